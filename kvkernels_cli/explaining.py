"""The call that ``kvkernels explain`` asks about; it needs torch."""

from __future__ import annotations

from typing import Any

import torch

import kvkernels


def explain_pages(
    op: str, page_bytes: int, pairs: int, pools: int, direction: str, executor: str
) -> kvkernels.Explanation:
    """Explain a call on pages in random order.

    Raises
    ------
    ValueError
        It cannot be served here; the text says why.
    """
    if op == "swap_blocks" and pools != 1:
        raise ValueError(f"explain: --pools must be 1 for swap_blocks, got {pools}")
    places = {"h": "cpu", "d": "cuda"}
    sides = places[direction[0]], places[direction[-1]]
    if "cuda" in sides and not torch.cuda.is_available():
        raise ValueError(f"explain: --direction {direction} needs a CUDA device, and torch sees none")

    def memory(width: int, side: str) -> torch.Tensor:
        pinned = side == "cpu" and "cuda" in sides
        return torch.empty(pairs, width, dtype=torch.uint8, device=side, pin_memory=pinned)

    try:
        src, dst = ([memory(page_bytes, side) for _ in range(pools)] for side in sides)
        packed_src, packed_dst = (memory(pools * page_bytes, side) for side in sides)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"explain: the pools cannot be allocated: {str(error).splitlines()[0]}") from None
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(0))
    mapping = torch.stack([torch.arange(pairs), order], dim=1)
    calls: dict[str, tuple[Any, ...]] = {
        "swap_blocks": (src[0], dst[0], page_bytes, mapping),
        "gather_blocks": (src, order, packed_dst),
        "scatter_blocks": (packed_src, order, dst),
        "copy_pages": (src, dst, mapping, kvkernels.whole_page_runs(src)),
    }
    return kvkernels.explain(op, *calls[op], executor=executor)
