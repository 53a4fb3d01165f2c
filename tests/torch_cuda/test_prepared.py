"""Prepared copies with a side on a device: what is looked up once, what each run asks, graphs, and ids on the device."""

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
            ValueError, match="PreparedCopy.run: executor 'kernel' cannot serve this call: src is in page"
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
