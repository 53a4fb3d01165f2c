"""Copies by way of a ring on the device: every byte, in both directions, in chunks, at adversarial times."""

from __future__ import annotations

import numpy as np
import pytest
from simgpu.moves import random_case
from simgpu.sim import (
    BATCH,
    D2D,
    D2H,
    DEVICE,
    H2D,
    LEGACY,
    OUT_OF_MEMORY,
    PAGEABLE,
    PINNED,
    CudaError,
    Move,
    Refused,
    Side,
    copy_naively,
    random_pairs,
)
from simgpu.worker import on_stand_in

COPY_CALLS = ("cuMemcpyBatchAsync", "cudaMemcpyAsync")
both_ways = pytest.mark.parametrize("direction", [H2D, D2H], ids=["h2d", "d2h"])


def places(sim, direction, src_bytes, dst_bytes, host=PINNED):
    kinds = (host, DEVICE) if direction == H2D else (DEVICE, host)
    return sim.memory(kinds[0], src_bytes), sim.memory(kinds[1], dst_bytes)


def check_staged(sim, moves, pairs, src, dst, stream, **options):
    """Every byte of both buffers, and the plan against what was issued."""
    dst ^= 0xFF
    expected, source = dst.copy(), src.copy()
    writes = copy_naively(moves, pairs, src, expected)
    assert writes.max(initial=0) <= 1
    planned = sim.staged(moves, pairs, src, dst, stream, plans_only=True, **options)
    sim.clear_log()
    done = sim.staged(moves, pairs, src, dst, stream, **options)
    sim.finish_device()
    assert np.array_equal(dst, expected), f"{np.flatnonzero(dst != expected)[:8]} of {len(dst)}: {moves} {done}"
    assert np.array_equal(src, source)
    assert done == planned
    issued, chunks, ring_bytes = done
    uploads = len(sim.log("cudaMemcpyAsync")) + len(sim.log("cuMemcpyBatchAsync")) + len(sim.log("launch"))
    assert issued.launches <= uploads
    assert issued.bytes == writes.sum(dtype=np.int64)
    return issued, chunks, ring_bytes


@pytest.mark.parametrize("host", [PINNED, PAGEABLE], ids=["pinned", "pageable"])
@pytest.mark.parametrize("seed", range(4))
@both_ways
@on_stand_in
def test_random_cases(sim, direction, seed, host):
    """Random moves, pools, loops, sub-blocks and rings, at once and at adversarial times."""
    rng = np.random.default_rng([seed, direction])
    chunked = 0
    for shape in ("page", "row", "bytes", "bulk", "chunks 8", "tiles") * 4:
        moves, pairs, src_bytes, dst_bytes, _ = random_case(rng, shape)
        src, dst = places(sim, direction, src_bytes, dst_bytes, host)
        stream = LEGACY if rng.integers(8) == 0 else sim.stream()
        least = 2048 + 2 * max(src_bytes, dst_bytes)
        ring_bytes = int(rng.choice([0, least, 20 * least]))
        sim.adversarial(int(rng.integers(3)))
        options = {"direction": direction, "ring_bytes": ring_bytes, "sm_budget": int(rng.integers(3))}
        try:
            _, chunks, taken = check_staged(sim, moves, pairs, src, dst, stream, **options)
            assert taken <= (ring_bytes or 32 << 20)
            chunked += chunks > 1
        except Refused as refusal:
            assert "bytes of host memory, more than the ring's" in str(refusal)
        sim.reset()


