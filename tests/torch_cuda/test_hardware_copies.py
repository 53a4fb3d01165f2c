"""Copies as large as an engine's, by every executor, on both kinds of stream: every byte of both sides is compared.

What small cases never reach is here: tables that are uploaded, batches that are full, rings that go round many times
and several chunks of staging. Work is queued behind a spinning kernel, so that nothing is in time by chance.
"""

from __future__ import annotations

import pytest
import torch
from cases import assert_issued
from torch_cuda.calls import BULK
from torch_cuda.hardware import (
    DIRECTIONS,
    EXECUTORS,
    Shape,
    are_same,
    assert_copied,
    on_stream,
    random_mapping,
    refusal_of,
    scaled,
    shared_buffers,
    spin,
    whole_pages,
)

import kvkernels

pytestmark = pytest.mark.cuda(gib=16, host_gib=8)

RING_BYTES = 32 << 20
BULK_MIN_BYTES = 512
BATCH = 2048
# Fragments by their bytes: pools and pairs at full size. 5,000 pairs are an uploaded table; 64 pools are an engine's.
SIZES = {
    72: (4, 5000),
    512: (4, 5000),
    4096: (4, 5000),
    4096 + 16: (4, 5000),
    4097: (64, 312),
    32 << 10: (64, 312),
    1 << 20: (64, 26),
}
buffers = pytest.fixture(scope="module")(shared_buffers)


def _expected_refusal(shape: Shape, direction: str, executor: str) -> str:
    """How the reason begins for which the executor cannot serve such a copy; "" where it can."""
    if executor == "bulk" and shape.page_bytes < BULK_MIN_BYTES:
        return f"its fragments must have at least {BULK_MIN_BYTES} bytes"
    if executor == "staged" and direction == "d2d":
        return "no side is in host memory"
    if executor == "staged" and shape.pools * shape.page_bytes > RING_BYTES:
        return f"a pair spans {shape.pools * shape.page_bytes} bytes of host memory, more than the ring's"
    return ""


def _check(buffers, direction, executor, shapes, mapping, **options):
    """One call by an executor that is named, or by ``auto``: what it issued, and every byte of both sides."""
    src, dst, pristine = buffers.sides(direction, shapes)
    arguments = shapes[0].on(src), shapes[1].on(dst), mapping, whole_pages(shapes[0])
    reason = _expected_refusal(shapes[0], direction, executor)
    if reason:
        said = refusal_of(lambda: kvkernels.copy_pages(*arguments, executor=executor, **options))
        assert said.startswith(reason)
        torch.cuda.synchronize()
        assert_copied(dst, shapes, pristine, mapping[:0])
        return None
    explained = kvkernels.explain("copy_pages", *arguments, executor=executor, **options)
    assert executor in ("auto", explained.executor)
    kvkernels.reset_counters()
    spin(1)
    kvkernels.copy_pages(*arguments, executor=executor, **options)
    assert_issued(explained)
    torch.cuda.synchronize()
    assert_copied(dst, shapes, pristine, mapping)
    assert are_same(src, pristine), "the source was written"
    return explained


