"""The memory of a pool that has some: pinned on the host, plain tensors on a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from kvkernels.layout import KVCache, KVLayout
from kvkernels.memory.pinned import PinnedPool


class Pages:
    """One page a block, or the tensors of a layout with as many blocks.

    Attributes
    ----------
    pools : tuple of Tensor
        uint8 ``[num_blocks, page_bytes]``, as the ops take them.
    cache : KVCache or None
        The same as a cache, where there is a layout.
    """

    def __init__(self, num_blocks: int, layout: KVLayout | None, page_bytes: int, device: torch.device) -> None:
        if layout is None:
            sizes = [page_bytes * num_blocks]
        else:
            sizes = [layout.needed_bytes(tensor) for tensor in range(layout.num_tensors)]
        with ExitStack() as undo:
            tensors = tuple(_memory(size, num_blocks, device, undo.callback) for size in sizes)
            self.cache = KVCache(layout, [tensor.view(-1) for tensor in tensors]) if layout is not None else None
            self.pools = tensors if self.cache is None else self.cache.pools
            self._undo = undo.pop_all()

    @property
    def device(self) -> torch.device:
        """Where they are, with its number."""
        return self.pools[0].device

    def close(self) -> None:
        """Give the memory up; tensors that are still referenced keep theirs."""
        self.pools, self.cache = (), None
        self._undo.close()


def _memory(size_bytes: int, num_blocks: int, device: torch.device, at_close: Callable[..., object]) -> Tensor:
    """uint8 ``[num_blocks, …]`` of at least so many bytes."""
    page_bytes = -(-size_bytes // num_blocks)
    if device.type != "cpu":
        return torch.empty(num_blocks, page_bytes, dtype=torch.uint8, device=device)
    pinned = PinnedPool(num_blocks, page_bytes)
    at_close(pinned.close)
    return pinned.pages
