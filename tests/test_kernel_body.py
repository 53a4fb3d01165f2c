"""The copy kernels' per-thread code, executed on the host: every byte, every alignment, each byte written once.

Accesses are checked one by one: aligned to their width, and inside memory that a kernel may touch.
"""

from __future__ import annotations

import numpy as np
import pytest
from simgpu.compile import ARCHITECTURES
from simgpu.moves import check, check_device_ids, random_case, sparse
from simgpu.ptx import SanitizerError
from simgpu.sim import (
    D2D,
    D2H,
    DEVICE,
    H2D,
    PINNED,
    DeviceIds,
    IdColumn,
    Move,
    Side,
    address,
    copy_naively,
    ids_in_column,
)
from simgpu.worker import on_stand_in

MAX_OFFSET_BYTES = 16
SIZES = (1, 2, 15, 16, 17, 31, 48, 100, 127, 128, 255, 1000, 1024, 1040, 3000, 4095, 4096, 4097, 4300, 8192, 9001)


# The per-thread code on the host, or what nvcc made of it, on the simulator.
each_code = pytest.mark.parametrize("code", ["host", *ARCHITECTURES])


def use_code(sim, code):
    if code != "host":
        sim.use_ptx(code)


@pytest.mark.parametrize("direction", [H2D, D2H], ids=["cut-on-src", "cut-on-dst"])
@pytest.mark.parametrize("src_offset", range(MAX_OFFSET_BYTES + 1))
@on_stand_in
def test_every_alignment_and_size(sim, src_offset, direction):
    src = sim.memory(DEVICE, 64 << 10)
    dst = sim.memory(DEVICE, 64 << 10)
    for dst_offset in range(MAX_OFFSET_BYTES + 1):
        for fragment_bytes in SIZES:
            stride = fragment_bytes + (src_offset + dst_offset) % 3
            moves = [Move(Side(src_offset, stride), Side(dst_offset, stride + 1), fragment_bytes)]
            check(sim, moves, [(0, 1), (3, 0), (2, 3)], src, dst, direction=direction, sm_budget=1)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", ["page", "row", "bytes"])
@on_stand_in
def test_random_cases(sim, shape, seed):
    """Random moves, pools, loops, sub-blocks and ids; a third of them cut into many launches."""
    rng = np.random.default_rng([seed, len(shape)])
    variants = set()
    for _ in range(25):
        moves, pairs, src_bytes, dst_bytes, _ = random_case(rng, shape)
        src, dst = sim.memory(DEVICE, src_bytes), sim.memory(DEVICE, dst_bytes)
        max_items = int(rng.choice([0, 0, rng.integers(1, 40), rng.integers(40, 3000)]))
        capturing = bool(rng.integers(4) == 0)
        run = check(
            sim, moves, pairs, src, dst, sm_budget=int(rng.integers(1, 4)), max_items=max_items, capturing=capturing,
            direction=int(rng.choice([H2D, D2H, D2D])),
        )  # fmt: skip
        variants.add(run.variant)
        if not max_items and not capturing:
            assert run.launches == 1
        sim.reset()
    assert shape != "row" or variants == {"row"}


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("shape", ["page", "row", "bytes"])
@on_stand_in
def test_ids_on_the_device(sim, shape, width):
    """Bad pairs are skipped and counted once each, whatever the moves, loops and launches; good ones are copied."""
    rng = np.random.default_rng([width, len(shape)])
    for _ in range(40):
        moves, pairs, src_bytes, dst_bytes, limits = random_case(rng, shape)
        src, dst = sim.memory(DEVICE, src_bytes), sim.memory(DEVICE, dst_bytes)
        ids = f"device {8 * width}-bit" + str(rng.choice(["", "", "", ", dst in order", ", src in order"]))
        max_items = int(rng.choice([0, rng.integers(1, 60)]))
        check_device_ids(sim, rng, moves, pairs, src, dst, limits, ids, sm_budget=2, max_items=max_items)
        sim.reset()


@on_stand_in
def test_the_first_op_to_fail_owns_the_row(sim):
    src, dst = sim.memory(DEVICE, 4096), sim.memory(DEVICE, 4096)
    move = Move(Side(0, 64), Side(0, 64), 64)
    for op, ids in ((3, [0, 1, 99, 99]), (5, [99, 0, 1, 2]), (3, [0, 99, 1, 2])):
        columns = DeviceIds(ids_in_column(sim, ids), IdColumn(), len(ids), 10, 10, op=op)
        sim.kernel([move], [], src, dst, ids=columns)
    assert sim.take_fault() == (4, 1, 3)


