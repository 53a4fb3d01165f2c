"""Which blocks are whose: a budget of tokens, counted in whole blocks."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from kvkernels.common.arguments import integer
from kvkernels.layout import KVCache, KVLayout
from kvkernels.memory.errors import (
    ClosedPoolError,
    ForeignHandleError,
    FreedHandleError,
    OverBudgetError,
    PinnedHandleError,
    SharedHandleError,
)
from kvkernels.memory.handle import KVHandle, Place
from kvkernels.memory.pages import Pages

#: Called with the tokens that were asked for and those that there are.
OnOverBudget = Callable[[int, int], object]


def num_blocks(max_tokens: int, block_size: int = 16) -> int:
    """The whole blocks in so many tokens: what a scheduler's pool counts, and the pages that a worker makes.

    Raises
    ------
    ValueError
        ``block_size`` is no positive integer, or not one block has room.

    Examples
    --------
    >>> from kvkernels.memory import num_blocks
    >>> num_blocks(1000, 16)
    62
    """
    block_size = integer("num_blocks: block_size", block_size, "a positive integer", least=1)
    return integer("num_blocks: max_tokens", max_tokens, "at least block_size", least=block_size) // block_size


class KVPool:
    """A budget of tokens, handed out in whole blocks.

    Parameters
    ----------
    max_tokens : int
        The budget. It rounds down to whole blocks.
    block_size : int
        Tokens of a block.
    layout : KVLayout, optional
        The pool owns the tensors of a cache with this layout, which has ``num_blocks(max_tokens, block_size)`` blocks
        of ``block_size`` tokens.
    page_bytes : int, optional
        The pool owns a page of so many bytes for each block. Without this and ``layout`` it owns no memory: a scheduler
        keeps the books so, while a worker has the pages.
    on_over_budget : callable, optional
        Called as ``on_over_budget(requested, available)``, in tokens, when an ``alloc`` does not fit. It may free
        handles; the ``alloc`` is then tried once more. Not called under the lock.
    device : str or torch.device
        Where the pages are: pinned memory for ``cpu``, as ``PinnedPool`` makes it, or plain tensors.
    rank : int
        Noted in each handle.

    Raises
    ------
    ValueError
        A size is not positive, or the layout does not fit.

    Notes
    -----
    Every method may be called from several threads. ``alloc`` and ``free`` take time by the blocks that they move and
    search nothing; blocks are alike, so there is no fragmentation. The ids of a new pool come in order.

    A method that raises has changed nothing.

    Examples
    --------
    >>> from kvkernels.memory import KVPool
    >>> pool = KVPool(max_tokens=1024, page_bytes=256)
    >>> handle = pool.alloc(num_tokens=40, device="cpu")
    >>> pool.pools[0][handle.block_ids].shape
    torch.Size([3, 256])
    >>> stats = pool.stats()
    >>> stats["used_tokens"], stats["allocated_tokens"], stats["available_tokens"]
    (40, 48, 976)
    >>> pool.free(handle)
    >>> pool.free(handle)
    Traceback (most recent call last):
        ...
    kvkernels.memory.errors.FreedHandleError: KVPool.free: handle must not be freed, got KVHandle(0, 40 tokens in 3 ...
    >>> pool.close()
    """

    def __init__(
        self, max_tokens: int, block_size: int = 16, *, layout: KVLayout | None = None, page_bytes: int | None = None,
        on_over_budget: OnOverBudget | None = None, device: str | torch.device = "cpu", rank: int = 0,
    ) -> None:  # fmt: skip
        self.block_size = integer("KVPool: block_size", block_size, "a positive integer", least=1)
        integer("KVPool: max_tokens", max_tokens, f"at least one block of {self.block_size}", least=self.block_size)
        self.num_blocks = num_blocks(max_tokens, self.block_size)
        rank = integer("KVPool: rank", rank, "an integer from 0", least=0)
        device = torch.device(device)
        if page_bytes is not None:
            page_bytes = integer("KVPool: page_bytes", page_bytes, "a positive integer", least=1)
        self._check_layout(layout, page_bytes)
        self._pages = None
        if layout is not None or page_bytes is not None:
            self._pages = Pages(self.num_blocks, layout, page_bytes or 0, device)
            device = self._pages.device
        self._place = Place(self.block_size, layout, str(device), rank)
        self._on_over_budget = on_over_budget
        self._lock = threading.RLock()
        # The ids from _head on are free. Slices of an array are copies, at a third of the time of numpy's.
        self._ids = array("q", np.arange(self.num_blocks, dtype=np.int64).tobytes())
        self._head = 0
        self._next_id = itertools.count()
        self._used_tokens = self._pinned_tokens = self._num_handles = self._num_pinned = 0
        self._is_closed = False

    def _check_layout(self, layout: KVLayout | None, page_bytes: int | None) -> None:
        if layout is None:
            return
        if not isinstance(layout, KVLayout):
            raise ValueError(f"KVPool: layout must be a KVLayout, got {layout!r}")
        if page_bytes is not None:
            raise ValueError(f"KVPool: page_bytes must be None with a layout, which says it, got {page_bytes}")
        if self.num_blocks != layout.B:
            raise ValueError(f"KVPool: layout must have the pool's {self.num_blocks} blocks, got {layout!r}")
        if not layout.opaque and self.block_size != layout.N:
            raise ValueError(f"KVPool: layout must have blocks of {self.block_size} tokens, got {layout!r}")

    @property
    def max_tokens(self) -> int:
        """The budget, in whole blocks."""
        return self.num_blocks * self.block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody has."""
        return self.num_blocks - self._head

    @property
    def pools(self) -> tuple[Tensor, ...]:
        """uint8 ``[num_blocks, page_bytes]`` tensors, as the ops take them; none where the pool owns no memory."""
        return self._pages.pools if self._pages else ()

    @property
    def cache(self) -> KVCache | None:
        """The pages as a cache of the pool's layout."""
        return self._pages.cache if self._pages else None

    def alloc(
        self, num_tokens: int, *, request_id: str | None = None, device: str | torch.device | None = None
    ) -> KVHandle:
        """Blocks for so many tokens.

        Parameters
        ----------
        num_tokens : int
            At least 1; rounded up to whole blocks.
        request_id : str, optional
            Noted in the handle.
        device : str or torch.device, optional
            Where the blocks are, by default the pool's. A pool without memory notes any other in the handle.

        Returns
        -------
        KVHandle
            With one user; the ids are in order where the blocks were never used.

        Raises
        ------
        ValueError
            ``num_tokens`` is not positive, or the pages are on another device.
        OverBudgetError
            They do not fit.
        ClosedPoolError
            The pool is closed.
        """
        if type(num_tokens) is not int or num_tokens < 1:
            num_tokens = integer("KVPool.alloc: num_tokens", num_tokens, "a positive integer", least=1)
        place = self._place if device is None else self._place_on(device)
        wanted = -(-num_tokens // self.block_size)
        with self._lock:
            handle = self._take(num_tokens, wanted, request_id, place)
        if handle is None and self._on_over_budget is not None:
            self._on_over_budget(num_tokens, self.num_free_blocks * self.block_size)
            with self._lock:
                handle = self._take(num_tokens, wanted, request_id, place)
        if handle is None:
            available = self.num_free_blocks * self.block_size
            raise OverBudgetError(
                f"KVPool.alloc: num_tokens must be at most the {available} that are available, got {num_tokens}",
                num_tokens,
                available,
            )
        return handle

    def _place_on(self, device: str | torch.device) -> Place:
        if device == self._place.device:
            return self._place
        asked, own = torch.device(device), torch.device(self._place.device)
        if asked == own or (asked.type == own.type and asked.index is None):
            return self._place
        if self._pages is not None:
            raise ValueError(
                f"KVPool.alloc: device must be that of the pages, {self._place.device}, got {str(asked)!r}"
            )
        return self._place._replace(device=str(asked))

    def _take(self, num_tokens: int, wanted: int, request_id: str | None, place: Place) -> KVHandle | None:
        if self._is_closed:
            raise ClosedPoolError("KVPool.alloc: the pool must be open, got one that is closed")
        head = self._head
        end = head + wanted
        if end > self.num_blocks:
            return None
        used_tokens, num_handles = self._used_tokens + num_tokens, self._num_handles + 1
        handle = KVHandle(next(self._next_id), request_id, num_tokens, place, self._ids[head:end], self)
        # What could run out of memory is above.
        self._head, self._used_tokens, self._num_handles = end, used_tokens, num_handles
        return handle

    def free(self, handle: KVHandle) -> None:
        """Take a handle's blocks back.

        Parameters
        ----------
        handle : KVHandle
            Of this pool, neither pinned nor with a user besides the caller.

        Raises
        ------
        FreedHandleError, ForeignHandleError, ClosedPoolError
            It was freed before, is of another pool or a copy, or the pool is closed.
        PinnedHandleError, SharedHandleError
            It is pinned, or has other users, which end by ``unref``.
        """
        with self._lock:
            self._check("free", handle)
            if handle.pin_count or handle.ref_count > 1:
                self._refuse_to_free("free", handle)
            self._give_back(handle)

    def ref(self, handle: KVHandle) -> None:
        """Count one more user of a handle; raises as ``free`` does for a freed or a foreign one."""
        with self._lock:
            self._check("ref", handle)
            handle.ref_count += 1
            handle.touch()

    def unref(self, handle: KVHandle) -> None:
        """Count one user less, and free the handle after the last; raises as ``free`` does, but not for other users."""
        with self._lock:
            self._check("unref", handle)
            if handle.ref_count > 1:
                handle.ref_count -= 1
                return
            if handle.pin_count:
                self._refuse_to_free("unref", handle)
            self._give_back(handle)

    def pin(self, handle: KVHandle) -> None:
        """Keep a handle from being freed until as many ``unpin``; raises as ``ref`` does."""
        with self._lock:
            self._check("pin", handle)
            handle.pin_count += 1
            if handle.pin_count == 1:
                self._num_pinned += 1
                self._pinned_tokens += handle.held_tokens
            handle.touch()

    def unpin(self, handle: KVHandle) -> None:
        """Undo one ``pin``; ValueError for a handle that is not pinned."""
        with self._lock:
            self._check("unpin", handle)
            if handle.pin_count == 0:
                raise ValueError(f"KVPool.unpin: handle must be pinned, got {handle!r}")
            handle.pin_count -= 1
            if handle.pin_count == 0:
                self._num_pinned -= 1
                self._pinned_tokens -= handle.held_tokens

    def split(self, handle: KVHandle) -> list[KVHandle]:
        """Make one handle a block out of a handle, which ends as if it were freed.

        So the blocks of a request go on one by one, as a prefix cache has them. Raises as ``free`` does.
        """
        with self._lock:
            self._check("split", handle)
            if handle.pin_count or handle.ref_count > 1:
                self._refuse_to_free("split", handle)
            size, rest, blocks = self.block_size, handle.num_tokens, handle._blocks
            parts = []
            for i in range(len(blocks)):
                tokens = min(size, rest - i * size)
                part = KVHandle(next(self._next_id), handle.request_id, tokens, handle.place, blocks[i : i + 1], self)
                parts.append(part)
            self._num_handles += len(parts) - 1
            handle.ref_count = 0
            return parts

    def _check(self, method: str, handle: KVHandle) -> None:
        if not isinstance(handle, KVHandle) or handle._owner is not self:
            raise ForeignHandleError(f"KVPool.{method}: handle must be one that this pool gave, got {handle!r}")
        if self._is_closed:
            raise ClosedPoolError(f"KVPool.{method}: the pool must be open, got {handle!r} of one that is closed")
        if handle.ref_count == 0:
            raise FreedHandleError(f"KVPool.{method}: handle must not be freed, got {handle!r}")

    def _refuse_to_free(self, method: str, handle: KVHandle) -> NoReturn:
        if handle.pin_count:
            raise PinnedHandleError(f"KVPool.{method}: handle must not be pinned, got {handle!r}")
        raise SharedHandleError(
            f"KVPool.{method}: handle must have no other users, got {handle!r} with {handle.ref_count}"
        )

    def _give_back(self, handle: KVHandle) -> None:
        blocks = handle._blocks
        head, used_tokens = self._head - len(blocks), self._used_tokens - handle.num_tokens
        num_handles = self._num_handles - 1
        self._ids[head : self._head] = blocks
        self._head, self._used_tokens, self._num_handles = head, used_tokens, num_handles
        handle.ref_count = 0

    def stats(self) -> dict[str, int]:
        """Tokens and handles as they are now.

        Returns
        -------
        dict
            In whole blocks ``max_tokens``, ``available_tokens``, ``allocated_tokens`` and, of those, ``pinned_tokens``;
            ``used_tokens``, as many as were asked for; ``num_handles`` and ``num_pinned_handles``.
        """
        with self._lock:
            return {
                "max_tokens": self.max_tokens,
                "allocated_tokens": self._head * self.block_size,
                "used_tokens": self._used_tokens,
                "pinned_tokens": self._pinned_tokens,
                "available_tokens": self.num_free_blocks * self.block_size,
                "num_handles": self._num_handles,
                "num_pinned_handles": self._num_pinned,
            }

    def close(self) -> None:
        """Give up the pages, and refuse everything from now on; tensors that are still referenced keep their memory."""
        with self._lock:
            self._is_closed = True
            pages, self._pages = self._pages, None
        if pages is not None:
            pages.close()

    def __enter__(self) -> KVPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"KVPool({self._head} of {self.num_blocks} blocks of {self.block_size} tokens allocated)"
