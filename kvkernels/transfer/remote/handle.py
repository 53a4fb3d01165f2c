"""One transfer as its owner sees it, and what became of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_log = logging.getLogger("kvkernels")


@dataclass(frozen=True)
class TransferResult:
    """What became of a transfer between machines.

    Attributes
    ----------
    outcome : str
        Of one that was sent: ``committed``, the receiver made it visible; ``failed``, it did not and will not;
        ``unknown``, the answer is lost. Of one that was received: ``visible`` or ``dropped``.
    pages : int
        That are visible at the receiver, all or none; 0 where it is unknown.
    bytes : int
        Written, repetitions included.
    retries : int
        Links that were lost or could not be made, and segments that were sent again.
    seconds : float
        From the call to the end.
    error : Exception or None
        A ``RemoteError``; None where it is committed or visible.
    """

    outcome: str
    pages: int
    bytes: int
    retries: int
    seconds: float
    error: Exception | None


class RemoteTransfer:
    """What ``send_blocks``, ``receive_blocks`` and ``fetch_blocks`` return. Safe to use from several threads."""

    def __init__(
        self, request: str, ended: dict[int, RemoteTransfer], cancel: Callable[[RemoteTransfer], None]
    ) -> None:
        self.request = request  #: str: what the two sides call it
        self._ended, self._cancel = ended, cancel
        self._began = time.monotonic()
        self._is_done = threading.Event()
        self._lock = threading.Lock()
        self._result: TransferResult | None = None
        self._callbacks: list[Callable[[RemoteTransfer], object]] = []
        self._was_told = False

    def __repr__(self) -> str:
        return f"RemoteTransfer({self.request!r}, {self._result.outcome if self._result else 'live'})"

    def __reduce__(self) -> str:
        raise TypeError("RemoteTransfer cannot be pickled or copied: it is of this process's connections")

    def done(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self._is_done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most so many seconds; ``poll`` does not tell of it after that."""
        if not self._is_done.wait(timeout):
            return False
        self.tell()
        return True

    def result(self, timeout: float | None = None) -> TransferResult:
        """Wait until it has ended and say what became of it; an error is returned, not raised.

        Raises
        ------
        TimeoutError
            It has not ended after ``timeout`` seconds. Its own deadline ends it in any case.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"RemoteTransfer.result: it must end within {timeout} s, got one that is live")
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Give it up; ``result`` says whether that came in time."""
        if not self.done():
            self._cancel(self)

    def add_callback(self, callback: Callable[[RemoteTransfer], object]) -> None:
        """Have ``callback(transfer)`` called by the ``poll``, ``wait`` or ``result`` that sees the end, or now."""
        with self._lock:
            if not self._was_told:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def end(self, outcome: str, pages: int, byte_count: int, retries: int, error: Exception | None) -> None:
        """For the pool: it has ended."""
        seconds = time.monotonic() - self._began
        self._result = TransferResult(outcome, pages, byte_count, retries, seconds, error)
        self._ended[id(self)] = self  # until somebody is told
        self._is_done.set()

    def tell(self) -> bool:
        """Call the callbacks; whether this was the first time."""
        with self._lock:
            was_told, self._was_told = self._was_told, True
            callbacks, self._callbacks = self._callbacks, []
        self._ended.pop(id(self), None)
        for callback in callbacks:
            self._call(callback)
        return not was_told

    def _call(self, callback: Callable[[RemoteTransfer], object]) -> None:
        try:
            callback(self)
        except Exception:
            _log.exception("a callback of %r failed", self)
