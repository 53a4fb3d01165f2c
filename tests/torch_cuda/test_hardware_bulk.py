"""The bulk kernel's ring of shared memory, again and again: what orders the asynchronous copies is a promise of the
hardware, which the simulator can only model, and a broken one shows rarely.
"""

from __future__ import annotations

import pytest
import torch
from torch_cuda.hardware import (
    DIRECTIONS,
    Shape,
    are_same,
    assert_copied,
    random_mapping,
    scaled,
    shared_buffers,
    whole_pages,
)

import kvkernels

pytestmark = pytest.mark.cuda(bulk=True)

TIMES = scaled(1000, 48)
BUDGETS = range(1, 17)
TILE_BYTES, STAGES, WARPS = 8 << 10, 6, 4
# Ragged in front, at the end or on both; of one tile and of many, of few stages and of many.
PAGE_BYTES = (512, 515, 4096 - 3, TILE_BYTES, TILE_BYTES + 1, 20_007)
buffers = pytest.fixture(scope="module")(shared_buffers)


@pytest.mark.parametrize("ids_place", ["cpu", "cuda"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_again_and_again(buffers, direction, ids_place):
    """Both sides begin equally far from a multiple of 16, as bulk copies want, or differ; all are compared."""
    wrapped = 0
    for turn in range(TIMES):
        page_bytes = PAGE_BYTES[turn % len(PAGE_BYTES)]
        pairs = scaled(400, 40)
        shift_bytes = turn % 16
        differs = turn % 5 == 4
        src = Shape(1, pairs + 7, page_bytes, -page_bytes % 16, shift_bytes)
        dst = Shape(1, pairs + 3, page_bytes, -page_bytes % 16 + 16, shift_bytes + 3 * differs)
        mapping = random_mapping(pairs, src.blocks, dst.blocks)
        sm_budget = BUDGETS[turn % len(BUDGETS)]
        with torch.cuda.stream(torch.cuda.Stream()):
            source, destination, pristine = buffers.sides(direction, (src, dst))
            kvkernels.copy_pages(
                src.on(source),
                dst.on(destination),
                mapping.to(ids_place),
                whole_pages(src),
                executor="bulk",
                sm_budget=sm_budget,
            )
            torch.cuda.synchronize()
        label = f"turn {turn}, pages of {page_bytes}, shifted by {shift_bytes}, {sm_budget} SMs, differs: {differs}"
        assert_copied(destination, (src, dst), pristine, mapping, label)
        assert are_same(source, pristine), f"{label}: the source was written"
        tiles_of_a_warp = pairs * -(-page_bytes // TILE_BYTES) / (WARPS * sm_budget)
        wrapped += page_bytes > TILE_BYTES and tiles_of_a_warp > STAGES
    kvkernels.check_device(0)
    assert wrapped, "no ring went round"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_call_that_goes_round_for_long(buffers, direction):
    """On one SM, so that each ring has hundreds of turns."""
    pairs = scaled(20_000, 300)
    shape = Shape(1, pairs + 1, TILE_BYTES + 16)
    mapping = random_mapping(pairs, shape.blocks, shape.blocks)
    with torch.cuda.stream(torch.cuda.Stream()):
        source, destination, pristine = buffers.sides(direction, (shape, shape))
        pools = shape.on(source), shape.on(destination)
        kvkernels.copy_pages(*pools, mapping, whole_pages(shape), executor="bulk", sm_budget=1)
        torch.cuda.synchronize()
    assert_copied(destination, (shape, shape), pristine, mapping)
