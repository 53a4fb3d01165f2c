"""The triton executor on torch's CUDA build: checks, upload, ids on the device, refusals.

Triton's own launch needs a driver that runs machine code. On the stand-in the simulator takes its place, on the
stand-in's memory.
"""

from __future__ import annotations

import pytest
import torch
from torch_cuda.calls import PAGE_BYTES, make, on, pageable, places

pytest.importorskip("triton")

from cases import IDS_AT
from plans import run_row, runs_tensor
from simgpu.ptx.memory import Area
from simgpu.triton_device import SimulatedLaunch
from torch_cuda.hardware import random_mapping, scaled

import kvkernels
from kvkernels import KVCache, KVLayout, convert_blocks
from kvkernels.triton import kernels
from kvkernels.triton.table import Head

pytestmark = pytest.mark.cuda
OPS = tuple(IDS_AT)
NOT_INITIALIZED = 3
each_op = pytest.mark.parametrize("op", OPS)


class StandInLaunch(SimulatedLaunch):
    """Reaches all that the stand-in has allocated, after what was put on streams before."""

    def __init__(self, sim) -> None:
        super().__init__("sm_80")
        self.device = sim.use_ptx("sm_80")

    def areas(self, table: torch.Tensor) -> list[Area]:
        torch.cuda.synchronize()
        return self.device._areas()


class RecordedLaunch:
    """Triton's own, and what was launched."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.launch = kernels.launch

    def __call__(self, call: Head, table: torch.Tensor, fault: int, programs: int) -> None:
        self.heads.append(call)
        self.launch(call, table, fault, programs)


@pytest.fixture
def launch(sim, monkeypatch):
    launch = RecordedLaunch() if sim is None else StandInLaunch(sim)
    monkeypatch.setattr(kernels, "launch", launch)
    return launch


def _expected(op: str) -> list[list[int]]:
    call = make(op, pageable, pageable)
    call.run()
    return call.bytes()


@each_op
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize("ids", ["cpu", "cuda"])
def test_bytes(launch, op, direction, ids):
    call = make(op, *places(direction, 0))
    arguments = list(call.arguments)
    arguments[IDS_AT[op]] = arguments[IDS_AT[op]].to(ids)
    kvkernels.reset_counters()
    getattr(torch.ops.kvkernels, op)(*arguments, executor="triton")
    assert call.bytes() == _expected(op)
    assert kvkernels.counters()["triton"]["calls"] == len(launch.heads) == 1
    kvkernels.check_device(0)


# What a call is made of: its kernel, whether fragments are chunked, their bytes and loops on either side.
KERNELS = {
    "page": ("page", False, 5008, []),
    "row": ("row", True, 64, [(3, 128, 64)]),
    "bytes in chunks": ("bytes", True, 72, [(3, 72, 144)]),
    "bytes in tiles": ("bytes", False, 5008, [(2, 5008, 5024)]),
}


@pytest.mark.parametrize("ids", ["cpu", "cuda"])
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize("which", KERNELS)
def test_each_kernel(launch, which, direction, ids):
    kernel, is_chunked, fragment_bytes, loops = KERNELS[which]
    pairs = scaled(3000, 3)
    src, dst = (torch.randint(0, 256, (pairs + 2, 16 << 10), dtype=torch.uint8) for _ in range(2))
    src_place, dst_place = places(direction, 0)
    placed = src_place(src), dst_place(dst)
    mapping = random_mapping(pairs, len(src), len(dst))
    runs = runs_tensor(run_row((0, 0), (0, 16), fragment_bytes, (0, 0), loops))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        kvkernels.copy_pages([placed[0]], [placed[1]], mapping.to(ids), runs, executor="triton")
        torch.cuda.synchronize()
    (head,) = launch.heads
    assert (kernels.KERNELS[head.kernel].__name__, bool(head.is_chunked)) == (kernel, is_chunked)
    kvkernels.copy_pages([src], [dst], mapping, runs, executor="cpu")
    assert torch.equal(placed[1].cpu(), dst)
    assert torch.equal(placed[0].cpu(), src)
    kvkernels.check_device(0)


@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize(("src_at", "dst_at"), [(0, 112), (112, 0), (5, 117)])
def test_tiles_are_cut_at_lines_of_the_host_that_is_read(launch, direction, src_at, dst_at):
    """And at the destination's otherwise: how many a page of a tile's size needs is that side's affair."""
    page_bytes = 4096
    src_place, dst_place = places(direction, 0)
    src = torch.randint(0, 256, (3, page_bytes + 128), dtype=torch.uint8)
    placed = src_place(src), dst_place(torch.zeros_like(src))
    pools = [[t[:, at : at + page_bytes]] for t, at in zip(placed, (src_at, dst_at), strict=True)]
    runs = runs_tensor(run_row((0, 0), (0, 0), page_bytes, (0, 0)))
    kvkernels.copy_pages(*pools, torch.tensor([[2, 0], [0, 1]]), runs, executor="triton")
    expected = torch.zeros_like(src)
    expected[:2, dst_at : dst_at + page_bytes] = src[[2, 0], src_at : src_at + page_bytes]
    assert torch.equal(placed[1].cpu(), expected)
    (head,) = launch.heads
    assert (head.cuts_on_src, head.links_host) == (direction == "h2d", direction != "d2d")


