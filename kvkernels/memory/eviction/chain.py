"""Our own: chains of blocks, kept by the hits that are to be expected of them."""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Set

from kvkernels.memory.eviction.density import BUCKETS, EDGES, bucket_of, hit_densities, survival
from kvkernels.memory.eviction.protocol import BlockContext, EvictionPolicy

_MOST_USES = 4  # more are not told apart
_CLASSES = 2 * _MOST_USES
# Cells are numbered bucket * _CLASSES + kind.
_OLDEST_FIRST = [bucket * _CLASSES + kind for bucket in reversed(range(BUCKETS)) for kind in range(_CLASSES)]
_AGES_A_CAPACITY = 32
_GHOSTS_A_CAPACITY = 8
_MEMORY_A_CAPACITY = 8  # uses after which what was learned counts 1/e
_LEAST_USES_TO_LEARN = 500


class _Run:
    """The keys of one class that one request left: they are of one age, and leave from the deepest on."""

    __slots__ = ("aside", "bucket", "is_listed", "keys", "kind", "start", "watched")

    def __init__(self, kind: int, start: int) -> None:
        self.kind = kind
        self.start = start
        self.keys: dict[Hashable, int] = {}  # to their places, in order
        self.aside: dict[Hashable, int] = {}  # not evictable, and passed over
        self.watched = 0  # keys, and the ghosts of those evicted
        self.bucket = 0
        self.is_listed = False


