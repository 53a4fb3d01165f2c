"""Least recently used."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable

from kvkernels.memory.eviction.line import Line
from kvkernels.memory.eviction.protocol import BlockContext, EvictionPolicy


class LRU(EvictionPolicy):
    """The key that was used longest ago leaves first; insertion is a use.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    Priorities and lifetimes are not looked at.
    """

    name = "lru"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._line = Line()
        self._place = 0

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._line:
            raise self._known(key)
        self._place += 1
        self._line.join(key, self._place)

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        order = self._line.order
        try:
            order.move_to_end(key)  # lookups come through here, block by block
        except KeyError:
            if key not in self._line:
                raise self._unknown("touch", key) from None
            self._line.leave(key)
        self._place = order[key] = self._place + 1

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        kept = self._check_victims(n, protected)
        return self._line.first(n, self._blocked, kept)

    def evicted(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self.remove(key)

    def remove(self, key: Hashable) -> None:
        if key not in self._line:
            raise self._unknown("remove", key)
        self._line.leave(key)
        self._blocked.discard(key)

    def clear(self) -> None:
        self._line = Line()
        self._blocked.clear()

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, key: object) -> bool:
        return key in self._line

    def _block(self, key: Hashable) -> None:
        self._line.hold(key)

    def _unblock(self, key: Hashable) -> None:
        self._line.back(key)
