"""Conversions between layouts and shards, token slots, and joined and split shards, at an engine's sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch_cuda.calls import on, pageable, pinned, places
from torch_cuda.hardware import (
    DIRECTIONS,
    EXECUTORS,
    POISON,
    WORKSHOP,
    are_same,
    on_stream,
    random_bytes,
    refusal_of,
    scaled,
    spin,
)

import kvkernels
from kvkernels import KVCache, KVLayout, convert_blocks, copy_slots

pytestmark = pytest.mark.cuda(gib=4)

HEADS, HEAD_BYTES, TOKENS = 8, 256, 16
BULK_MIN_BYTES = 512
HEAD_FIRST, TOKEN_FIRST = "B L K H N D", "B L K N H D"
SIZES = {"L": scaled(32, 2), "K": 2, "N": TOKENS, "H": HEADS, "D": HEAD_BYTES // 2, "dtype": torch.bfloat16}
BLOCKS = scaled(16, 4)


def _random(*shape: int) -> Tensor:
    return random_bytes(math.prod(shape)).cpu().view(shape)


def _layouts(pattern: str, ranks: int, blocks: int) -> list[KVLayout]:
    whole = KVLayout(pattern, B=blocks, **SIZES)
    return [whole.shard(rank, ranks) for rank in range(ranks)]


def _memory(layouts: list[KVLayout]) -> list[list[Tensor]]:
    """Of each rank, random bytes for every tensor."""
    return [[_random(layout.needed_bytes(i)) for i in range(layout.num_tensors)] for layout in layouts]


def _poisoned(layouts: list[KVLayout]) -> list[list[Tensor]]:
    sizes = [[layout.needed_bytes(i) for i in range(layout.num_tensors)] for layout in layouts]
    return [[torch.full((size,), POISON, dtype=torch.uint8) for size in rank] for rank in sizes]


def _placed(memory: list[list[Tensor]], place) -> list[list[Tensor]]:
    return [[place(flat) for flat in rank] for rank in memory]


def _caches(layouts: list[KVLayout], memory: list[list[Tensor]]) -> list[KVCache]:
    return [KVCache(layout, tensors) for layout, tensors in zip(layouts, memory, strict=True)]


def _shortest_fragment(pattern: str, src_ranks: int, dst_ranks: int) -> int:
    """Bytes that lie together on both sides: heads of a token that one rank has there and here, or tokens of a head."""
    if pattern == TOKEN_FIRST:
        return HEAD_BYTES * HEADS // max(src_ranks, dst_ranks)
    return HEAD_BYTES * (TOKENS if src_ranks == HEADS else 1)


@pytest.mark.parametrize(("src_ranks", "dst_ranks"), [(1, 1), (4, 2), (1, 8), (8, 1)])
@pytest.mark.parametrize("pattern", [HEAD_FIRST, TOKEN_FIRST], ids=["head-first", "token-first"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_conversions_and_shards(executor, direction, pattern, src_ranks, dst_ranks):
    """From token-first layers to pages of all layers, of as many ranks or others: what the CPU makes of them."""
    src_layouts = _layouts("L | K B N H D", src_ranks, BLOCKS + 3)
    dst_layouts = _layouts(pattern, dst_ranks, BLOCKS + 2)
    sources = _memory(src_layouts)
    wanted = _poisoned(dst_layouts)
    mapping = torch.stack((torch.randint(0, BLOCKS + 3, (BLOCKS,)), torch.randperm(BLOCKS + 2)[:BLOCKS]), 1)
    src_place, dst_place = places(direction, 0)
    from_tensors, to_tensors = _placed(sources, src_place), _placed(wanted, dst_place)
    calls = _caches(src_layouts, from_tensors), _caches(dst_layouts, to_tensors), mapping

    shortest = _shortest_fragment(pattern, src_ranks, dst_ranks)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        if executor == "bulk" and shortest < BULK_MIN_BYTES:
            said = refusal_of(lambda: convert_blocks(*calls, executor=executor))
            assert said == f"its fragments must have at least {BULK_MIN_BYTES} bytes, and one has {shortest}"
        elif (executor, direction) == ("staged", "d2d"):
            assert refusal_of(lambda: convert_blocks(*calls, executor=executor)) == "no side is in host memory"
        else:
            convert_blocks(_caches(src_layouts, sources), _caches(dst_layouts, wanted), mapping, executor="cpu")
            spin(1)
            convert_blocks(*calls, executor=executor)
        torch.cuda.synchronize()
    for got, expected in ((to_tensors, wanted), (from_tensors, sources)):
        for got_rank, rank in zip(got, expected, strict=True):
            assert all(are_same(a, b) for a, b in zip(got_rank, rank, strict=True))


@pytest.mark.parametrize("executor", [e for e in EXECUTORS if e not in ("dma", "staged")])
@pytest.mark.parametrize("slots_place", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda(torch_kernels=True))])
@pytest.mark.parametrize("chunk_place", [pinned, on(0)], ids=["host", "device"])
def test_slots_there_and_back(executor, slots_place, chunk_place):
    """Most of a cache's tokens, in any order and some left out, to a chunk and from another."""
    blocks = scaled(64, 3)
    layers, count = SIZES["L"], blocks * TOKENS - 5
    layout = KVLayout("L | K B N H D", B=blocks, **{**SIZES, "D": HEAD_BYTES, "dtype": torch.uint8})
    values = [_random(2, blocks, TOKENS, HEADS, HEAD_BYTES) for _ in range(layers)]
    tensors = [on(0)(value) for value in values]
    cache = KVCache(layout, tensors)
    slots = torch.randperm(blocks * TOKENS)[:count]
    slots[[0, 7, count - 1]] = -1
    kept = slots >= 0
    logical = torch.stack(values).transpose(0, 1).reshape(2, layers, blocks * TOKENS, HEADS * HEAD_BYTES)
    out = torch.full((2, layers, count, HEADS * HEAD_BYTES), POISON, dtype=torch.uint8)
    back = _random(*out.shape)
    chunks = chunk_place(out), chunk_place(back)
    placed_slots = slots.to(slots_place)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        spin(1)
        copy_slots(cache, placed_slots, chunks[0], direction="to_buffer", executor=executor)
        copy_slots(cache, placed_slots, chunks[1], direction="to_cache", executor=executor)
        torch.cuda.synchronize()
    out[:, :, kept] = logical[:, :, slots[kept]]
    assert are_same(chunks[0].view(-1), out.view(-1))
    logical[:, :, slots[kept]] = back[:, :, kept]
    got = torch.stack([tensor.to(WORKSHOP) for tensor in tensors]).transpose(0, 1).reshape(logical.shape)
    assert are_same(got.reshape(-1), logical.reshape(-1))
    kvkernels.check_device(0)


