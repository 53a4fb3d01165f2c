"""What no policy can pass."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def optimal_hits(accesses: Sequence[int], capacity: int) -> int:
    """The most blocks that can be hit, by one who knows the future and need not keep what is missed.

    L. A. Belady's MIN with bypass: out goes the block, held or just missed, whose next use is furthest away. Prefix
    hits are block hits, so this bounds them too.

    Parameters
    ----------
    accesses : sequence of int
        The blocks of all requests, in order.
    capacity : int
        In blocks.

    Examples
    --------
    >>> optimal_hits([1, 2, 3, 1, 2, 3, 1], 2)
    3
    """
    never = len(accesses)
    upcoming = [never] * len(accesses)
    seen: dict[int, int] = {}
    for position in range(len(accesses) - 1, -1, -1):
        upcoming[position] = seen.get(accesses[position], never)
        seen[accesses[position]] = position
    hits = 0
    held: dict[int, int] = {}  # to the position of the next use
    furthest: list[tuple[int, int]] = []  # (-next use, block); entries that held contradicts are old
    for block, after in zip(accesses, upcoming, strict=True):
        if block in held:
            hits += 1
            del held[block]
        if after == never:
            continue
        held[block] = after
        heapq.heappush(furthest, (-after, block))
        while len(held) > capacity:
            position, out = heapq.heappop(furthest)
            if held.get(out) == -position:
                del held[out]
    return hits
