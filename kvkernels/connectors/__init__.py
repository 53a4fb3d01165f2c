"""Engines that use this library: their connectors, and what all of these have in common.

``books`` and ``worker`` know no engine; ``vllm`` is vLLM's, and imports it.
"""
