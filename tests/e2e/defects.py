"""Broken copies, each of which must make the run fail: they stand in for ``torch.ops.kvkernels``' own.

A defect is a function of ``(copy, src, dst, mapping, page, loading)``. ``copy(src, dst, mapping, page)`` is the real op:
source and destination pools (one for ``swap_blocks``, a group's layers for ``copy_pages``), the int64 ``[n, 2]`` mapping
of block ids, and the part of a page that is copied, from its start, as a fraction. ``loading`` says that the destination
is the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Pools = list[torch.Tensor]
Copy = Callable[[Pools, Pools, torch.Tensor, float], None]
Defect = Callable[[Copy, Pools, Pools, torch.Tensor, bool], None]


def copy_nothing(copy: Copy, src: Pools, dst: Pools, mapping: torch.Tensor, loading: bool) -> None:
    pass


def drop_last_block(copy: Copy, src: Pools, dst: Pools, mapping: torch.Tensor, loading: bool) -> None:
    copy(src, dst, mapping[:-1], 1.0)


def half_a_page(copy: Copy, src: Pools, dst: Pools, mapping: torch.Tensor, loading: bool) -> None:
    copy(src, dst, mapping, 0.5)


def exchange_two_blocks_on_load(copy: Copy, src: Pools, dst: Pools, mapping: torch.Tensor, loading: bool) -> None:
    if loading and len(mapping) >= 2:
        mapping = mapping.clone()
        mapping[[-1, -2], 1] = mapping[[-2, -1], 1]
    copy(src, dst, mapping, 1.0)


DEFECTS: dict[str, Defect] = {
    function.__name__: function
    for function in (copy_nothing, drop_last_block, half_a_page, exchange_two_blocks_on_load)
}


def plant(name: str, worker: Any) -> None:
    """Replaces both ops of this process, as the worker finds them, with broken ones."""
    defect, ops = DEFECTS[name], torch.ops.kvkernels
    swap_blocks, copy_pages = ops.swap_blocks, ops.copy_pages
    device = {pages.data_ptr() for pages in worker.device}

    def broken_swap_blocks(src: torch.Tensor, dst: torch.Tensor, page_bytes: int, mapping: torch.Tensor) -> None:
        def copy(src: Pools, dst: Pools, mapping: torch.Tensor, page: float) -> None:
            part = int(page_bytes * page)
            swap_blocks(src[0][:, :part], dst[0][:, :part], part, mapping)

        defect(copy, [src], [dst], mapping, dst.data_ptr() in device)

    def broken_copy_pages(src: Pools, dst: Pools, mapping: torch.Tensor, runs: torch.Tensor) -> None:
        def copy(src: Pools, dst: Pools, mapping: torch.Tensor, page: float) -> None:
            part = runs.clone()
            part[:, 4] = (part[:, 4] * page).long()
            copy_pages(src, dst, mapping, part)

        defect(copy, src, dst, mapping, dst[0].data_ptr() in device)

    ops.swap_blocks, ops.copy_pages = broken_swap_blocks, broken_copy_pages
