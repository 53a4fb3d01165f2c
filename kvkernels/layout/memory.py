"""A tensor's memory as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

_Int: TypeAlias = "int | torch.SymInt"


def bytes_of_storage(
    tensor: Tensor, offset_bytes: _Int, sizes: Sequence[_Int], strides: Sequence[_Int], dtype: torch.dtype = torch.uint8
) -> Tensor:
    """A view of one-byte elements, anywhere in the storage behind a tensor: ``offset_bytes`` counts from its begin.

    A real view, so that autograd learns of a write through it: both have one version.
    """
    if tensor.is_quantized:  # which no view with another dtype can be made of
        raw = torch.empty(0, dtype=dtype, device=tensor.device)
        return raw.set_(tensor.untyped_storage(), offset_bytes, sizes, strides)
    with torch.no_grad():
        one = tensor.as_strided((min(1, tensor.numel()),), (1,))
        return one.view(dtype).as_strided(sizes, strides, offset_bytes)


def as_storages(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
    """Tensors as whole storages and their places in them, for ``from_storages``.

    pickle and copy go from tensor to tensor, and would give each of those that share memory memory of its own.
    """
    of_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        of_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    order = list(of_storage)
    places = [
        (
            order.index(t.untyped_storage()._cdata), t.dtype, t.storage_offset(), tuple(t.shape), t.stride(),
            t.requires_grad,
        )
        for t in tensors
    ]  # fmt: skip
    return [_whole(sharers) for sharers in of_storage.values()], places


def _whole(sharers: Sequence[Tensor]) -> Tensor:
    """All of a storage, as its tensors see it: torch.save refuses one that is seen with two dtypes."""
    dtypes = {tensor.dtype for tensor in sharers}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    storage = sharers[0].untyped_storage()
    whole = torch.empty(0, dtype=dtype, device=sharers[0].device)
    return whole.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def from_storages(storages: Sequence[Tensor], places: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """The tensors again."""
    tensors = []
    for i, dtype, offset, shape, strides, requires_grad in places:
        raw = torch.empty(0, dtype=dtype, device=storages[i].device)
        raw.set_(storages[i].untyped_storage(), offset, shape, strides)
        tensors.append(raw.requires_grad_(requires_grad))
    return tensors


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether two of them have one storage."""
    return len({tensor.untyped_storage()._cdata for tensor in tensors}) < len(tensors)
