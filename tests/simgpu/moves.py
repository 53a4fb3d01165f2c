"""Calls of the copy kernels: random moves, and the check that all ways to run them share."""

from __future__ import annotations

import mmap

import numpy as np

from .sim import DEVICE, Move, Side, Sim, copy_naively


def check(sim: Sim, moves, pairs, src, dst, **options):
    """Runs the kernels and compares every byte of the destination, and how often each was written, with the oracle."""
    dst ^= 0xFF  # what an earlier call copied must not pass for this one's work
    expected = dst.copy()
    expected_writes = copy_naively(moves, pairs, src, expected)
    assert expected_writes.max(initial=0) <= 1, "the case itself writes a byte twice"
    source = src.copy()
    rows = options.pop("rows", pairs)
    writes = sim.watch(dst)
    before = [sim.calls("cudaLaunchKernelExC"), sim.calls("cudaMemcpyAsync")]
    run = sim.kernel(moves, pairs, src, dst, **options)
    after = [sim.calls("cudaLaunchKernelExC"), sim.calls("cudaMemcpyAsync")]
    assert np.array_equal(dst, expected), f"{np.flatnonzero(dst != expected)[:8]} of {len(dst)}: {moves} {run}"
    assert np.array_equal(writes, expected_writes), f"{np.flatnonzero(writes != expected_writes)[:8]}: {moves} {run}"
    assert np.array_equal(src, source)
    assert after[0] - before[0] == run.launches == run.issued.launches
    assert after[1] - before[1] == int(run.uploads)
    assert (run.issued.descriptors, run.issued.bytes) == (run.descriptors, run.bytes)
    assert run.bytes == len(rows) * sum(m.fragment_bytes * len(m.offsets()) for m in moves)
    return run


def _nest(rng, extents, fragment_bytes, pad_unit):
    """Strides of a page whose loops lie in random order, innermost first, with random padding; and its bytes."""
    strides = [0] * len(extents)
    size = fragment_bytes + pad_unit * int(rng.integers(0, 3))
    for level in rng.permutation(len(extents)):
        strides[level] = size
        size = size * extents[level] + pad_unit * int(rng.integers(0, 3))
    return strides, size


def random_case(rng, shape):
    """Moves over disjoint parts of both buffers, pairs, both sizes, and the ids there are on each side."""
    fragment_bytes = {
        "page": lambda: int(rng.choice([rng.integers(1, 200), rng.integers(200, 5000), rng.integers(5000, 14000)])),
        "row": lambda: 16 * int(rng.integers(1, 65)),
        "bytes": lambda: int(rng.choice([rng.integers(1, 70), rng.integers(70, 1200), rng.integers(4000, 9000)])),
    }[shape]()
    unit = 16 if shape == "row" else int(rng.choice([1, 2, 4, 8, 16]))
    if shape == "bytes" and rng.integers(2):
        fragment_bytes = max(unit, fragment_bytes // unit * unit)
    loop_count = 0 if shape == "page" else int(rng.integers(0, 4))
    budget = max(1, 60000 // fragment_bytes)
    subblocks = [1, 1]
    if rng.integers(3) == 0:
        subblocks = [int(rng.choice([1, 2, 3, 7, 16])) for _ in range(2)]
    blocks = [max(2, int(rng.integers(2, 12)) // s) for s in subblocks]
    id_counts = [b * s for b, s in zip(blocks, subblocks, strict=True)]
    moves, ends = [], [0, 0]
    same_form = bool(rng.integers(2))
    extents = None
    for _ in range(int(rng.integers(1, 5))):
        if extents is None or not same_form:
            extents = [int(rng.integers(2, 6)) for _ in range(loop_count)]
            while np.prod(extents, dtype=int) * max(id_counts) > budget and max(extents, default=1) > 1:
                extents[int(np.argmax(extents))] -= 1
        sides, all_strides = [], []
        for s in range(2):
            strides, size = _nest(rng, [*extents, subblocks[s]], fragment_bytes, unit)
            offset = (ends[s] + 15) // 16 * 16 + (0 if shape == "row" else unit * int(rng.integers(0, 17)))
            block_stride = size + unit * int(rng.integers(0, 4))
            sides.append(Side(offset, block_stride, strides[-1], subblocks[s]))
            all_strides.append(strides[:-1])
            ends[s] = offset + blocks[s] * block_stride
        loops = tuple(zip(extents, *all_strides, strict=True))
        moves.append(Move(sides[0], sides[1], fragment_bytes, loops))
        if not same_form:
            grain = 16 if shape == "row" else 1
            fragment_bytes = grain * int(
                rng.choice([rng.integers(1, fragment_bytes // grain + 1), 1 + rng.integers(0, 9)])
            )
    count = int(rng.integers(1, id_counts[1] + 1))
    dst_ids = rng.permutation(id_counts[1])[:count]
    src_ids = rng.integers(0, id_counts[0], count)
    if rng.integers(3) == 0:
        dst_ids = np.sort(dst_ids)
        src_ids = np.minimum(dst_ids, id_counts[0] - 1)
    pairs = list(zip(src_ids.tolist(), dst_ids.tolist(), strict=True))
    return moves, pairs, ends[0] + 64, ends[1] + 64, id_counts


def sparse(sim, byte_count):
    """Memory of which only what is touched exists."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = np.frombuffer(mmap.mmap(-1, byte_count, flags=flags), np.uint8)
    return sim.adopt(buffer, DEVICE)
