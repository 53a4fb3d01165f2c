"""The compiled copy kernels, executed on the simulator: every byte, every finding, every line of each architecture."""

from __future__ import annotations

import itertools

import pytest
from simgpu.compile import ARCHITECTURES
from simgpu.coverage import Coverage
from simgpu.moves import IDS, TABLES, aligned_bytes, alignment_call, alike_call, full_call, random_call
from simgpu.sim import D2H, DEVICE, H2D, Move, Side
from simgpu.worker import on_stand_in

SIZES = (1, 2, 15, 16, 17, 31, 48, 100, 128, 255, 1000, 1024, 1040, 4095, 4097, 8192, 9001)

KINDS = ("page", "row", "chunks 8", "chunks 4", "chunks 2", "chunks 1", "tiles")

# Branches that no call takes, at most: a bad id in a launch that has no word to record it in, another op's record in
# uploaded tables, a search among less than two moves, and further rounds over a tile that never has the bytes for them.
NEVER_TAKEN = {"page": 9, "row": 14, "bytes": 62}

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_architecture
@on_stand_in
def test_every_line(sim, architecture):
    """Every alignment and many sizes; random and full moves with tables and ids in every place."""
    earlier = ARCHITECTURES[: ARCHITECTURES.index(architecture)]
    if sim.has_same_ptx(architecture, earlier, NEVER_TAKEN):
        return  # nvcc makes the same of it as for an architecture that has been here
    coverage = Coverage(sim, architecture, [ARCHITECTURES.index(architecture)])
    for fragment_bytes, direction in itertools.product(SIZES, (H2D, D2H)):
        coverage.run(alignment_call, "page", "small", [fragment_bytes], direction)
    # Moves of one tile a page and of several: only then is a tile's move searched for.
    coverage.run(alignment_call, "page", "small", (607, 9001), H2D)
    for tables, shape in itertools.product(TABLES, ("page", "tiles")):
        sizes = (285, 607, 1025, 2303, 4093, 9001)
        # So many moves do not fit into small tables.
        for some in zip(sizes) if tables == "small" else (sizes,):
            coverage.run(alignment_call, shape, tables, some, H2D)
    for tables, shape in itertools.product(TABLES, KINDS):
        coverage.run(alike_call, shape, tables)
    for tables, ids, shape in itertools.product(TABLES, IDS, KINDS):
        if tables == "small" or shape == "page":
            coverage.run(random_call, shape, tables, ids)
        # Fragments of less than four chunks are found in another way than those of more.
        for chunks in (5,) if shape in ("page", "tiles") else (5, 3):
            for skips_negative in (False, True) if ids.startswith("device") else (False,):
                coverage.run(full_call, shape, tables, ids, False, False, chunks, skips_negative)
        if ids.startswith("device"):
            for has_earlier in (False, True) if shape == "page" else (IDS.index(ids) % 2 == 0,):
                coverage.run(full_call, shape, tables, ids, True, has_earlier)
    coverage.check(NEVER_TAKEN)


@each_architecture
@on_stand_in
def test_aligned_moves_are_coalesced(sim, architecture):
    """16-byte accesses alone, and of each warp's request no more sectors than its bytes fill."""
    src, dst = (sim.adopt(aligned_bytes(1 << 20), DEVICE) for _ in range(2))
    pairs = [(i, (i * 5 + 1) % 8) for i in range(8)]
    page = Move(Side(0, 65536), Side(0, 65536), 65536)
    # NHD to HND: 16 tokens of 8 heads of 256 bytes.
    heads = Move(Side(0, 65536), Side(0, 65536), 256, ((16, 2048, 256), (8, 256, 4096)))
    for move, fragment_bytes in ((page, 65536), (heads, 256 * 16 * 8)):
        device = sim.use_ptx(architecture)
        device.counts_sectors = True
        sim.kernel([move], pairs, src, dst, sm_budget=4)
        (report,) = device.last_reports
        for accesses in (report.loads, report.stores):
            texts = device.module[report.kernel].kernel.lines()
            data = [a for line, a in accesses.items() if ".v4.u32" in texts[line] and "global" in texts[line]]
            assert sum(a.bytes for a in data) == 8 * fragment_bytes
            assert sum(a.sectors for a in data) == sum(a.least_sectors for a in data) == 8 * fragment_bytes // 32
        assert sum(a.bytes for a in report.stores.values()) == 8 * fragment_bytes


def instructions_of_a_tile(sim, architecture, moves, pairs):
    """On one CTA, whose warps have as many tiles each, but for the last, and do the same at the same time."""
    src, dst = (sim.adopt(aligned_bytes(1 << 20), DEVICE) for _ in range(2))
    device = sim.use_ptx(architecture)
    run = sim.kernel(moves, pairs, src, dst, sm_budget=1)
    assert run.variant == "row", run
    (report,) = device.last_reports
    sim.reset()
    return sum(report.executed.values()) / -(-run.tiles // (run.threads // 32))


@each_architecture
@on_stand_in
def test_rows_are_found_once_a_tile_and_not_once_a_chunk(sim, architecture):
    """A tile takes few instructions, of fragments of any size from 64 bytes on, and in any move.

    Of PTX, from which ptxas makes fewer. When each chunk was found by itself, one loop made them 327, and 16 moves 300.
    """
    page = 32768
    pairs = [(i, (i * 5 + 1) % 32) for i in range(32)]
    for fragment_bytes in (64, 128, 192, 256, 512, 1024):
        # Every second fragment of a page.
        loop = (page // fragment_bytes // 2, 2 * fragment_bytes, fragment_bytes)
        one = Move(Side(0, page), Side(0, page), fragment_bytes, (loop,))
        assert instructions_of_a_tile(sim, architecture, [one], pairs) < 260
        layers = [Move(Side(2048 * i, page), Side(2048 * i, page), fragment_bytes) for i in range(16)]
        assert instructions_of_a_tile(sim, architecture, layers, pairs) < 240
