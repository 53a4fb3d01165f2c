"""Host memory for KV pages: who holds which page, which pages are worth keeping, and where they lie."""

from kvkernels.memory.eviction import (
    BlockContext,
    EvictionError,
    EvictionPolicy,
    NotEnoughEvictable,
    NothingEvictable,
    make_policy,
)
from kvkernels.memory.pinned import PinnedFacts, PinnedPool
from kvkernels.memory.registration import RegistrationError
from kvkernels.memory.shared import (
    NoOwnerError,
    OwnedElsewhereError,
    SharedPoolError,
    SharedSizeError,
    StaleSegmentError,
)

__all__ = [
    "BlockContext",
    "EvictionError",
    "EvictionPolicy",
    "NoOwnerError",
    "NotEnoughEvictable",
    "NothingEvictable",
    "OwnedElsewhereError",
    "PinnedFacts",
    "PinnedPool",
    "RegistrationError",
    "SharedPoolError",
    "SharedSizeError",
    "StaleSegmentError",
    "make_policy",
]
