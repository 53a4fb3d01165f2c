"""Small jobs for movers."""

from __future__ import annotations

import torch

from kvkernels.transfer import SwapJob

LONG = 30.0  # seconds that no transfer here takes


def pool(blocks: int = 8, page: int = 64, fill: int | None = None) -> torch.Tensor:
    return torch.randint(1, 255, (blocks, page), dtype=torch.uint8) if fill is None else torch.full(
        (blocks, page), fill, dtype=torch.uint8
    )  # fmt: skip


def ids(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64)


def swap(src: torch.Tensor, dst: torch.Tensor, *pairs: tuple[int, int]) -> SwapJob:
    return SwapJob(src, dst, src[0].numel() * src.element_size(), ids(*pairs))
