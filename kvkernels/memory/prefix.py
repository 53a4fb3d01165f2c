"""Which blocks hold which prefixes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from kvkernels.common.arguments import integer
from kvkernels.memory.chains import Chains, Entry, Pair, Worth
from kvkernels.memory.errors import NotCachedError, NotHeldError, ReservationEndedError
from kvkernels.memory.eviction import EvictionPolicy, make_policy
from kvkernels.memory.hashes import BlockHasher, Tokens
from kvkernels.memory.reservations import Fence, Reservation

_CONTEXT = attrgetter("context")
# For policies that size their ghosts by the capacity, where there is none.
_UNBOUNDED_CAPACITY = 1 << 20


class PrefixCache:
    """Blocks by the hash of all tokens up to their end.

    The cache knows block ids and no memory: blocks become its own by ``insert`` and ``commit``, and the caller's again
    as the (hash, block) pairs that methods return.

    Parameters
    ----------
    block_size : int
        Tokens of a block.
    max_cached_blocks : int, optional
        The most blocks that it has at any time, room that is reserved included. None: no limit.
    policy : str or EvictionPolicy
        Which blocks leave first: a name for ``make_policy``, or a policy that nobody else uses.
    salt : bytes
        Keeps tenants, models or weights apart.
    hash : str
        ``xxh3_128``, ``blake3`` or ``sha256``, as ``BlockHasher`` takes it.
    on_access : callable, optional
        Is told of each block that ``lookup`` was asked for, and whether it was found:
        ``kvkernels.observe.AccessStatsCollector().record_access``.

    Raises
    ------
    ValueError
        A size or a name makes no sense.

    Notes
    -----
    Every method may be called from several threads. A method that raises has changed nothing.

    Leaves are evicted before their parents, so that no cached block is unreachable. A block that is held, and so each
    block before it, is not evicted; to pin a prefix, ``hold`` it.

    Hashes are bytes of any length, where each stands for its whole prefix: those of ``compute_block_hashes``, or an
    engine's own. vLLM's, with a group's number in them, work as they are, a call for each group.

    Examples
    --------
    >>> from kvkernels.memory import PrefixCache
    >>> cache = PrefixCache(block_size=4, max_cached_blocks=3, hash="sha256")
    >>> hashes = cache.compute_block_hashes(range(10))
    >>> cache.insert(hashes, [7, 8])
    []
    >>> cache.lookup(cache.compute_block_hashes([0, 1, 2, 3, 9, 9, 9, 9]))
    ([7], 4)
    >>> other = cache.compute_block_hashes([5] * 8)
    >>> [block for _, block in cache.insert(other, [3, 4])]
    [8]
    """

    def __init__(
        self, block_size: int = 16, max_cached_blocks: int | None = None, *, policy: str | EvictionPolicy = "lru",
        salt: bytes = b"", hash: str = "xxh3_128", on_access: Callable[[bytes, bool], object] | None = None,
    ) -> None:  # fmt: skip
        self._on_access = on_access
        self.block_size = integer("PrefixCache: block_size", block_size, "a positive integer", least=1)
        if max_cached_blocks is not None:
            max_cached_blocks = integer(
                "PrefixCache: max_cached_blocks", max_cached_blocks, "an integer from 0", least=0
            )
        self.max_cached_blocks = max_cached_blocks
        self._hasher = BlockHasher(self.block_size, salt=salt, algorithm=hash)
        if isinstance(policy, str):
            policy = make_policy(
                policy, max(1, _UNBOUNDED_CAPACITY if max_cached_blocks is None else max_cached_blocks)
            )
        self._chains = Chains(policy)
        self._lock = threading.RLock()
        self._reserved = 0
        self._version = 0  # grows with each change, so that who planned something sees that there was none
        self._reservations: set[Reservation] = set()
        self._fences: list[Fence] = []
        self._counts = dict.fromkeys(("calls", "call_hits", "blocks", "block_hits", "inserted", "evicted"), 0)

    def compute_block_hashes(
        self, tokens: Tokens, *, parent: bytes | None = None, extra: Iterable[bytes | str | int] = ()
    ) -> list[bytes]:
        """The hash of each whole block of a prompt, as ``BlockHasher.hashes`` gives it."""
        return self._hasher.hashes(tokens, parent=parent, extra=extra)

    # Reading.

    def lookup(self, hashes: Sequence[bytes], *, hold: bool = False) -> tuple[list[int], int]:
        """Find the longest cached prefix.

        Parameters
        ----------
        hashes : sequence of bytes
            Of a prompt's blocks, in order.
        hold : bool
            Keep what is found until ``release``, which takes the first so many of the hashes.

        Returns
        -------
        blocks : list of int
            Of the hashes up to the first that is not cached.
        num_tokens : int
            Tokens in them.
        """
        with self._lock:
            entries = self._chains.match(hashes)
            found = len(entries)
            self._chains.policy.touch_all(hashes[:found], map(_CONTEXT, entries))
            if hold:
                self._hold(entries)
            self._version += bool(found)
            counts = self._counts
            counts["calls"] += bool(hashes)
            counts["call_hits"] += bool(found)
            counts["blocks"] += len(hashes)
            counts["block_hits"] += found
            blocks = [entry.block for entry in entries]
        if self._on_access is not None:
            for place, key in enumerate(hashes):
                self._on_access(key, place < found)
        return blocks, found * self.block_size

    def hold(self, hashes: Sequence[bytes]) -> None:
        """Keep blocks from being evicted until as many ``release``; NotCachedError where one is not cached."""
        with self._lock:
            self._hold([self._cached("hold", "hashes", key) for key in hashes])

    def release(self, hashes: Sequence[bytes]) -> list[Pair]:
        """Undo one hold of each block.

        Returns
        -------
        list of (hash, block)
            Blocks that were dropped while they were held, by this caller last: they are the caller's now.

        Raises
        ------
        NotHeldError
            One of them is not held, or not as often as it is named.
        """
        with self._lock:
            entries: list[Entry] = []
            for key in hashes:
                entry = self._chains.entries.get(key) or self._chains.draining.get(key)
                if entry is None or entry.holds == 0:
                    for one in entries:
                        one.holds += 1
                    raise NotHeldError(f"PrefixCache.release: hashes must be held, got {key.hex()}")
                entry.holds -= 1
                entries.append(entry)
            return self._unuse(entries)

    def __contains__(self, key: object) -> bool:
        """Whether a hash is cached and readable."""
        return key in self._chains.entries

    def __len__(self) -> int:
        """Blocks that are cached and readable."""
        return len(self._chains.entries)

    # Writing.

    def insert(
        self, hashes: Sequence[bytes], blocks: Sequence[int] | npt.NDArray[np.int64], *, parent: bytes | None = None,
        priority: int = 0, ttl_s: float | None = None,
    ) -> list[Pair]:  # fmt: skip
        """Make the blocks of a chain readable.

        Parameters
        ----------
        hashes : sequence of bytes
            In order, each the hash of the block behind the one before it.
        blocks : sequence of int
            The block of each.
        parent : bytes, optional
            The hash of the block before the first; by default they begin a prompt.
        priority : int
            For the policy ``priority``, by which the lowest leave first.
        ttl_s : float, optional
            For the policy ``ttl``: seconds after the last use from which on they are worth nothing.

        Returns
        -------
        list of (hash, block)
            What is the caller's: blocks that were evicted to make room, and of those given the ones that did not become
            the cache's, because their hash has a block already, or because there is no room behind what is held.

        Raises
        ------
        NotCachedError
            The parent is not cached.
        ValueError
            Not one block a hash, a hash or a block twice, a block that is cached under another hash, a hash that is
            cached behind another parent, or a lifetime that is negative.
        """
        with self._lock:
            given = _as_list(blocks)
            known, tail = self._check_insert(hashes, given, parent)
            worth = self._checked_worth("insert", priority, ttl_s)
            return self._append(tail, hashes, given, known, worth, missed=True)

    def _check_insert(
        self, hashes: Sequence[bytes], blocks: list[int], parent: bytes | None
    ) -> tuple[int, Entry | None]:
        """Raise what ``insert`` would; else how many of the hashes are cached, and the last of them or the parent."""
        tail = self._cached("insert", "parent", parent) if parent is not None else None
        self._check_count("insert", hashes, blocks)
        return self._check_chain("insert", tail, hashes, blocks)

    def reserve(
        self, hashes: Sequence[bytes], *, parent: bytes | None = None, priority: int = 0, ttl_s: float | None = None
    ) -> Reservation:
        """Make room for the blocks of a chain that are not cached, before they are copied.

        Parameters
        ----------
        hashes, parent, priority, ttl_s
            As for ``insert``.

        Returns
        -------
        Reservation
            What it is for, and what was evicted. The blocks before it stay until it ends.

        Raises
        ------
        NotCachedError
            The parent is not cached.
        NothingEvictable, NotEnoughEvictable
            There is no room for all of them.
        ValueError
            As for ``insert``.
        """
        with self._lock:
            chains = self._chains
            tail = self._cached("reserve", "parent", parent) if parent is not None else None
            known, tail = self._check_chain("reserve", tail, hashes, None)
            worth = self._checked_worth("reserve", priority, ttl_s)
            missing = list(hashes[known:])
            excess = 0 if self.max_cached_blocks is None else max(0, len(missing) - self._room())
            if tail is not None:
                chains.use(tail)
            try:
                chains.check_evictable(excess)
            except Exception:
                if tail is not None:
                    chains.unuse(tail)
                raise
            for key in missing:
                chains.policy.missed(key)
            evicted = self._evict(excess)
            self._reserved += len(missing)
            reservation = Reservation(missing, evicted, tail, worth, self._end)
            self._reservations.add(reservation)
            return reservation

    def evict(self, count: int) -> list[Pair]:
        """Take out as many blocks as are asked for, in the policy's order, leaves first.

        Raises
        ------
        ValueError
            ``count`` is no integer from 0.
        NothingEvictable, NotEnoughEvictable
            Fewer may go.
        """
        count = integer("PrefixCache.evict: count", count, "an integer from 0", least=0)
        with self._lock:
            return self._evict(count)

    def _evict_these(self, keys: Iterable[bytes]) -> list[Pair]:
        """Take out what ``preview`` said, in its order."""
        with self._lock:
            pairs = self._chains.evict_these(keys)
            self._counts["evicted"] += len(pairs)
            return pairs

    def preview(self, hashes: Sequence[bytes], count: int) -> tuple[list[int], list[Pair]]:
        """What ``lookup`` would find, and what would be evicted then while that is held; nothing changes.

        What ``evict`` takes out is the same by policies that only order blocks; those that adapt to each eviction (ARC,
        S3-FIFO, SIEVE) may change their mind on the way.

        Raises
        ------
        NothingEvictable, NotEnoughEvictable
            As ``evict`` would.
        """
        with self._lock:
            found = self._chains.match(hashes)
            for entry in found:
                self._chains.use(entry)
            try:
                chosen = self._chains.choose(count)
            finally:
                for entry in found:
                    self._chains.unuse(entry)
            return [entry.block for entry in found], [(entry.key, entry.block) for entry in chosen]

    @property
    def num_evictable(self) -> int:
        """Blocks that ``evict`` could take out."""
        return self._chains.num_evictable

    def drop(self, hashes: Iterable[bytes]) -> list[Pair]:
        """Take blocks out, and all behind them; hashes that are not cached are passed over.

        Returns
        -------
        list of (hash, block)
            The caller's. What is held is unreadable at once, and comes from the last ``release``.
        """
        with self._lock:
            self._version += 1
            entries = self._chains.entries
            return [pair for key in hashes if key in entries for pair in self._chains.drop(entries[key])]

    def invalidate(self, block: int) -> list[Pair]:
        """Take out a block whose contents are lost, if it is cached, and all behind it, as ``drop`` does."""
        with self._lock:
            entry = self._chains.by_block.get(block)
            return self.drop([entry.key]) if entry is not None else []

    def reset(self) -> Fence:
        """Take out everything, at once for readers, and say when the last copy of before has ended.

        What reservations commit later does not become readable: the weights may be others.

        Returns
        -------
        Fence
        """
        with self._lock:
            self._version += 1
            freed = self._chains.drop_all()
            for reservation in self._reservations:
                reservation.is_stale = True
            fence = Fence(freed, {*self._chains.draining.values(), *self._reservations})
            if not fence.is_passed:
                self._fences.append(fence)
            return fence

    def get_stats(self) -> dict[str, int | float | None]:
        """Counts since the cache was made, and blocks as they are now.

        Returns
        -------
        dict
            ``calls`` of ``lookup`` and ``call_hits``, which found at least a block; ``blocks`` that were asked for and
            ``block_hits``; ``hit_rate`` by blocks and ``call_hit_rate`` by calls, from 0 to 1, 0 before the first;
            ``inserted`` and ``evicted`` blocks; ``cached_blocks``, and of them ``locked_blocks``, which cannot be
            evicted; ``draining_blocks``, ``reserved_blocks`` and ``max_cached_blocks``.
        """
        with self._lock:
            counts, chains = self._counts, self._chains
            return {
                **counts,
                "hit_rate": counts["block_hits"] / max(1, counts["blocks"]),
                "call_hit_rate": counts["call_hits"] / max(1, counts["calls"]),
                "cached_blocks": len(chains.entries),
                "draining_blocks": len(chains.draining),
                "reserved_blocks": self._reserved,
                "locked_blocks": chains.num_locked,
                "max_cached_blocks": self.max_cached_blocks,
            }

    # Under the lock.

    def _room(self) -> int:
        return (self.max_cached_blocks or 0) - self._chains.num_blocks - self._reserved

    def _cached(self, method: str, argument: str, key: bytes) -> Entry:
        entry = self._chains.entries.get(key)
        if entry is None:
            raise NotCachedError(f"PrefixCache.{method}: {argument} must be cached, got {key!r}")
        return entry

    def _hold(self, entries: Sequence[Entry]) -> None:
        self._version += 1
        for entry in entries:
            entry.holds += 1
            self._chains.use(entry)

    def _unuse(self, entries: Iterable[Entry]) -> list[Pair]:
        self._version += 1
        pairs = []
        for entry in entries:
            pair = self._chains.unuse(entry)
            if pair is not None:
                pairs.append(pair)
                self._tell_fences(entry)
        return pairs

    def _tell_fences(self, ended: object) -> None:
        for fence in self._fences:
            fence._ended(ended)
        self._fences = [fence for fence in self._fences if not fence.is_passed]

    def _evict(self, count: int) -> list[Pair]:
        self._version += 1
        pairs = self._chains.evict(count)
        self._counts["evicted"] += len(pairs)
        return pairs

    def _checked_worth(self, method: str, priority: int, ttl_s: float | None) -> Worth:
        if ttl_s is not None and not ttl_s >= 0:
            raise ValueError(f"PrefixCache.{method}: ttl_s must be seconds from 0, got {ttl_s!r}")
        return Worth(integer(f"PrefixCache.{method}: priority", priority), ttl_s)

    def _check_count(self, method: str, hashes: Sequence[bytes], blocks: list[int]) -> None:
        if len(blocks) != len(hashes):
            raise ValueError(f"PrefixCache.{method}: blocks must be one a hash, {len(hashes)}, got {len(blocks)}")

    def _check_chain(
        self, method: str, tail: Entry | None, hashes: Sequence[bytes], blocks: list[int] | None
    ) -> tuple[int, Entry | None]:
        """How many of the hashes are cached already, and the last of them."""
        entries, by_block = self._chains.entries, self._chains.by_block
        if blocks is not None and len(set(blocks)) < len(blocks):
            raise ValueError(f"PrefixCache.{method}: blocks must differ, got one twice in {blocks}")
        known = 0
        for key in hashes:
            entry = entries.get(key)
            if entry is None:
                break
            if entry.parent is not tail:
                raise ValueError(f"PrefixCache.{method}: hashes[{known}] must be cached behind its parent, got {key!r}")
            if blocks is not None and blocks[known] != entry.block and blocks[known] in by_block:
                raise ValueError(f"PrefixCache.{method}: blocks[{known}] must not be cached, got {blocks[known]}")
            known += 1
            tail = entry
        self._check_new(method, known, hashes[known:], blocks[known:] if blocks is not None else None)
        return known, tail

    def _check_new(self, method: str, first: int, hashes: Sequence[bytes], blocks: list[int] | None) -> None:
        if len(set(hashes)) < len(hashes):
            raise ValueError(f"PrefixCache.{method}: hashes must differ, got one twice")
        for i, key in enumerate(hashes, first):
            if not isinstance(key, bytes):
                raise ValueError(f"PrefixCache.{method}: hashes[{i}] must be bytes, got {key!r}")
            if key in self._chains.entries:
                raise ValueError(f"PrefixCache.{method}: hashes[{i}] must be cached behind its parent, got {key!r}")
        for i, block in enumerate(blocks or (), first):
            if type(block) is not int or block < 0:
                integer(f"PrefixCache.{method}: blocks[{i}]", block, "an integer from 0", least=0)
            if block in self._chains.by_block:
                raise ValueError(f"PrefixCache.{method}: blocks[{i}] must not be cached, got {block}")

    def _append(
        self, tail: Entry | None, hashes: Sequence[bytes], blocks: list[int], known: int, worth: Worth, *, missed: bool
    ) -> list[Pair]:
        """Add what is not known behind ``tail``, the last that is; returns what is the caller's."""
        self._version += 1
        chains = self._chains
        pairs: list[Pair] = []
        if known:
            entries = chains.entries
            pairs = [(k, b) for k, b in zip(hashes[:known], blocks, strict=False) if entries[k].block != b]
        for i in range(known, len(hashes)):
            key = hashes[i]
            if key in chains.draining:
                return pairs + list(zip(hashes[i:], blocks[i:], strict=True))
            if missed:
                chains.policy.missed(key)
            if self.max_cached_blocks is not None and self._room() <= 0:
                evicted = chains.evict_beside(tail)
                if evicted is None:
                    return pairs + list(zip(hashes[i:], blocks[i:], strict=True))
                self._counts["evicted"] += 1
                pairs.append(evicted)
            tail = chains.add(key, blocks[i], tail, worth)
            self._counts["inserted"] += 1
        return pairs

    def _end(self, reservation: Reservation, blocks: Sequence[int] | None) -> list[Pair]:
        """Commit a reservation, or abort it where there are no blocks."""
        with self._lock:
            if reservation.is_ended:
                raise ReservationEndedError("Reservation: it must be open, got one that was committed or aborted")
            tail, missing = reservation._tail, reservation.missing
            given = [] if blocks is None else _as_list(blocks)
            is_lost = reservation.is_stale or (tail is not None and self._chains.entries.get(tail.key) is not tail)
            known, end = 0, tail
            if blocks is not None:
                self._check_count("commit", missing, given)
                if not is_lost:
                    known, end = self._check_chain("commit", tail, missing, given)
            reservation.is_ended = True
            self._reservations.discard(reservation)
            self._reserved -= len(missing)
            if blocks is None or is_lost:
                pairs = list(zip(missing, given, strict=False))
            else:
                pairs = self._append(end, missing, given, known, reservation._worth, missed=False)
            if tail is not None:
                pairs += self._unuse([tail])
            self._tell_fences(reservation)
            return pairs


def _as_list(blocks: Sequence[int] | npt.NDArray[np.int64]) -> list[int]:
    return blocks.tolist() if isinstance(blocks, np.ndarray) else list(blocks)
