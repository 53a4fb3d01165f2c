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

__all__ = [
    "BlockContext",
    "EvictionError",
    "EvictionPolicy",
    "NotEnoughEvictable",
    "NothingEvictable",
    "PinnedFacts",
    "PinnedPool",
    "make_policy",
]
