"""A layout with its tensors: checked once, then a list of pools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvkernels.layout.fits import check_fits
from kvkernels.layout.geometry import PoolPlace
from kvkernels.layout.layout import KVLayout
from kvkernels.layout.memory import as_storages, bytes_of_storage, from_storages, share_memory


class KVCache:
    """The tensors of a KV cache, and the layout they are in.

    Parameters
    ----------
    layout : KVLayout
        What the tensors are said to be.
    tensors : Tensor or sequence of Tensor
        As many as the layout has, its scales' last, on one device. Each has the layout's dtype, or uint8 or int8 for
        raw bytes, and is in memory what the pattern says: dimensions may come in any order (an HND cache that the
        engine shows as NHD), and neighbouring letters may be one dimension. A flat buffer of enough bytes will do, too.

    Raises
    ------
    ValueError
        The number, a dtype, a device, or a tensor's shape and strides do not fit the layout.

    Notes
    -----
    Nothing is copied: the pools are views of the tensors' memory, and keep it alive.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import KVCache, KVLayout
    >>> layout = KVLayout("L | B H N D", L=2, B=8, N=4, H=2, D=16, dtype=torch.float16)
    >>> shown_as_nhd = [torch.zeros(8, 2, 4, 16, dtype=torch.float16).transpose(1, 2) for _ in range(2)]
    >>> cache = KVCache(layout, shown_as_nhd)
    >>> [tuple(pool.shape) for pool in cache.pools]
    [(8, 256), (8, 256)]
    """

    def __init__(self, layout: KVLayout, tensors: Tensor | Sequence[Tensor]) -> None:
        if not isinstance(layout, KVLayout):
            raise ValueError(f"KVCache: layout must be a KVLayout, got {layout!r}")
        self.layout = layout
        self.tensors = (tensors,) if isinstance(tensors, Tensor) else _as_tensors(tensors)
        if not self.tensors:
            raise ValueError(f"KVCache: {layout!r} has {layout.num_tensors} tensors, got 0")
        self.device = self.tensors[0].device
        # A compiler cannot trace the checks: the op that is given the cache makes them.
        self._pools = None if torch.compiler.is_compiling() else self._checked_pools()

    @property
    def pools(self) -> tuple[Tensor, ...]:
        """uint8 ``[B, page_bytes]`` views of the tensors, as copy_pages takes them."""
        if self._pools is None:
            self._pools = self._checked_pools()
        return self._pools

    def _checked_pools(self) -> tuple[Tensor, ...]:
        layout = self.layout
        if len(self.tensors) != layout.num_tensors:
            raise ValueError(f"KVCache: {layout!r} has {layout.num_tensors} tensors, got {len(self.tensors)}")
        for member in layout.members:
            beside = [other.layout for other in layout.members if other is not member and other.tensor == member.tensor]
            for i, at in enumerate(member.tensors):
                check_fits(member.layout, beside, self.tensors[at], i, f"KVCache: tensors[{at}]", self.device)
        return tuple(_pool(self.tensors[place.tensor], place, layout.B) for place in layout.pools)

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of every pool."""
        return self.layout.B

    def __copy__(self) -> KVCache:
        return KVCache(self.layout, self.tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """The layout and the tensors: the pools of the copy are then views of the copy's tensors."""
        if not share_memory(self.tensors):
            return KVCache, (self.layout, self.tensors)
        return _of_storages, (self.layout, *as_storages(self.tensors))

    def __repr__(self) -> str:
        return f"KVCache({self.layout!r}, {len(self.tensors)} tensors on {self.device})"


def _of_storages(layout: KVLayout, storages: Sequence[Tensor], places: Sequence[tuple[Any, ...]]) -> KVCache:
    return KVCache(layout, from_storages(storages, places))


def _as_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"KVCache: tensors must be a Tensor or a list of them, got {type(tensors).__name__}")
    return tuple(tensors)


def _pool(tensor: Tensor, place: PoolPlace, blocks: int) -> Tensor:
    start = tensor.storage_offset() * tensor.element_size() + place.offset_bytes
    return bytes_of_storage(tensor, start, (blocks, place.page_bytes), (place.row_bytes, 1))
