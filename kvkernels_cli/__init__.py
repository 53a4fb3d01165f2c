"""The commands ``kvkernels``, ``capture-kv``, ``check-kv`` and ``kv-stats``.

They are a package of their own because importing any part of ``kvkernels`` imports torch, which takes more than a
second. A command imports what it needs when it has read its arguments.
"""
