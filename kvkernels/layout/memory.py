"""A tensor's memory as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

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
