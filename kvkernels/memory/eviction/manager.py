"""Eviction by need: so many tokens must go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

from kvkernels.common.arguments import integer
from kvkernels.memory.eviction.make import make_policy
from kvkernels.memory.eviction.protocol import NotEnoughEvictable, NothingEvictable


class EvictionManager:
    """Keys with sizes, some of them pinned, of which a policy says what goes when room is needed.

    Parameters
    ----------
    policy : str
        A name that ``make_policy`` takes.
    capacity : int
        The most keys that are held at a time, for the policies that keep ghosts.
    clock : callable
        The time in seconds.

    Raises
    ------
    ValueError
        An unknown policy, or a capacity below 1.

    Notes
    -----
    Thread-safe.

    Examples
    --------
    >>> from kvkernels.memory import EvictionManager
    >>> manager = EvictionManager("lru", 100)
    >>> for key in "abc":
    ...     manager.add(key, num_tokens=64)
    >>> manager.pin("a")
    >>> manager.evict(100)  # b alone is too small
    ['b', 'c']
    """

    def __init__(self, policy: str = "lru", capacity: int = 65_536, *, clock: Callable[[], float] = time.monotonic):
        self._lock = threading.Lock()
        self._policy = make_policy(policy, capacity, clock=clock)
        self._tokens: dict[Hashable, int] = {}
        self._pins: dict[Hashable, int] = {}
        self._pinned_tokens = 0
        self._total_tokens = 0

    def add(self, key: Hashable, num_tokens: int = 1, *, priority: int = 0, ttl: float | None = None) -> None:
        """Take a key in.

        Parameters
        ----------
        key : hashable
        num_tokens : int
            What goes with it, 1 or more.
        priority, ttl
            As ``EvictionPolicy.insert`` has them.

        Raises
        ------
        ValueError
            A key that is held, or an argument out of range.
        """
        num_tokens = integer("EvictionManager.add: num_tokens", num_tokens, "an integer from 1", least=1)
        with self._lock:
            if key not in self._tokens:
                self._policy.missed(key)
            self._policy.insert(key, priority=priority, ttl=ttl)
            self._tokens[key] = num_tokens
            self._total_tokens += num_tokens

    def access(self, key: Hashable) -> None:
        """A key was used; KeyError if it is not held."""
        with self._lock:
            self._policy.touch(key)

    def pin(self, key: Hashable) -> None:
        """Keep a key until ``unpin`` was called as often; KeyError if it is not held."""
        with self._lock:
            self._policy.set_evictable(key, False)
            if key not in self._pins:
                self._pinned_tokens += self._tokens[key]
            self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: Hashable) -> None:
        """Take a pin back; KeyError if the key is not held, ValueError if it is not pinned."""
        with self._lock:
            if key not in self._tokens:
                raise KeyError(f"EvictionManager.unpin: key must be held, got {key!r}")
            if key not in self._pins:
                raise ValueError(f"EvictionManager.unpin: key must be pinned, got {key!r}")
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._pinned_tokens -= self._tokens[key]
                self._policy.set_evictable(key, True)

    def remove(self, key: Hashable) -> None:
        """A key left by itself, pinned or not; KeyError if it is not held."""
        with self._lock:
            self._policy.remove(key)
            self._forget(key)

    def evict(self, num_tokens: int) -> list[Hashable]:
        """Give up keys until so many tokens are free.

        Parameters
        ----------
        num_tokens : int
            0 evicts nothing.

        Returns
        -------
        list
            The keys that went, in the policy's order, and none more than needed.

        Raises
        ------
        ValueError
            ``num_tokens`` is no integer from 0.
        NothingEvictable
            There is no key, or all are pinned.
        NotEnoughEvictable
            All that are not pinned come to fewer tokens. Nothing has changed.
        """
        num_tokens = integer("EvictionManager.evict: num_tokens", num_tokens, "an integer from 0", least=0)
        with self._lock:
            available = self._total_tokens - self._pinned_tokens
            if num_tokens > available:
                kind = NotEnoughEvictable if available else NothingEvictable
                raise kind(
                    f"EvictionManager.evict: num_tokens must be at most the {available} that may be evicted, "
                    f"got {num_tokens}",
                    num_tokens,
                    available,
                )
            victims = self._enough(num_tokens)
            self._policy.evicted(victims)
            for key in victims:
                self._forget(key)
            return victims

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, key: object) -> bool:
        return key in self._tokens

    def _enough(self, num_tokens: int) -> list[Hashable]:
        """The first victims that come to so many tokens, of which there are enough."""
        asked = 1
        while num_tokens:
            asked = min(2 * asked, self._policy.num_evictable)
            victims = self._policy.victims(asked)
            free = 0
            for count, key in enumerate(victims, 1):
                free += self._tokens[key]
                if free >= num_tokens:
                    return victims[:count]
        return []

    def _forget(self, key: Hashable) -> None:
        tokens = self._tokens.pop(key)
        self._total_tokens -= tokens
        if self._pins.pop(key, 0):
            self._pinned_tokens -= tokens
