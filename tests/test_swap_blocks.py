"""swap_blocks against the reference and against plain indexing."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from hypothesis import given

import kvkernels


@cases.examples(250)
@given(cases.swap_cases())
def test_random_cases(case):
    cases.check(case)


@pytest.mark.cuda
@pytest.mark.parametrize(("placement", "pinned"), cases.DEVICE_PLACEMENTS)
def test_random_cases_on_a_device(placement, pinned):
    @cases.examples(100)
    @given(cases.swap_cases().filter(lambda case: case.fits(placement)))
    def run(case):
        cases.check(case, placement, pinned)

    run()


@pytest.mark.parametrize("offset_bytes", range(17))
def test_every_alignment(offset_bytes):
    """Each of 17 source alignments with each of 17 destination alignments, at sizes around the vector widths."""
    for dst_offset_bytes in range(17):
        for page_bytes in (1, 15, 16, 17, 31, 63, 64, 65, 127, 130, 255, 1025, 4097):
            arena = cases.Arena()
            src = cases.pool_view(
                arena.reserve("src", 5 * page_bytes, offset_bytes), 5, page_bytes, page_bytes, torch.uint8
            )
            place = arena.reserve("dst", 5 * (page_bytes + 1), dst_offset_bytes)
            dst = cases.pool_view(place, 5, page_bytes, page_bytes + 1, torch.uint8)
            mapping = torch.tensor([[4, 0], [1, 2], [2, 3]])
            cases.check(arena.case("swap_blocks", src, dst, page_bytes, mapping, seed=page_bytes))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_dtype_keeps_its_bytes(dtype):
    arena = cases.Arena()
    size = dtype.itemsize
    src = cases.View(*arena.reserve("src", 6 * 24 * size), dtype, (6, 2, 12), (24, 12, 1))
    dst = cases.View(*arena.reserve("dst", 5 * 25 * size), dtype, (5, 3, 8), (25, 8, 1))
    cases.check(arena.case("swap_blocks", src, dst, 24 * size, torch.tensor([[5, 0], [0, 4], [5, 2]])))


def test_nan_payloads_are_kept():
    """Quiet and signalling NaNs of both signs, with payloads: what converting through a float register would change."""
    patterns = [0x7FA00001, 0xFFA0BEEF, 0x7FC12345, 0xFFFFFFFF, 0x7F800001, 0x80000001, 0x7F800000, 0]
    words = torch.tensor(np.array(patterns, dtype=np.uint32).view(np.int32)).repeat(4, 1)
    src, dst = words.view(torch.float32), torch.zeros(4, 8)
    torch.ops.kvkernels.swap_blocks(src, dst, 32, torch.tensor([[0, 3], [2, 1]]))
    expected = torch.zeros(4, 8, dtype=torch.int32)
    expected[[3, 1]] = words[[0, 2]]
    assert torch.equal(dst.view(torch.int32), expected)


@pytest.mark.parametrize("padding_bytes", [0, 24])
@pytest.mark.parametrize("page_bytes", [4096, 20_000, 300_001])
def test_large_calls_over_several_lanes(threads, page_bytes, padding_bytes):
    """12 MiB, which several threads share, in random order with neighbours among the pairs."""
    blocks = (12 << 20) // page_bytes
    rng = np.random.default_rng(page_bytes)
    arena = cases.Arena()
    stride_bytes = page_bytes + padding_bytes
    views = [
        cases.pool_view(arena.reserve(side, blocks * stride_bytes, 5), blocks, page_bytes, stride_bytes, torch.uint8)
        for side in ("src", "dst")
    ]
    pairs = cases.neighbouring_pairs(rng, blocks, blocks, blocks - 3)
    case = arena.case("swap_blocks", *views, page_bytes, torch.from_numpy(pairs))
    cases.check(case)
    buffers = case.random_buffers()
    assert kvkernels.explain("swap_blocks", *case.arguments_on(buffers)).lanes == threads


def test_pages_sorted_by_source(threads):
    """4 KiB pages in a call so large that the pairs are put in the order of their sources."""
    blocks, page_bytes = 18_000, 4096
    rng = np.random.default_rng(0)
    src = torch.from_numpy(rng.integers(0, 256, (blocks, page_bytes), dtype=np.uint8))
    dst, expected = torch.zeros_like(src), torch.zeros_like(src)
    mapping = torch.from_numpy(np.stack((rng.permutation(blocks), rng.permutation(blocks)), 1))[: blocks - 5]
    kvkernels.reset_counters()
    predicted = kvkernels.explain("swap_blocks", src, dst, page_bytes, mapping)
    kvkernels.swap_blocks(src, dst, page_bytes, mapping)
    expected[mapping[:, 1]] = src[mapping[:, 0]]
    assert torch.equal(dst, expected)
    cases.assert_issued(predicted)


def test_no_pairs_touch_nothing():
    src, dst = torch.ones(4, 16), torch.zeros(4, 16)
    for shape in ((0, 2),):
        kvkernels.swap_blocks(src, dst, 64, torch.empty(shape, dtype=torch.int64))
    assert not dst.any()


def test_tensors_without_blocks():
    empty = torch.empty(0, 16)
    kvkernels.swap_blocks(empty, empty, 64, torch.empty(0, 2, dtype=torch.int32))
    with pytest.raises(IndexError, match=r"block_mapping\[0, 0\] = 0 is out of range for src with 0 blocks"):
        kvkernels.swap_blocks(empty, torch.zeros(1, 16), 64, torch.zeros(1, 2, dtype=torch.int64))


def test_keys_and_values_of_one_tensor():
    """K = t[:, 0] and V = t[:, 1] lie between each other's rows: copying one to the other touches no byte twice."""
    t = torch.arange(6 * 2 * 8, dtype=torch.int32).reshape(6, 2, 8)
    expected = t.clone()
    expected[:, 1] = t[:, 0]
    mapping = torch.arange(6)[:, None].repeat(1, 2)
    kvkernels.swap_blocks(t[:, 0], t[:, 1], 32, mapping)
    assert torch.equal(t, expected)


