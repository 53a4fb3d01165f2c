"""The compiled bulk kernel on the simulator: every byte, every finding, every line, and the bugs it could have."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from simgpu.compile import compile_ptx
from simgpu.coverage import Coverage
from simgpu.device import Device, Modules
from simgpu.moves import IDS, TABLES, add_small_moves, alignment_call, alike_call, check, full_call, random_call
from simgpu.ptx import load
from simgpu.sim import D2H, DEVICE, H2D, Move, Side, copy_naively
from simgpu.worker import on_stand_in

# Compute capability 9.0 is the first that has bulk copies.
ARCHITECTURES = ("sm_90", "sm_100")
CSRC = Path(__file__).resolve().parents[1] / "csrc"
# Branches that no call takes, at most, as in test_ptx_kernels.py.
NEVER_TAKEN = {"bulk": 24}

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


@on_stand_in
def test_sm_80_has_a_kernel_that_traps(sim):
    """Nothing launches it, but where a driver translates it for a later device, it must not pass for a copy."""
    module = sim.use_ptx("sm_80").module
    for tables in ("small", "large", "table"):
        lines = module[f"kvkernels_copy_bulk_{tables}"].kernel.lines().values()
        assert next(iter(lines)).strip(" ;") == "trap"


def more_tiles_than_stages(sim, rng, tables):
    """On one CTA, whose warps' rings have three generations of two stages each for tiles of this size."""
    fragments, stride = 16, 8192
    move = Move(Side(0, fragments * stride), Side(0, fragments * stride), stride, ((fragments, stride, stride),))
    moves, *sizes = add_small_moves([move], tables, "bulk", [2 * fragments * stride] * 2, 2)
    src, dst = (sim.memory(DEVICE, size) for size in sizes)
    check(sim, moves, [(0, 1), (1, 0)], src, dst, sm_budget=1, bulk=True)


@each_architecture
@on_stand_in
def test_every_line(sim, architecture):
    """Random and full moves, with tables and ids in every place, and copies early and late."""
    earlier = ARCHITECTURES[: ARCHITECTURES.index(architecture)]
    if sim.has_same_ptx(architecture, earlier, NEVER_TAKEN):
        return  # nvcc makes the same of it as for an architecture that has been here
    coverage = Coverage(sim, architecture, [ARCHITECTURES.index(architecture)])
    for tables, ids in itertools.product(TABLES, IDS):
        if tables == "small":
            coverage.run(random_call, "bulk", tables, ids, copies_early=True)
        coverage.run(full_call, "bulk", tables, ids)
    for tables in TABLES:
        coverage.run(more_tiles_than_stages, tables)
        coverage.run(alike_call, "bulk", tables)
        coverage.run(alignment_call, "bulk", tables, (528, 607, 4093, 9001), H2D)
        for has_earlier in (False, True):
            coverage.run(full_call, "bulk", tables, "device 64-bit", True, has_earlier, copies_early=True)
    coverage.check(NEVER_TAKEN)


@each_architecture
@early_or_late
@on_stand_in
def test_a_ring_that_goes_round(sim, architecture, copies_early):
    """Each stage is used several times, whatever the size of a tile makes of their number; and under capture."""
    missed = []
    for fragment_bytes, count in ((512, 600), (8192, 60), (8200, 60)):
        device = sim.use_ptx(architecture)
        device.copies_early = copies_early
        move = Move(Side(8, fragment_bytes + 8), Side(8, fragment_bytes + 8), fragment_bytes - 8)
        src, dst = (sim.memory(DEVICE, (fragment_bytes + 8) * count + 16) for _ in range(2))
        stream = sim.stream(capturing=copies_early)
        pairs = [(i, count - 1 - i) for i in range(count)]
        run = check(sim, [move], pairs, src, dst, stream=stream, sm_budget=1, bulk=True, capturing=copies_early)
        lanes = min(32, (16 << 10) // min(8192, -(-fragment_bytes // 128) * 128))
        assert run.tiles > 4 * lanes * 4, "more than four generations of four warps"
        missed.append({text for lines in device.unexecuted.values() for text in lines.values()})
        sim.reset()
    assert not [text for text in set.intersection(*missed) if "bulk" in text or "mbarrier" in text]


# What is changed in bulk_body.h, and what tells: a kind of finding, or the bytes.
BUGS = {
    "no wait for the load": ("    wait_until_full();\n", "", "read of unwritten bytes"),
    "wrong parity": ("parity_ = 0;", "parity_ = 1;", "read of unwritten bytes"),
    "parity never changes": ("parity_ ^= 1;", "", "read of unwritten bytes"),
    "a barrier for one lane": ('"n"(kWarpLanes)', '"n"(1)', "more arrivals|unwritten"),
    "no wait for the reads": ('"cp.async.bulk.wait_group.read 0;"', '"// "', "race"),
    "a read too many": ("wait_group.read 0", "wait_group.read 1", "race"),
    "a generation too many": ("loading_ == kGenerations - 1", "loading_ == kGenerations", "race"),
    "no wait at the end": ('asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");', "", "copy not waited for"),
    "the last generation is not stored": ("if (loading_ > 0) store(newer_);", "", "differ"),
    "the one before is not stored": ("if (loading_ > 1) store(older_);", "", "differ"),
    "wrong bytes expected": ('"r"(full), "r"(bytes)', '"r"(full), "r"(bytes + 16)', "never goes on"),
    "no tail": ("tile.first, last, lane", "tile.first, 0, lane", "differ"),
    "no head": ("(0u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(span.dst))) & 15", "0", "misaligned access"),
    "another stage": ("stage_ + oldest_ *", "stage_ + newest_ *", "unwritten|race|differ"),
    "a stage for two lanes": ("lane * stage_bytes", "0 * stage_bytes", "race"),
    "a lane's tile left out": ("of >= lanes", "of + 1 >= lanes", "differ"),
}


@pytest.mark.parametrize("bug", BUGS)
@on_stand_in
def test_a_broken_kernel_is_found(sim, bug):
    with TemporaryDirectory() as folder:
        old, new, told = BUGS[bug]
        body = (CSRC / "cuda" / "bulk_body.h").read_text()
        assert body.count(old) == 1, bug
        (Path(folder) / "cuda").mkdir()
        (Path(folder) / "cuda" / "bulk_body.h").write_text(body.replace(old, new))
        flags = (f"-I{folder}", f"-I{CSRC}")
        text = compile_ptx(CSRC / "cuda" / "bulk_kernel.cu", "sm_90", Path(folder) / "broken.ptx", flags)
    sim.device = Device(sim.cuda, Modules([load(text)]))
    # Of 8 bytes before, 12 after the part that bulk copies take.
    count, stride = 60, 8192
    move = Move(Side(8, stride), Side(8, stride), stride - 12)
    src, dst = (sim.memory(DEVICE, stride * count + 16) for _ in range(2))
    dst ^= 0xFF
    expected = dst.copy()
    pairs = [(i, count - 1 - i) for i in range(count)]
    copy_naively([move], pairs, src, expected)
    with pytest.raises(AssertionError, match=told):
        sim.kernel([move], pairs, src, dst, sim.stream(), sm_budget=1, bulk=True)
        assert np.array_equal(dst, expected), "bytes differ"
    sim.device = None
