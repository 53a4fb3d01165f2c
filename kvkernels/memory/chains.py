"""Cached blocks as the trees that shared prefixes make of them: who stands behind whom, and which may go."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from kvkernels.memory.eviction import BlockContext, EvictionError, EvictionPolicy, NotEnoughEvictable, NothingEvictable

#: A hash and the block that holds, or held, its tokens.
Pair = tuple[bytes, int]


class Worth(NamedTuple):
    """What the caller says of a block for the policies that look at it."""

    priority: int = 0
    ttl_s: float | None = None


class Entry:
    """A cached block."""

    __slots__ = ("block", "children", "context", "holds", "key", "locks", "parent", "users")

    def __init__(self, key: bytes, block: int, parent: Entry | None) -> None:
        self.key = key
        self.block = block
        self.parent = parent
        self.context: BlockContext = BlockContext(parent.context.depth + 1, parent.key) if parent else BlockContext()
        self.children: set[Entry] | None = None
        self.holds = 0  # of callers
        self.users = 0  # holds, and reservations of what comes behind it
        self.locks = 0  # users, and children that are locked


class Chains:
    """The books of a prefix cache; its owner has a lock, and calls under it.

    A block is in one of three states::

        entries    readable; evictable while it has no child and no user
        draining   dropped while it had users: unreadable, and its block not yet free
        gone       the caller's

    An entry with a locked descendant is locked itself, so that ``len(entries) - num_locked`` blocks can be evicted one
    after another, leaves first.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.entries: dict[bytes, Entry] = {}
        self.draining: dict[bytes, Entry] = {}
        self.by_block: dict[int, Entry] = {}
        self.num_locked = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that are not the caller's."""
        return len(self.by_block)

    @property
    def num_evictable(self) -> int:
        """Blocks that can be evicted one after another."""
        return len(self.entries) - self.num_locked

    def match(self, hashes: Sequence[bytes]) -> list[Entry]:
        """The entries of the first hashes, up to one that is not cached."""
        found: list[Entry] = []
        for key in hashes:
            entry = self.entries.get(key)
            if entry is None:
                break
            found.append(entry)
        return found

    def add(self, key: bytes, block: int, parent: Entry | None, worth: Worth) -> Entry:
        """A new block, behind another or as the beginning of a prompt."""
        entry = Entry(key, block, parent)
        self.policy.insert(key, priority=worth.priority, ttl=worth.ttl_s, context=entry.context)
        self.entries[key] = entry
        self.by_block[block] = entry
        if parent is not None:
            if parent.children is None:
                parent.children = set()
            if not parent.children:
                self.policy.set_evictable(parent.key, False)
            parent.children.add(entry)
        return entry

    def use(self, entry: Entry) -> None:
        """One user more, for whom it stays."""
        if entry.users == 0 and not entry.children:  # with children it is not evictable anyway
            self.policy.set_evictable(entry.key, False)
        entry.users += 1
        self._lock(entry)

    def unuse(self, entry: Entry) -> Pair | None:
        """One user less; its block, if it was draining for this one alone."""
        entry.users -= 1
        if self.draining.get(entry.key) is entry:
            if entry.users:
                return None
            del self.draining[entry.key], self.by_block[entry.block]
            return entry.key, entry.block
        self._unlock(entry)
        self._let_go(entry)
        return None

    def evict(self, count: int) -> list[Pair]:
        """Take out blocks, leaves first; EvictionError, and nothing has changed, where there are too few."""
        self.check_evictable(count)
        return [self._evict(self.policy.victims(1)) for _ in range(count)]

    def evict_beside(self, tail: Entry | None) -> Pair | None:
        """Take out one block that is not in the chain which ends with ``tail``, if there is one."""
        try:
            return self._evict(self.policy.victims(1, (tail.key,) if tail else ()))
        except EvictionError:
            return None

    def check_evictable(self, count: int) -> None:
        """EvictionError where fewer blocks can be evicted."""
        available = self.num_evictable
        if count > available:
            kind = NotEnoughEvictable if available else NothingEvictable
            raise kind(
                f"PrefixCache: what is evicted must be at most the {available} blocks that may go, got {count}",
                count,
                available,
            )

    def _evict(self, keys: Sequence[Hashable]) -> Pair:
        """Take out the one leaf that is named."""
        entry = self.entries[keys[0]]  # type: ignore[index]
        self.policy.evicted(keys)
        self._forget(entry)
        del self.by_block[entry.block]
        self._leave_parent(entry)
        return entry.key, entry.block

    def choose(self, count: int) -> list[Entry]:
        """What ``evict`` would take out, in order, and nothing changes."""
        self.check_evictable(count)
        chosen: list[Entry] = []
        blocked: list[Entry] = []
        freed: dict[Entry, int] = {}  # children that were chosen
        for _ in range(count):
            entry = self.entries[self.policy.victims(1)[0]]  # type: ignore[index]
            chosen.append(entry)
            self.policy.set_evictable(entry.key, False)
            parent = entry.parent
            if parent is not None:
                freed[parent] = freed.get(parent, 0) + 1
                if freed[parent] == len(parent.children or ()) and not parent.users:
                    self.policy.set_evictable(parent.key, True)
                    blocked.append(parent)
        for entry in chosen:
            self.policy.set_evictable(entry.key, True)
        for entry in blocked:
            self.policy.set_evictable(entry.key, False)
        return chosen

    def evict_these(self, keys: Iterable[bytes]) -> list[Pair]:
        """Take out what ``choose`` gave; the policy is asked, so that it goes on as it does for ``evict``."""
        pairs = []
        for key in keys:
            self.policy.victims(1)
            pairs.append(self._evict((key,)))
        return pairs

    def drop(self, entry: Entry) -> list[Pair]:
        """Take out a block and all behind it; those with users stay, unreadable, until ``unuse``."""
        gone: list[Pair] = []
        parent, was_locked = entry.parent, entry.locks > 0
        left = [entry]
        while left:
            one = left.pop()
            left.extend(one.children or ())
            self.policy.remove(one.key)
            self._forget(one)
            if one.users:
                self.draining[one.key] = one
            else:
                del self.by_block[one.block]
                gone.append((one.key, one.block))
            if one is not entry:
                one.parent = None
        if was_locked and parent is not None:
            self._unlock(parent)
        self._leave_parent(entry)
        return gone

    def drop_all(self) -> list[Pair]:
        """Take out everything, as ``drop`` does."""
        roots = [entry for entry in self.entries.values() if entry.parent is None]
        gone = [pair for entry in roots for pair in self.drop(entry)]
        self.policy.clear()
        return gone

    def _forget(self, entry: Entry) -> None:
        del self.entries[entry.key]
        if entry.locks:
            self.num_locked -= 1

    def _leave_parent(self, entry: Entry) -> None:
        parent, entry.parent = entry.parent, None
        if parent is not None and parent.children is not None:
            parent.children.discard(entry)
            self._let_go(parent)

    def _let_go(self, entry: Entry) -> None:
        if not entry.children and not entry.users:
            self.policy.set_evictable(entry.key, True)

    def _lock(self, entry: Entry | None) -> None:
        while entry is not None:
            entry.locks += 1
            if entry.locks > 1:
                return
            self.num_locked += 1
            entry = entry.parent

    def _unlock(self, entry: Entry | None) -> None:
        while entry is not None:
            entry.locks -= 1
            if entry.locks:
                return
            self.num_locked -= 1
            entry = entry.parent
