"""Least recently used, and first in, first out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable
from itertools import islice

from kvkernels.memory.eviction.line import Line
from kvkernels.memory.eviction.protocol import BlockContext, EvictionPolicy


class LRU(EvictionPolicy):
    """The key that was used longest ago leaves first; insertion is a use.

    R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger, "Evaluation techniques for storage hierarchies", IBM Systems
    Journal 9(2), 1970. Priorities and lifetimes are not looked at.
    """

    name = "lru"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._line = Line()
        self._place = 0

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        line = self._line
        if key in line.order or key in line.aside:
            raise self._known(key)
        self._place += 1
        line.order[key] = self._place

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        order = self._line.order
        if key in order:
            order.move_to_end(key)
        elif key in self._line.aside:
            self._line.leave(key)
        else:
            raise self._unknown("touch", key)
        self._place += 1
        order[key] = self._place

    def touch_all(self, keys: Iterable[Hashable], contexts: Iterable[BlockContext | None]) -> None:
        order, aside, place = self._line.order, self._line.aside, self._place
        to_end = order.move_to_end
        for key in keys:
            if key in order:
                to_end(key)
            elif key in aside:
                self._line.leave(key)
            else:
                raise self._unknown("touch_all", key)
            self._place = place = place + 1
            order[key] = place

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        order = self._line.order
        if not self._blocked and not self._line.aside and not protected and type(n) is int and 0 < n <= len(order):
            return list(islice(order, n))
        kept = self._check_victims(n, protected)
        return self._line.first(n, self._blocked, kept)

    def evicted(self, keys: Iterable[Hashable]) -> None:
        given, order = list(keys), self._line.order
        if len(given) == 1 and not self._blocked and given[0] in order:
            del order[given[0]]
            return
        for key in self._held(given):
            self._line.leave(key)
            self._blocked.discard(key)

    def remove(self, key: Hashable) -> None:
        if key not in self:
            raise self._unknown("remove", key)
        self._line.leave(key)
        self._blocked.discard(key)

    def clear(self) -> None:
        self._line = Line()
        self._blocked.clear()

    def __len__(self) -> int:
        return len(self._line.order) + len(self._line.aside)

    def __contains__(self, key: object) -> bool:
        return key in self._line.order or key in self._line.aside

    def _block(self, key: Hashable) -> None:
        self._line.hold(key)

    def _unblock(self, key: Hashable) -> None:
        self._line.back(key)


class FIFO(LRU):
    """The key that came first leaves first, however often it was used.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    Priorities and lifetimes are not looked at.
    """

    name = "fifo"
    touch_all = EvictionPolicy.touch_all

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        if key not in self:
            raise self._unknown("touch", key)