@each_code
@on_stand_in
def test_offsets_beyond_32_bits(sim, code):
    """Block, sub-block and loop strides and ids whose products pass 2^31 and 2^32."""
    use_code(sim, code)
    big = sparse(sim, 13 << 30)
    small = sim.memory(DEVICE, 1 << 16)
    page = 4096 + 40
    near = Side(24, page)
    cases = [
        (Move(Side(8, (1 << 30) + 16), near, page), [(9, 0), (2, 3), (4, 1)]),
        (Move(Side(0, 1 << 20), Side(0, 6 * page), page, ((3, (1 << 31) + 48, page),)), [(5, 0), (2, 1)]),
        (Move(Side(0, 1 << 28, (1 << 31) + 64, 5), Side(0, 3 * page), 272), [(4, 0), (7, 1), (0, 2)]),
        (Move(Side(8, (1 << 30) + 16, 8192, 5), near, page), [(49, 0), (13, 1)]),
    ]
    for src_is_big in (True, False):
        for move, pairs in cases:
            if not src_is_big:
                loops = tuple((extent, dst_stride, src_stride) for extent, src_stride, dst_stride in move.loops)
                move = Move(move.dst, move.src, move.fragment_bytes, loops)
                pairs = [(dst_id, src_id) for src_id, dst_id in pairs]
            places = [(s + move.src.at(a), d + move.dst.at(b)) for a, b in pairs for s, d in move.offsets()]
            assert max(max(place) for place in places) > 2**32
            src, dst = (big, small) if src_is_big else (small, big)
            for k, (s, _) in enumerate(places):
                if src_is_big:
                    src[s : s + move.fragment_bytes] = (np.arange(move.fragment_bytes) * 7 + k) % 251
            sim.kernel([move], pairs, src, dst, sm_budget=2)
            for s, d in places:
                assert np.array_equal(dst[d : d + move.fragment_bytes], src[s : s + move.fragment_bytes])
                if not src_is_big:
                    guard = dst[d + move.fragment_bytes : d + move.fragment_bytes + 64]
                    assert not guard.any()
                    dst[d : d + move.fragment_bytes] = 0


