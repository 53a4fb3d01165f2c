"""A mover's threads and its transfers, for as long as either the mover or one of its transfers is referenced."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from ctypes import c_int64, c_void_p
from typing import Any, Generic, Protocol, TypeVar

from kvkernels.transfer.native import native

_POLLED = 256  # tickets that are asked for at once
_Tickets = c_int64 * _POLLED

HOST, ANY_DEVICE = -1, -2  # where a mover's tensors are; from 0 on the CUDA device of that number

_forks = 0  # that this process is the child of, since the package was imported


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Told(Protocol):
    """A transfer, as its owner sees it."""

    ticket: int

    def take_callbacks(self) -> list[Callable[[], None]]:
        """Those that are to be called at its end, which are given once."""

    def keep_callback(self, callback: Callable[[Any], object]) -> None:
        """One more of them."""


T = TypeVar("T", bound=Told)


class Owner(Generic[T]):
    """The handle of a mover in the compiled library, and who is to be told of an end."""

    def __init__(self, lanes: int, chunk_bytes: int, place: int) -> None:
        self._native = native()
        self._forks = _forks
        self.is_on_device = place != HOST
        self.device = place if place >= 0 else None
        self._handle = self._native.checked(self._native.open(lanes, chunk_bytes, place))
        self._lock = threading.Lock()
        self._untold: dict[int, T] = {}
        self._finalizer = weakref.finalize(self, _end, self._native, self._handle, _forks)

    def check_process(self, what: str) -> None:
        """RuntimeError in a child of a fork, which has none of the threads and may find their locks taken."""
        if _forks != self._forks:
            raise RuntimeError(
                f"{what}: the mover must be of this process, got one from before a fork, whose threads a child lacks: "
                "make another"
            )

    def submit(
        self, call: Callable[[], None], priority: int, after: list[int], events: list[int], make: Callable[[int], T]
    ) -> T:
        """The transfer of what ``call`` makes ops do, after transfers and after events of CUDA by their handles."""
        self.check_process("Mover.submit")
        tickets = (c_int64 * len(after))(*after) if after else None
        handles = (c_void_p * len(events))(*events) if events else None
        submit = self._native.submit_to_device if self.is_on_device else self._native.submit
        if not self._native.checked(self._native.begin(self._handle)):
            raise RuntimeError("Mover.submit: a job must not submit another, got one that does")
        try:
            call()
        except BaseException:
            self._native.abandon()
            raise
        # Under the lock, so that whoever polls meanwhile finds the transfer.
        with self._lock:
            ticket = submit(self._handle, priority, tickets, len(after), handles, len(events))
            transfer = make(ticket if ticket >= 0 else self._native.checked(ticket))
            self._untold[transfer.ticket] = transfer
        return transfer

    def wait(self, ticket: int, timeout_ns: int) -> bool:
        self.check_process("Transfer.wait")
        return self._native.checked(self._native.wait(self._handle, ticket, timeout_ns)) > 0

    def block(self, ticket: int, timeout_ns: int, device: int, stream: int) -> bool:
        """Whether the stream now waits for it, as far as the device has it."""
        self.check_process("Transfer.block_stream")
        return self._native.checked(self._native.block(self._handle, ticket, timeout_ns, device, stream)) > 0

    def cancel(self, ticket: int) -> bool:
        self.check_process("Transfer.cancel")
        return self._native.checked(self._native.cancel(self._handle, ticket)) > 0

    def state(self, ticket: int) -> int:
        self.check_process("Transfer")
        return self._native.checked(self._native.state(self._handle, ticket))

    def report(self, ticket: int, numbers: Any) -> None:
        self.check_process("Transfer")
        self._native.checked(self._native.report(self._handle, ticket, numbers))

    def why(self, ticket: int, buffer: Any) -> None:
        self._native.why(self._handle, ticket, buffer, len(buffer) - 1)

    def forget(self, ticket: int) -> None:
        # Nothing to do where the library's mover is gone, or is a parent's.
        if self._finalizer.alive and _forks == self._forks:
            self._native.forget(self._handle, ticket)

    def poll(self) -> list[T]:
        """Those that ended and were not told of, in that order; their callbacks have been called."""
        self.check_process("Mover.poll")
        tickets: list[int] = []
        buffer = _Tickets()
        while True:
            count = self._native.checked(self._native.poll(self._handle, buffer, _POLLED))
            tickets += buffer[:count]
            if count < _POLLED:
                break
        if not tickets:
            return []
        with self._lock:
            found = [self._untold[ticket] for ticket in tickets if ticket in self._untold]
        self.ended(found)
        return found

    def ended(self, transfers: Iterable[T]) -> None:
        """Call the callbacks of those that are told of for the first time."""
        calls: list[Callable[[], None]] = []
        with self._lock:
            for transfer in transfers:
                if self._untold.pop(transfer.ticket, None) is not None:
                    calls += transfer.take_callbacks()
        for call in calls:
            call()

    def add_callback(self, transfer: T, callback: Callable[[T], object]) -> bool:
        """False where its end was told of already."""
        with self._lock:
            if transfer.ticket not in self._untold:
                return False
            transfer.keep_callback(callback)
            return True

    def touching(self, ranges: list[tuple[int, int]]) -> list[T]:
        """The unfinished transfers with a pool in one of the ranges of addresses."""
        self.check_process("Mover.drain")
        given = (c_int64 * (2 * len(ranges)))(*(end for one in ranges for end in one))
        most = len(self._untold) + 16
        tickets = (c_int64 * most)()
        count = self._native.checked(self._native.touching(self._handle, given, len(ranges), tickets, most))
        with self._lock:
            return [self._untold[ticket] for ticket in tickets[: min(count, most)] if ticket in self._untold]

    def hold(self, holds: bool) -> None:
        self.check_process("Mover.held")
        self._native.checked(self._native.hold(self._handle, int(holds)))

    def close(self, finishes: bool) -> None:
        self.check_process("Mover.close")
        self._native.checked(self._native.close(self._handle, int(finishes)))

    def stats(self, numbers: Any) -> int:
        """How many numbers were written."""
        self.check_process("Mover.stats")
        return self._native.checked(self._native.stats(self._handle, numbers))

    def trace(self) -> list[list[int]]:
        """The last chunks, each the eight numbers of transfer/metrics.h."""
        self.check_process("Mover.trace")
        most = 1 << 14
        numbers = (c_int64 * (8 * most))()
        count = min(most, self._native.checked(self._native.trace(self._handle, numbers, most)))
        return [list(numbers[8 * i : 8 * i + 8]) for i in range(count)]


def _end(library: Any, handle: int, forks: int) -> None:
    """Also at the process's end, before its statics go: at most the chunks that are being copied are waited for."""
    if forks == _forks:
        library.close(handle, 0)
        library.release(handle)
