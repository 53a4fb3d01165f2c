"""S3-FIFO."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Set

from kvkernels.memory.eviction.hands import HandPolicy, Queue
from kvkernels.memory.eviction.protocol import BlockContext


class S3FIFO(HandPolicy):
    """A small queue that most keys leave soon, a main one for those that were used in it, and a queue of ghosts.

    J. Yang, Y. Zhang, Z. Qiu, Y. Yue, R. Vinayak, "FIFO queues are all you need for cache eviction", SOSP 2023,
    algorithm 1. S has a tenth of the capacity, M and the ghosts have the rest each. Counts go up to 3; a key goes from
    S to M with a count above 1, and begins at 0 there. Where M has become too long by that, M gives the victim. Keys
    that are aside do not count in the length of their queue, and a queue without a key that may leave is passed over.
    """

    name = "s3fifo"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._small_limit = max(1, capacity // 10)
        self._main_limit = capacity - self._small_limit
        self._small: Queue = OrderedDict()
        self._main: Queue = OrderedDict()
        self._ghosts: Queue = OrderedDict()

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._count:
            raise self._known(key)
        self._take_back(0)
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None
        self._count[key] = 0

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        if self._steps:
            self._take_back(0)
        count = self._count.get(key)
        if count is None:
            raise self._unknown("touch", key)
        if count < 3:
            self._count[key] = count + 1

    def _queues(self) -> tuple[Queue, ...]:
        return self._small, self._main, self._ghosts

    def _left(self, key: Hashable, queue: Queue) -> None:
        if queue is self._small:
            self._ghosts[key] = None
            if len(self._ghosts) > self._main_limit:
                self._ghosts.popitem(last=False)

    def _search(self, n: int, kept: Set[Hashable]) -> None:
        while len(self._planned) < n:
            if len(self._small) >= self._small_limit or not self._main:
                self._search_small(kept)
            else:
                self._search_main(kept)

    def _search_small(self, kept: Set[Hashable]) -> None:
        small, main, count = self._small, self._main, self._count
        while small:
            key = next(iter(small))
            if key in self._blocked or key in kept:
                self._step(key, small, self._away)
            elif count[key] > 1:
                self._step(key, small, main)
                count[key] = 0
                if len(main) > self._main_limit:
                    break
            else:
                self._step(key, small, None)
                return
        self._search_main(kept)

    def _search_main(self, kept: Set[Hashable]) -> None:
        main, count = self._main, self._count
        while main:
            key = next(iter(main))
            if key in self._blocked or key in kept:
                self._step(key, main, self._away)
            elif count[key]:
                self._step(key, main, main)
                count[key] -= 1
            else:
                self._step(key, main, None)
                return
