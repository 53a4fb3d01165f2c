"""By lifetime."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Collection, Hashable
from itertools import islice

from kvkernels.memory.eviction.line import Line
from kvkernels.memory.eviction.protocol import BlockContext, EvictionPolicy


class TTL(EvictionPolicy):
    """The key whose lifetime ends first leaves first, be it over or not; those without one leave last, as in LRU.

    A use begins the lifetime anew, as prompt caches of services do. There is a line for each length of lifetime, in
    which keys expire in the order of their uses, and ``victims(n)`` merges the fronts of the lines: O(n) for each
    different length. The clock must not go back.
    """

    name = "ttl"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._ttl_of: dict[Hashable, float] = {}
        self._expiry_of: dict[Hashable, tuple[float, int]] = {}  # the second is the place, for those that are equal
        self._lines: dict[float, Line] = {}
        self._place = 0

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._ttl_of:
            raise self._known(key)
        seconds = math.inf if ttl is None else float(ttl)
        if not seconds >= 0:
            raise ValueError(f"TTL.insert: ttl must be seconds from 0, got {ttl!r}")
        self._join(key, seconds)

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        if key not in self._ttl_of:
            raise self._unknown("touch", key)
        ttl = self._ttl_of[key]
        self._leave(key)
        self._join(key, ttl)

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        kept = self._check_victims(n, protected)
        if len(self._lines) == 1:
            (line,) = self._lines.values()
            return line.first(n, self._blocked, kept)
        fronts = [line.first(n, self._blocked, kept) for line in self._lines.values()]
        return list(islice(heapq.merge(*fronts, key=self._expiry_of.__getitem__), n))

    def expired(self) -> list[Hashable]:
        """The evictable keys whose lifetime is over, first to last."""
        now = self._clock()
        over: list[Hashable] = []
        for line in self._lines.values():
            n = 1
            while True:
                front = line.first(n, self._blocked, frozenset())
                if len(front) < n or self._expiry_of[front[-1]][0] > now:
                    break
                n *= 2
            over += [key for key in front if self._expiry_of[key][0] <= now]
        return sorted(over, key=self._expiry_of.__getitem__)

    def remove(self, key: Hashable) -> None:
        if key not in self._ttl_of:
            raise self._unknown("remove", key)
        self._leave(key)
        self._blocked.discard(key)

    def clear(self) -> None:
        self._ttl_of.clear()
        self._expiry_of.clear()
        self._lines.clear()
        self._blocked.clear()

    def __len__(self) -> int:
        return len(self._ttl_of)

    def __contains__(self, key: object) -> bool:
        return key in self._ttl_of

    def _join(self, key: Hashable, ttl: float) -> None:
        self._place += 1
        self._ttl_of[key] = ttl
        self._expiry_of[key] = (self._clock() + ttl, self._place)
        if ttl not in self._lines:
            self._lines[ttl] = Line()
        self._lines[ttl].join(key, self._place)

    def _leave(self, key: Hashable) -> None:
        ttl = self._ttl_of.pop(key)
        del self._expiry_of[key]
        self._lines[ttl].leave(key)
        if not self._lines[ttl]:
            del self._lines[ttl]

    def _block(self, key: Hashable) -> None:
        self._lines[self._ttl_of[key]].hold(key)

    def _unblock(self, key: Hashable) -> None:
        self._lines[self._ttl_of[key]].back(key)
