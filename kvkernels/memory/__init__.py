"""Host memory for KV pages: who holds which page, which pages are worth keeping, and where they lie."""

from kvkernels.memory.eviction import (
    BlockContext,
    EvictionError,
    EvictionManager,
    EvictionPolicy,
    NotEnoughEvictable,
    NothingEvictable,
    make_policy,
)

__all__ = [
    "BlockContext",
    "EvictionError",
    "EvictionManager",
    "EvictionPolicy",
    "NotEnoughEvictable",
    "NothingEvictable",
    "make_policy",
]
