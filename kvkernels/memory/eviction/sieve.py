"""SIEVE."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Set

from kvkernels.memory.eviction.hands import HandPolicy, Queue
from kvkernels.memory.eviction.protocol import BlockContext


class SIEVE(HandPolicy):
    """A queue in order of insertion, and a hand that goes from the oldest key to the newest and spares those visited.

    Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU", NSDI 2024, algorithm 1. The
    queue is two here, so that the hand is a front::

        passed (oldest first) | hand -> ahead (newest last) <- new keys

    A hand that has passed the newest key is at the oldest at once, before another key comes.
    """

    name = "sieve"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._ahead: Queue = OrderedDict()
        self._passed: Queue = OrderedDict()

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._count:
            raise self._known(key)
        self._take_back(0)
        self._ahead[key] = None
        self._count[key] = 0

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        if self._steps:
            self._take_back(0)
        if key not in self._count:
            raise self._unknown("touch", key)
        self._count[key] = 1

    def _queues(self) -> tuple[Queue, ...]:
        return self._ahead, self._passed

    def _home(self, queue: Queue) -> Queue:
        return self._ahead

    def _turn(self) -> None:
        self._ahead, self._passed = self._passed, self._ahead

    def _settled(self) -> None:
        if not self._ahead:
            self._turn()

    def _search(self, n: int, kept: Set[Hashable]) -> None:
        while len(self._planned) < n:
            if not self._ahead:
                self._turn()
                self._steps.append((None, self._away, self._away, 0))
            key = next(iter(self._ahead))
            if key in self._blocked or key in kept:
                self._step(key, self._ahead, self._away)
            elif self._count[key]:
                self._step(key, self._ahead, self._passed)
                self._count[key] = 0
            else:
                self._step(key, self._ahead, None)
