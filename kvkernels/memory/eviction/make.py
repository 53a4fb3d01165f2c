"""Policies by their names."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvkernels.memory.eviction.arc import ARC
from kvkernels.memory.eviction.buckets import LFU, Priority
from kvkernels.memory.eviction.chain import Chain
from kvkernels.memory.eviction.lru import FIFO, LRU
from kvkernels.memory.eviction.protocol import EvictionPolicy
from kvkernels.memory.eviction.s3fifo import S3FIFO
from kvkernels.memory.eviction.sieve import SIEVE
from kvkernels.memory.eviction.ttl import TTL

#: The policies by the names that ``make_policy`` takes.
POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (LRU, LFU, FIFO, TTL, Priority, ARC, S3FIFO, SIEVE, Chain)
}


def make_policy(name: str, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> EvictionPolicy:
    """A policy by its name.

    Parameters
    ----------
    name : str
        One of ``POLICIES``.
    capacity : int
        The most keys that its owner will hold.
    clock : callable
        The time in seconds.

    Returns
    -------
    EvictionPolicy

    Raises
    ------
    ValueError
        An unknown name, or a capacity below 1.

    Examples
    --------
    >>> from kvkernels.memory import make_policy
    >>> lru = make_policy("lru", 3)
    >>> for key in "abc":
    ...     lru.insert(key)
    >>> lru.touch("a")
    >>> lru.victims(2)
    ['b', 'c']
    """
    if name not in POLICIES:
        raise ValueError(f"make_policy: name must be one of {', '.join(map(repr, POLICIES))}, got {name!r}")
    return POLICIES[name](capacity, clock=clock)
