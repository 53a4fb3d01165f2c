"""One transfer: whether it has ended, and what became of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from ctypes import c_int64, create_string_buffer
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvkernels.transfer.jobs import Job
from kvkernels.transfer.metrics import EXECUTORS
from kvkernels.transfer.native import STATES
from kvkernels.transfer.owner import Owner

_log = logging.getLogger("kvkernels")
_VALUE_ERROR, _DEPENDENCY, _CANCELLED = 1, 3, 4  # of transfer/item.h
_Report = c_int64 * 9  # of transfer/queue.h
_FOREVER = 1e9  # seconds
_SLICE_NS = 50_000_000  # so long a wait keeps Python from seeing an interrupt


class TransferFailed(RuntimeError):
    """A transfer was not carried out, because one that it needs failed or was cancelled."""


class TransferCancelled(RuntimeError):
    """A transfer was cancelled, by ``cancel()`` or when its mover was closed."""


@dataclass(frozen=True)
class Result:
    """What became of a transfer.

    Attributes
    ----------
    state : str
        ``done``, ``failed`` or ``cancelled``.
    bytes : int
        Bytes that it is of.
    chunks : int
        Parts that it was cut into.
    seconds : float
        From its first chunk to its last; 0 where it did not begin.
    queue_seconds : float
        From submit to its first chunk, or to its end where it did not begin.
    executor : str
        What carried it out.
    error : Exception or None
        The op's own, TransferFailed or TransferCancelled; None where it is done.
    undefined : tuple of Tensor
        What it writes to, where a part of it was written and the rest was not. Pages that other transfers wrote, or
        nothing, are as they were.
    """

    state: str
    bytes: int
    chunks: int
    seconds: float
    queue_seconds: float
    executor: str
    error: Exception | None
    undefined: tuple[Tensor, ...]


class Transfer:
    """What ``Mover.submit`` returns. Safe to use from several threads."""

    __slots__ = ("__weakref__", "_callbacks", "_job", "_owner", "_result", "priority", "ticket")

    def __init__(self, owner: Owner[Transfer], ticket: int, priority: str, job: Job) -> None:
        self._owner = owner
        self._job = job
        self._callbacks: list[Callable[[Transfer], object]] = []
        self._result: Result | None = None
        self.ticket = ticket  #: int: its number, from 1 in order of submission
        self.priority = priority  #: str: as submitted

    def __repr__(self) -> str:
        return f"Transfer({self.ticket}, {self.priority}, {self.state})"

    def __del__(self) -> None:
        self._owner.forget(self.ticket)

    def __reduce__(self) -> str:
        raise TypeError("Transfer cannot be pickled or copied: it is of this process's threads")

    @property
    def state(self) -> str:
        """``queued``, ``running``, ``done``, ``failed`` or ``cancelled``."""
        return self._result.state if self._result else STATES[self._owner.state(self.ticket)]

    def done(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self._result is not None or self._owner.state(self.ticket) >= 2

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most so many seconds, and call its callbacks.

        Returns
        -------
        bool
            Whether it has ended.

        Raises
        ------
        RuntimeError
            In a child of a fork.

        Notes
        -----
        Sleeps without the GIL. ``poll`` does not tell of a transfer that was waited for.
        """
        until = None if timeout is None else time.monotonic_ns() + int(min(timeout, _FOREVER) * 1e9)
        while True:
            left = _SLICE_NS if until is None else min(_SLICE_NS, max(0, until - time.monotonic_ns()))
            if self._owner.wait(self.ticket, left):
                self._owner.ended([self])
                return True
            if until is not None and time.monotonic_ns() >= until:
                return False

    def result(self, timeout: float | None = None) -> Result:
        """Wait until it has ended and say what became of it; an error is returned, not raised.

        Raises
        ------
        TimeoutError
            It has not ended after ``timeout`` seconds.
        """
        if self._result is None:
            if not self.wait(timeout):
                raise TimeoutError(f"Transfer.result: it must end within {timeout} s, got one that is {self.state}")
            self._result = self._read()
        return self._result

    def block_stream(self, stream: torch.cuda.Stream | None = None) -> None:
        """Have what a stream is asked for from now on wait for the transfer; the host does not.

        For a transfer on a device. The host waits only until the transfer, which then goes before all others and
        without a break, was handed to the device, along with those that it waits for; ``Mover.held`` would keep it
        waiting. What one engine stream waits for need not be waited for by another.

        Parameters
        ----------
        stream : torch.cuda.Stream, optional
            The current one by default, of the mover's device or else of torch's current device.

        Raises
        ------
        Exception
            What the transfer failed of, or TransferCancelled, where it had ended so.
        ValueError
            The transfer is one on the host.
        RuntimeError
            The stream is being captured; the device failed.
        """
        if not self._owner.is_on_device:
            raise ValueError(
                "Transfer.block_stream: the transfer must be on a device, got one on the host: wait() for it"
            )
        if stream is None:
            stream = torch.cuda.current_stream(self._owner.device)
        if not isinstance(stream, torch.cuda.Stream):
            raise ValueError(f"Transfer.block_stream: stream must be a torch.cuda.Stream, got {stream!r}")
        while not self._owner.block(self.ticket, _SLICE_NS, stream.device_index, stream.cuda_stream):
            pass
        error = self.result().error if self.done() else None
        if error is not None:
            raise error

    def cancel(self) -> bool:
        """See to it that it never begins.

        Returns
        -------
        bool
            False where it had begun or ended: then it is carried out. Transfers that need it fail, as if it had failed.
        """
        return self._result is None and self._owner.cancel(self.ticket)

    def add_callback(self, callback: Callable[[Transfer], object]) -> None:
        """Have ``callback(transfer)`` called once it has ended; at once where ``poll`` or ``wait`` told of that.

        It is called by the ``poll()``, ``wait()``, ``result()`` or ``drain()`` that sees the end, in the thread that
        called it: so none runs beside the model unasked, and no thread of the mover needs Python. An exception is
        logged under ``kvkernels``.
        """
        if not self._owner.add_callback(self, callback):
            self._call(callback)

    def take_callbacks(self) -> list[Callable[[], None]]:
        """Those that the end calls, for the mover; each is given once."""
        if not self._callbacks:
            return []
        callbacks, self._callbacks = self._callbacks, []
        return [partial(self._call, callback) for callback in callbacks]

    def keep_callback(self, callback: Callable[[Transfer], object]) -> None:
        """One that the end calls, for the mover."""
        self._callbacks.append(callback)

    def _call(self, callback: Callable[[Transfer], object]) -> None:
        try:
            callback(self)
        except Exception:
            _log.exception("a callback of %r failed", self)

    def _read(self) -> Result:
        numbers = _Report()
        self._owner.report(self.ticket, numbers)
        state, kind, size, chunks, submitted, started, ended, undefined, executor = numbers
        return Result(
            STATES[state], size, chunks, (ended - started) / 1e9 if started else 0.0,
            ((started or ended) - submitted) / 1e9, EXECUTORS[executor], self._error(kind) if kind else None,
            self._job.written() if undefined else (),
        )  # fmt: skip

    def _error(self, kind: int) -> Exception:
        buffer = create_string_buffer(8192)
        self._owner.why(self.ticket, buffer)
        why = buffer.value.decode()
        if kind == _DEPENDENCY:
            return TransferFailed(f"Transfer {self.ticket}: {why}")
        if kind == _CANCELLED:
            return TransferCancelled(f"Transfer {self.ticket}: {why}")
        return ValueError(why) if kind == _VALUE_ERROR else RuntimeError(why)
