"""Which chunk of a host pool holds what, while copies go in and out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvkernels.memory import EvictionError, Fence, KVHandle, KVPool, PrefixCache, make_policy


@dataclass
class _Pending:
    """A chunk that is being stored."""

    order: int
    chunk: int
    parent: bytes | None
    is_lost: bool = False  # its copy failed, or the books were reset


@dataclass(frozen=True)
class Reserved:
    """Chunks to store into.

    Attributes
    ----------
    keys : list of bytes
        Those that were neither cached nor being stored.
    chunks : list of int
        A chunk for each.
    evicted : list of bytes
        What left for them.
    """

    keys: list[bytes]
    chunks: list[int]
    evicted: list[bytes]


class HostBooks:
    """A prefix cache over the chunks of a pool, for copies that take time and may fail.

    ::

        free ──reserve──▶ pending ──commit──▶ cached ──hold──▶ read by a copy ──release──▶ cached
          ▲                  │ fail              │ evicted, or dropped by fail and reset     │
          └──────────────────┴───────────────────┴───────────────────────────────────────────┘
                        never while a copy still writes or reads it

    Keys are bytes of any length. Where a key has a parent, it leaves before it.

    Parameters
    ----------
    num_chunks : int
        Of the pool.
    policy : str
        A name that ``make_policy`` takes.

    Raises
    ------
    ValueError
        No chunks, or an unknown policy.

    Notes
    -----
    Safe to use from several threads. It owns no memory: that is the worker's.

    Examples
    --------
    >>> books = HostBooks(2)
    >>> books.reserve([b"a", b"b"], [None, b"a"]).chunks
    [0, 1]
    >>> books.state(b"a")
    'pending'
    >>> books.commit([b"a", b"b"])
    [b'a', b'b']
    >>> books.hold([b"a"])
    [0]
    >>> books.reserve([b"c"], [None]).evicted
    [b'b']
    """

    def __init__(self, num_chunks: int, policy: str = "lru") -> None:
        self._pool = KVPool(num_chunks, 1)
        # Never full by itself, since the pool is: who evicts is here. Keys come from the engine, none is hashed.
        self._cache = PrefixCache(1, None, policy=make_policy(policy, num_chunks), hash="sha256")
        self._handles: dict[int, KVHandle] = {}
        self._pending: dict[bytes, _Pending] = {}
        self._order = itertools.count()
        self._fences: list[Fence] = []
        self._lock = threading.RLock()

    def state(self, key: bytes) -> str:
        """``cached``, ``pending`` (being stored) or ``missing``; changes nothing."""
        if key in self._cache:
            return "cached"
        pending = self._pending.get(key)
        return "pending" if pending is not None and not pending.is_lost else "missing"

    def reserve(self, keys: Sequence[bytes], parents: Sequence[bytes | None]) -> Reserved | None:
        """Make room for what is not cached yet.

        Parameters
        ----------
        keys : sequence of bytes
        parents : sequence of bytes or None
            The key of the chunk before each in its prompt, as far as there is one that matters.

        Returns
        -------
        Reserved or None
            None, and nothing has changed, where there is no room: neither what is asked for, nor what is before it,
            nor what a copy reads or writes is evicted.
        """
        with self._lock:
            cached = [key for key in keys if key in self._cache]
            missing = {
                key: parent
                for key, parent in zip(keys, parents, strict=True)
                if key not in self._cache and key not in self._pending
            }
            before = [parent for parent in missing.values() if parent is not None and parent in self._cache]
            excess = len(missing) - self._pool.num_free_blocks
            evicted: list[tuple[bytes, int]] = []
            if excess > 0:
                self._cache.hold([*cached, *before])
                try:
                    evicted = self._cache.evict(excess)
                except EvictionError:
                    return None
                finally:
                    self._cache.release([*cached, *before])
                self._free(chunk for _, chunk in evicted)
            if cached:
                self._cache.lookup(cached)  # a use of each
            if not missing:
                return Reserved([], [], [])
            handles = self._pool.split(self._pool.alloc(len(missing)))
            chunks = [int(handle.block_array[0]) for handle in handles]
            self._handles.update(zip(chunks, handles, strict=True))
            for (key, parent), chunk in zip(missing.items(), chunks, strict=True):
                self._pending[key] = _Pending(next(self._order), chunk, parent)
            return Reserved(list(missing), chunks, [key for key, _ in evicted])

    def commit(self, keys: Iterable[bytes]) -> list[bytes]:
        """Their copies have ended: make them readable, but for those that are lost.

        Returns
        -------
        list of bytes
            What became readable, in the order of the reservations.
        """
        with self._lock:
            ended = sorted(((self._pending.pop(key), key) for key in keys if key in self._pending), key=_by_order)
            self._free(pending.chunk for pending, _ in ended if pending.is_lost)
            stored: list[bytes] = []
            for run in _chains([(pending, key) for pending, key in ended if not pending.is_lost]):
                parent = run[0][0].parent
                if parent is not None and parent not in self._cache:
                    parent = None  # it left in the meantime
                names = [key for _, key in run]
                back = self._cache.insert(names, [pending.chunk for pending, _ in run], parent=parent)
                self._free(chunk for _, chunk in back)
                stored += [key for key in names if key in self._cache]
            return stored

    def hold(self, keys: Sequence[bytes]) -> list[int]:
        """The chunks of cached keys, kept until ``release``; a use of each. NotCachedError where one is not cached."""
        with self._lock:
            self._cache.hold(keys)
            return self._cache.lookup(keys)[0]

    def release(self, keys: Iterable[bytes]) -> None:
        """Their copies have ended. NotHeldError where one is not held."""
        with self._lock:
            self._free(chunk for _, chunk in self._cache.release(list(keys)))

    def fail(self, keys: Iterable[bytes]) -> list[bytes]:
        """A copy of these failed: what is being stored will not be readable, what is cached is dropped.

        A copy that is still under way has to be ended by ``commit`` or ``release`` all the same.

        Returns
        -------
        list of bytes
            Those that were readable and all behind them, but for what another copy still reads.
        """
        with self._lock:
            dropped: list[bytes] = []
            for key in keys:
                if key in self._pending:
                    self._pending[key].is_lost = True
                elif key in self._cache:
                    dropped.append(key)
                    pairs = self._cache.drop([key])
                    dropped += [gone for gone, _ in pairs if gone != key]
                    self._free(chunk for _, chunk in pairs)
            return dropped

    def reset(self) -> None:
        """Forget everything; chunks that copies read or write are given out again only once those have ended."""
        with self._lock:
            fence = self._cache.reset()
            self._free(chunk for _, chunk in fence.freed)
            for pending in self._pending.values():
                pending.is_lost = True
            self._fences = [one for one in (*self._fences, fence) if not one.is_passed]

    @property
    def is_draining(self) -> bool:
        """Whether copies of before a reset or a failure have not ended."""
        with self._lock:
            self._fences = [one for one in self._fences if not one.is_passed]
            return bool(self._fences) or any(pending.is_lost for pending in self._pending.values())

    def stats(self) -> dict[str, int]:
        """Chunks: ``chunks``, and of them ``cached``, ``pending`` and ``free``; ``evicted`` since the beginning."""
        with self._lock:
            cache = self._cache.get_stats()
            return {
                "chunks": self._pool.num_blocks,
                "cached": len(self._cache),
                "pending": len(self._pending),
                "free": self._pool.num_free_blocks,
                "evicted": int(cache["evicted"] or 0),
            }

    def _free(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._pool.free(self._handles.pop(chunk))


def _by_order(item: tuple[_Pending, bytes]) -> int:
    return item[0].order


def _chains(items: Sequence[tuple[_Pending, bytes]]) -> list[list[tuple[_Pending, bytes]]]:
    """Cut where an item does not stand behind the one before it."""
    runs: list[list[tuple[_Pending, bytes]]] = []
    for pending, key in items:
        if runs and pending.parent is not None and pending.parent == runs[-1][-1][1]:
            runs[-1].append((pending, key))
        else:
            runs.append([(pending, key)])
    return runs
