"""What can go wrong with handles, pools, cached prefixes and requests; nothing has changed when one is raised."""

from __future__ import annotations


class OverBudgetError(MemoryError):
    """A pool has too few free blocks.

    ``requested`` and ``available`` are tokens.
    """

    def __init__(self, message: str, requested: int, available: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class HandleError(ValueError):
    """A handle cannot be used like this."""


class FreedHandleError(HandleError):
    """The handle was freed: a double free, or a use after it."""


class ForeignHandleError(HandleError):
    """The handle is of another pool, or a copy."""


class PinnedHandleError(HandleError):
    """The handle is pinned, so that it cannot be freed."""


class SharedHandleError(HandleError):
    """The handle has other users, so that it cannot be freed."""


class ClosedPoolError(ValueError):
    """The pool, which may be the handle's, was closed."""


class NotCachedError(LookupError):
    """A block is not cached that must be: the parent of what is inserted, or what is to be held."""


class NotHeldError(ValueError):
    """A block was to be released that is not held."""


class ReservationEndedError(RuntimeError):
    """A reservation was committed or aborted before."""


class DuplicateRequestError(ValueError):
    """A request with this id is live."""


class UnknownRequestError(LookupError):
    """No request with this id is live."""


class StalePlanError(RuntimeError):
    """What a plan said is no longer what would happen."""
