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
        t1, t2, b1, b2 = self._t1, self._t2, self._b1, self._b2
        if key in t1 or key in t2:
            raise self._known(key)
        self._place += 1
        self._missed_in_b2 = False
        if key in b1 or key in b2:
            b1.pop(key, None)
            b2.pop(key, None)
            t2.join(key, self._place)
            return
        if b1 and len(t1) + len(b1) >= self.capacity:
            b1.popitem(last=False)
        elif b2 and len(t1) + len(b1) + len(t2) + len(b2) >= 2 * self.capacity:
            b2.popitem(last=False)
        t1.join(key, self._place)

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        if key in self._t1:
            self._t1.leave(key)
        elif key in self._t2:
            self._t2.leave(key)
        else:
            raise self._unknown("touch", key)
        self._place += 1
        self._t2.join(key, self._place)

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        kept = self._check_victims(n, protected)
        once = self._t1.first(n, self._blocked, kept)
        again = self._t2.first(n, self._blocked, kept)
        once.reverse()
        again.reverse()
        left = len(self._t1)
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
            if key in self._t2:
                self._t2.leave(key)
                self._b2[key] = None
            else:
                # A T1 that fills the cache leaves no ghosts: the paper's case IV A.
                if len(self._t1) < self.capacity or self._missed_in_b2:
                    self._b1[key] = None
                self._t1.leave(key)
            self._blocked.discard(key)

    def remove(self, key: Hashable) -> None:
        if key not in self:
            raise self._unknown("remove", key)
        (self._t1 if key in self._t1 else self._t2).leave(key)
        self._blocked.discard(key)

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2)

    def __contains__(self, key: object) -> bool:
        return key in self._t1 or key in self._t2

    def _block(self, key: Hashable) -> None:
        (self._t1 if key in self._t1 else self._t2).hold(key)

    def _unblock(self, key: Hashable) -> None:
        (self._t1 if key in self._t1 else self._t2).back(key)
