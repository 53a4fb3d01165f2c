"""Prepared copies with a side on a device: what is looked up once, what a run asks, graphs, and ids on the device."""

from __future__ import annotations

import pytest
import torch
from torch_cuda.calls import on, pageable, pinned, places

import kvkernels

pytestmark = pytest.mark.cuda

PAIRS = torch.tensor([[3, 0], [0, 2], [1, 1]])


def _prepared(direction: str, count: int = 3, page_bytes: int = 64, **options):
    src_place, dst_place = places(direction, 0)
    torch.manual_seed(5)
    src = [src_place(torch.randint(0, 256, (4, page_bytes), dtype=torch.uint8)) for _ in range(count)]
    dst = [dst_place(torch.full((4, page_bytes), 255, dtype=torch.uint8)) for _ in range(count)]
    return src, dst, kvkernels.prepare(src, dst, **options)


def _arrived(src, dst, pairs=PAIRS) -> bool:
    torch.cuda.synchronize()
    return all(torch.equal(b.cpu()[pairs[:, 1]], a.cpu()[pairs[:, 0]]) for a, b in zip(src, dst, strict=True))


@pytest.mark.parametrize("executor", ["auto", "kernel", "dma", "staged"])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_each_executor(sim, direction, executor):
    src, dst, prepared = _prepared(direction, executor=executor)
    for _ in range(2):
        prepared.run(PAIRS)
        assert _arrived(src, dst)


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_the_driver_is_asked_about_host_memory_once(stand_in, direction):
    src, dst, prepared = _prepared(direction, executor="kernel")
    prepared.run(PAIRS)
    asked = stand_in.calls("cuPointerGetAttributes")
    prepared.run(torch.tensor([[2, 3]]))
    assert stand_in.calls("cuPointerGetAttributes") == asked
    kvkernels.copy_pages(src, dst, PAIRS, kvkernels.whole_page_runs(src), executor="kernel")
    assert stand_in.calls("cuPointerGetAttributes") > asked, "copy_pages cannot know that it stayed"
    assert _arrived(src, dst)


@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_ids_on_the_device(sim, direction):
    src, dst, prepared = _prepared(direction)
    for _ in range(2):
        prepared.run(PAIRS.cuda())
        assert _arrived(src, dst)
    prepared.run(torch.tensor([[1, 9], [2, 2]]).cuda())
    with pytest.raises(
        IndexError, match=r"PreparedCopy.run: 1 pairs had ids out of range on cuda:0, the first in row 0"
    ):
        kvkernels.check_device(0)


def test_pageable_memory_is_for_who_has_ids_on_the_device_or_names_the_kernel(sim, refuses_pageable):
    src = [pageable(torch.zeros(4, 64, dtype=torch.uint8))]
    dst = [on(0)(torch.ones(4, 64, dtype=torch.uint8))]
    prepared = kvkernels.prepare(src, dst, executor="kernel")
    for pairs in (PAIRS, PAIRS.cuda()):
        with pytest.raises(
            ValueError, match=r"PreparedCopy.run: executor 'kernel' cannot serve this call: src is in page"
        ):
            prepared.run(pairs)
    by_copy_engine = kvkernels.prepare(src, dst)
    by_copy_engine.run(PAIRS)
    assert _arrived(src, dst)


@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_capture(sim, direction):
    src, dst, prepared = _prepared(direction)
    prepared.run(PAIRS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run(torch.tensor([[2, 3]]))
    graph.replay()
    assert _arrived(src, dst, torch.tensor([[3, 0], [2, 3]]))


def test_memory_that_moved(sim):
    src, dst, prepared = _prepared("d2h")
    src[1].data = src[1].clone()
    with pytest.raises(ValueError, match=r"PreparedCopy.run: src\[1\] must be in the memory that it had"):
        prepared.run(PAIRS)
    assert pinned(dst[0].cpu()).unique().tolist() == [255]


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_slabs_and_groups(sim, direction):
    """A slab on each side, two groups that share the pools: a call each, and none where one of them is refused."""
    src_place, dst_place = places(direction, 0)
    torch.manual_seed(6)
    data = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
    src = [[src_place(data[:2].clone()), src_place(data[2:].clone())]]
    dst = [[dst_place(torch.full((n, 64), 255, dtype=torch.uint8)) for n in (4, 1)]]
    prepared = kvkernels.prepare(src, dst)
    pairs = torch.tensor([[5, 0], [1, 4], [0, 2]])
    with pytest.raises(ValueError, match=r"^PreparedCopy.run: mapping must be on the cpu"):
        prepared.run(pairs.cuda())
    prepared.run(pairs)
    torch.cuda.synchronize()
    assert _arrived([data], [torch.cat([slab.cpu() for slab in dst[0]])], pairs)
    whole_src, whole_dst = [src_place(data)], [dst_place(torch.full((6, 64), 255, dtype=torch.uint8))]
    groups = kvkernels.PreparedGroups([kvkernels.prepare(whole_src, whole_dst) for _ in range(2)])
    with pytest.raises(ValueError, match=r"must be on the cpu, with values, got another in group 1"):
        groups.run([pairs, torch.tensor([[3, 1]]).cuda()])
    torch.cuda.synchronize()
    assert whole_dst[0].cpu().unique().tolist() == [255]
    groups.run([pairs, torch.tensor([[3, 1]])])
    assert _arrived(whole_src, whole_dst, torch.cat([pairs, torch.tensor([[3, 1]])]))
