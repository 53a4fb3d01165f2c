"""The worker's half of a connector: a pool on the host, and the copies between it and an engine's KV cache."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kvkernels.connectors.copies import Copies, Mappings, pages_of
from kvkernels.connectors.rows import Rows, group_mappings
from kvkernels.connectors.sums import PageSums
from kvkernels.layout.canonical import CanonicalKVCaches
from kvkernels.memory import NoOwnerError, PinnedPool
from kvkernels.transfer import Mover, Transfer

_log = logging.getLogger("kvkernels.connectors")
_OWNER_SECONDS = 120.0


@dataclass(frozen=True)
class Ended:
    """A job that is over.

    Attributes
    ----------
    job_id : int
    error : Exception or None
        Why it failed; nothing may be concluded then about where it was to write.
    bytes : int
        That were copied.
    seconds : float
        From its first byte to its last.
    """

    job_id: int
    error: Exception | None
    bytes: int
    seconds: float


@dataclass
class _Job:
    is_store: bool
    device_ids: npt.NDArray[np.integer] = field(default_factory=lambda: np.empty(0, np.int32))
    mappings: Mappings = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    expedited: bool = False
    error: Exception | None = None
    ended: Ended | None = None


class PageCheckError(RuntimeError):
    """A page that was loaded is not the one that was stored."""


class HostWorker:
    """Stores an engine's blocks into a host pool, and loads them again.

    Parameters
    ----------
    caches : CanonicalKVCaches
        The engine's pages: ``kvkernels.layout.canonicalize`` makes them, or vLLM, whose have the same attributes.
    num_chunks, blocks_per_chunk : int
        Of the pool.
    states : sequence of int
        Groups that are loaded before the others.
    verify : bool
        Whether each block has a checksum, made when it was stored and checked when it was loaded.
    lanes : int, optional
        Cores that copies may use, as ``Mover`` takes it.
    rank, ranks : int
        This worker's place among those that have the same bytes; each of them stores every ``ranks``-th chunk.
    shared : str, optional
        The name of the pool that all ranks share; rank 0 makes it.

    Raises
    ------
    ValueError
        An argument is out of its range.
    MemoryError
        The system has too little.

    Notes
    -----
    A job that cannot be carried out never raises: it ends with an error, which is logged once.

    Safe to use from several threads. Jobs that touch one page keep their order.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from kvkernels.layout import canonicalize
    >>> from kvkernels.layout.specs import KVCacheGroup, MLA
    >>> spec = MLA(block_size=4, head_size=8, dtype=torch.float16)
    >>> cache = torch.randn(6, 4, 8).half()
    >>> before = cache[3].clone()
    >>> worker = HostWorker(canonicalize({"a": cache}, [KVCacheGroup(["a"], spec)]), num_chunks=4, blocks_per_chunk=1)
    >>> worker.submit_store(0, np.array([3]), np.array([2]), [1], [0])
    >>> worker.wait([0])
    >>> _ = cache.zero_()
    >>> worker.submit_load(1, np.array([2]), np.array([5]), [1], [0])
    >>> worker.wait([1])
    >>> [(one.job_id, one.error, one.bytes) for one in worker.finished()]
    [(0, None, 64), (1, None, 64)]
    >>> torch.equal(cache[5], before)
    True
    >>> worker.close()
    """

    def __init__(
        self, caches: CanonicalKVCaches, num_chunks: int, blocks_per_chunk: int, *, states: Sequence[int] = (),
        verify: bool = False, lanes: int | None = None, rank: int = 0, ranks: int = 1, shared: str | None = None,
    ) -> None:  # fmt: skip
        self.blocks_per_chunk = blocks_per_chunk
        self.device = [cache.tensor for cache in caches.tensors]
        self.groups = caches.group_data_refs
        rows = Rows(tuple(cache.page_size_bytes for cache in caches.tensors), verify)
        self._pool = _pool(num_chunks * blocks_per_chunk, rows.row_bytes, rank, shared)
        #: A tensor for each of the engine's, a row a block.
        self.host = [view.view(torch.int8) for view in rows.views(self._pool.pages)]
        self._sums = PageSums(self._pool.pages) if verify else None
        self._rank, self._ranks = (rank, ranks) if shared else (0, 1)
        self._states = tuple(states)
        self._mover = Mover(self.device[0].device, lanes=lanes)
        self._copies: Copies | None = None
        self._jobs: dict[int, _Job] = {}
        self._bad_blocks: set[int] = set()
        self._lock = threading.RLock()
        self.bind()

    def submit_store(
        self, job_id: int, device_ids: npt.NDArray[np.integer], chunk_ids: npt.NDArray[np.integer],
        group_sizes: Sequence[int], first_blocks: Sequence[int],
    ) -> None:  # fmt: skip
        """Copy blocks of the engine's into chunks, with ids as ``group_mappings`` takes them."""
        self._submit(job_id, _Job(is_store=True), device_ids, chunk_ids, group_sizes, first_blocks)

    def submit_load(
        self, job_id: int, chunk_ids: npt.NDArray[np.integer], device_ids: npt.NDArray[np.integer],
        group_sizes: Sequence[int], first_blocks: Sequence[int], *, expedited: bool = False,
    ) -> None:  # fmt: skip
        """Copy chunks into blocks of the engine's; an expedited load comes before all that is not yet being copied."""
        job = _Job(is_store=False, expedited=expedited)
        self._submit(job_id, job, device_ids, chunk_ids, group_sizes, first_blocks)

    def _submit(
        self, job_id: int, job: _Job, device_ids: npt.NDArray[np.integer], chunk_ids: npt.NDArray[np.integer],
        group_sizes: Sequence[int], first_blocks: Sequence[int],
    ) -> None:  # fmt: skip
        job.device_ids = device_ids
        with self._lock:
            self._jobs[job_id] = job
            try:
                job.mappings = group_mappings(device_ids, chunk_ids, group_sizes, first_blocks, self.blocks_per_chunk)
                if job.is_store and self._ranks > 1:
                    job.mappings = [self._elected(mapping) for mapping in job.mappings]
                if self._copies is None:
                    raise ValueError("HostWorker: the engine's pools must be bound, got those of one that sleeps")
                self._copies.submit(self._mover, job.mappings, job.is_store, job.expedited, job.transfers)
            except Exception as error:
                job.error = error

    def _elected(self, mapping: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64] | None:
        """The blocks that this rank writes: ranks take turns by chunk."""
        if mapping is None:
            return None
        own = mapping[mapping[:, 1] // self.blocks_per_chunk % self._ranks == self._rank]
        return own if len(own) else None

    def finished(self) -> list[Ended]:
        """The jobs that are over and were not returned before; never waits for a copy."""
        with self._lock:
            ended = []
            for job_id, job in list(self._jobs.items()):
                if job.ended is None and all([transfer.done() for transfer in job.transfers]):
                    self._end(job_id, job)
                if job.ended is not None:
                    del self._jobs[job_id]
                    ended.append(job.ended)
            return ended

    def wait(self, job_ids: Iterable[int]) -> None:
        """Return when these are over, and their blocks are the engine's again. An expedited load is retried once."""
        for job_id in job_ids:
            job = self._jobs.get(job_id)
            if job is None or job.ended is not None:
                continue
            for transfer in job.transfers:
                transfer.wait()
            with self._lock:
                if job.ended is None:
                    self._end(job_id, job)

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the engine's that an expedited load left undefined, each told once."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
            return bad

    def bind(self) -> None:
        """Prepare the copies; also after the engine's pools were unbound, and are where they will stay."""
        with self._lock:
            if self._copies is None:
                self._copies = Copies(self.device, self.host, self.groups, self._states)

    def unbind(self) -> None:
        """End what is under way and let go of the engine's pools, which may go away: jobs fail until ``bind``."""
        self.wait(list(self._jobs))
        with self._lock:
            copies, self._copies = self._copies, None
        if copies is not None:
            copies.release()

    def close(self) -> None:
        """End what is under way, and give the pool back."""
        self._mover.close()
        with self._lock:
            copies, self._copies = self._copies, None
            self._jobs.clear()
        if copies is not None:
            copies.release()
        self.device, self.host, self._sums = [], [], None
        self._pool.close()

    def _end(self, job_id: int, job: _Job) -> None:
        """Say what became of a job whose copies are over."""
        results = [transfer.result() for transfer in job.transfers]
        error = job.error or next((one.error for one in results if one.error is not None), None)
        size, seconds = sum(one.bytes for one in results), sum(one.seconds for one in results)
        if error is None:
            error = self._checked(job)
        if error is not None and job.expedited:
            started = time.perf_counter()
            again = self._retried(job)
            if again is None:
                _log.warning("load %d was carried out by the reference, because it failed: %s", job_id, error)
                error, seconds = None, time.perf_counter() - started
            else:
                self._bad_blocks.update(job.device_ids.tolist())
        if error is not None:
            _log.warning("%s %d failed: %s", "store" if job.is_store else "load", job_id, error)
        job.ended = Ended(job_id, error, 0 if error else size, seconds)

    def _retried(self, job: _Job) -> Exception | None:
        try:
            if self._copies is None or not any(mapping is not None for mapping in job.mappings):
                return job.error
            self._copies.load_by_reference(job.mappings)
        except Exception as error:
            return error
        return self._checked(job)

    def _checked(self, job: _Job) -> Exception | None:
        """Make a stored block's checksum, or compare a loaded one's."""
        if self._sums is None:
            return None
        wrong: list[int] = []
        for group, mapping in enumerate(job.mappings):
            if mapping is None:
                continue
            on_host = self.device[0].device.type == "cpu"
            sides = self.device if on_host else self.host
            pages = [sides[tensor][:, :page_bytes] for tensor, page_bytes in pages_of(self.groups[group]).items()]
            ids = mapping[:, 0] if on_host else mapping[:, 1]
            if job.is_store:
                self._sums.write(pages, ids, mapping[:, 1])
            else:
                wrong += self._sums.check(pages, ids, mapping[:, 1])
        if wrong:
            return PageCheckError(f"the checksum of {len(wrong)} blocks is another than when they were stored")
        return None


def _pool(rows: int, row_bytes: int, rank: int, shared: str | None) -> PinnedPool:
    """A pool of this rank's own, or the one that all share, which rank 0 makes."""
    if shared is None or rank == 0:
        return PinnedPool(rows, row_bytes, shared=shared)
    until = time.monotonic() + _OWNER_SECONDS
    while True:
        try:
            return PinnedPool.attach(shared, rows, row_bytes, timeout_s=_OWNER_SECONDS)
        except NoOwnerError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
