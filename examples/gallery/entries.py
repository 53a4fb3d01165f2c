"""What an entry of the gallery is, and the tensors that engines allocate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvkernels import KVLayout

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
F8, I8, U8 = torch.float8_e4m3fn, torch.int8, torch.uint8

# An attention layer of 8 heads of 128, blocks of 16 tokens; SGLang's, TensorRT-LLM's and MLA's pages have 64.
N, H, D, PAGE = 16, 8, 128, 64
GQA = {"K": 2, "N": N, "H": H, "D": D, "dtype": BF16}
PAGES = {**GQA, "N": PAGE}
LATENT = {"N": PAGE, "D": 576, "dtype": BF16}


@dataclass(frozen=True)
class Entry:
    """One cache: who registers it, as what, its layout, and the engine's tensors, all layers' where one has them."""

    title: str
    registered: str
    layout: Callable[[int, int], KVLayout]
    tensors: Callable[[int, int], list[Tensor]]


def entry(
    title: str, registered: str, layout: Callable[..., KVLayout], tensors: Callable[[int, int], list[Tensor]]
) -> Entry:
    """``layout`` takes B and L by name."""
    return Entry(title, registered, lambda b, n: layout(B=b, L=n), tensors)


def each(*shape: int, dtype: torch.dtype = BF16, like: str = "") -> Callable[[int, int], list[Tensor]]:
    """A tensor a layer, its blocks first; ``like`` is the order in which the engine shows the dimensions."""

    def make(b: int, n: int) -> list[Tensor]:
        tensors = [torch.zeros(b, *shape, dtype=dtype) for _ in range(n)]
        return [tensor.permute([int(i) for i in like]) for tensor in tensors] if like else tensors

    return make


def one(*letters: int | str, dtype: torch.dtype = BF16) -> Callable[[int, int], list[Tensor]]:
    """One tensor, with ``"B"`` and ``"L"`` where blocks and layers are counted."""
    return lambda b, n: [torch.zeros([{"B": b, "L": n}.get(x, x) for x in letters], dtype=dtype)]  # type: ignore[misc]


def flat(page_bytes: int) -> Callable[[int, int], list[Tensor]]:
    """Bytes a layer, where the shape that is shown cuts through the parts."""
    return lambda b, n: [torch.zeros(b * page_bytes, dtype=U8) for _ in range(n)]


def several(*makers: Callable[[int, int], list[Tensor]]) -> Callable[[int, int], list[Tensor]]:
    return lambda b, n: [tensor for make in makers for tensor in make(b, n)]


def in_one_row(order: str, row: int, heads: int = H) -> Callable[[int, int], list[Tensor]]:
    """All layers' ``[B, H, N, row]`` in one memory, in one of vLLM's orders that have blocks or heads outermost."""
    return lambda b, n: [torch.zeros([{"L": n, "B": b, "H": heads, "N": N, "C": row}[x] for x in order], dtype=BF16)]
