"""Host memory for KV pages: who holds which page, which pages are worth keeping, and where they lie."""

from kvkernels.memory.errors import (
    ClosedPoolError,
    DuplicateRequestError,
    ForeignHandleError,
    FreedHandleError,
    HandleError,
    NotCachedError,
    NotHeldError,
    OverBudgetError,
    PinnedHandleError,
    ReservationEndedError,
    SharedHandleError,
    StalePlanError,
    UnknownRequestError,
)
from kvkernels.memory.eviction import (
    BlockContext,
    EvictionError,
    EvictionManager,
    EvictionPolicy,
    NotEnoughEvictable,
    NothingEvictable,
    make_policy,
)
from kvkernels.memory.handle import KVHandle
from kvkernels.memory.hashes import BlockHasher
from kvkernels.memory.pinned import PinnedFacts, PinnedPool
from kvkernels.memory.pool import KVPool, num_blocks
from kvkernels.memory.prefix import PrefixCache
from kvkernels.memory.registration import RegistrationError
from kvkernels.memory.reservations import Fence, Reservation
from kvkernels.memory.scheduler import RequestPlan, SchedulerBridge
from kvkernels.memory.shared import (
    NoOwnerError,
    OwnedElsewhereError,
    SharedPoolError,
    SharedSizeError,
    StaleSegmentError,
)

__all__ = [
    "BlockContext",
    "BlockHasher",
    "ClosedPoolError",
    "DuplicateRequestError",
    "EvictionError",
    "EvictionManager",
    "EvictionPolicy",
    "Fence",
    "ForeignHandleError",
    "FreedHandleError",
    "HandleError",
    "KVHandle",
    "KVPool",
    "NoOwnerError",
    "NotCachedError",
    "NotEnoughEvictable",
    "NotHeldError",
    "NothingEvictable",
    "OverBudgetError",
    "OwnedElsewhereError",
    "PinnedFacts",
    "PinnedHandleError",
    "PinnedPool",
    "PrefixCache",
    "RegistrationError",
    "RequestPlan",
    "Reservation",
    "ReservationEndedError",
    "SchedulerBridge",
    "SharedHandleError",
    "SharedPoolError",
    "SharedSizeError",
    "StalePlanError",
    "StaleSegmentError",
    "UnknownRequestError",
    "make_policy",
    "num_blocks",
]
