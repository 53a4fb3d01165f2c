"""Calls of the copy kernels: random moves, and the check that all ways to run them share."""

from __future__ import annotations

import itertools
import mmap

import numpy as np

from .sim import D2H, DEVICE, H2D, LEGACY, DeviceIds, IdColumn, Move, Side, Sim, copy_naively, ids_in_column


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
    """Moves over disjoint parts of both buffers, pairs, both sizes, and the ids there are on each side.

    ``shape`` is page, row, bytes, or those of the last that a kernel treats alike: "chunks 8" (also 4, 2 and 1), which
    are as wide as all addresses and sizes allow, and "tiles"; or "bulk", whose fragments mostly begin at the same
    distance from a multiple of 16 on both sides.
    """
    kind, _, width = shape.partition(" ")
    fragment_bytes = {
        "page": lambda: int(rng.choice([rng.integers(1, 200), rng.integers(200, 5000), rng.integers(5000, 14000)])),
        "row": lambda: 16 * int(rng.integers(1, 65)),
        "bytes": lambda: int(rng.choice([rng.integers(1, 70), rng.integers(70, 1200), rng.integers(4000, 9000)])),
        "chunks": lambda: int(width) * (2 * int(rng.integers(0, 120 // int(width))) + 1),
        "tiles": lambda: int(rng.choice([rng.integers(257, 1300), rng.integers(4000, 9000)])) | 1,
        "bulk": lambda: int(
            rng.choice([16 * rng.integers(32, 100), rng.integers(512, 3000), rng.integers(8000, 18000)])
        ),
    }[kind]()
    unit = {"row": 16, "chunks": int(width or 1)}.get(kind, int(rng.choice([1, 2, 4, 8, 16])))
    if shape == "bytes" and rng.integers(2):
        fragment_bytes = max(unit, fragment_bytes // unit * unit)
    both_begin = 0
    if shape == "bulk":
        unit = int(rng.choice([16, 16, 16, 1]))
        both_begin = int(rng.choice([0, rng.integers(16)]))
    loop_count = 0 if shape == "page" else int(rng.integers(kind == "tiles", 4))
    budget = max(1, 60000 // fragment_bytes)
    subblocks = [1, 1]
    if rng.integers(3) == 0:
        subblocks = [int(rng.choice([1, 2, 3, 7, 16])) for _ in range(2)]
    # A tile of the bulk kernel takes the simulator long.
    most_blocks = 4 if shape == "bulk" else 12
    blocks = [max(2, int(rng.integers(2, most_blocks)) // s) for s in subblocks]
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
            offset += both_begin
            block_stride = size + unit * int(rng.integers(0, 4))
            sides.append(Side(offset, block_stride, strides[-1], subblocks[s]))
            all_strides.append(strides[:-1])
            ends[s] = offset + blocks[s] * block_stride
        loops = tuple(zip(extents, *all_strides, strict=True))
        moves.append(Move(sides[0], sides[1], fragment_bytes, loops))
        if not same_form:
            grain = {"row": 16, "chunks": unit}.get(kind, 1)
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


def aligned_bytes(count):
    """Random bytes at a multiple of 256, as allocators of device memory give them."""
    raw = np.random.default_rng(count).integers(0, 256, count + 256, np.uint8)
    begin = -raw.ctypes.data % 256
    return raw[begin : begin + count]


def sparse(sim, byte_count):
    """Memory of which only what is touched exists."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = np.frombuffer(mmap.mmap(-1, byte_count, flags=flags), np.uint8)
    return sim.adopt(buffer, DEVICE)


# What a launch's tables may be in, and where its ids may be.
TABLES = ("small", "large", "table")
IDS = ("host 32-bit", "host 64-bit", "device 32-bit", "device 64-bit", "device, dst in order", "device, src in order")
_EXTRA_MOVES = {"small": 0, "large": 40, "table": 260}
FAR = 1 << 33


def _grain(shape):
    """Bytes of the smallest move that leaves the shape as it is."""
    return {"page": 272, "bulk": 512}.get(shape) or int(shape.partition(" ")[2] or 16)


def add_small_moves(moves, tables, shape, ends, most_ids):
    """Small moves, each with a form of its own, so that the tables grow; and both sizes.

    A bulk copy takes the simulator long: where they are meant, these moves are shifted, and go without them.
    """
    count, bytes_ = _EXTRA_MOVES[tables], _grain(shape)
    shift = 8 if shape == "bulk" else 0
    src, dst = (-(-end // 16) * 16 for end in ends)
    stride = -(-bytes_ // 16) * 16
    room = stride * most_ids
    grown = [Move(Side(src, 16 * (i + 1)), Side(dst + shift + i * room, stride), bytes_) for i in range(count)]
    return [*moves, *grown], src + 16 * (count + 1) * most_ids + stride, dst + shift + room * count


def random_call(sim: Sim, rng, shape, tables, ids):
    """Runs a random call whose tables and ids are where it is asked for."""
    while True:
        moves, pairs, src_bytes, dst_bytes, limits = random_case(rng, shape)
        if ids != "host 64-bit" or all(move.src.subblocks == 1 for move in moves):
            break
    moves, src_bytes, dst_bytes = add_small_moves(moves, tables, shape, (src_bytes, dst_bytes), max(limits))
    src, dst = sim.memory(DEVICE, src_bytes + 64), sim.memory(DEVICE, dst_bytes + 64)
    options = {"sm_budget": int(rng.choice([1, 3, 12])), "direction": int(rng.choice([H2D, D2H]))}
    options["max_items"] = int(rng.choice([0, 0, 0, 4000]))
    options["bulk"] = shape == "bulk"
    if ids.startswith("host"):
        moves, pairs = _with_far_ids(rng, moves, pairs) if "64" in ids else (moves, pairs)
        return check(sim, moves, pairs, src, dst, **options)
    return check_device_ids(sim, rng, moves, pairs, src, dst, limits, ids, **options)


def _side(at, bytes_, subblocks, ids):
    """One side of a page of ``bytes_`` for so many ids, and where it ends."""
    blocks = -(-ids // subblocks)
    side = Side(at, bytes_ * subblocks + 16, bytes_ if subblocks > 1 else 0, subblocks)
    return side, -(-(at + blocks * side.block_stride) // 16) * 16


def full_call(
    sim: Sim, rng, shape, tables, ids, captures=False, has_earlier=False, chunks=5, skips_negative=None
):  # fmt: skip
    """Moves with and without loops and sub-blocks on either side; of ids on the device half are bad.

    While capturing, large tables become several launches, of which the first records bad ids. ``chunks`` are those of a
    fragment where the shape has them.
    """
    # More than a tile of chunks, so that each of a lane's meets a bad pair.
    count = {"page": 8, "tiles": 8, "bulk": 3}.get(shape, 40)
    bytes_ = {"page": 301, "tiles": 261, "bulk": 528}.get(shape, chunks * _grain(shape))
    loops = () if shape == "page" else ((2, 6 * bytes_, 6 * bytes_), (3, bytes_, 2 * bytes_), (2, 3 * bytes_, bytes_))
    page = 12 * bytes_ if loops else bytes_
    moves, ends = [], [0, 0]
    for used, src_subblocks, dst_subblocks in ((0, 1, 1), (3, 3, 1), (1, 1, 5), (2, 7, 2)):
        if ids == "host 64-bit" and src_subblocks > 1:
            continue
        sides = []
        for s, subblocks in enumerate((src_subblocks, dst_subblocks)):
            side, ends[s] = _side(ends[s], page, subblocks, count)
            sides.append(side)
        moves.append(Move(*sides, bytes_, loops[:used]))
    moves, src_bytes, dst_bytes = add_small_moves(moves, tables, shape, ends, count)
    src, dst = sim.memory(DEVICE, src_bytes + 64), sim.memory(DEVICE, dst_bytes + 64)
    pairs = list(zip(rng.permutation(count).tolist(), rng.permutation(count).tolist(), strict=True))
    options = {"capturing": captures, "sm_budget": 1 if captures else 8, "bulk": shape == "bulk"}
    if ids.startswith("host"):
        moves, pairs = _with_far_ids(rng, moves, pairs) if "64" in ids else (moves, pairs)
        return check(sim, moves, pairs, src, dst, **options)
    options |= {"one_in": 2, "has_earlier": has_earlier, "skips_negative": skips_negative}
    return check_device_ids(sim, rng, moves, pairs, src, dst, [count, count], ids, **options)


def alike_call(sim: Sim, rng, shape, tables):
    """Moves that are alike, and as many pairs as it takes for the tables; of bulk copies only what they leave."""
    count = {"small": 40, "large": 1500, "table": 4100}[tables]
    bytes_ = {"tiles": 261, "bulk": 512}.get(shape, 5 * _grain(shape))
    loops = () if shape in ("page", "bulk") else ((2, bytes_, bytes_),)
    stride, shift = 4 * bytes_, 8 if shape == "bulk" else 0
    src, dst = (sim.memory(DEVICE, stride * count + 16) for _ in range(2))
    pairs = list(zip(rng.permutation(count).tolist(), rng.permutation(count).tolist(), strict=True))
    moves = [Move(Side(at, stride), Side(at + shift, stride), bytes_, loops) for at in (0, 2 * bytes_)]
    run = check(sim, moves, pairs, src, dst, sm_budget=8, bulk=shape == "bulk")
    assert run.uploads == (tables == "table")


def alignment_call(sim: Sim, rng, shape, tables, sizes, direction):
    """Every offset of the destination against the source's, modulo 16, for fragments of each size."""
    moves, ends = [], [0, 0]
    for fragment_bytes, difference in itertools.product(sizes, range(16)):
        loops = ((2, fragment_bytes + 1, fragment_bytes),) if shape == "tiles" else ()
        page = 2 * fragment_bytes + 1 if loops else fragment_bytes
        offset = int(rng.integers(16))
        sides = Side(ends[0] + offset, page + difference % 3), Side(ends[1] + offset + difference, page + 1)
        moves.append(Move(*sides, fragment_bytes, loops))
        ends = [-(-(side.base + 4 * side.block_stride) // 16) * 16 for side in sides]
    moves, src_bytes, dst_bytes = add_small_moves(moves, tables, shape, ends, 4)
    src, dst = sim.memory(DEVICE, src_bytes + 64), sim.memory(DEVICE, dst_bytes + 64)
    check(sim, moves, [(0, 1), (3, 0), (2, 3)], src, dst, direction=direction, sm_budget=4, bulk=shape == "bulk")


def _with_far_ids(rng, moves, pairs):
    """Source ids that need 64 bits: sub-blocks without a stride of their own."""
    moves = [Move(Side(m.src.base, m.src.block_stride, 0, FAR), m.dst, m.fragment_bytes, m.loops) for m in moves]
    return moves, [(s * FAR + int(rng.integers(FAR)), d) for s, d in pairs]


def check_device_ids(
    sim: Sim, rng, moves, pairs, src, dst, limits, ids, *, one_in=4, has_earlier=False, skips_negative=None, **options
):  # fmt: skip
    """One in ``one_in`` pairs is bad: it is not copied, and recorded unless negative ones are to be skipped.

    ``skips_negative`` is at random where it is None.
    """
    width = 4 if "32" in ids else 8
    rows = [list(pair) for pair in pairs]
    skip_negative = bool(rng.integers(2)) if skips_negative is None else skips_negative
    for row in range(len(rows)):
        if rng.integers(one_in) == 0:
            side = int(rng.integers(2))
            far = 2**31 - 1 if width == 4 else 2**62
            rows[row][side] = int(rng.choice([-1, -far, limits[side], limits[side] + 1, far]))
    side = {"src in order": 0, "dst in order": 1}.get(ids.partition(", ")[2])
    in_order = [side == s and len(rows) <= limits[s] for s in (0, 1)]
    for row, pair in enumerate(rows):
        if any(in_order):
            pair[side] = row

    def is_good(s, d):
        return 0 <= s < limits[0] and 0 <= d < limits[1]

    kept = [(s, d) for s, d in rows if is_good(s, d)]
    bad = [row for row, (s, d) in enumerate(rows) if not is_good(s, d) and not (skip_negative and min(s, d) < 0)]
    strides = width * int(rng.integers(1, 4)), width * 2
    columns = [
        IdColumn() if in_order[s] else ids_in_column(sim, [pair[s] for pair in rows], width, strides[s]) for s in (0, 1)
    ]
    earlier = _earlier_fault(sim, src, dst) if has_earlier else None
    device_ids = DeviceIds(*columns, len(rows), *limits, skip_negative)
    run = check(sim, moves, kept, src, dst, ids=device_ids, rows=rows, **options)
    count = len(bad)
    if earlier:
        # The op that failed first keeps the row.
        assert sim.take_fault() == (count + 1, 1, earlier)
    else:
        assert sim.take_fault() == ((count, bad[0], device_ids.op) if bad else None)
    assert sim.take_fault() is None
    return run


def _earlier_fault(sim: Sim, src, dst):
    """What another op has left in the device's word: one bad row, its second."""
    ids = DeviceIds(ids_in_column(sim, [-1, 9]), IdColumn(), 2, 1, 2, skip_negative=True, op=3)
    sim.kernel([Move(Side(0, 16), Side(0, 16), 16)], [], src, dst, ids=ids)
    return ids.op


def check_kernel(sim, moves, pairs, src, dst, stream=LEGACY, **options):
    """Copied as a loop would copy it, and launched as the plan and what was issued say; the run and its launches."""
    dst ^= 0xFF  # what an earlier call copied must not pass for this one's work
    expected = dst.copy()
    copy_naively(moves, pairs, src, expected)
    sim.clear_log()
    run = sim.kernel(moves, pairs, src, dst, stream, **options)
    launches = sim.log("launch")
    assert np.array_equal(dst, expected)
    assert len(launches) == run.launches == run.issued.launches
    assert max(entry["ctas"] for entry in launches) == run.ctas
    assert {entry["threads"] for entry in launches} == {run.threads}
    assert {entry["stream"] for entry in launches} == {stream}
    assert (run.issued.descriptors, run.issued.bytes) == (run.descriptors, run.bytes)
    return run, launches
