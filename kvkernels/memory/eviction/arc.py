"""Adaptive replacement."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable

from kvkernels.memory.eviction.line import Line
from kvkernels.memory.eviction.protocol import BlockContext, EvictionPolicy


class ARC(EvictionPolicy):
    """Keys used once and keys used again have a line each, and misses on what was evicted move room between them.

    N. Megiddo, D. S. Modha, "ARC: A self-tuning, low overhead replacement cache", FAST 2003, figure 4. T1 and T2 are
    lines in LRU order, B1 and B2 the ghosts of each, p the room that T1 is to have. What the paper has in one step is
    in three here: ``missed`` moves p, ``victims`` is REPLACE, and ``insert`` trims the ghosts. p is a real number, and
    grows and shrinks by real ratios. Where the line that REPLACE names has no key that may leave, the other gives one.
    """

    name = "arc"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self.clear()

    def clear(self) -> None:
        self._t1, self._t2 = Line(), Line()
        self._line_of: dict[Hashable, Line] = {}
        self._b1: OrderedDict[Hashable, None] = OrderedDict()
        self._b2: OrderedDict[Hashable, None] = OrderedDict()
        self._p = 0.0
        self._place = 0
        self._missed_in_b2 = False
        self._blocked.clear()

    def missed(self, key: Hashable) -> None:
        b1, b2 = len(self._b1), len(self._b2)
        self._missed_in_b2 = key in self._b2
        if key in self._b1:
            self._p = min(float(self.capacity), self._p + max(1.0, b2 / b1))
        elif self._missed_in_b2:
            self._p = max(0.0, self._p - max(1.0, b1 / b2))

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._line_of:
            raise self._known(key)
        b1, b2 = self._b1, self._b2
        self._missed_in_b2 = False
        if key in b1:
            del b1[key]
            return self._join(key, self._t2)
        if key in b2:
            del b2[key]
            return self._join(key, self._t2)
        once = len(self._t1) + len(b1)
        if b1 and once >= self.capacity:
            b1.popitem(last=False)
        elif b2 and once + len(self._t2) + len(b2) >= 2 * self.capacity:
            b2.popitem(last=False)
        self._join(key, self._t1)

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        line = self._line_of.get(key)
        if line is None:
            raise self._unknown("touch", key)
        line.leave(key)
        self._join(key, self._t2)

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        kept = self._check_victims(n, protected)
        left = len(self._t1)
        once = self._t1.first(n, self._blocked, kept) if left else []
        again = self._t2.first(n, self._blocked, kept) if len(once) < n or left - n < self._p else []
        once.reverse()
        again.reverse()
        found: list[Hashable] = []
        while len(found) < n:
            is_too_long = left > self._p or (self._missed_in_b2 and left == self._p)
            if once and (is_too_long or not again):
                found.append(once.pop())
                left -= 1
            else:
                found.append(again.pop())
        return found

    def evicted(self, keys: Iterable[Hashable]) -> None:
        for key in self._held(keys):
            line = self._line_of[key]
            if line is self._t2:
                self._b2[key] = None
            elif len(line) < self.capacity or self._missed_in_b2:
                # A T1 that fills the cache leaves no ghosts: the paper's case IV A.
                self._b1[key] = None
            self._leave(key)

    def remove(self, key: Hashable) -> None:
        if key not in self._line_of:
            raise self._unknown("remove", key)
        self._leave(key)

    def __len__(self) -> int:
        return len(self._line_of)

    def __contains__(self, key: object) -> bool:
        return key in self._line_of

    def _join(self, key: Hashable, line: Line) -> None:
        self._place += 1
        self._line_of[key] = line
        line.order[key] = self._place

    def _leave(self, key: Hashable) -> None:
        self._line_of.pop(key).leave(key)
        self._blocked.discard(key)

    def _block(self, key: Hashable) -> None:
        self._line_of[key].hold(key)

    def _unblock(self, key: Hashable) -> None:
        self._line_of[key].back(key)
