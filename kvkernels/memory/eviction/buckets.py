"""Least frequently used, and by priority: lines one above the other, of which the lowest leaves first."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Hashable

from kvkernels.common.arguments import integer
from kvkernels.memory.eviction.line import Line
from kvkernels.memory.eviction.protocol import BlockContext, EvictionPolicy


class _Buckets(EvictionPolicy):
    """Keys leave by their rank, and among those of a rank the one used longest ago.

    Finding the line of a rank costs O(log r) with r different ranks, and passing over lines in which no key may leave
    O(r); both are small beside the number of keys.
    """

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._rank_of: dict[Hashable, int] = {}
        self._lines: dict[int, Line] = {}
        self._ranks: list[int] = []  # those of _lines, lowest first
        self._place = 0

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        kept = self._check_victims(n, protected)
        found: list[Hashable] = []
        for rank in self._ranks:
            if len(found) == n:
                break
            found += self._lines[rank].first(n - len(found), self._blocked, kept)
        return found

    def remove(self, key: Hashable) -> None:
        if key not in self._rank_of:
            raise self._unknown("remove", key)
        self._leave(key, self._rank_of.pop(key))
        self._blocked.discard(key)

    def clear(self) -> None:
        self._rank_of.clear()
        self._lines.clear()
        self._ranks.clear()
        self._blocked.clear()

    def __len__(self) -> int:
        return len(self._rank_of)

    def __contains__(self, key: object) -> bool:
        return key in self._rank_of

    def _join(self, key: Hashable, rank: int) -> None:
        line = self._lines.get(rank)
        if line is None:
            line = self._lines[rank] = Line()
            insort(self._ranks, rank)
        self._rank_of[key] = rank
        self._place += 1
        line.join(key, self._place)

    def _leave(self, key: Hashable, rank: int) -> None:
        line = self._lines[rank]
        line.leave(key)
        if not line:
            del self._lines[rank]
            del self._ranks[bisect_left(self._ranks, rank)]

    def _block(self, key: Hashable) -> None:
        self._lines[self._rank_of[key]].hold(key)

    def _unblock(self, key: Hashable) -> None:
        self._lines[self._rank_of[key]].back(key)


class LFU(_Buckets):
    """The key that was used least often since it came leaves first; of several, the one used longest ago.

    K. Shah, A. Mitra, D. Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010, whose list
    of frequencies is a sorted array here. The paper leaves open which key of the lowest frequency goes. Counts do not
    age, and a key that left begins at 1 again.
    """

    name = "lfu"

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._rank_of:
            raise self._known(key)
        self._join(key, 1)

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        uses = self._rank_of.get(key)
        if uses is None:
            raise self._unknown("touch", key)
        self._leave(key, uses)
        self._join(key, uses + 1)


class Priority(_Buckets):
    """The key of the lowest priority leaves first; of several, the one used longest ago."""

    name = "priority"

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._rank_of:
            raise self._known(key)
        self._join(key, integer("Priority.insert: priority", priority))

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        rank = self._rank_of.get(key)
        if rank is None:
            raise self._unknown("touch", key)
        self._leave(key, rank)
        self._join(key, rank)