@pytest.mark.parametrize("stream", ["side", "default"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("fragment_bytes", SIZES)
def test_large_copies(buffers, fragment_bytes, executor, direction, stream):
    pools, pairs = SIZES[fragment_bytes]
    pools, pairs = scaled(pools, 3), scaled(pairs, 2 if fragment_bytes == 1 << 20 else 6)
    shape = Shape(pools, pairs + pairs // 8 + 2, fragment_bytes)
    with torch.cuda.stream(on_stream(stream)):
        _check(buffers, direction, executor, (shape, shape), random_mapping(pairs, shape.blocks, shape.blocks))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", ["kernel", BULK])
def test_tables_are_uploaded(buffers, executor, direction):
    """From some 4,000 pairs on they exceed a kernel's parameters."""
    pairs = scaled(100_000, 4200)
    shape = Shape(1, pairs, 64 if executor == "kernel" else BULK_MIN_BYTES)
    with torch.cuda.stream(torch.cuda.Stream()):
        mapping = random_mapping(pairs, pairs, pairs)
        explained = _check(buffers, direction, executor, (shape, shape), mapping)
    assert explained.device["uploads"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_batches_are_full(buffers, direction):
    """Every other block of a pool, so that no two join: more than two batches on a stream that takes them."""
    pairs = scaled(20_000, 2 * BATCH + 10)
    shape = Shape(1, 2 * pairs, 64)
    ids = 2 * torch.arange(pairs)
    with torch.cuda.stream(torch.cuda.Stream()):
        explained = _check(buffers, direction, "dma", (shape, shape), torch.stack((ids, ids), 1))
    assert (explained.descriptors, explained.launches) == (pairs, -(-pairs // BATCH))


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("stream", ["side", "default"])
def test_staging_in_several_chunks(buffers, direction, stream):
    """The halves of one ring are used again and again: no chunk may overtake the one before."""
    pairs = scaled(8192, 300)
    shape = Shape(1, pairs + 10, 128 << 10)
    with torch.cuda.stream(on_stream(stream)):
        mapping = random_mapping(pairs, shape.blocks, shape.blocks)
        explained = _check(buffers, direction, "staged", (shape, shape), mapping)
    assert explained.device["chunks"] == -(-pairs // (RING_BYTES // 2 // shape.page_bytes))


def _swap(sources, destinations, mapping, page_bytes):
    for src, dst in zip(sources, destinations, strict=True):
        kvkernels.swap_blocks(src, dst, page_bytes, mapping)


def _swap_addresses(sources, destinations, mapping, page_bytes, any_order):
    addresses = [
        torch.cat([pool.data_ptr() + page_bytes * mapping[:, column] for pool in pools])
        for column, pools in enumerate((sources, destinations))
    ]
    kvkernels.swap_blocks_batch(*addresses, torch.full_like(addresses[0], page_bytes), any_order)


SWAPS = {
    "swap_blocks": _swap,
    "swap_blocks_batch": lambda *arguments: _swap_addresses(*arguments, False),
    "swap_blocks_batch in any order": lambda *arguments: _swap_addresses(*arguments, True),
}


@pytest.mark.parametrize("stream", ["side", "default"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("page_bytes", [4096, 16 << 10, 256 << 10])
@pytest.mark.parametrize("swap", SWAPS)
def test_swaps(buffers, swap, page_bytes, direction, stream):
    """All layers in turns, or at once by raw addresses."""
    pools, pairs = scaled(64, 3), scaled((80 << 20) // page_bytes // 4, 5)
    shape = Shape(pools, pairs + 3, page_bytes)
    mapping = random_mapping(pairs, shape.blocks, shape.blocks)
    with torch.cuda.stream(on_stream(stream)):
        src, dst, pristine = buffers.sides(direction, (shape, shape))
        torch.cuda.synchronize()  # sources in any order must be there
        SWAPS[swap](shape.on(src), shape.on(dst), mapping, page_bytes)
        torch.cuda.synchronize()
    assert_copied(dst, (shape, shape), pristine, mapping)
    assert are_same(src, pristine), "the source was written"


@pytest.mark.parametrize("stream", ["side", "default"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gathered_and_scattered(buffers, executor, direction, stream):
    """Packed rows of all layers in between, as blocks are parked: there by the one op, and back by the other."""
    pools, pairs = scaled(64, 3), scaled(300, 6)
    shape = Shape(pools, pairs + 20, 16 << 10)
    mapping = random_mapping(pairs, shape.blocks, shape.blocks)
    back = f"{direction[0]}2{direction[0]}"
    with torch.cuda.stream(on_stream(stream)):
        src, dst, pristine = buffers.sides(back, (shape, shape))
        rows = buffers.take(direction[-1], "rows", pairs * pools * shape.page_bytes).view(pairs, -1)

        def gather() -> None:
            kvkernels.gather_blocks(shape.on(src), mapping[:, 0], rows, executor=executor)

        if (executor, direction) == ("staged", "d2d"):
            assert refusal_of(gather) == "no side is in host memory"
            return
        spin(1)
        gather()
        kvkernels.scatter_blocks(rows, mapping[:, 1], shape.on(dst), executor=executor)
        torch.cuda.synchronize()
    assert_copied(dst, (shape, shape), pristine, mapping)
    assert are_same(src, pristine), "the source was written"


@pytest.mark.parametrize("fragment_bytes", [4096, 32 << 10])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_pageable_memory(buffers, direction, executor, fragment_bytes):
    """Copy engines reach it, kernels do not; where a device reads it all the same, the bytes must be right."""
    pairs = scaled(2000, 8)
    shape = Shape(2, pairs + 2, fragment_bytes)
    src, dst, pristine = buffers.sides(direction, (shape, shape))
    torch.cuda.synchronize()
    if direction == "h2d":
        src = src.clone()
    else:
        dst = dst.clone()
    assert not (src.is_pinned() or dst.is_pinned())
    mapping = random_mapping(pairs, shape.blocks, shape.blocks)
    arguments = shape.on(src), shape.on(dst), mapping, whole_pages(shape)
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            kvkernels.copy_pages(*arguments, executor=executor)
        except ValueError as error:
            assert executor in ("kernel", "bulk", "triton")
            assert "cannot serve this call: " in str(error) and "pageable host memory" in str(error)
            mapping = mapping[:0]
        torch.cuda.synchronize()
    assert_copied(dst, (shape, shape), pristine, mapping)
