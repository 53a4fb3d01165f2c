"""Room in a prefix cache for blocks whose copies are under way, and what a reset waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from kvkernels.memory.chains import Entry, Pair, Worth


class Reservation:
    """Room for the blocks of a chain that are not cached yet; ``PrefixCache.reserve`` makes one.

    ::

        reserve ──▶ copy into blocks ──▶ commit   readable from here on
                         │
                         └── it failed ─▶ abort   as if nothing had been reserved, but for what was evicted

    Attributes
    ----------
    missing : list of bytes
        The hashes that it is for, in order.
    evicted : list of (hash, block)
        What made room for it: the caller's now.

    Notes
    -----
    As a context manager it aborts at the end what was not committed. Safe to use from several threads.
    """

    def __init__(
        self, missing: list[bytes], evicted: list[Pair], tail: Entry | None, worth: Worth,
        end: Callable[[Reservation, Sequence[int] | None], list[Pair]],
    ) -> None:  # fmt: skip
        self.missing = missing
        self.evicted = evicted
        self.is_ended = False
        self.is_stale = False  # the cache was reset
        self._tail = tail
        self._worth = worth
        self._end = end

    def commit(self, blocks: Sequence[int]) -> list[Pair]:
        """Make what was copied readable.

        Parameters
        ----------
        blocks : sequence of int
            The block of each of ``missing``.

        Returns
        -------
        list of (hash, block)
            What stays the caller's: blocks that another had cached in the meantime, or all of them where the block
            before them was dropped or the cache was reset. Also that block, if it was kept for this alone.

        Raises
        ------
        ValueError
            Not one block a hash, or one that is cached already.
        ReservationEndedError
            It was committed or aborted before.
        """
        return self._end(self, blocks)

    def abort(self) -> list[Pair]:
        """Give the room back.

        Returns
        -------
        list of (hash, block)
            The block before the missing ones, if it was dropped and kept for this alone.

        Raises
        ------
        ReservationEndedError
            It was committed or aborted before.
        """
        return self._end(self, None)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_ended:
            self.abort()


class Fence:
    """Copies that were in flight at a reset; ``PrefixCache.reset`` makes one.

    It is passed when every block that was held has been released, and every reservation has ended.

    Attributes
    ----------
    freed : list of (hash, block)
        What was in no copy, and is the caller's at once. The others come from ``release``, ``commit`` and ``abort``.
    """

    def __init__(self, freed: list[Pair], in_flight: set[object]) -> None:
        self.freed = freed
        self._in_flight = in_flight
        self._passed = threading.Event()
        if not in_flight:
            self._passed.set()

    @property
    def is_passed(self) -> bool:
        """Whether nothing of before the reset is in flight."""
        return self._passed.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is passed; False where that took longer than the timeout."""
        return self._passed.wait(timeout_s)

    def _ended(self, one: object) -> None:
        self._in_flight.discard(one)
        if not self._in_flight:
            self._passed.set()
