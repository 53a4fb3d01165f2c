"""The compiled copy kernels, executed on the simulator: every byte, every finding, every line of each architecture."""

from __future__ import annotations

import numpy as np
import pytest
from simgpu.compile import ARCHITECTURES
from simgpu.moves import check, random_case
from simgpu.sim import D2D, D2H, DEVICE, H2D, Move, Side
from simgpu.worker import on_stand_in

SIZES = (1, 2, 15, 16, 17, 31, 48, 100, 128, 255, 1000, 1024, 1040, 4095, 4097, 8192, 9001)

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
    check(sim, moves, [(0, 1), (3, 0), (2, 3)], src, dst, direction=direction, sm_budget=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["page", "row", "bytes"])
@each_architecture
@on_stand_in
def test_random_cases(sim, architecture, shape, seed):
    """Random moves, pools, loops, sub-blocks and ids; a third of them cut into several launches."""
    rng = np.random.default_rng([seed, len(shape), ARCHITECTURES.index(architecture)])
    for _ in range(20):
        sim.use_ptx(architecture)
        moves, pairs, src_bytes, dst_bytes, _ = random_case(rng, shape)
        src, dst = sim.memory(DEVICE, src_bytes), sim.memory(DEVICE, dst_bytes)
        check(
            sim, moves, pairs, src, dst, sm_budget=int(rng.integers(1, 4)), max_items=int(rng.choice([0, 0, 400])),
            capturing=bool(rng.integers(4) == 0), direction=int(rng.choice([H2D, D2H, D2D])),
        )  # fmt: skip
        sim.reset()
