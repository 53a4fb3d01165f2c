"""The compiled bulk kernel on the simulator: every byte, every finding, every line, and the bugs it could have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from simgpu.moves import IDS, TABLES, check, faulty_call, random_call
from simgpu.sim import D2H, DEVICE, H2D, Move, Side
from simgpu.worker import on_stand_in

# Compute capability 9.0 is the first that has bulk copies.
ARCHITECTURES = ("sm_90", "sm_100")
SIZES = (1, 15, 16, 17, 31, 48, 100, 512, 1000, 1024, 8191, 8192, 8193, 9001, 20000)

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
early_or_late = pytest.mark.parametrize("copies_early", [False, True], ids=["late", "early"])


@pytest.mark.parametrize("direction", [H2D, D2H], ids=["cut-on-src", "cut-on-dst"])
@pytest.mark.parametrize("difference", [0, 0, 1, 4, 8])
@each_architecture
@on_stand_in
def test_every_alignment_and_size(sim, architecture, difference, direction):
    """One launch for all offsets of one difference: a move for each. Where it is 0 the middle goes by bulk copies."""
    sim.use_ptx(architecture)
    moves, at = [], [0, 0]
    for src_offset in (0, 1, 8, 15):
        for fragment_bytes in SIZES:
            stride = fragment_bytes + 16 - fragment_bytes % 16
            sides = Side(at[0] + src_offset, stride), Side(at[1] + src_offset + difference, stride + 16)
            moves.append(Move(*sides, fragment_bytes))
            at = [at[0] + 3 * stride + 48, at[1] + 3 * (stride + 16) + 48]
    src, dst = sim.memory(DEVICE, at[0] + 64), sim.memory(DEVICE, at[1] + 64)
    run = check(sim, moves, [(0, 1), (2, 0), (2, 2)], src, dst, direction=direction, bulk=True)
    assert run.variant == "bulk"
