"""A cache of blocks without blocks, which counts what a policy would have hit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from kvkernels.memory.eviction import BlockContext, EvictionError, make_policy
from kvkernels.memory.replay.trace import Request

_CONTEXTS: list[BlockContext] = []


def _contexts(count: int) -> list[BlockContext]:
    """Contexts by depth, made once."""
    while len(_CONTEXTS) < count:
        _CONTEXTS.append(BlockContext(len(_CONTEXTS)))
    return _CONTEXTS


class Simulation:
    """One policy at one capacity.

    Every block of a request is used in order: one that is held is touched, one that is not is inserted. A block counts
    as a hit while every block before it in its request does. The policy's clock is the trace's.

    Parameters
    ----------
    policy : str
        A name that ``make_policy`` takes.
    capacity : int
        In blocks.
    chains : bool
        Hold a block only while the one before it is held: of the blocks that are evictable by that, those without a
        block after them, the policy chooses. A block for which there is no room then is not inserted, nor are those
        after it.

    Attributes
    ----------
    hits : int
        Blocks so far.

    Examples
    --------
    >>> from kvkernels.memory.replay import Simulation
    >>> lru = Simulation("lru", 3)
    >>> for hash_ids in ([0, 1, 2], [0, 3], [0, 1]):
    ...     lru.run(hash_ids)
    >>> lru.hits  # 0 twice; then 1 had gone
    2
    """

    def __init__(self, policy: str, capacity: int, *, chains: bool = False) -> None:
        self.policy = policy
        self.capacity = capacity
        self.hits = 0
        self._now_s = 0.0
        self._policy = make_policy(policy, capacity, clock=lambda: self._now_s)
        self._held: set[Hashable] = set()
        self._parent: dict[Hashable, Hashable] = {}
        self._children: defaultdict[Hashable, int] = defaultdict(int)
        self._run: Callable[[list[int]], None] = self._run_chain if chains else self._run_blocks

    def run(self, hash_ids: list[int], timestamp_ms: float = 0.0) -> None:
        """Take one request."""
        self._now_s = max(self._now_s, timestamp_ms / 1000)
        self._run(hash_ids)

    def _run_blocks(self, hash_ids: list[int]) -> None:
        held, policy = self._held, self._policy
        touch, missed, insert, victims, evicted = (
            policy.touch, policy.missed, policy.insert, policy.victims, policy.evicted
        )  # fmt: skip
        room = self.capacity - len(held)
        is_prefix = True
        for block, context in zip(hash_ids, _contexts(len(hash_ids)), strict=False):
            if block in held:
                if is_prefix:
                    self.hits += 1
                touch(block, context)
                continue
            is_prefix = False
            missed(block)
            if room:
                room -= 1
            else:
                out = victims(1)
                evicted(out)
                held.remove(out[0])
            held.add(block)
            insert(block, context=context)

    def _run_chain(self, hash_ids: list[int]) -> None:
        held, policy = self._held, self._policy
        parent: tuple[int, ...] = ()
        for block, context in zip(hash_ids, _contexts(len(hash_ids)), strict=False):
            if block in held:
                self.hits += 1
                policy.touch(block, context)
            else:
                policy.missed(block)
                if len(held) >= self.capacity and not self._evict_leaf(parent):
                    return
                held.add(block)
                policy.insert(block, context=context)
                if parent:
                    self._parent[block] = parent[0]
                    self._children[parent[0]] += 1
                    policy.set_evictable(parent[0], False)
            parent = (block,)

    def _evict_leaf(self, protected: tuple[int, ...]) -> bool:
        try:
            victims = self._policy.victims(1, protected)
        except EvictionError:
            return False
        self._policy.evicted(victims)
        (leaf,) = victims
        self._held.remove(leaf)
        if leaf in self._parent:
            parent = self._parent.pop(leaf)
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                self._policy.set_evictable(parent, True)
        return True


def replay(requests: Iterable[Request], simulations: Iterable[Simulation]) -> None:
    """Give each request to each simulation."""
    runs = [simulation.run for simulation in simulations]
    for request in requests:
        for run in runs:
            run(request.hash_ids, request.timestamp_ms)