@both_ways
@on_stand_in
def test_many_chunks(sim, direction):
    """The ring is used again while copies of the chunk before may be on their way."""
    layers, page, blocks = 6, 4096, 40
    # The device has a pool a layer, the host a row a block.
    device = [Side(i * page * blocks, page) for i in range(layers)]
    host = [Side(i * page, layers * page) for i in range(layers)]
    moves = [Move(*((h, d) if direction == H2D else (d, h)), page) for h, d in zip(host, device, strict=True)]
    size = layers * page * blocks
    for seed in range(1, 12):
        src, dst = places(sim, direction, size, size)
        ring_bytes = int(np.random.default_rng(seed).choice([1, 3, 7])) * layers * page + 512
        sim.adversarial(seed)
        _, chunks, taken = check_staged(
            sim, moves, random_pairs(29, blocks), src, dst, sim.stream(), direction=direction, ring_bytes=ring_bytes
        )
        rows = max(1, ring_bytes // 2 // (layers * page))
        assert chunks == -(-29 // rows) and taken <= ring_bytes
        sim.reset()


@both_ways
@on_stand_in
def test_one_long_copy_for_what_lies_together_on_the_host(sim, direction):
    """Scattered blocks of many layers against rows one after the other: one launch and one copy."""
    layers, page, blocks = 8, 512, 64
    device = [Side(i * page * blocks, page) for i in range(layers)]
    host = [Side(i * page, layers * page) for i in range(layers)]
    moves = [Move(*((h, d) if direction == H2D else (d, h)), page) for h, d in zip(host, device, strict=True)]
    ids = np.random.default_rng(0).permutation(blocks)[:20].tolist()
    pairs = [(row, i) if direction == H2D else (i, row) for row, i in enumerate(ids)]
    size = layers * page * blocks
    src, dst = places(sim, direction, size, size)
    start = sim.counters()
    issued, chunks, _ = check_staged(sim, moves, pairs, src, dst, sim.stream(), direction=direction)
    assert (issued.launches, chunks) == (2, 1)
    assert issued.descriptors == len(moves) + len(pairs) + 1
    # Conversion on the way: heads and tokens change places, and the host's side is still one piece.
    done = sim.counters() - start
    assert done.synchronisations == 1  # the test's own
    nhd_to_hnd = Move(Side(0, 4096), Side(0, 4096), 64, ((8, 512, 64), (8, 64, 512)))
    src, dst = places(sim, direction, 4096 * 8, 4096 * 8)
    issued, _, _ = check_staged(
        sim, [nhd_to_hnd], [(i, i) for i in range(5)], src, dst, sim.stream(), direction=direction
    )
    assert (issued.launches, issued.descriptors) == (2, 1 + 5 + 1)


@on_stand_in
def test_steps_back_and_shared_sources(sim):
    """Loops that count down on the host, and fragments that several moves read."""
    src, dst = sim.memory(PINNED, 8192), sim.memory(DEVICE, 8192)
    back = Move(Side(192, 512), Side(0, 512), 64, ((4, -64, 64),))
    again = Move(Side(64, 512), Side(4096, 512), 100)
    repeated = Move(Side(0, 512), Side(256, 512), 32, ((2, 0, 32), (2, 32, 64)))
    check_staged(sim, [back, again, repeated], [(3, 0), (3, 1), (0, 7)], src, dst, sim.stream(), direction=H2D)
    src, dst = sim.memory(DEVICE, 8192), sim.memory(PINNED, 8192)
    down = Move(Side(0, 512), Side(450, 512), 50, ((4, 64, -150),))
    check_staged(sim, [down], [(0, 3), (5, 1)], src, dst, sim.stream(), direction=D2H)


@on_stand_in
def test_what_the_ring_cannot_serve(sim):
    src, dst = sim.memory(DEVICE, 1 << 20), sim.memory(PINNED, 1 << 20)
    page = Move(Side(0, 4096), Side(0, 4096), 4096)
    with pytest.raises(Refused, match=r"^a pair spans 4096 bytes of host memory, more than the ring's 4000$"):
        sim.staged([page], [(0, 1)], src, dst, sim.stream(), ring_bytes=4000)
    pieces = Move(Side(0, 1 << 18), Side(0, 1 << 18), 16, ((4097, 16, 32),))
    with pytest.raises(Refused, match=r"^a pair lies in more than 4096 pieces in host memory$"):
        sim.staged([pieces], [(0, 1)], src, dst, sim.stream())
    with pytest.raises(Refused, match=r"^no side is in host memory$"):
        sim.staged([page], [(0, 1)], src, dst, sim.stream(), direction=D2D)
    assert not sim.log("launch")


@both_ways
@on_stand_in
def test_every_return_code_is_checked(sim, direction):
    moves = [Move(Side(0, 64), Side(0, 128), 64)]
    src, dst = places(sim, direction, 1 << 16, 1 << 16)
    stream = sim.stream()
    run = lambda: sim.staged(moves, random_pairs(40, 200), src, dst, stream, direction=direction, ring_bytes=2000)  # noqa: E731
    for call in ("cudaLaunchKernelExC", "cuMemcpyBatchAsync", "cuPointerGetAttributes", "cudaStreamIsCapturing",
                 "cudaEventRecord", "cudaStreamWaitEvent"):  # fmt: skip
        sim.adversarial(0)
        before = sim.calls(call)
        run()
        for k in range(1, sim.calls(call) - before + 1):
            sim.adversarial(k)
            dst[:] = 0
            sim.fail(call, k, OUT_OF_MEMORY)
            with pytest.raises(CudaError, match=f"^{call}.* failed: cudaErrorMemoryAllocation"):
                run()
            assert sim.cudart.cudaPeekAtLastError() == 0
            # What was on its way on the ring's own stream is behind the caller's, too.
            sim.finish_stream(stream)
            found = dst.copy()
            sim.finish_device()
            assert np.array_equal(dst, found)
    assert BATCH > 40
