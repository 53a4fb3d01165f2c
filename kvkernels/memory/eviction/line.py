"""A line of keys that policies are made of: keys join at its end and leave from its front, some wait beside it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Set


class Line:
    """Keys in the order of their places, which are integers that grow.

    ::

        front                                  end
        order     4:a   9:c   12:f   13:b          joined by join(), each with a place above all others
        aside     6:d*  8:e                        passed over by first() while they might not leave
        returned  6:d                              of those, the ones that may leave again (marked *)

    What may not leave is passed over once and put aside, so that later searches do not meet it; what may leave again
    counts where its place is. Each operation is O(1) amortised, but for a key that returns from aside: O(log r) with r
    such keys, and mostly r is small, as they are the next to leave.
    """

    __slots__ = ("_at", "_returned", "aside", "order")

    def __init__(self) -> None:
        self.order: OrderedDict[Hashable, int] = OrderedDict()
        self.aside: dict[Hashable, int] = {}
        self._returned: list[int] = []  # negative places, so that the next to leave is the last
        self._at: dict[int, Hashable] = {}

    def __len__(self) -> int:
        return len(self.order) + len(self.aside)

    def __contains__(self, key: object) -> bool:
        return key in self.order or key in self.aside

    def join(self, key: Hashable, place: int) -> None:
        """A key that is not in it goes to its end."""
        self.order[key] = place

    def leave(self, key: Hashable) -> int:
        """A key goes, wherever it is, and KeyError says that it is nowhere; returns its place."""
        place = self.order.pop(key, None)
        if place is None:
            place = self.aside.pop(key)
            self._not_returned(place)
        return place

    def back(self, key: Hashable) -> None:
        """A key of it may leave again."""
        place = self.aside.get(key)
        if place is not None and place not in self._at:
            self._at[place] = key
            insort(self._returned, -place)

    def hold(self, key: Hashable) -> None:
        """A key of it may not leave any longer."""
        place = self.aside.get(key)
        if place is not None:
            self._not_returned(place)

    def _not_returned(self, place: int) -> None:
        if self._at.pop(place, None) is not None:
            del self._returned[bisect_left(self._returned, -place)]

    def first(self, n: int, blocked: Set[Hashable], kept: Set[Hashable]) -> list[Hashable]:
        """Up to ``n`` keys in order, without those of ``blocked``, which it puts aside, and those of ``kept``."""
        if n == 1 and not self._returned:
            front = next(iter(self.order), None)
            if self.order and front not in blocked and front not in kept:
                return [front]
        found: list[Hashable] = []
        passed: list[Hashable] = []
        # More of them than this cannot be reached.
        returned = [self._at[-place] for place in self._returned[-n - len(kept) :]]
        for key, place in self.order.items():
            while returned and len(found) < n and self.aside[returned[-1]] < place:
                other = returned.pop()
                if other not in kept:
                    found.append(other)
            if len(found) >= n:
                break
            if key in blocked:
                passed.append(key)
            elif key not in kept:
                found.append(key)
        while returned and len(found) < n:
            other = returned.pop()
            if other not in kept:
                found.append(other)
        for key in passed:
            self.aside[key] = self.order.pop(key)
        return found
