"""gather_blocks and scatter_blocks against the reference and against plain indexing."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from hypothesis import given

import kvkernels

OPS = ("gather_blocks", "scatter_blocks")


@pytest.mark.parametrize("op", OPS)
def test_random_cases(op):
    @cases.examples(100)
    @given(cases.gather_scatter_cases(op))
    def run(case):
        cases.check(case)

    run()


@pytest.mark.cuda
@pytest.mark.parametrize(("placement", "pinned"), cases.DEVICE_PLACEMENTS)
@pytest.mark.parametrize("op", OPS)
def test_random_cases_on_a_device(op, placement, pinned):
    @cases.examples(60)
    @given(cases.gather_scatter_cases(op).filter(lambda case: case.fits(placement)))
    def run(case):
        cases.check(case, placement, pinned)

    run()


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_ids_on_the_device(op):
    """Ids that live on the device: a pair out of range is skipped, recorded once, and reported by check_device."""
    before = torch.arange(10 * 64, dtype=torch.int32).reshape(10, 64)
    pool = before.cuda()
    ids = torch.tensor([3, 99, 0, -1]).cuda()
    buffer = torch.zeros(4, 256, dtype=torch.uint8).cuda()
    if op == "gather_blocks":
        kvkernels.gather_blocks([pool], ids, buffer)
        expected = torch.zeros(4, 64, dtype=torch.int32)
        expected[[0, 2]] = before[[3, 0]]
        assert torch.equal(buffer.cpu().view(torch.int32), expected)
    else:
        kvkernels.scatter_blocks(buffer, ids, [pool])
        before[[3, 0]] = 0
    assert torch.equal(pool.cpu(), before)
    with pytest.raises(IndexError, match=rf"{op}: 2 pairs had ids out of range on cuda:0"):
        kvkernels.check_device("cuda:0")
    kvkernels.check_device("cuda:0")


def _pools_of(rng, blocks, *page_bytes):
    return [torch.from_numpy(rng.integers(0, 256, (blocks, size), dtype=np.uint8)) for size in page_bytes]


@pytest.mark.parametrize("executor", ["auto", "cpu", "reference"])
def test_pages_stand_beside_each_other_in_a_row(executor):
    """Pool t's page lies at the sum of the pages before it, whatever the dtypes are."""
    rng = np.random.default_rng(1)
    raw = _pools_of(rng, 9, 24, 2, 40)
    pools = [raw[0].view(torch.float64), raw[1].view(torch.bfloat16), raw[2].view(torch.float8_e4m3fn)]
    ids = torch.tensor([8, 0, 3, 3])
    out = torch.empty(4, 66, dtype=torch.uint8)
    kvkernels.gather_blocks(pools, ids, out, executor)
    assert torch.equal(out, torch.cat([r[ids] for r in raw], 1))
    ids = torch.tensor([1, 8, 0, 4])
    expected = [r.clone() for r in raw]
    for e, part in zip(expected, out.split([24, 2, 40], 1), strict=True):
        e[ids] = part
    kvkernels.scatter_blocks(out, ids, pools, executor)
    assert all(torch.equal(r, e) for r, e in zip(raw, expected, strict=True))


@pytest.mark.parametrize("page_bytes", [4096, 33_000, 524_288])
@pytest.mark.parametrize("op", OPS)
def test_large_calls_over_several_lanes(threads, op, page_bytes):
    """20 MiB over three pools, which several threads share."""
    rng = np.random.default_rng(page_bytes)
    layers = 3
    blocks = (20 << 20) // (layers * page_bytes) + 1
    arena = cases.Arena()
    pools_side, buffer_side = ("src", "dst") if op == "gather_blocks" else ("dst", "src")
    pools = [
        cases.pool_view(arena.reserve(pools_side, blocks * page_bytes), blocks, page_bytes, page_bytes, torch.uint8)
        for _ in range(layers)
    ]
    ids = torch.from_numpy(cases.neighbouring_ids(rng, blocks, blocks).copy())
    place = arena.reserve(buffer_side, blocks * layers * page_bytes, 3)
    buffer = cases.pool_view(place, blocks, layers * page_bytes, layers * page_bytes, torch.uint8)
    case = arena.case(op, *((pools, ids, buffer) if op == "gather_blocks" else (buffer, ids, pools)))
    cases.check(case)
    assert kvkernels.explain(op, *case.arguments_on(case.random_buffers())).lanes == threads


def test_pools_that_share_memory_may_be_gathered():
    pool = torch.arange(12, dtype=torch.uint8).reshape(6, 2)
    out = torch.empty(2, 4, dtype=torch.uint8)
    kvkernels.gather_blocks([pool, pool], torch.tensor([5, 5]), out)
    assert out.tolist() == [[10, 11, 10, 11]] * 2


@pytest.mark.parametrize("op", OPS)
def test_no_ids_touch_nothing(op):
    pool, buffer = torch.zeros(3, 4), torch.empty(0, 16, dtype=torch.uint8)
    ids = torch.empty(0, dtype=torch.int32)
    if op == "gather_blocks":
        kvkernels.gather_blocks([pool], ids, buffer)
    else:
        kvkernels.scatter_blocks(buffer, ids, [pool])
    assert not pool.any()


def test_gather_then_scatter_is_the_identity():
    rng = np.random.default_rng(2)
    pools = _pools_of(rng, 50, 100, 4096, 31)
    copies = [torch.zeros_like(pool) for pool in pools]
    ids = torch.from_numpy(rng.permutation(50))
    out = torch.empty(50, 100 + 4096 + 31, dtype=torch.uint8)
    kvkernels.gather_blocks(pools, ids, out)
    kvkernels.scatter_blocks(out, ids, copies)
    assert all(torch.equal(a, b) for a, b in zip(pools, copies, strict=True))
