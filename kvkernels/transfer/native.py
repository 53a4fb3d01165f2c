"""The mover's functions in the compiled library, through ctypes: those that wait let go of the GIL, the others keep it.

They are no ops, because a busy thread that gets the GIL keeps it for milliseconds, and every op lets go of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int64, c_void_p
from functools import cache
from typing import Any

from kvkernels.registration import LIBRARY

_INTS = POINTER(c_int64)

# Arguments after the mover's handle, and whether the call may wait.
_FUNCTIONS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "close": ((c_int64,), True),
    "release": ((), True),
    "wait": ((c_int64, c_int64), True),
    "block": ((c_int64, c_int64, c_int64, c_void_p), True),
    "begin": ((), False),
    "cancel": ((c_int64,), False),
    "state": ((c_int64,), False),
    "report": ((c_int64, _INTS), False),
    "why": ((c_int64, c_char_p, c_int64), False),
    "poll": ((_INTS, c_int64), False),
    "touching": ((_INTS, c_int64, _INTS, c_int64), False),
    "hold": ((c_int64,), False),
    "forget": ((c_int64,), False),
    "stats": ((_INTS,), False),
    "trace": ((_INTS, c_int64), False),
}

STATES = ("queued", "running", "done", "failed", "cancelled")


class Native:
    """The library's functions, each as an attribute; a result below 0 is for ``checked``."""

    open: Callable[[int, int, int], int]
    abandon: Callable[[], None]

    def __init__(self, path: str) -> None:
        self._quick, self._waiting = ctypes.PyDLL(path), ctypes.CDLL(path)
        for name, (arguments, waits) in _FUNCTIONS.items():
            setattr(self, name, self._function(name, (c_int64, *arguments), c_int64, waits))
        self.open = self._function("open", (c_int64, c_int64, c_int64), c_int64, True)
        # A device may have the call wait for room in a stream, the host has not.
        of_submit = (c_int64, c_int64, _INTS, c_int64, POINTER(c_void_p), c_int64)
        self.submit = self._function("submit", of_submit, c_int64)
        self.submit_to_device = self._function("submit", of_submit, c_int64, True)
        self.abandon = self._function("abandon", (), None)
        self._error = self._function("error", (), c_char_p)
        self._is_value = self._function("error_is_value", (), c_int64)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # for the type checker: the attributes are set above

    def _function(self, name: str, arguments: tuple[Any, ...], result: Any, waits: bool = False) -> Any:
        found = getattr(self._waiting if waits else self._quick, f"kvkernels_mover_{name}", None)
        if found is None:
            raise RuntimeError(
                f"Mover: the compiled library must be this version's, got one without {name}; rebuild it"
            )
        found.argtypes, found.restype = arguments, result
        return found

    def checked(self, result: int) -> int:
        """The result of a call on this thread, or what it failed of."""
        if result < 0:
            kind = ValueError if self._is_value() else RuntimeError
            raise kind(f"Mover: {self._error().decode()}")
        return result


@cache
def native() -> Native:
    """The functions of the loaded library; RuntimeError where there is none."""
    if not LIBRARY.compiled:
        raise RuntimeError(f"Mover: the compiled library must be there, got the reference: {LIBRARY.why}")
    return Native(str(LIBRARY.path))
