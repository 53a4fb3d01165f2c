"""Blocks, pages and tensors beyond 2^31 and 2^32 bytes and elements, in memory that exists only where it is touched."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from plans import run_row, runs_tensor

import kvkernels

_MAP_NORESERVE = 0x4000  # Python's mmap module names it from 3.13 on
_BYTES = 10 << 30
_BLOCK = 48 << 10
EXECUTORS = ("auto", "cpu", "reference")
# Blocks that begin below, at and above 2^31 and 2^32 bytes, and the last one.
BLOCKS = _BYTES // _BLOCK
FAR = [0, (2**31) // _BLOCK, (2**31) // _BLOCK + 1, (2**32) // _BLOCK, (2**32) // _BLOCK + 7, BLOCKS - 2, BLOCKS - 1]


def _sparse(bytes: int = _BYTES, huge_pages: bool = False) -> torch.Tensor:
    memory = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    if huge_pages:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _blocks(t: torch.Tensor) -> torch.Tensor:
    return t[: BLOCKS * _BLOCK].view(BLOCKS, _BLOCK)


def _fill(blocks: torch.Tensor, ids: list[int]) -> None:
    for id in ids:
        blocks[id] = torch.randint(0, 256, blocks.shape[1:], dtype=torch.uint8)


@pytest.fixture
def far_source() -> torch.Tensor:
    t = _blocks(_sparse())
    _fill(t, FAR)
    return t


def _assert_only(dst: torch.Tensor, source: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """Each destination block is its source, and the blocks round it were left alone."""
    written = {d for _, d in pairs}
    for s, d in pairs:
        assert torch.equal(dst[d], source[s]), (s, d)
        for near in (d - 1, d + 1):
            # A wrapped product of 32-bit numbers lands 2^31 or 2^32 bytes away.
            if 0 <= near < dst.shape[0] and near not in written:
                assert not dst[near].any(), (s, d)
        for wrapped in (d * _BLOCK % 2**32 // _BLOCK, d * _BLOCK % 2**31 // _BLOCK):
            if wrapped not in written:
                assert not dst[wrapped].any(), (s, d)


def test_swap_blocks(far_source):
    dst = _blocks(_sparse())
    pairs = list(zip(FAR, FAR[3:] + FAR[:3], strict=True))
    kvkernels.swap_blocks(far_source, dst, _BLOCK, torch.tensor(pairs, dtype=torch.int32))
    _assert_only(dst, far_source, pairs)


@pytest.mark.skipif(_available_bytes() < 8 << 30, reason="needs 8 GiB of free memory")
def test_one_descriptor_of_more_than_four_gigabytes():
    """Neighbouring blocks that coalesce to one fragment longer than 2^32 bytes, cut between the lanes."""
    bytes, block = (4 << 30) + (5 << 20), 1 << 20
    src, dst = (_sparse(bytes, huge_pages=True).view(-1, block) for _ in range(2))
    marks = torch.tensor([0, 2047, 2048, 4095, 4096, 4100])
    src[marks] = torch.randint(0, 256, (len(marks), block), dtype=torch.uint8)
    ids = torch.arange(src.shape[0])
    mapping = torch.stack((ids, ids), 1)
    kvkernels.reset_counters()
    kvkernels.swap_blocks(src, dst, block, mapping)
    issued = kvkernels.counters()["cpu"]
    assert (issued["descriptors"], issued["bytes"]) == (1, bytes)
    assert torch.equal(dst[marks], src[marks])
    assert not dst[marks[[0, 2, 4]] + 1][:, ::64].any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gather_blocks(far_source, executor):
    out = torch.zeros(len(FAR), _BLOCK, dtype=torch.uint8)
    kvkernels.gather_blocks([far_source], torch.tensor(FAR), out, executor)
    assert torch.equal(out, far_source[FAR])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_scatter_blocks(executor):
    buffer = torch.randint(0, 256, (len(FAR), _BLOCK), dtype=torch.uint8)
    pool = _blocks(_sparse())
    kvkernels.scatter_blocks(buffer, torch.tensor(FAR), [pool], executor)
    _assert_only(pool, buffer, list(enumerate(FAR)))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("gap", [0, 64], ids=["side by side", "apart"])
def test_copy_pages_with_far_sub_blocks(far_source, executor, gap):
    """Ids of sub-blocks beyond 2^31 bytes: the second one of each block to the first one of another.

    Side by side they continue from block to block, and an id needs no division; apart it does.
    """
    dst = _blocks(_sparse())
    half = _BLOCK // 2
    runs = runs_tensor(run_row((0, 0), (0, 0), half - gap, (half - gap, half - gap)))
    pairs = torch.tensor([[2 * s + 1, 2 * d] for s, d in zip(FAR, reversed(FAR), strict=True)])
    kvkernels.copy_pages(
        [far_source], [dst], pairs, runs, src_subblocks_per_block=2, dst_subblocks_per_block=2, executor=executor
    )
    for s, d in zip(FAR, reversed(FAR), strict=True):
        assert torch.equal(dst[d, : half - gap], far_source[s, half - gap : _BLOCK - 2 * gap])
        assert not dst[d, half - gap :].any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_copy_pages_with_far_offsets_in_a_page(executor):
    """One page of 10 GiB: offsets and strides of runs beyond 2^32, upwards and downwards."""
    src, dst = _sparse().view(1, -1), _sparse().view(1, -1)
    stride, count, fragment = (3 << 30) + 4096, 3, 1000
    for i in range(count):
        src[0, 64 + i * stride : 64 + i * stride + fragment] = torch.randint(0, 256, (fragment,), dtype=torch.uint8)
    last = 128 + (count - 1) * stride
    runs = runs_tensor(run_row((0, 0), (64, last), fragment, (0, 0), [(count, stride, -stride)]))
    kvkernels.copy_pages([src], [dst], torch.tensor([[0, 0]]), runs, executor=executor)
    for i in range(count):
        got = dst[0, last - i * stride - 64 : last - i * stride + fragment + 64]
        assert torch.equal(got[64:-64], src[0, 64 + i * stride : 64 + i * stride + fragment])
        assert not got[:64].any()
        assert not got[-64:].any()


@pytest.mark.parametrize("op", ["concat_tp_shards_out", "split_tp_shards"])
def test_element_offsets_beyond_32_bits(op):
    """bfloat16 columns 5 GiB apart: more than 2^31 elements from the first to the last."""
    far = _sparse().view(torch.bfloat16).as_strided((2, 3, 8), ((5 << 29) + 8, 8, 1))
    assert far.stride(0) > 2**31
    parts = [torch.randn(2, n, 8, dtype=torch.bfloat16) for n in (1, 2)]
    whole = torch.cat(parts, 1)
    if op == "concat_tp_shards_out":
        kvkernels.concat_tp_shards_out(parts, 1, far)
        assert torch.equal(far, whole)
        return
    far.copy_(whole)
    got = [torch.empty_like(part) for part in parts]
    kvkernels.split_tp_shards(far, 1, got)
    assert all(torch.equal(g, p) for g, p in zip(got, parts, strict=True))
