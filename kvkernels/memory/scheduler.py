"""What a scheduler asks for a request: which blocks it reuses, which are new, and what leaves for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvkernels.common.arguments import integer
from kvkernels.memory.chains import Pair
from kvkernels.memory.errors import DuplicateRequestError, OverBudgetError, StalePlanError, UnknownRequestError
from kvkernels.memory.eviction import EvictionError
from kvkernels.memory.handle import KVHandle
from kvkernels.memory.pool import KVPool
from kvkernels.memory.prefix import PrefixCache


@dataclass(frozen=True)
class RequestPlan:
    """What ``allocate`` will do for a request, if nothing changes before it.

    Attributes
    ----------
    request_id : str
    num_tokens : int
        For which there will be blocks.
    hashes : tuple of bytes
        Of the prompt's whole blocks.
    reused : tuple of int
        Cached blocks that it begins with.
    reused_tokens, computed_tokens : int
        Tokens in those, and the others.
    num_new_blocks : int
    evicted : tuple of (hash, block)
        What leaves the cache to make room.
    """

    request_id: str
    num_tokens: int
    hashes: tuple[bytes, ...]
    reused: tuple[int, ...]
    reused_tokens: int
    num_new_blocks: int
    evicted: tuple[Pair, ...]
    _of: tuple[int, int] = field(default=(-1, -1), repr=False, compare=False)  # the cache's and the pool's state

    @property
    def computed_tokens(self) -> int:
        """Tokens that are not reused."""
        return self.num_tokens - self.reused_tokens


@dataclass(frozen=True)
class _Live:
    plan: RequestPlan
    handle: KVHandle | None


class SchedulerBridge:
    """Blocks for requests, out of a pool and the prefixes that are cached in it.

    ::

        pool     free ──────▶ a live request's ──────▶ cached ──────▶ free
                   alloc            │          free()        evicted
                                    └── holds the cached blocks that it reuses: they stay

    Parameters
    ----------
    pool : KVPool
        Where all blocks come from. Others may use it, too.
    cache : PrefixCache
        Of this pool's blocks, and filled by this bridge alone; with the same ``block_size``.

    Raises
    ------
    ValueError
        The block sizes differ, or the cache is not empty.

    Notes
    -----
    Every method may be called from several threads. A method that raises has changed nothing, and no block of a live
    request is ever evicted.

    Examples
    --------
    >>> from kvkernels.memory import KVPool, PrefixCache, SchedulerBridge
    >>> pool, cache = KVPool(max_tokens=64, block_size=4), PrefixCache(block_size=4, hash="sha256")
    >>> bridge = SchedulerBridge(pool, cache)
    >>> hashes = cache.compute_block_hashes(range(10))
    >>> bridge.allocate(bridge.plan("a", 12, hashes))
    tensor([0, 1, 2])
    >>> bridge.free("a")
    >>> plan = bridge.plan("b", 12, hashes)
    >>> plan.reused, plan.computed_tokens
    ((0, 1), 4)
    """

    def __init__(self, pool: KVPool, cache: PrefixCache) -> None:
        if pool.block_size != cache.block_size:
            raise ValueError(
                f"SchedulerBridge: cache must have the pool's block_size, {pool.block_size}, got {cache.block_size}"
            )
        if len(cache):
            raise ValueError(f"SchedulerBridge: cache must be empty, got one with {len(cache)} blocks")
        self.pool = pool
        self.cache = cache
        # The cache's lock comes before the pool's.
        self._lock, self._pool_lock = cache._lock, pool._lock
        self._live: dict[str, _Live] = {}
        self._cached: dict[int, KVHandle] = {}

    def plan(self, request_id: str, num_tokens: int, hashes: Sequence[bytes] = ()) -> RequestPlan:
        """Say what a request would get; nothing changes.

        Parameters
        ----------
        request_id : str
            Of no live request.
        num_tokens : int
            For which it needs blocks, reused ones and those to come included.
        hashes : sequence of bytes
            Of the prompt's whole blocks, as far as they may be reused.

        Returns
        -------
        RequestPlan

        Raises
        ------
        DuplicateRequestError
            The request is live.
        OverBudgetError
            There is no room for it, whatever is evicted.
        ValueError
            ``num_tokens`` is not positive, or less than the hashes stand for.
        """
        num_tokens = integer("SchedulerBridge.plan: num_tokens", num_tokens, "a positive integer", least=1)
        size = self.pool.block_size
        if len(hashes) * size > num_tokens:
            raise ValueError(
                f"SchedulerBridge.plan: num_tokens must be at least those of {len(hashes)} hashes, got {num_tokens}"
            )
        with self._lock, self._pool_lock:
            self._check_not_live("plan", request_id)
            reused, _ = self.cache.preview(hashes, 0)
            needed = -(-num_tokens // size) - len(reused)
            free = self.pool.num_free_blocks
            try:
                _, evicted = self.cache.preview(hashes, max(0, needed - free))
            except EvictionError as error:
                most = (free + error.available) * size
                raise OverBudgetError(
                    f"SchedulerBridge.plan: num_tokens must need at most {most} new ones, got {needed * size}",
                    needed * size,
                    most,
                ) from error
            return RequestPlan(
                request_id, num_tokens, tuple(hashes), tuple(reused), len(reused) * size, needed, tuple(evicted),
                (self.cache._version, free),
            )  # fmt: skip

    def allocate(self, plan: RequestPlan) -> Tensor:
        """Do what a plan says.

        Parameters
        ----------
        plan : RequestPlan
            Of this bridge.

        Returns
        -------
        Tensor
            int64 ids of the request's blocks in order: first those that are reused.

        Raises
        ------
        StalePlanError
            Other blocks would be reused or evicted by now: plan again.
        DuplicateRequestError, OverBudgetError
            As for ``plan``.
        """
        with self._lock, self._pool_lock:
            self._check_not_live("allocate", plan.request_id)
            if plan._of != (self.cache._version, self.pool.num_free_blocks):
                self._check_holds(plan, self.plan(plan.request_id, plan.num_tokens, plan.hashes))
            prefix = plan.hashes[: len(plan.reused)]
            self.cache.lookup(plan.hashes, hold=True)
            try:
                self._reclaim(block for _, block in self.cache._evict_these(key for key, _ in plan.evicted))
                handle = self._alloc(plan)
            except BaseException:
                self.cache.release(prefix)
                raise
            self._live[plan.request_id] = _Live(plan, handle)
            reused = np.array(plan.reused, dtype=np.int64)
            new = handle.block_array if handle is not None else reused[:0]
            return torch.from_numpy(np.concatenate([reused, new]))

    def _check_not_live(self, method: str, request_id: str) -> None:
        if request_id in self._live:
            raise DuplicateRequestError(
                f"SchedulerBridge.{method}: request_id must not be that of a live request, got {request_id!r}"
            )

    def _check_holds(self, plan: RequestPlan, now: RequestPlan) -> None:
        if now != plan:
            raise StalePlanError(
                f"SchedulerBridge.allocate: plan must hold still, got one for {plan.request_id!r} that reused "
                f"{len(plan.reused)} blocks and evicted {len(plan.evicted)}, where now {len(now.reused)} "
                f"and {len(now.evicted)} are"
            )

    def _alloc(self, plan: RequestPlan) -> KVHandle | None:
        tokens = plan.computed_tokens
        return self.pool.alloc(tokens, request_id=plan.request_id) if tokens else None

    def free(self, request_id: str, hashes: Sequence[bytes] | None = None) -> None:
        """End a request: its whole blocks become cached, the others free.

        Parameters
        ----------
        request_id : str
            Of a live request.
        hashes : sequence of bytes, optional
            Of all whole blocks that were computed, the reused ones first; by default the prompt's, as in the plan. An
            empty sequence caches nothing, for a request that failed.

        Raises
        ------
        UnknownRequestError
            No such request is live.
        ValueError
            More hashes than the request has whole blocks, or others than the reused ones first.
        PinnedHandleError, SharedHandleError
            Somebody pinned its blocks, or shares them.
        """
        with self._lock, self._pool_lock:
            live = self._live.get(request_id)
            if live is None:
                raise UnknownRequestError(
                    f"SchedulerBridge.free: request_id must be that of a live one, got {request_id!r}"
                )
            plan = live.plan
            prefix = plan.hashes[: len(plan.reused)]
            hashes = plan.hashes if hashes is None else tuple(hashes)
            if len(hashes) > plan.num_tokens // self.pool.block_size or (hashes and hashes[: len(prefix)] != prefix):
                raise ValueError(
                    f"SchedulerBridge.free: hashes must be those reused, {len(prefix)}, and of whole blocks of "
                    f"{plan.num_tokens} tokens, got {len(hashes)}"
                )
            new = hashes[len(prefix) :]
            parent = prefix[-1] if prefix else None
            if parent is not None and parent not in self.cache:  # dropped in the meantime
                new = ()
            blocks = live.handle.block_array.tolist() if live.handle is not None else []
            self.cache._check_insert(new, blocks[: len(new)], parent if new else None)
            parts = self.pool.split(live.handle) if live.handle is not None else []
            del self._live[request_id]
            self._cached.update(zip(blocks, parts, strict=True))
            pairs = self.cache.insert(new, blocks[: len(new)], parent=parent if new else None)
            pairs += self.cache.release(prefix)
            self._reclaim([*blocks[len(new) :], *(block for _, block in pairs)])

    def reclaim(self, pairs: Iterable[Pair]) -> None:
        """Free the blocks that the cache gave back when somebody called its ``drop``, ``invalidate`` or ``reset``.

        Raises
        ------
        ValueError
            A block that the cache did not have from this bridge.
        """
        with self._lock, self._pool_lock:
            blocks = [block for _, block in pairs]
            cached = self.cache._chains.by_block
            if len(set(blocks)) < len(blocks) or any(one not in self._cached or one in cached for one in blocks):
                raise ValueError(
                    f"SchedulerBridge.reclaim: pairs must be what the cache gave back, each once, got blocks {blocks}"
                )
            self._reclaim(blocks)

    def _reclaim(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.pool.free(self._cached.pop(block))
