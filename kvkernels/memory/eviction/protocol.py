"""What every eviction policy does, and the errors of one that cannot."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Set
from typing import ClassVar, NamedTuple

from kvkernels.common.arguments import integer

_NONE: frozenset[Hashable] = frozenset()


class BlockContext(NamedTuple):
    """Where in its chain a block is; policies that do not look at it take None as well."""

    depth: int = 0  #: blocks before it
    parent: Hashable | None = None  #: the key of the block before it


class EvictionError(RuntimeError):
    """There are too few keys to evict; nothing has changed.

    ``requested`` is the number asked for, ``available`` the number that there is.
    """

    def __init__(self, message: str, requested: int, available: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class NothingEvictable(EvictionError):
    """No key at all may be evicted."""


class NotEnoughEvictable(EvictionError):
    """Some keys may be evicted, but fewer than were asked for."""


class EvictionPolicy(ABC):
    """An order in which keys leave.

    It holds keys alone. The owner says what happens to them, and takes out what it decides to:

    - a key comes in: ``missed(key)``; if there is no room, ``victims(n)`` and, once they are gone, ``evicted`` with
      them; then ``insert(key)``;
    - a key is used: ``touch(key)``;
    - a key goes for another reason than room: ``remove(key)``.

    ``victims`` changes nothing that a caller can see. A policy whose paper changes its state while it looks for a
    victim (S3-FIFO, SIEVE) does so in ``evicted``, if the keys are the first that the last call of ``victims`` gave and
    nothing else has happened in between; other keys simply leave.

    A key that is not evictable keeps its place: ``set_evictable(key, True)`` puts it where it would be had it been
    evictable all the time, and ``touch`` works on it. (In S3-FIFO and SIEVE, whose hands pass over it, it is looked at
    next.) Such keys do not make the search for victims longer: each is passed over once after ``set_evictable(key,
    False)`` or a touch, and then waits aside.

    Parameters
    ----------
    capacity : int
        The most keys that the owner will hold; the policies with ghosts size them by it. It is not enforced.
    clock : callable
        The time in seconds.

    Raises
    ------
    ValueError
        A capacity below 1; of the methods, ``insert`` of a key that is held.
    KeyError
        Of the methods but ``insert`` and ``missed``: a key that is not held.

    Notes
    -----
    Not thread-safe: whoever owns the keys has a lock, and calls under it.
    """

    #: By which ``make_policy`` makes it.
    name: ClassVar[str]

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = integer(f"{type(self).__name__}: capacity", capacity, "an integer from 1", least=1)
        self._clock = clock
        self._blocked: set[Hashable] = set()

    @abstractmethod
    def insert(
        self, key: Hashable, *, priority: int = 0, ttl: float | None = None, context: BlockContext | None = None
    ) -> None:
        """Take a key in, evictable.

        Parameters
        ----------
        key : hashable
        priority : int
            Of policies that look at it, those of lower priority leave first.
        ttl : float, optional
            Seconds from now after which the key is worth nothing; None is for ever.
        context : BlockContext, optional
        """

    @abstractmethod
    def touch(self, key: Hashable, context: BlockContext | None = None) -> None:
        """A held key was used."""

    def touch_all(self, keys: Iterable[Hashable], contexts: Iterable[BlockContext | None]) -> None:
        """Held keys were used, one after another: ``touch`` of each, which a policy may do faster."""
        for key, context in zip(keys, contexts, strict=True):
            self.touch(key, context)

    def missed(self, key: Hashable) -> None:  # noqa: B027
        """A key was asked for that is not held, and is about to be inserted; before room is made for it."""

    @abstractmethod
    def victims(self, n: int, protected: Collection[Hashable] = ()) -> list[Hashable]:
        """The keys to evict, in order.

        Parameters
        ----------
        n : int
        protected : set or other collection
            Keys that are to stay this once.

        Returns
        -------
        list of ``n`` keys

        Raises
        ------
        ValueError
            ``n`` is no integer from 0.
        NothingEvictable
            ``n`` is positive, and no key may be evicted.
        NotEnoughEvictable
            Fewer than ``n`` may.
        """

    def evicted(self, keys: Iterable[Hashable]) -> None:
        """These left to make room, from which policies with ghosts learn."""
        for key in self._held(keys):
            self.remove(key)

    @abstractmethod
    def remove(self, key: Hashable) -> None:
        """A key left for another reason, and is forgotten."""

    def set_evictable(self, key: Hashable, evictable: bool) -> None:
        """Say whether a held key may be among the victims."""
        if key not in self:
            raise self._unknown("set_evictable", key)
        if not evictable and key not in self._blocked:
            self._blocked.add(key)
            self._block(key)
        elif evictable and key in self._blocked:
            self._blocked.discard(key)
            self._unblock(key)

    @abstractmethod
    def clear(self) -> None:
        """Forget everything, ghosts too."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of keys held."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether a key is held."""

    @property
    def num_evictable(self) -> int:
        """The number of keys that ``victims`` chooses from."""
        return len(self) - len(self._blocked)

    @abstractmethod
    def _block(self, key: Hashable) -> None:
        """A key has been put into ``_blocked``."""

    @abstractmethod
    def _unblock(self, key: Hashable) -> None:
        """A key has been taken out of ``_blocked``."""

    def _held(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """The keys, all of which are held, and none twice; else KeyError."""
        given = list(keys)
        if len(given) == 1 and given[0] in self:
            return given
        if len(set(given)) < len(given):
            raise KeyError(f"{type(self).__name__}.evicted: keys must be different, got {given!r}")
        for key in given:
            if key not in self:
                raise self._unknown("evicted", key)
        return given

    def _check_victims(self, n: int, protected: Collection[Hashable]) -> Set[Hashable]:
        """The keys to pass over if there are enough others; else the error for it."""
        if type(n) is not int or n < 0:
            n = integer(f"{type(self).__name__}.victims: n", n, "an integer from 0", least=0)
        kept = {key for key in protected if key in self and key not in self._blocked} if protected else _NONE
        available = len(self) - len(self._blocked) - len(kept)
        if n > available:
            kind = NotEnoughEvictable if available else NothingEvictable
            raise kind(
                f"{type(self).__name__}.victims: n must be at most the {available} keys that may be evicted, got {n}",
                n,
                available,
            )
        return kept

    def _unknown(self, method: str, key: Hashable) -> KeyError:
        return KeyError(f"{type(self).__name__}.{method}: key must be held, got {key!r}")

    def _known(self, key: Hashable) -> ValueError:
        return ValueError(f"{type(self).__name__}.insert: key must not be held, got {key!r}")
