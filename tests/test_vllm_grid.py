"""vLLM's own grid for swap_blocks: 256 mappings of 8 heads, against plain indexing."""

from __future__ import annotations

import mmap
import random

import pytest
import torch

_MAP_NORESERVE = 0x4000
NUM_MAPPINGS = 256
NUM_HEADS = 8


def _cache(num_blocks: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A cache of zeros, in memory only where it is written: the largest has 2.4 GiB."""
    bytes = num_blocks * torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(num_blocks, *shape)


def _words(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32 if t.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("num_blocks", [512, 1024, 10_000])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_swap_blocks(head_size, block_size, num_blocks, dtype):
    shape = (block_size, NUM_HEADS, head_size)
    src, dst = _cache(num_blocks, shape, dtype), _cache(num_blocks, shape, dtype)
    # vLLM's choice: no block is both read and written, so that one cache could be both.
    sources = random.sample(range(num_blocks), NUM_MAPPINGS)
    destinations = random.sample(sorted(set(range(num_blocks)) - set(sources)), NUM_MAPPINGS)
    values = torch.randn(NUM_MAPPINGS, *shape).to(dtype)
    src[sources] = values
    mapping = torch.tensor(list(zip(sources, destinations, strict=True)), dtype=torch.int64)
    block_size_in_bytes = src.element_size() * src.stride(0)
    torch.ops.kvkernels.swap_blocks(src, dst, block_size_in_bytes, mapping)
    assert torch.equal(_words(dst[destinations]), _words(values))
    assert torch.equal(_words(src[sources]), _words(values))
    untouched = set(range(num_blocks)) - set(destinations)
    if num_blocks > 1024:
        # Reading all of 10,000 sparse blocks takes seconds; the neighbours are where a wrong stride ends up.
        untouched &= {block for d in destinations for block in (d - 1, d + 1)}
    assert not any(_words(dst[block]).any() for block in untouched)
