"""Which of the keys that are held go first when room is needed: one protocol, and a policy a file."""

from kvkernels.memory.eviction.arc import ARC
from kvkernels.memory.eviction.buckets import LFU, Priority
from kvkernels.memory.eviction.chain import Chain
from kvkernels.memory.eviction.lru import FIFO, LRU
from kvkernels.memory.eviction.make import POLICIES, make_policy
from kvkernels.memory.eviction.manager import EvictionManager
from kvkernels.memory.eviction.protocol import (
    BlockContext,
    EvictionError,
    EvictionPolicy,
    NotEnoughEvictable,
    NothingEvictable,
)
from kvkernels.memory.eviction.s3fifo import S3FIFO
from kvkernels.memory.eviction.sieve import SIEVE
from kvkernels.memory.eviction.ttl import TTL

__all__ = [
    "ARC",
    "FIFO",
    "LFU",
    "LRU",
    "POLICIES",
    "S3FIFO",
    "SIEVE",
    "TTL",
    "BlockContext",
    "Chain",
    "EvictionError",
    "EvictionManager",
    "EvictionPolicy",
    "NotEnoughEvictable",
    "NothingEvictable",
    "Priority",
    "make_policy",
]