@each_op
def test_ids_out_of_range_are_reported_with_those_of_the_compiled_kernels(launch, op):
    call = make(op, *places("d2d", 0))
    arguments = list(call.arguments)
    bad = arguments[IDS_AT[op]].clone()
    bad.view(-1)[0] = 99
    arguments[IDS_AT[op]] = bad.cuda()
    for executor in ("triton", "kernel"):
        getattr(torch.ops.kvkernels, op)(*arguments, executor=executor)
    with pytest.raises(IndexError, match=f"^{op}: 2 pairs had ids out of range on cuda:0, the first in row 0$"):
        kvkernels.check_device(0)
    kvkernels.check_device(0)


@each_op
def test_pageable_memory_is_refused(launch, refuses_pageable, op):
    call = make(op, pageable, on(0))
    with pytest.raises(ValueError, match=rf"^{op}: executor 'triton' cannot serve this call: .*"):
        call.run(executor="triton")
    assert call.bytes()[1] == [255] * 4 * PAGE_BYTES


@each_op
def test_a_capture_is_refused(launch, op):
    call = make(op, *places("d2d", 0))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            with pytest.raises(ValueError, match="the stream captures a CUDA graph"):
                call.run(executor="triton")
        finally:
            graph.capture_end()
    assert not launch.heads


def _without_driver(stand_in) -> None:
    """The next op finds no CUDA driver in use, as where torch is for another vendor's devices."""
    stand_in.fail("cuCtxGetCurrent", 1, NOT_INITIALIZED)


@each_op
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize("ids", ["cpu", "cuda"])
def test_auto_takes_it_where_the_library_has_no_code(stand_in, launch, op, direction, ids):
    call = make(op, *places(direction, 0))
    arguments = list(call.arguments)
    arguments[IDS_AT[op]] = arguments[IDS_AT[op]].to(ids)
    _without_driver(stand_in)
    explained = kvkernels.explain(op, *arguments)
    assert (explained.executor, "no CUDA driver is in use" in explained.reason) == ("triton", True)
    _without_driver(stand_in)
    getattr(torch.ops.kvkernels, op)(*arguments)
    assert call.bytes() == _expected(op)
    assert len(launch.heads) == 1


@each_op
def test_what_it_cannot_serve_there_is_an_error(stand_in, launch, op):
    for options, error, text in (
        ({}, RuntimeError, rf"^{op}: tensors on a cuda device need CUDA code or the triton kernels: .* pinned memory$"),
        ({"executor": "triton"}, ValueError, rf"^{op}: executor 'triton' cannot serve this call: .* pinned memory$"),
        ({"executor": "kernel"}, ValueError, rf"^{op}: executor 'kernel' cannot serve this call: this build's kernels"),
        ({"executor": "cpu"}, ValueError, rf"^{op}: executor 'cpu' cannot serve this call: a tensor is on a cuda"),
    ):
        call = make(op, pageable, on(0))
        _without_driver(stand_in)
        with pytest.raises(error, match=text):
            call.run(**options)
        assert call.bytes()[1] == [255] * 4 * PAGE_BYTES


@each_op
def test_ids_out_of_range_are_reported_there(stand_in, launch, op):
    """By a word that Python keeps."""
    call = make(op, *places("d2d", 0))
    arguments = list(call.arguments)
    bad = arguments[IDS_AT[op]].clone()
    bad.view(-1)[0] = 99
    arguments[IDS_AT[op]] = bad.cuda()
    _without_driver(stand_in)
    getattr(torch.ops.kvkernels, op)(*arguments)
    _without_driver(stand_in)
    with pytest.raises(IndexError, match=f"^{op}: 1 pairs had ids out of range on cuda:0, the first in row 0$"):
        kvkernels.check_device(0)
    kvkernels.check_device(0)


@pytest.mark.parametrize(("src_ranks", "dst_ranks"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_a_conversion_of_layouts(launch, direction, src_ranks, dst_ranks):
    """Token-first shards to head-first pages of all layers, in one launch."""
    sizes = {"L": 2, "K": 2, "N": 4, "H": 6, "D": 16, "dtype": torch.float16}
    generator = torch.Generator().manual_seed(5)

    def convert(src_place, dst_place, executor):
        sides = []
        for pattern, ranks, place in (("L | K B N H D", src_ranks, src_place), ("B L K H N D", dst_ranks, dst_place)):
            whole = KVLayout(pattern, B=3, **sizes)
            generator.manual_seed(5)
            caches = []
            for layout in (whole.shard(rank, ranks) for rank in range(ranks)):
                sizes_bytes = [layout.needed_bytes(i) for i in range(layout.num_tensors)]
                flat = [torch.randint(256, (n,), dtype=torch.uint8, generator=generator) for n in sizes_bytes]
                caches.append(KVCache(layout, [place(t) for t in flat]))
            sides.append(caches)
        convert_blocks(*sides, torch.tensor([[2, 0], [0, 1]]), executor=executor)
        return [tensor.cpu().tolist() for cache in sides[1] for tensor in cache.tensors]

    got = convert(*places(direction, 0), "triton")
    assert len(launch.heads) == 1
    assert got == convert(pageable, pageable, "reference")
