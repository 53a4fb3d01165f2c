"""Ids that only the device knows: thousands of them, some out of range, and changed between a graph's replays."""

from __future__ import annotations

import pytest
import torch
from torch_cuda.hardware import (
    DIRECTIONS,
    KERNELS,
    POISON,
    Shape,
    are_same,
    assert_copied,
    random_mapping,
    scaled,
    shared_buffers,
    spin,
    whole_pages,
)

import kvkernels

pytestmark = pytest.mark.cuda(gib=4)

PAIRS = scaled(20_000, 64)
SRC = Shape(pools=2, blocks=PAIRS + 100, page_bytes=1024)
DST = Shape(pools=2, blocks=PAIRS + 50, page_bytes=1024)
buffers = pytest.fixture(scope="module")(shared_buffers)
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_kernel = pytest.mark.parametrize("executor", KERNELS)


def _with_bad_rows(mapping: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The first half just past the source's blocks, the others negative for the destination."""
    mapping = mapping.clone()
    for i, row in enumerate(rows):
        mapping[row, 0 if 2 * i < len(rows) else 1] = SRC.blocks if 2 * i < len(rows) else -1
    return mapping


def _without(mapping: torch.Tensor, rows: list[int]) -> torch.Tensor:
    kept = torch.ones(len(mapping), dtype=torch.bool)
    kept[rows] = False
    return mapping[kept]


@each_direction
@each_kernel
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_out_of_range(buffers, executor, direction, dtype):
    """They are skipped and counted, the first of them is named, and all other rows are copied."""
    rows = sorted(torch.randperm(PAIRS)[: 1 + PAIRS // 20].tolist())
    mapping = random_mapping(PAIRS, SRC.blocks, DST.blocks)
    with torch.cuda.stream(torch.cuda.Stream()):
        src, dst, pristine = buffers.sides(direction, (SRC, DST))
        ids = _with_bad_rows(mapping, rows).to(dtype).cuda()
        spin(1)
        kvkernels.copy_pages(SRC.on(src), DST.on(dst), ids, whole_pages(SRC), executor=executor)
    text = rf"^copy_pages: {len(rows)} pairs had ids out of range on cuda:0, the first in row {rows[0]}$"
    with pytest.raises(IndexError, match=text):
        kvkernels.check_device(0)
    kvkernels.check_device(0)
    assert_copied(dst, (SRC, DST), pristine, _without(mapping, rows))
    assert are_same(src, pristine)


@each_direction
@each_kernel
def test_negative_rows_are_skipped_on_request(buffers, executor, direction):
    rows = torch.randperm(PAIRS)[: PAIRS // 3].tolist()
    mapping = random_mapping(PAIRS, SRC.blocks, DST.blocks)
    ids = mapping.clone()
    ids[rows, 1] = -1
    with torch.cuda.stream(torch.cuda.Stream()):
        src, dst, pristine = buffers.sides(direction, (SRC, DST))
        kvkernels.copy_pages(
            SRC.on(src), DST.on(dst), ids.cuda(), whole_pages(SRC), skip_negative=True, executor=executor
        )
        torch.cuda.synchronize()
    kvkernels.check_device(0)
    assert_copied(dst, (SRC, DST), pristine, _without(mapping, rows))


def test_faults_of_several_streams_add_up(buffers):
    """The word that they share counts every one."""
    src, dst, _ = buffers.sides("d2d", (SRC, DST))
    mapping = random_mapping(PAIRS, SRC.blocks, DST.blocks)
    arguments = SRC.on(src), DST.on(dst), _with_bad_rows(mapping, [1, 5]).cuda(), whole_pages(SRC)
    torch.cuda.synchronize()
    for _ in range(8):
        with torch.cuda.stream(torch.cuda.Stream()):
            kvkernels.copy_pages(*arguments, executor="kernel")
    with pytest.raises(IndexError, match=r"^copy_pages: 16 pairs had ids out of range on cuda:0, the first in row 1$"):
        kvkernels.check_device(0)


@each_direction
@pytest.mark.parametrize("executor", [e for e in KERNELS if e != "triton"])
def test_replays_read_the_ids_of_their_time(buffers, executor, direction):
    """New ids, behind the last replay on the same stream and before the next, without a wait in between."""
    src, dst, pristine = buffers.sides(direction, (SRC, DST))
    mappings = [random_mapping(PAIRS, SRC.blocks, DST.blocks) for _ in range(4)]
    on_device = [mapping.cuda() for mapping in mappings]
    ids, poison = mappings[0].cuda(), torch.full((DST.bytes,), POISON, dtype=torch.uint8).cuda()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kvkernels.copy_pages(SRC.on(src), DST.on(dst), ids, whole_pages(SRC), executor=executor)
    torch.cuda.synchronize()
    assert_copied(dst, (SRC, DST), pristine, mappings[0][:0], "capture")
    with torch.cuda.stream(torch.cuda.Stream()):
        results = []
        for now in on_device:
            dst.copy_(poison, non_blocking=True)
            spin(1)
            ids.copy_(now, non_blocking=True)
            graph.replay()
            results.append(torch.empty(DST.bytes, dtype=torch.uint8, device="cuda").copy_(dst, non_blocking=True))
        torch.cuda.synchronize()
    for turn, (mapping, result) in enumerate(zip(mappings, results, strict=True)):
        assert_copied(result, (SRC, DST), pristine, mapping, f"replay {turn}")
    kvkernels.check_device(0)
