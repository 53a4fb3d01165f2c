"""A layout with its tensors: checked once, then a list of pools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvkernels.common.arguments import dtype_text, shape_text
from kvkernels.layout.layout import KVLayout, PoolPlace
from kvkernels.layout.memory import as_storages, bytes_of_storage, from_storages, share_memory

_RAW_DTYPES = (torch.uint8, torch.int8)


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
        own = layout.num_tensors - (layout.scales.num_tensors if layout.scales else 0)
        pools = _checked_pools(layout, self.tensors[:own], 0, self.device)
        if layout.scales is not None:
            pools += _checked_pools(layout.scales, self.tensors[own:], own, self.device)
        return tuple(pools)

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


def _checked_pools(layout: KVLayout, tensors: Sequence[Tensor], first: int, device: torch.device) -> list[Tensor]:
    for i, tensor in enumerate(tensors):
        _check(layout, tensor, i, f"KVCache: tensors[{first + i}]", device)
    return [_pool(tensors[place.tensor], place, layout.B) for place in layout.places]


def _check(layout: KVLayout, tensor: Tensor, index: int, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name} must hold its values as they are, got one that is conjugated or negated when read")
    wanted = layout.dtype
    if not layout.opaque and tensor.dtype != wanted and tensor.dtype not in _RAW_DTYPES:
        raise ValueError(f"{name} must be {dtype_text(wanted)} or raw uint8, got {dtype_text(tensor.dtype)}")  # type: ignore[arg-type]
    needed = layout.needed_bytes(index)
    is_flat = tensor.dim() == 1 and tensor.is_contiguous() and tensor.nbytes >= needed
    if not (is_flat or _is_in_order(layout, tensor, index) or _is_padded_rows(layout, tensor, index)):
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        raise ValueError(
            f"{name} must be {_wanted(layout, index)}a flat buffer of {needed} bytes for {layout!r}, "
            f"got shape {shape_text(tensor.shape)} with strides of {shape_text(strides)} bytes"
        )
    if layout.padding_unsaid and layout.row_bytes is None and not layout.offset_bytes and tensor.nbytes != needed:
        raise ValueError(
            f"{name} must be of {needed} bytes for {layout!r}, or the shard must say its own row_bytes and "
            f"offset_bytes (dataclasses.replace), as the whole layout did, got {tensor.nbytes} bytes"
        )
    held = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    if held < needed:
        raise ValueError(f"{name} must have {needed} bytes of storage behind it for {layout!r}, got {held}")


def _wanted(layout: KVLayout, index: int) -> str:
    dimensions = layout.dimensions(index)
    if dimensions is None or layout.offset_bytes:
        return ""
    sizes, strides = [n for n, _ in dimensions], [stride for _, stride in dimensions]
    return f"{shape_text(sizes)} with strides of {shape_text(strides)} bytes in any order of dimensions, or "


def _is_in_order(layout: KVLayout, tensor: Tensor, index: int) -> bool:
    """Whether the tensor's dimensions, by falling stride, are the layout's, some neighbours being one."""
    dimensions = layout.dimensions(index)
    if dimensions is None or layout.offset_bytes:
        return False
    if layout.B == 0:
        return tensor.numel() == 0
    item = tensor.element_size()
    mine = [(n, s * item) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    mine = [*sorted(mine, key=lambda dimension: -dimension[1]), (item, 1)]
    # An element may be seen as several, such as bytes; an opaque page as anything.
    while mine[-1][0] < layout.element_bytes and len(mine) > 1 and mine[-2][1] == mine[-1][0]:
        mine[-2:] = [(mine[-2][0] * mine[-1][0], 1)]
    theirs = [*((n, s) for n, s in dimensions if n != 1), (layout.element_bytes, 1)]
    for n, stride in reversed(mine):
        extent = 1
        while extent < n:
            if not theirs or theirs[-1][1] != stride * extent:
                return False
            extent *= theirs.pop()[0]
        if extent != n:
            return False
    return not theirs


def _is_padded_rows(layout: KVLayout, tensor: Tensor, index: int) -> bool:
    """Whether it is ``[B, row_bytes]`` with the padding shown."""
    if layout.inside[0] != "B" or layout.offset_bytes or tensor.dim() != 2 or not tensor.is_contiguous():
        return False
    rows = {place.row_bytes for place in layout.places if place.tensor == index}
    return tensor.shape[0] == layout.B and {tensor.shape[1] * tensor.element_size()} == rows


def _pool(tensor: Tensor, place: PoolPlace, blocks: int) -> Tensor:
    start = tensor.storage_offset() * tensor.element_size() + place.offset_bytes
    return bytes_of_storage(tensor, start, (blocks, place.page_bytes), (place.row_bytes, 1))
