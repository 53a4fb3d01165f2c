"""swap_blocks_batch on a device: who is chosen for which sizes, what is refused and why."""

from __future__ import annotations

import pytest
import torch
from cases import assert_issued
from torch_cuda.calls import issued, on, pageable, pinned

import kvkernels

pytestmark = pytest.mark.cuda

POOL_BYTES = 1 << 20


class Copies:
    """Rows of these sizes between two places, each size from a slot of its own that leaves gaps."""

    def __init__(self, src_place, dst_place, sizes: list[int], gap: int = 64) -> None:
        generator = torch.Generator().manual_seed(len(sizes))
        self.src = src_place(torch.randint(256, (POOL_BYTES,), dtype=torch.uint8, generator=generator))
        self.dst = dst_place(torch.zeros(POOL_BYTES, dtype=torch.uint8))
        self.wanted = torch.zeros(POOL_BYTES, dtype=torch.uint8)
        rows, to = [], 0
        for size in sizes:
            at = (POOL_BYTES - to - size) // 16 * 16
            rows.append((self.src.data_ptr() + at, self.dst.data_ptr() + to, size))
            self.wanted[to : to + size] = self.src[at : at + size].cpu()
            to += (size + 15) // 16 * 16 + gap
        self.arguments = tuple(torch.tensor(column) for column in zip(*rows, strict=True))

    def explain(self, **options) -> kvkernels.Explanation:
        return kvkernels.explain("swap_blocks_batch", *self.arguments, **options)

    def check(self, **options) -> kvkernels.Explanation:
        explanation = self.explain(**options)
        kvkernels.reset_counters()
        kvkernels.swap_blocks_batch(*self.arguments, **options)
        torch.cuda.synchronize()
        assert_issued(explanation)
        assert torch.equal(self.dst.cpu(), self.wanted)
        return explanation

    def refused(self, **options) -> str:
        with pytest.raises(ValueError) as raised:
            kvkernels.swap_blocks_batch(*self.arguments, **options)
        torch.cuda.synchronize()
        assert not self.dst.cpu().any()
        text = str(raised.value)
        assert text.startswith(f"swap_blocks_batch: executor '{options['executor']}' cannot serve this call: ")
        return text.split("call: ")[1]


@pytest.fixture(autouse=True)
def own_stream():
    """Where copies are batched."""
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@pytest.mark.parametrize(("src", "dst"), [(pinned, on(0)), (on(0), pinned), (on(0), on(0))], ids=["h2d", "d2h", "d2d"])
@pytest.mark.parametrize(
    "sizes", [[2000] * 20 + [40] * 20, [1024, 48] * 20 + [333], [100 + i % 8 for i in range(40)]], ids=len
)
def test_mixed_sizes_go_to_the_kernel(sim, src, dst, sizes):
    """Pages with their scales, a short tail: one move and one launch a size."""
    different = len(set(sizes))
    copies = Copies(src, dst, sizes)
    if sim is not None:
        sim.clear_log()
    explanation = copies.check()
    assert (explanation.executor, explanation.moves, explanation.launches) == ("kernel", different, different)
    assert (explanation.pairs, explanation.bytes) == (len(sizes), sum(sizes))
    if sim is not None:
        assert [entry["call"] for entry in issued(sim)].count("launch") == different


def test_too_many_sizes_go_to_the_copy_engine(sim):
    copies = Copies(pinned, on(0), [100 + i % 9 for i in range(40)])
    explanation = copies.check()
    assert explanation.executor == "dma"
    assert "; kernel cannot: its fragments have more than 8 sizes; staged cannot: " in explanation.reason
    assert Copies(pinned, on(0), [100 + i % 9 for i in range(40)]).refused(executor="kernel") == (
        "its fragments have more than 8 sizes"
    )


def test_neighbours_that_join_do_not_keep_pages_from_the_kernel(sim):
    """Random pages come in stretches of any length: joined they have many sizes, as they are listed they have one."""
    page, stretches = 64, [1 + i for i in range(12)]
    src, dst = pinned(torch.arange(POOL_BYTES).to(torch.uint8)), on(0)(torch.zeros(POOL_BYTES, dtype=torch.uint8))
    rows, at = [], 0
    for stretch in stretches:
        rows += [(at + i * page, at + i * page) for i in range(stretch)]
        at += (stretch + 1) * page
    offsets = torch.tensor(rows)
    arguments = src.data_ptr() + offsets[:, 0], dst.data_ptr() + offsets[:, 1], torch.full((len(rows),), page)
    explanation = kvkernels.explain("swap_blocks_batch", *arguments, executor="kernel")
    assert (explanation.moves, explanation.pairs) == (1, sum(stretches))
    kvkernels.swap_blocks_batch(*arguments, executor="kernel")
    torch.cuda.synchronize()
    wanted = torch.zeros(POOL_BYTES, dtype=torch.uint8)
    for at, to in rows:
        wanted[to : to + page] = src[at : at + page]
    assert torch.equal(dst.cpu(), wanted)


def test_bulk_is_for_who_names_it(sim):
    """Aligned and long fragments, too, in one size or several: no row of the default policy has it."""
    assert Copies(pinned, on(0), [4096] * 20 + [8192] * 4).check().executor == "kernel"
    assert Copies(on(0), on(0), [4096] * 20).check().executor == "kernel"


@pytest.mark.parametrize("executor", ["kernel", "bulk"])
def test_the_budget_bounds_the_grid(sim, executor):
    wide = Copies(pinned, on(0), [4096] * 100).explain(executor=executor).device["ctas"]
    assert wide > 1
    copies = Copies(pinned, on(0), [4096] * 100)
    assert copies.check(executor=executor, sm_budget=1).device["ctas"] == 1


def test_what_is_refused(sim, refuses_pageable):
    def refused(src, dst, executor: str, size: int = 1024) -> str:
        return Copies(src, dst, [size] * 20).refused(executor=executor)

    unreachable = "is in pageable host memory, which the device cannot read"
    for executor in ("kernel", "bulk"):
        assert refused(pageable, on(0), executor) == f"src_ptrs {unreachable}"
        assert refused(on(0), pageable, executor) == f"dst_ptrs {unreachable}"
        assert refused(pinned, pinned, executor) == "it needs a tensor on a cuda device"
    assert refused(pinned, on(0), "bulk", 511) == "its fragments must have at least 512 bytes, and one has 511"
    assert refused(pinned, on(0), "cpu") == "an address is on a cuda device"
    for executor in ("staged", "triton", "reference"):
        assert refused(pinned, on(0), executor) == "it takes tensors, and got addresses"
    auto = Copies(pageable, on(0), [1024] * 20).check()
    assert auto.executor == "dma"
    assert f"; kernel cannot: src_ptrs {unreachable}; staged cannot: " in auto.reason


def test_no_rows_are_on_no_device(sim):
    """An engine's empty batch is no reason for an error, whatever executor it names."""
    nothing = tuple(torch.zeros(0, dtype=torch.int64) for _ in range(3))
    kvkernels.reset_counters()
    for executor in ("auto", "cpu", "kernel", "bulk", "dma"):
        kvkernels.swap_blocks_batch(*nothing, executor=executor)
    assert not any(counted["calls"] for counted in kvkernels.counters().values())


def test_mixed_sizes_are_captured(sim):
    copies = Copies(pinned, on(0), [2000, 48] * 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kvkernels.swap_blocks_batch(*copies.arguments, executor="kernel")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(copies.dst.cpu(), copies.wanted)
