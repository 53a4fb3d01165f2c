"""This library's eviction policies for vLLM's own host pool, under which they are named so:

    "eviction_policy": "s3fifo", "cache_policy_module_path": "kvkernels.connectors.vllm_policies"

The names are ``LRU``, ``LFU``, ``FIFO``, ``TTL``, ``Priority``, ``ARC``, ``S3FIFO``, ``SIEVE`` and ``Chain``, and those
that ``kvkernels.memory.make_policy`` takes, of which vLLM has a ``lru`` and an ``arc`` of its own. Under
``KVKernelsConnector``, ``eviction_policy`` is such a name by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from kvkernels.connectors.vllm_version import CachePolicy
from kvkernels.memory.eviction import EvictionError, make_policy
from kvkernels.memory.eviction.make import POLICIES


class HostCachePolicy(CachePolicy):
    """A policy of this library's as vLLM's CachePolicy.

    It keeps the chunks' records, and gives out only those that no transfer uses. ``evict`` is all or nothing.
    """

    policy_name: ClassVar[str]

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._policy = make_policy(self.policy_name, cache_capacity)
        self._chunks: dict[bytes, Any] = {}

    def get(self, key: bytes) -> Any:
        return self._chunks.get(key)

    def insert(self, key: bytes, chunk: Any, req_context: Any = None) -> None:
        """Without the request in vLLM 0.32."""
        self._policy.insert(key)
        self._chunks[key] = chunk
        # -1 while it is being stored.
        self._policy.set_evictable(key, chunk.ref_cnt == 0)

    def remove(self, key: bytes) -> None:
        self._policy.remove(key)
        del self._chunks[key]

    def touch(self, keys: Iterable[bytes], req_context: Any) -> None:
        # A prompt's end first, so that it leaves before what it stands behind.
        for key in reversed(list(keys)):
            if key in self._chunks:
                self._policy.touch(key)

    def on_store_miss(self, keys: Iterable[bytes], req_context: Any) -> None:
        for key in keys:
            if key not in self._chunks:
                self._policy.missed(key)

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, Any]] | None:
        try:
            keys: list[Any] = self._policy.victims(n, protected)
        except EvictionError:
            return None
        self._policy.evicted(keys)
        return [(key, self._chunks.pop(key)) for key in keys]

    def clear(self) -> None:
        self._policy.clear()
        self._chunks.clear()

    def mark_evictable(self, key: bytes) -> None:
        self._policy.set_evictable(key, True)

    def mark_non_evictable(self, key: bytes) -> None:
        self._policy.set_evictable(key, False)


for _name, _policy in POLICIES.items():
    _made = type(_policy.__name__, (HostCachePolicy,), {"policy_name": _name, "__module__": __name__})
    globals()[_policy.__name__] = globals()[_name] = _made