@pytest.mark.parametrize("stream", ["side", "default"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(
    ("src_place", "dst_place"),
    [(pageable, on(0)), (pinned, on(0)), (on(0), pageable), (on(0), pinned), (on(0), on(0))],
    ids=["h2d-pageable", "h2d", "d2h-pageable", "d2h", "d2d"],
)
def test_shards_joined_and_split(src_place, dst_place, dim, stream):
    shape = [scaled(2048, 8), 8, 128]
    parts = [8, shape[dim] - 8] if dim != 1 else [1] * 8
    whole = _random(*shape, 2).view(torch.bfloat16).squeeze(-1)
    shards = [src_place(part.contiguous()) for part in whole.split(parts, dim)]
    joined = dst_place(torch.zeros_like(whole))
    pieces = [dst_place(torch.zeros_like(part)) for part in whole.split(parts, dim)]
    placed = src_place(whole)
    torch.cuda.synchronize()
    with torch.cuda.stream(on_stream(stream)):
        spin(1)
        kvkernels.concat_tp_shards_out(shards, dim, joined)
        kvkernels.split_tp_shards(placed, dim, pieces)
        together = kvkernels.concat_tp_shards(shards, dim)
        torch.cuda.synchronize()
    for got, expected in ((joined, whole), (together, whole), *zip(pieces, whole.split(parts, dim), strict=True)):
        assert are_same(got.view(torch.uint8).view(-1), expected.contiguous().view(torch.uint8).view(-1))