@each_code
@on_stand_in
def test_ids_beyond_32_bits(sim, code):
    """Ids that do not fit in 32 bits ride in the tables as 64-bit ones."""
    use_code(sim, code)
    big = sparse(sim, 5 << 30)
    dst = sim.memory(DEVICE, 4096)
    ids = [2**32 + 5, 2**31 + 3, 7]
    for value, id_ in enumerate(ids):
        big[id_] = value + 1
    sim.kernel([Move(Side(0, 1), Side(0, 1), 1)], [(id_, row) for row, id_ in enumerate(ids)], big, dst)
    assert dst[:3].tolist() == [1, 2, 3]
    # 2^40 sub-block ids of no stride of their own: only the division sees the size.
    for subblocks in (3, 2**20 + 7, 2**39 + 1):
        ids = [2**40 - 1, 2**40 // 2 + 1, subblocks]
        move = Move(Side(0, 1, 0, subblocks), Side(0, 1), 1)
        for id_ in ids:
            if id_ // subblocks < 5 << 30:
                big[id_ // subblocks] = id_ % 250 + 1
        usable = [id_ for id_ in ids if id_ // subblocks < 5 << 30]
        assert usable
        sim.kernel([move], [(id_, row) for row, id_ in enumerate(usable)], big, dst)
        assert dst[: len(usable)].tolist() == [int(big[id_ // subblocks]) for id_ in usable]


@on_stand_in
def test_division_by_multiplication_is_exact(sim):
    """At every edge: multiples of the divisor and their neighbours, up to the largest number allowed."""
    rng = np.random.default_rng(0)
    for wide, limit in ((False, 2**31), (True, 2**63)):
        divisors = [1, 2, 3, 5, 7, 16, 63, 64, 65, 1000, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]
        divisors += [int(d) for d in rng.integers(1, 2**31, 100)]
        if wide:
            divisors = [*divisors[1:], 2**31, 2**32 + 1, 2**62 - 1, 2**62, 2**62 + 1, 2**63 - 1]
        for divisor in divisors:
            numbers = {0, 1, divisor - 1, divisor, limit - 1, limit - 2}
            for multiple in (limit // divisor, limit // divisor // 2, 2, int(rng.integers(0, limit // divisor + 1))):
                numbers |= {multiple * divisor - 1, multiple * divisor, multiple * divisor + 1}
            for n in numbers:
                if 0 <= n < limit:
                    assert sim.divide(n, divisor, wide) == n // divisor, (n, divisor, wide)


@on_stand_in
def test_wide_accesses_and_loads_in_flight(sim):
    """Aligned pages move in 16-byte accesses alone, eight a lane before a store; the widest common width otherwise."""
    src, dst = sim.memory(DEVICE, 1 << 20), sim.memory(DEVICE, 1 << 20)
    pairs = [(i, (i * 5 + 1) % 8) for i in range(8)]
    sim.loads()
    sim.kernel([Move(Side(0, 65536), Side(0, 65536), 65536)], pairs, src, dst)
    assert sim.loads() == ({16: 8 * 65536 // 16}, 8)
    sim.kernel([Move(Side(0, 65536), Side(0, 65536), 256, ((8, 4096, 256), (16, 256, 2048)))], pairs, src, dst)
    assert sim.loads() == ({16: 8 * 128 * 16}, 4)
    # Tiles are cut at cache lines, so that only a page's own ends go byte by byte.
    sim.kernel([Move(Side(40, 65536), Side(24, 65536), 65280)], pairs, src, dst)
    assert sim.loads()[0] == {16: 8 * (65280 // 16 - 1), 1: 8 * 16}
    for difference, width in ((8, 8), (4, 4), (2, 2), (1, 1)):
        sim.kernel([Move(Side(difference, 65536), Side(0, 65536), 65280)], pairs, src, dst)
        widths, deepest = sim.loads()
        assert widths[width] >= 8 * (65280 // width - 2 * 16) and deepest >= 4


@on_stand_in
def test_addresses_as_ids_keep_their_alignment(sim):
    """Raw addresses are ids of a stride of 1: the widest access that all of them allow, and exact tiles."""
    src, dst = sim.memory(DEVICE, 1 << 18), sim.memory(DEVICE, 1 << 18)
    absolute = np.empty(0, np.uint8)
    for unit, variant in ((16, "row"), (8, "bytes"), (4, "bytes"), (2, "bytes"), (1, "bytes")):
        for fragment_bytes in (48, 5 * 4096):
            places = [(3 * unit, 16 * 7), (65536, unit), (131072 + 5 * unit, 65536)]
            expected = dst.copy()
            for s, d in places:
                expected[d : d + fragment_bytes] = src[s : s + fragment_bytes]
            pairs = [(address(src) + s, address(dst) + d) for s, d in places]
            # The move's base is null: what is added to it here, the Sim adds back.
            move = Move(Side(-address(absolute), 1), Side(-address(absolute), 1), fragment_bytes)
            sim.loads()
            run = sim.kernel([move], pairs, absolute, absolute)
            assert np.array_equal(dst, expected)
            widths, _ = sim.loads()
            assert run.variant == (variant if fragment_bytes == 48 else "page")
            assert fragment_bytes > 48 or widths == {unit: 3 * 48 // unit}
            assert fragment_bytes == 48 or run.tiles == 3 * 6
            src[:] = np.roll(src, 1)
    aligned = [(address(src), address(dst) + 128), (address(src) + 256, address(dst) + 65536)]
    move = Move(Side(-address(absolute), 1), Side(-address(absolute), 1), 3 * 4096)
    assert sim.kernel([move], aligned, absolute, absolute, runs=False).tiles == 2 * 3


@on_stand_in
def test_chunks_are_as_wide_as_every_address_allows(sim):
    """Ids decide, too: blocks 0 and 1 of a stride of 24 lie 8 bytes apart from alignment, blocks 0 and 2 do not."""
    src, dst = sim.memory(DEVICE, 1 << 16), sim.memory(DEVICE, 1 << 16)
    move = Move(Side(0, 24), Side(0, 24), 16)
    for pairs, width in (([(0, 0), (1, 1)], 8), ([(2, 0), (0, 2)], 16), ([(0, 2), (2, 1)], 8)):
        sim.loads()
        check(sim, [move], pairs, src, dst)
        assert sim.loads()[0] == {width: 32 // width}
    for fragment_bytes, variant in (
        (1024, "row"),
        (1040, "page"),
        (64, "row"),
        (60, "bytes"),
        (252, "bytes"),
        (260, "page"),
    ):
        assert check(sim, [Move(Side(0, 4096), Side(0, 4096), fragment_bytes)], [(1, 1)], src, dst).variant == variant


@each_code
@on_stand_in
def test_pinned_memory_is_reached_through_the_devices_address(sim, code):
    """Where the device sees host memory at another address, kernels use that one; the host's would fault here."""
    use_code(sim, code)
    sim.set("device_addresses_differ", 1)
    host, device = sim.memory(PINNED, 1 << 16), sim.memory(DEVICE, 1 << 16)
    moves = [Move(Side(64, 5000), Side(32, 6000), 4999), Move(Side(40000, 96), Side(50000, 96), 96)]
    pairs = [(0, 3), (2, 1), (5, 0)]
    sim.kernel(moves, pairs, host, device, direction=H2D, maps=True)
    expected = device.copy()
    copy_naively(moves, pairs, host, expected)
    assert np.array_equal(device, expected)
    sim.kernel(moves, pairs, device, host, direction=D2H, maps=True)
    with pytest.raises((RuntimeError, SanitizerError), match=r"out of (reach|bounds)"):
        sim.kernel(moves, pairs, host, device, direction=H2D, maps=False)
