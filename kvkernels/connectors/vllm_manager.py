"""The scheduler's half of the connector, in vLLM's words: ``HostBooks`` as an OffloadingManager."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from kvkernels.connectors.books import HostBooks
from kvkernels.connectors.vllm_version import (
    CacheHitSource,
    CPULoadStoreSpec,
    LookupResult,
    Medium,
    OffloadingConnectorStats,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingManager,
    PrepareStoreOutput,
    RequestOffloadingContext,
    get_offload_group_idx,
)

FAILED_LOADS = "kvkernels:kv_offload_failed_loads"
FAILED_STORES = "kvkernels:kv_offload_failed_stores"
EVICTED_CHUNKS = "kvkernels:kv_offload_evicted_chunks"
CACHED_CHUNKS = "kvkernels:kv_offload_cached_chunks"
FREE_CHUNKS = "kvkernels:kv_offload_free_chunks"

METRICS = {
    FAILED_LOADS: OffloadingCounterMetadata("Loads that failed, each of which cost one request its prefix."),
    FAILED_STORES: OffloadingCounterMetadata("Stores that failed, whose chunks are not in the host pool."),
    EVICTED_CHUNKS: OffloadingCounterMetadata("Chunks that left the host pool to make room."),
    CACHED_CHUNKS: OffloadingGaugeMetadata("Chunks in the host pool that a request may load."),
    FREE_CHUNKS: OffloadingGaugeMetadata("Chunks of the host pool that hold nothing."),
}

_STATES = {"cached": LookupResult.HIT, "pending": LookupResult.HIT_PENDING, "missing": LookupResult.MISS}


@dataclass
class _Prompt:
    """The chunks of a request that were seen, by group and by the token that each ends with."""

    keys: dict[tuple[int, int], bytes] = field(default_factory=dict)


class HostManager(OffloadingManager):
    """Which chunks of the host pool hold which keys.

    Parameters
    ----------
    books : HostBooks
    chunk_tokens : dict of int to int
        Tokens of a chunk, for each of vLLM's groups in which a chunk is worth nothing without those before it.
    enable_events : bool
        Whether to tell what is stored and removed.
    """

    def __init__(self, books: HostBooks, chunk_tokens: dict[int, int], enable_events: bool = False) -> None:
        self.books = books
        self._chunk_tokens = chunk_tokens
        self._events: list[Any] | None = [] if enable_events else None
        self._counts = {FAILED_LOADS: 0, FAILED_STORES: 0, EVICTED_CHUNKS: 0}

    def on_new_request(self, req_context: Any) -> Any:
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> Any:
        return _STATES[self.books.state(key)]

    def get_load_source(self, key: bytes, req_context: Any) -> Any:
        return CacheHitSource.HOST

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> Any:
        self._parents(keys, req_context)
        return CPULoadStoreSpec(self.books.hold(list(keys)))

    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        self.books.release(keys)

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> Any:
        given = list(keys)
        reserved = self.books.reserve(given, self._parents(given, req_context))
        if reserved is None:
            return None
        self._tell(reserved.evicted, removed=True)
        self._counts[EVICTED_CHUNKS] += len(reserved.evicted)
        return PrepareStoreOutput(reserved.keys, CPULoadStoreSpec(reserved.chunks), reserved.evicted)

    def complete_store(self, keys: Collection[bytes], req_context: Any, success: bool = True) -> None:
        if not success:
            self.fail(keys, is_store=True)
        self._tell(self.books.commit(keys), removed=False)

    def fail(self, keys: Collection[bytes], *, is_store: bool) -> None:
        """A job with these keys failed, on one rank at least; ``complete_store`` or ``complete_load`` still follows."""
        self._counts[FAILED_STORES if is_store else FAILED_LOADS] += 1
        self._tell(self.books.fail(keys), removed=True)

    def end_of_before_reset(self, keys: Collection[bytes], is_store: bool) -> None:
        """A job of before a reset has ended on every rank: its chunks may be given out again."""
        if is_store:
            self.books.commit(keys)
        else:
            self.books.release(keys)

    def reset_cache(self) -> None:
        self.books.reset()

    def has_pending_work(self) -> bool:
        return self.books.is_draining

    def take_events(self) -> Iterable[Any]:
        events, self._events = self._events, [] if self._events is not None else None
        return events or ()

    def get_stats(self) -> Any:
        stats = OffloadingConnectorStats()
        for name, count in self._counts.items():
            if count:
                stats.increase_counter(name, count)
        self._counts = dict.fromkeys(self._counts, 0)
        chunks = self.books.stats()
        stats.set_gauge(CACHED_CHUNKS, chunks["cached"])
        stats.set_gauge(FREE_CHUNKS, chunks["free"])
        return stats

    def _tell(self, keys: list[bytes], *, removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent(keys=keys, medium=Medium.CPU, removed=removed))

    def _parents(self, keys: Iterable[bytes], req_context: Any) -> list[bytes | None]:
        """The key of the chunk before each, where its group is a chain and that one was seen."""
        prompt = req_context.get_state(_Prompt)
        if prompt is None:
            prompt = _Prompt()
            req_context.set_state(prompt)
        parents: list[bytes | None] = []
        for key in keys:
            group, end = get_offload_group_idx(key), req_context.get_offload_key_position(key)
            tokens = self._chunk_tokens.get(group)
            if tokens is None or end is None:
                parents.append(None)
                continue
            prompt.keys[group, end] = key
            parents.append(prompt.keys.get((group, (end - 1) // tokens * tokens)))
        return parents
