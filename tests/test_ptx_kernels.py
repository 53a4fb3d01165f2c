"""The compiled copy kernels, executed on the simulator: every byte, every finding, every line of each architecture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from simgpu.compile import ARCHITECTURES
from simgpu.moves import IDS, TABLES, check, faulty_call, random_call
from simgpu.sim import D2H, DEVICE, H2D, Move, Side
from simgpu.worker import on_stand_in

SIZES = (1, 2, 15, 16, 17, 31, 48, 100, 128, 255, 1000, 1024, 1040, 4095, 4097, 8192, 9001)

KINDS = ("page", "row", "chunks 8", "chunks 4", "chunks 2", "chunks 1", "tiles")

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.mark.parametrize("direction", [H2D, D2H], ids=["cut-on-src", "cut-on-dst"])
@pytest.mark.parametrize("difference", range(16))
@each_architecture
@on_stand_in
def test_every_alignment_and_size(sim, architecture, difference, direction):
    """One launch for all offsets of one difference: a move for each."""
    sim.use_ptx(architecture)
    moves, at = [], [0, 0]
    for src_offset in range(0, 16, 3):
        for fragment_bytes in SIZES:
            stride = fragment_bytes + src_offset % 3
            sides = Side(at[0] + src_offset, stride), Side(at[1] + src_offset + difference, stride + 1)
            moves.append(Move(*sides, fragment_bytes))
            at = [at[0] + (4 * stride + 48) // 16 * 16, at[1] + (4 * stride + 64) // 16 * 16]
    src, dst = sim.memory(DEVICE, at[0] + 64), sim.memory(DEVICE, at[1] + 64)
    check(sim, moves, [(0, 1), (3, 0), (2, 3)], src, dst, direction=direction, sm_budget=16)


@each_architecture
@on_stand_in
def test_random_cases(sim, architecture):
    """Random moves, pools, loops and sub-blocks; tables and ids in every place. Together they execute every line."""
    rng = np.random.default_rng(ARCHITECTURES.index(architecture))
    unexecuted = {}

    def run(call, *arguments):
        device = sim.use_ptx(architecture)
        call(sim, rng, *arguments)
        for kernel, lines in device.unexecuted.items():
            known = unexecuted.get(kernel, lines)
            unexecuted[kernel] = {line: text for line, text in lines.items() if line in known}
        sim.reset()

    for tables, ids, shape in itertools.product(TABLES, IDS, KINDS):
        run(random_call, shape, tables, ids)
        if ids.startswith("device"):
            for has_earlier in (False, True):
                run(faulty_call, shape, tables, ids, has_earlier)
    assert set(unexecuted) == {
        f"kvkernels_copy_{shape}_{tables}" for shape in ("page", "row", "bytes") for tables in TABLES
    }
    for k, v in unexecuted.items():
        print(k, len(v), *list(v.items())[:60], sep="\n  ")
