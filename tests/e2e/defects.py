"""Broken copies, each of which must make the run fail: they stand in for ``torch.ops.kvkernels``' own.

``copy(src, dst, mapping, fraction)`` is the real op, for either: pools (one for ``swap_blocks``, a group's layers for
``copy_pages``), block ids as int64 ``[n, 2]``, and how much of each page, from its start. A defect calls it in its own
way; ``loading`` says that the destination is the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Pools = list[Tensor]
    Copy = Callable[[Pools, Pools, Tensor, float], None]


def copy_nothing(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
    pass


def drop_last_block(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
    copy(src, dst, mapping[:-1], 1.0)


def half_a_page(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
    copy(src, dst, mapping, 0.5)


def exchange_two_blocks_on_load(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
    if loading and len(mapping) >= 2:
        mapping = mapping.clone()
        mapping[[-1, -2], 1] = mapping[[-2, -1], 1]
    copy(src, dst, mapping, 1.0)


DEFECTS = {
    defect.__name__: defect for defect in (copy_nothing, drop_last_block, half_a_page, exchange_two_blocks_on_load)
}


def plant(name: str, worker: Any) -> None:
    """Replaces both ops of this process, as the worker finds them, with broken ones."""
    import torch

    defect, ops = DEFECTS[name], torch.ops.kvkernels
    swap_blocks, copy_pages = ops.swap_blocks, ops.copy_pages
    device = {pages.data_ptr() for pages in worker.device}

    def broken_swap_blocks(src: Tensor, dst: Tensor, page_bytes: int, mapping: Tensor) -> None:
        def copy(src: Pools, dst: Pools, mapping: Tensor, fraction: float) -> None:
            part = int(page_bytes * fraction)
            swap_blocks(src[0][:, :part], dst[0][:, :part], part, mapping)

        defect(copy, [src], [dst], mapping, dst.data_ptr() in device)

    def broken_copy_pages(src: Pools, dst: Pools, mapping: Tensor, runs: Tensor) -> None:
        def copy(src: Pools, dst: Pools, mapping: Tensor, fraction: float) -> None:
            part = runs.clone()
            part[:, 4] = (part[:, 4] * fraction).long()
            copy_pages(src, dst, mapping, part)

        defect(copy, src, dst, mapping, dst[0].data_ptr() in device)

    ops.swap_blocks, ops.copy_pages = broken_swap_blocks, broken_copy_pages
