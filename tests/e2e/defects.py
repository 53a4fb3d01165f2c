"""Seeded defects: wrong copies and wrong workers, each of which must make the run fail.

Each is planted in a worker before the audit begins to watch it, and names the checks that must find it, so that no
check can go blind behind another.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Pools = list[Tensor]
    Copy = Callable[[Pools, Pools, Tensor, float], None]

# Where the damage can be seen in all that the engine says and all that is compared.
EVERYWHERE = {"job", "pages", "tokens", "log-probabilities", "bytes"}


def break_ops(worker: Any, broken: Callable[[Copy, Pools, Pools, Tensor, bool], None]) -> None:
    """Puts ``broken`` in the place of both ops.

    It is given the real one as ``copy(src, dst, mapping, fraction)``: pools (one for ``swap_blocks``, a group's layers
    for ``copy_pages``), block ids as int64 ``[n, 2]``, and how much of each page, from its start; and whether the
    destination is the device.
    """
    import torch

    ops = torch.ops.kvkernels
    swap_blocks, copy_pages = ops.swap_blocks, ops.copy_pages
    device = {pages.data_ptr() for pages in worker.device}

    def broken_swap_blocks(src: Tensor, dst: Tensor, page_bytes: int, mapping: Tensor) -> None:
        def copy(src: Pools, dst: Pools, mapping: Tensor, fraction: float) -> None:
            part = int(page_bytes * fraction)
            swap_blocks(src[0][:, :part], dst[0][:, :part], part, mapping)

        broken(copy, [src], [dst], mapping, dst.data_ptr() in device)

    def broken_copy_pages(src: Pools, dst: Pools, mapping: Tensor, runs: Tensor) -> None:
        def copy(src: Pools, dst: Pools, mapping: Tensor, fraction: float) -> None:
            part = runs.clone()
            part[:, 4] = (part[:, 4] * fraction).long()
            copy_pages(src, dst, mapping, part)

        broken(copy, src, dst, mapping, dst[0].data_ptr() in device)

    ops.swap_blocks, ops.copy_pages = broken_swap_blocks, broken_copy_pages


def copy_nothing(worker: Any) -> None:
    break_ops(worker, lambda copy, src, dst, mapping, loading: None)


def drop_last_block(worker: Any) -> None:
    break_ops(worker, lambda copy, src, dst, mapping, loading: copy(src, dst, mapping[:-1], 1.0))


def half_a_page(worker: Any) -> None:
    break_ops(worker, lambda copy, src, dst, mapping, loading: copy(src, dst, mapping, 0.5))


def exchange_two_blocks_on_load(worker: Any) -> None:
    def broken(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
        if loading and len(mapping) >= 2:
            mapping = mapping.clone()
            mapping[[-1, -2], 1] = mapping[[-2, -1], 1]
        copy(src, dst, mapping, 1.0)

    break_ops(worker, broken)


def one_block_too_many(worker: Any) -> None:
    def broken(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
        copy(src, dst, mapping, 1.0)
        if loading:
            untouched = next(row for row in reversed(range(len(dst[0]))) if row not in mapping[:, 1])
            copy(src, dst, mapping.new_tensor([[int(mapping[0, 0]), untouched]]), 1.0)

    break_ops(worker, broken)


def some_copies_by_torch(worker: Any) -> None:
    calls = 0

    def broken(copy: Copy, src: Pools, dst: Pools, mapping: Tensor, loading: bool) -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            copy(src, dst, mapping, 1.0)
        else:
            for source, destination in zip(src, dst, strict=True):
                destination[mapping[:, 1]] = source[mapping[:, 0]]

    break_ops(worker, broken)


def without_last_layer(worker: Any) -> None:
    worker.groups = [refs[:-1] for refs in worker.groups]


def long_loads_reversed(worker: Any) -> None:
    copy = worker.copy

    def broken(self: Any, src: Pools, dst: Pools, mappings: list[Tensor]) -> int:
        if dst is self.device and len(mappings[0]) > 64:
            import torch

            mappings = [torch.stack([mapping[:, 0], mapping[:, 1].flip(0)], dim=1) for mapping in mappings]
        return copy(src, dst, mappings)

    worker.copy = types.MethodType(broken, worker)


def damage_between_jobs(worker: Any) -> None:
    get_finished = worker.get_finished

    def broken(self: Any) -> list[Any]:
        finished = get_finished()
        if finished:
            self.device[0][-1] += 1
        return finished

    worker.get_finished = types.MethodType(broken, worker)


def wrong_byte_counts(worker: Any) -> None:
    get_finished = worker.get_finished

    def broken(self: Any) -> list[Any]:
        finished = get_finished()
        for result in finished:
            result.transfer_size += 1
        return finished

    worker.get_finished = types.MethodType(broken, worker)


# What each must be found by, at the least.
DEFECTS: dict[Callable[[Any], None], set[str]] = {
    copy_nothing: {*EVERYWHERE, "op calls"},
    drop_last_block: EVERYWHERE,
    half_a_page: EVERYWHERE,
    # Neither the tokens nor the log-probabilities need show it: attention does not look at the order of blocks.
    exchange_two_blocks_on_load: {"job", "pages"},
    one_block_too_many: {"job", "bytes"},
    some_copies_by_torch: {"bytes"},
    without_last_layer: EVERYWHERE,
    long_loads_reversed: {"job", "pages"},
    damage_between_jobs: {"job"},
    wrong_byte_counts: {"bytes"},
}
BY_NAME = {defect.__name__: defect for defect in DEFECTS}
