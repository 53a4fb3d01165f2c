"""Moves bytes later, beside the model and in order of urgency."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kvkernels import policy
from kvkernels.common.arguments import integer
from kvkernels.prepared import BoundPools
from kvkernels.transfer.jobs import Job
from kvkernels.transfer.metrics import PRIORITIES, read_stats
from kvkernels.transfer.owner import ANY_DEVICE, HOST, Owner
from kvkernels.transfer.trace import names_of_lanes, names_of_streams, write_trace
from kvkernels.transfer.transfer import Transfer

CHUNK_BYTES = 16 << 20
#: On a device two are on their way in a direction: together what one of the host's is, in front of something urgent.
DEVICE_CHUNK_BYTES = 8 << 20
_MOST_LANES = 256


class Mover:
    """Carries out copies beside the model, on the host or a device, in order of urgency, and says when each is done.

    Parameters
    ----------
    device : torch.device or str, optional
        Where the tensors are: the CPU, a CUDA device, or ``"cuda"`` for whichever a job's tensors are on. A device has
        the pools of one side or of both; those on the host must be pinned.
    lanes : int, optional
        Cores that copies on the host may use at a time; by default 2, or as many as ``python -m kvkernels tune`` found
        to be worth it, but always one fewer than the process has.
    chunk_bytes : int, optional
        The parts that a large copy is cut into, between which a more urgent one may come: by default 16 MiB, and 8 MiB
        on a device, where two of a direction are on their way at a time.

    Raises
    ------
    ValueError
        A device that is not there, or is neither the CPU nor a CUDA device; numbers that are not positive; ``lanes`` on
        a device.
    RuntimeError
        There is no compiled library, or none with CUDA code.

    Notes
    -----
    **Order.** ``expedited`` comes before ``load``, and that before ``store``; within one priority, whichever was
    submitted first. Two transfers that touch one page, of which one writes it, are carried out in the order in which
    they were submitted, and the earlier one becomes as urgent as the later. One that reads what an earlier one was to
    write fails where that one fails or is cancelled, and so does one that names it in ``after``. One that only
    overwrites goes on.

    **Threads.** Those that copy are the library's own: they never need the GIL, so that Python may be busy. Those for
    stores have a lower priority for the operating system. A job is checked by the thread that submits it, in the modes
    (``inference_mode``, ``no_grad``) of that thread. All methods are safe to call from several threads.

    **Streams.** On a device a transfer comes after what the caller's current stream was asked for before ``submit``, in
    streams of the mover's own, one for each direction and priority. ``Transfer.block_stream`` has a stream wait for it.
    One thread hands chunks over and sees their ends. A stream that is being captured is refused; captures of other
    streams are left alone. Unverified on hardware.

    **Memory.** A transfer keeps its tensors alive until it has ended; mappings and ids are read when it is submitted.
    Sources must stay unwritten and destinations unread by others until then. Versions, for autograd, count the write
    at submit. Tensors are let go of by the next call of ``submit``, ``poll`` or ``wait``.

    **The end.** Transfers that are neither polled for nor waited for keep a few hundred bytes each. A mover that is no
    longer referenced, nor one of its transfers, and the end of the process, cancel what has not ended. A child of a
    fork cannot use its parent's mover.

    Examples
    --------
    >>> import torch, kvkernels
    >>> from kvkernels.transfer import Mover, PreparedJob
    >>> device, host = torch.arange(6).reshape(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    >>> offload = kvkernels.prepare([device], [host])
    >>> with Mover(lanes=1) as mover:
    ...     transfer = mover.submit(PreparedJob(offload, torch.tensor([[2, 0]])), priority="store")
    ...     transfer.result().state, host[0].tolist()
    ('done', [4, 5])
    """

    def __init__(
        self, device: torch.device | str | None = None, *, lanes: int | None = None, chunk_bytes: int | None = None
    ) -> None:
        self.device = torch.device("cpu" if device is None else device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"Mover: device must be the cpu or a cuda device, got {self.device}")
        is_host = self.device.type == "cpu"
        if not is_host and lanes is not None:
            raise ValueError(f"Mover: lanes must be left out on a device, whose copies take no cores, got {lanes}")
        if lanes is None:
            self.lanes = _default_lanes() if is_host else 0
        else:
            self.lanes = integer("Mover: lanes", lanes, "positive", least=1)
        if self.lanes > _MOST_LANES:
            raise ValueError(f"Mover: lanes must be at most {_MOST_LANES}, got {lanes}")
        self.chunk_bytes = CHUNK_BYTES if is_host else DEVICE_CHUNK_BYTES
        if chunk_bytes is not None:
            self.chunk_bytes = integer("Mover: chunk_bytes", chunk_bytes, "positive", least=1)
        place = HOST if is_host else _place_of(self.device)
        self._owner: Owner[Transfer] = Owner(self.lanes, self.chunk_bytes, place)

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(finish=kind is None)

    def __reduce__(self) -> str:
        raise TypeError("Mover cannot be pickled or copied: it stands for this process's threads; make another")

    def submit(
        self, job: Job, *, priority: str = "load", after: Sequence[Transfer | torch.cuda.Event] = ()
    ) -> Transfer:
        """Check a job as its op would, and have it carried out.

        Parameters
        ----------
        job : Job
            ``PreparedJob``, ``GroupsJob``, ``SwapJob``, ``GatherJob``, ``ScatterJob``, ``CopyPagesJob`` or
            ``ConvertJob``.
        priority : {'expedited', 'load', 'store'}
            What it comes before.
        after : sequence of Transfer or torch.cuda.Event
            Transfers of this mover that must be done before; where one fails, this one does. On a device also events,
            each for what was recorded there when this is called. The current stream need not be among them.

        Returns
        -------
        Transfer

        Raises
        ------
        IndexError, ValueError
            What the op refuses; tensors that are not where the mover is for; an executor that needs Python; a mode that
            only traces. On a device also ids that are there, and host memory that is not pinned. Nothing was queued.
        RuntimeError
            The mover was closed, or is that of a process that forked; the current stream is being captured; a call of
            CUDA failed. Nothing was queued.
        """
        if priority not in PRIORITIES:
            raise ValueError(f"Mover.submit: priority must be one of {', '.join(PRIORITIES)}, got {priority!r}")
        if not isinstance(job, Job):
            raise ValueError(f"Mover.submit: job must be a Job, got {type(job).__name__}")
        owner = self._owner
        tickets, events = [], []
        for one in after:
            if isinstance(one, Transfer) and one._owner is owner:
                tickets.append(one.ticket)
            elif owner.is_on_device and isinstance(one, torch.cuda.Event):
                events.append(_recorded(one))
            else:
                kinds = "transfers of this mover" + (" or events" if owner.is_on_device else "")
                raise ValueError(f"Mover.submit: after must be {kinds}, got {one!r}")
        if _get_current_dispatch_mode() is not None or torch.compiler.is_compiling():
            raise ValueError("Mover.submit: job must be of tensors with values, got a mode that intercepts ops")
        return owner.submit(
            job.call, PRIORITIES.index(priority), tickets, events, lambda ticket: Transfer(owner, ticket, priority, job)
        )

    def poll(self) -> list[Transfer]:
        """What ended since the last call, in that order, but for what was waited for. Calls callbacks; never waits."""
        return self._owner.poll()

    def drain(self, pools: BoundPools | Sequence[Tensor] | None = None, timeout: float | None = None) -> bool:
        """Wait for all transfers that touch some pools: before they sleep, are reset or go.

        Parameters
        ----------
        pools : BoundPools or sequence of Tensor, optional
            By default all transfers are waited for.
        timeout : float, optional
            Seconds, for all of them together.

        Returns
        -------
        bool
            Whether they have ended. Others may be submitted meanwhile, which are not waited for.
        """
        tensors = pools.tensors if isinstance(pools, BoundPools) else pools
        ranges = [(0, (1 << 63) - 1)] if tensors is None else [_range_of(tensor) for tensor in tensors]
        return _wait_all(self._owner.touching(ranges), timeout)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing begins, and no further chunk is copied, until the ``with`` block ends.

        For several transfers that are submitted one after the other and must begin in order of priority alone.
        """
        self._owner.hold(True)
        try:
            yield
        finally:
            self._owner.hold(False)

    def close(self, *, finish: bool = True) -> None:
        """End the threads, after all transfers were carried out or, where ``finish`` is false, cancelled.

        What is being copied then ends with the chunks at hand: it is cancelled, and its result says what is undefined.
        ``poll``, and what a Transfer says, work after that; ``submit`` does not. Closing twice is nothing.
        """
        self._owner.close(finish)

    def stats(self) -> dict[str, Any]:
        """What was moved so far.

        Returns
        -------
        dict
            ``queued`` and ``running`` are transfers; ``transfers`` has a row for each priority: ``direction``,
            ``priority``, ``executor``; how many were ``done``, ``failed`` and ``cancelled``; of those that were done
            ``bytes``, ``seconds``, ``queue_seconds``, ``chunks``, and how many transfers were at most of each size and
            time, ``bytes_buckets``, ``seconds_buckets`` and ``queue_seconds_buckets``: (upper bound, transfers), the
            last bound infinite.
        """
        return read_stats(self._owner.stats)

    def trace(self, path: str | os.PathLike[str]) -> int:
        """Write the last chunks (16,384 at most) and the transfers' queueing as a Chrome trace; returns how many.

        ``chrome://tracing`` and https://ui.perfetto.dev show it.
        """
        chunks = self._owner.trace()
        names = names_of_streams(chunks) if self._owner.is_on_device else names_of_lanes(self.lanes)
        return write_trace(path, chunks, names)


def _wait_all(transfers: Sequence[Transfer], timeout: float | None) -> bool:
    until = None if timeout is None else time.monotonic() + timeout
    return all([one.wait(None if until is None else max(0.0, until - time.monotonic())) for one in transfers])


def _place_of(device: torch.device) -> int:
    if not torch.cuda.is_available():
        raise ValueError(f"Mover: device must be one of this machine, got {device}, and torch finds no cuda device")
    if device.index is None:
        return ANY_DEVICE
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"Mover: device must be one of the {torch.cuda.device_count()} there are, got {device}")
    return device.index


def _recorded(event: torch.cuda.Event) -> int:
    """The handle of an event, which torch makes when it is first recorded."""
    if not event.cuda_event:
        raise ValueError("Mover.submit: after must be events that were recorded, got one that was not")
    return int(event.cuda_event)


def _default_lanes() -> int:
    tuned: int = policy.in_force().get("cpu", {}).get("lanes", 2)
    return max(1, min(tuned, len(os.sched_getaffinity(0)) - 1))


def _range_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor, gaps in its rows included."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
