"""What S3-FIFO and SIEVE share: they change their state while they look for a victim."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Set
from typing import TypeAlias

from kvkernels.memory.eviction.protocol import EvictionPolicy

Queue: TypeAlias = "OrderedDict[Hashable, None]"

#: What was done to a key: the queue it left the front of, the one it joined the end of, and its count before.
#: A victim joined none.
Step: TypeAlias = "tuple[Hashable, Queue, Queue | None, int]"


class HandPolicy(EvictionPolicy):
    """``victims`` takes the paper's steps and notes them; they stand once ``evicted`` says that the victims left.

    Any other call takes them back first. A key that may not leave and comes to the front goes away by such a step. A
    protected one is put before the front again when the eviction is done, one that is not evictable when it has become
    so, to be looked at next. Each step is O(1), and paid for by the call that gave the key its count or blocked it.
    """

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._count: dict[Hashable, int] = {}  # of each key that is held
        self._aside: dict[Hashable, Queue] = {}
        self._away: Queue = OrderedDict()  # stands for _aside in a step, and is empty
        self._steps: list[Step] = []
        self._planned: list[Hashable] = []

    @abstractmethod
    def _search(self, n: int, kept: Set[Hashable]) -> None:
        """Take steps until ``n`` keys are in ``_planned``; there are as many."""

    @abstractmethod
    def _queues(self) -> tuple[Queue, ...]:
        """Where a key that is not aside may be."""

    def _left(self, key: Hashable, queue: Queue) -> None:
        """A key was evicted from the front of a queue, or from the midst of it."""

    def _home(self, queue: Queue) -> Queue:
        """Where a key goes that was aside, by the queue that it left."""
        return queue

    def _turn(self) -> None:
        """Two queues change places, or change back: for policies with steps whose queues are both ``_away``."""

    def _settled(self) -> None:
        """Keys came or went for good."""

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        self._take_back(0)
        kept = self._check_victims(n, protected)
        self._search(n, kept)
        return list(self._planned)

    def evicted(self, keys: Iterable[Hashable]) -> None:
        given = self._held(keys)
        planned = self._planned[: len(given)] == given
        self._take_back(len(given) if planned else 0)
        if planned:
            for key, queue, to, _ in self._steps:
                if to is None:
                    del self._count[key]
                    self._left(key, queue)
                elif to is self._away and queue is not to and key in self._blocked:
                    self._aside[key] = queue
            self._settled()
            for key, queue, to, _ in reversed(self._steps):
                if to is self._away and queue is not to and key not in self._blocked:
                    self._put_before(key, self._home(queue))
            self._steps.clear()
            self._planned.clear()
        else:
            for key in given:
                self._left(key, self._discard(key))
            self._settled()

    def remove(self, key: Hashable) -> None:
        if key not in self._count:
            raise self._unknown("remove", key)
        self._take_back(0)
        self._discard(key)
        self._settled()

    def clear(self) -> None:
        self._steps.clear()
        self._planned.clear()
        self._count.clear()
        self._aside.clear()
        self._blocked.clear()
        for queue in self._queues():
            queue.clear()

    def __len__(self) -> int:
        return len(self._count)

    def __contains__(self, key: object) -> bool:
        return key in self._count

    def _step(self, key: Hashable, queue: Queue, to: Queue | None) -> None:
        """The key at the front of a queue goes to the end of another; to none, it is a victim."""
        self._steps.append((key, queue, to, self._count[key]))
        del queue[key]
        if to is None:
            self._planned.append(key)
        elif to is not self._away:
            to[key] = None

    def _take_back(self, kept_victims: int) -> None:
        """Take back the steps after that many victims."""
        while len(self._planned) > kept_victims or (self._steps and self._steps[-1][2] is not None):
            key, queue, to, count = self._steps.pop()
            if to is queue is self._away:
                self._turn()
                continue
            if to is None:
                self._planned.pop()
            elif to is not self._away:
                del to[key]
            self._put_before(key, queue)
            self._count[key] = count

    def _discard(self, key: Hashable) -> Queue:
        """Take a key out, and say of which queue."""
        del self._count[key]
        self._blocked.discard(key)
        if key in self._aside:
            return self._aside.pop(key)
        queue = next(queue for queue in self._queues() if key in queue)
        del queue[key]
        return queue

    def _block(self, key: Hashable) -> None:
        self._take_back(0)

    def _unblock(self, key: Hashable) -> None:
        self._take_back(0)
        if key in self._aside:
            self._put_before(key, self._home(self._aside.pop(key)))

    @staticmethod
    def _put_before(key: Hashable, queue: Queue) -> None:
        queue[key] = None
        queue.move_to_end(key, last=False)
