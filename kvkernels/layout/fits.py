"""Whether a tensor is in memory what a layout says of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.common.arguments import dtype_text, shape_text
from kvkernels.layout.layout import KVLayout

_RAW_DTYPES = (torch.uint8, torch.int8)


def check_fits(
    layout: KVLayout, beside: Sequence[KVLayout], tensor: Tensor, index: int, name: str, device: torch.device
) -> None:
    """That a tensor is in memory what a part says, in which other parts may lie, too, or ValueError naming it."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the first, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got layout {tensor.layout}")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name} must hold its values as they are, got one that is conjugated or negated when read")
    wanted = layout.dtype
    if not layout.opaque and tensor.dtype not in (wanted, *(part.dtype for part in beside), *_RAW_DTYPES):
        raise ValueError(f"{name} must be {dtype_text(wanted)} or raw uint8, got {dtype_text(tensor.dtype)}")  # type: ignore[arg-type]
    needed = layout.needed_bytes((layout.tensor or 0) + index)
    is_flat = tensor.dim() == 1 and tensor.is_contiguous() and tensor.nbytes >= needed
    fits = is_flat or _is_in_order(layout, tensor, index) or _is_padded_rows(layout, tensor, index)
    if not (fits or ((beside or layout.steps) and _holds(layout, tensor, index))):
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


def _holds(layout: KVLayout, tensor: Tensor, index: int) -> bool:
    """Whether its outer dimensions, B's among them, are the layout's, and a dense row of bytes holds what is inside."""
    item = tensor.element_size()
    mine = [(n, s * item) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    mine.sort(key=lambda dimension: -dimension[1])
    theirs = [(n, s) for n, s in layout.dimensions(index) or [] if n != 1]
    while mine:
        n, step = mine[0]
        extent, count = 1, 0
        while extent < n and count < len(theirs):
            if extent > 1 and theirs[count - 1][1] != theirs[count][0] * theirs[count][1]:
                break
            extent *= theirs[count][0]
            count += 1
        if extent != n or theirs[count - 1][1] != step:
            break
        mine, theirs = mine[1:], theirs[count:]
    row = item
    if len(mine) > 1 and theirs:
        return False
    for n, step in reversed(mine):
        if step != row:
            return False
        row *= n
    inside = sum((n - 1) * step for n, step in theirs) + layout.element_bytes
    block = layout.step("B").bytes
    return (layout.B, block) not in theirs and layout.B > 0 and layout.offset_bytes + inside <= row


def _is_padded_rows(layout: KVLayout, tensor: Tensor, index: int) -> bool:
    """Whether it is ``[B, row_bytes]`` with the padding shown."""
    if layout.inside[0] != "B" or layout.offset_bytes or tensor.dim() != 2 or not tensor.is_contiguous():
        return False
    rows = {place.row_bytes for place in layout.places if place.tensor == index}
    return tensor.shape[0] == layout.B and {tensor.shape[1] * tensor.element_size()} == rows