def test_source_may_be_read_only_memory():
    """The source is opened for reading alone: a copy-on-write clone stays shared, its sibling unharmed."""
    src = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
    lazy = torch._lazy_clone(src)
    dst = torch._lazy_clone(src)
    kvkernels.swap_blocks(lazy, dst, 8, torch.tensor([[0, 3]]))
    assert torch._C._is_cow_tensor(lazy)
    assert dst[3].tolist() == list(range(8))
    assert src[3].tolist() == list(range(24, 32))


@pytest.mark.parametrize("call", [kvkernels.swap_blocks, kvkernels.reference.swap_blocks])
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_head_first_memory_that_is_shown_as_token_first(call, pad, dtype):
    """As vLLM shows it: what counts in a block is that its bytes are dense."""
    memory = [torch.randint(0, 100, (6, 2 * 4 * 8 + pad)).to(dtype) for _ in range(2)]
    src, dst = (m[:, : 2 * 4 * 8].view(6, 2, 4, 8).transpose(1, 2) for m in memory)
    before, block_bytes = memory[1].clone(), 2 * 4 * 8 * dtype.itemsize
    call(src, dst, block_bytes, torch.tensor([[5, 0], [1, 4]]))
    before[[0, 4], : 2 * 4 * 8] = memory[0][[5, 1], : 2 * 4 * 8]
    assert torch.equal(memory[1], before)
    kv = [torch.randint(0, 100, (2, 6, 2, 4, 8)).to(dtype) for _ in range(2)]
    call(kv[0].transpose(2, 3), kv[1].transpose(2, 3), block_bytes, torch.tensor([[7, 2]]))
    assert torch.equal(kv[1][0, 2], kv[0][1, 1])
    for scattered in (memory[0].t(), kv[0].transpose(0, 1), kv[0][..., ::2]):
        with pytest.raises(ValueError, match="src must be contiguous or have rows of"):
            call(scattered, dst, 2, torch.tensor([[0, 1]]))