class Chain(EvictionPolicy):
    """Keys leave by the hits that they are to bring for the room that they take up, a request's deepest block first.

    Nathan Beckmann, Haoxian Chen, Asaf Cidon, "LHD: Improving cache hit rate by maximizing hit density", NSDI 2018, has
    the idea: what a key is worth depends on its age and on the class that it is in, and both are learned. For chains of
    blocks this is done as follows.

    - **Classes**: how often a key has been used, 1 to 4 or more, its time as a ghost included, and whether it was the
      last block of its request, which mostly is not full and never used again. That there is a next block says the
      context's depth: a request goes on as long as depths rise by one.
    - **Learned**: of each class the share of keys that are used again, and of all classes together how long that takes.
      Ghosts, eight for each key of the capacity, are watched as well, so that ages longer than what is held are seen.
      Old knowledge fades.
    - **Worth**: for each class and age the hits over the room, at the best of all lengths of time to keep it from there
      on. Right after a request that may be little, and more some time later, when the next turn is due: then keys that
      have waited stay, and of new prompts only as many as there is room for until they are due.
    - **Order**: of one worth the oldest request first, and of a request the deepest block first, so that what is left
      of it is a prefix. Without a context, keys count as one request for a 32nd of the capacity's uses.

    Each operation is O(1) amortised: a request's blocks of a class are one run, runs wait in cells of class and age,
    and there are 384 cells. A key that becomes evictable again after it was passed over goes back to its place, which
    takes as many steps as its request has blocks.
    """

    name = "chain"

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(capacity, clock=clock)
        self._age_uses = max(1, self.capacity // _AGES_A_CAPACITY)
        self._edges = [edge * self._age_uses for edge in EDGES]
        self._most_ghosts = _GHOSTS_A_CAPACITY * self.capacity
        self._learn_uses = max(_LEAST_USES_TO_LEARN, self.capacity // 4)
        self._fade = math.exp(-self._learn_uses / (_MEMORY_A_CAPACITY * self.capacity))
        self.clear()

    def clear(self) -> None:
        self._run_of: dict[Hashable, _Run] = {}
        self._ghosts: OrderedDict[Hashable, _Run] = OrderedDict()
        self._blocked.clear()
        self._now = 0  # uses so far
        self._aged_at = self._learned_at = self._start = 0
        self._request: list[_Run | None] = [None] * _CLASSES
        self._last: Hashable = None
        self._depth = -1
        self._runs: list[_Run] = []
        # By cell, in the order of their starts; _heap has the cells that may have a key.
        self._cells: list[deque[_Run]] = [deque() for _ in range(BUCKETS * _CLASSES)]
        self._rank = self._ranks([[1.0 / (1 + bucket) for bucket in range(BUCKETS)]] * _CLASSES)
        self._heap: list[tuple[int, int]] = []
        self._is_in_heap = bytearray(BUCKETS * _CLASSES)
        self._gaps = [0.0] * BUCKETS
        self._again = [0.0] * _CLASSES
        self._gone = [0.0] * _CLASSES

    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        if key in self._run_of:
            raise self._known(key)
        self._follow(context)
        ghost = self._ghosts.pop(key, None)
        kind = 0
        if ghost is not None:
            ghost.watched -= 1
            self._again[ghost.kind] += 1.0
            self._gaps[self._bucket(ghost, self._now)] += 1.0
            kind = min(ghost.kind | 1, _CLASSES - 3) + 1
        self._join(key, kind)

    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        run = self._run_of.get(key)
        if run is None:
            raise self._unknown("touch", key)
        self._follow(context)
        run = self._run_of[key]
        kind = run.kind
        self._again[kind] += 1.0
        self._gaps[run.bucket if run.is_listed else self._bucket(run, self._aged_at)] += 1.0
        run.watched -= 1
        if run.keys.pop(key, None) is None:
            del run.aside[key]
        self._join(key, min(kind | 1, _CLASSES - 3) + 1)

    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        run = self._first_run()
        if run is not None and not protected and type(n) is int and n == 1:
            key = next(reversed(run.keys))
            if key not in self._blocked:
                return [key]
        kept = self._check_victims(n, protected)
        found: list[Hashable] = []
        for _, cell in sorted(self._heap):
            for run in self._waiting(cell):
                if len(found) == n:
                    return found
                found += self._last_of(run, n - len(found), kept)
        return found

    def evicted(self, keys: Iterable[Hashable]) -> None:
        given, run_of, ghosts = list(keys), self._run_of, self._ghosts
        if len(given) != 1 or given[0] not in run_of:
            given = self._held(given)
        for key in given:
            run = run_of.pop(key)
            waiting = run.keys
            if waiting and next(reversed(waiting)) == key:
                waiting.popitem()  # del would leave a gap at the end that each search passes over
            elif waiting.pop(key, None) is None:
                del run.aside[key]
            self._blocked.discard(key)
            ghosts[key] = run
            if len(ghosts) > self._most_ghosts:
                _, forgotten = ghosts.popitem(last=False)
                forgotten.watched -= 1
                self._gone[forgotten.kind] += 1.0

    def remove(self, key: Hashable) -> None:
        if key not in self._run_of:
            raise self._unknown("remove", key)
        run = self._run_of.pop(key)
        run.watched -= 1
        if run.keys.pop(key, None) is None:
            del run.aside[key]
        self._blocked.discard(key)

    def __len__(self) -> int:
        return len(self._run_of)

    def __contains__(self, key: object) -> bool:
        return key in self._run_of

    def _bucket(self, run: _Run, at: int) -> int:
        return bucket_of(max(0, at - run.start) // self._age_uses)

    def _follow(self, context: BlockContext | None) -> None:
        """A key is used: the clock goes on, and maybe another request begins."""
        self._depth += 1
        if context is None:
            if self._now - self._start >= self._age_uses:
                self._begin(is_chain=False)
        elif context.depth != self._depth:
            self._depth = context.depth
            self._begin(is_chain=True)
        self._now += 1

    def _begin(self, is_chain: bool) -> None:
        run = self._run_of.get(self._last)
        if is_chain and run is not None:
            tail = self._run_of[self._last] = self._run(run.kind + 1)
            waits = self._last in run.aside
            run.watched -= 1
            tail.watched += 1
            (tail.aside if waits else tail.keys)[self._last] = (run.aside if waits else run.keys).pop(self._last)
        self._request = [None] * _CLASSES
        self._last = None
        self._start = self._now
        if self._now - self._aged_at >= self._age_uses:
            self._age()
        if self._now - self._learned_at >= self._learn_uses:
            self._learn()

    def _join(self, key: Hashable, kind: int) -> None:
        run = self._request[kind]
        if run is None or not run.is_listed:
            run = self._run(kind)
        self._run_of[key] = run
        run.keys[key] = self._now
        run.watched += 1
        self._last = key

    def _run(self, kind: int) -> _Run:
        """The one of this request, in its cell."""
        run = self._request[kind]
        if run is None:
            run = self._request[kind] = _Run(kind, self._start)
            self._runs.append(run)
        if not run.is_listed:
            self._list(run)
        return run

    def _list(self, run: _Run) -> None:
        """Put a run into its cell, where it is not, and the cell into the heap."""
        cell = run.bucket * _CLASSES + run.kind
        runs = self._cells[cell]
        if runs and runs[-1].start > run.start:
            runs.insert(sum(other.start < run.start for other in runs), run)
        else:
            runs.append(run)
        run.is_listed = True
        if not self._is_in_heap[cell]:
            self._is_in_heap[cell] = 1
            heapq.heappush(self._heap, (self._rank[cell], cell))

    def _first_run(self) -> _Run | None:
        """The run to take a key from next; cells without keys are taken out on the way."""
        while self._heap:
            cell = self._heap[0][1]
            runs = self._cells[cell]
            if runs and (runs[0].keys or self._waiting(cell)):
                return runs[0]
            heapq.heappop(self._heap)
            self._is_in_heap[cell] = 0
        return None

    def _waiting(self, cell: int) -> deque[_Run]:
        """The runs of a cell, without those before the first that has a key."""
        runs = self._cells[cell]
        while runs and not runs[0].keys:
            runs.popleft().is_listed = False
        return runs

    def _last_of(self, run: _Run, n: int, kept: Set[Hashable]) -> list[Hashable]:
        """Up to ``n`` keys of a run, the deepest first; those that are not evictable go aside."""
        found: list[Hashable] = []
        passed: list[Hashable] = []
        for key in reversed(run.keys):
            if len(found) == n:
                break
            if key in self._blocked:
                passed.append(key)
            elif key not in kept:
                found.append(key)
        for key in passed:
            run.aside[key] = run.keys.pop(key)
        return found

    def _age(self) -> None:
        """Runs go to the cell of the age that they have now."""
        now = self._aged_at = self._now
        cells, edges, last = self._cells, self._edges, BUCKETS - 1
        for cell in sorted((cell for _, cell in self._heap), reverse=True):
            runs, bucket = cells[cell], cell // _CLASSES
            latest = now - edges[bucket + 1]
            if not runs or runs[0].start > latest or bucket == last:
                continue
            while runs and runs[0].start <= latest:
                run = runs.popleft()
                run.is_listed = False
                if run.keys:
                    run.bucket = self._bucket(run, now)
                    self._list(run)

    def _learn(self) -> None:
        """What keys are worth by now; only their order matters."""
        self._learned_at = self._now
        self._runs = [run for run in self._runs if run.watched]
        if not any(self._gaps):
            return
        left = survival(self._gaps)
        watched = [again + gone for again, gone in zip(self._again, self._gone, strict=True)]
        bucket, known, younger = BUCKETS, 1.0, -1
        for run in self._runs:  # the oldest first
            if run.start > younger:
                bucket = self._bucket(run, self._now)
                known = 1.0 - left[bucket]
                younger = self._now - self._edges[bucket]
            watched[run.kind] += run.watched * known
        self._rank = self._ranks(
            [hit_densities(left, again, all_) for again, all_ in zip(self._again, watched, strict=True)]
        )
        self._heap = [(self._rank[cell], cell) for _, cell in self._heap]
        heapq.heapify(self._heap)
        self._gaps = [count * self._fade for count in self._gaps]
        self._again = [count * self._fade for count in self._again]
        self._gone = [count * self._fade for count in self._gone]

    @staticmethod
    def _ranks(worth: list[list[float]]) -> list[int]:
        """The place of each cell in the order in which they are emptied: of one worth the older first."""
        values = (worth[kind][bucket] for bucket in reversed(range(BUCKETS)) for kind in range(_CLASSES))
        ranks = [0] * (BUCKETS * _CLASSES)
        for rank, (_, number) in enumerate(sorted(zip(values, range(len(ranks)), strict=True))):
            ranks[_OLDEST_FIRST[number]] = rank
        return ranks

    def _block(self, key: Hashable) -> None:
        """It goes aside when a search meets it."""

    def _unblock(self, key: Hashable) -> None:
        run = self._run_of[key]
        place = run.aside.pop(key, None)
        if place is None:
            return
        is_deepest = not run.keys or place > run.keys[next(reversed(run.keys))]
        run.keys[key] = place
        if not is_deepest:
            run.keys = dict(sorted(run.keys.items(), key=lambda item: item[1]))
        if not run.is_listed:
            run.bucket = self._bucket(run, self._aged_at)
            self._list(run)
