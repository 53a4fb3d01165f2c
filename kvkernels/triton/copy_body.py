"""What the copy kernels have in common: from a unit's number to addresses, and the copy itself.

The counterpart of csrc/cuda/copy_body.h. All arithmetic on offsets is in 64 bits, and the table's addresses become
pointers only where something is loaded or stored.
"""

import triton
import triton.language as tl

from kvkernels.triton import table as columns
from kvkernels.triton.table import Head

# Kernels see no globals but these.
HEAD_COLUMNS = tl.constexpr(columns.HEAD_COLUMNS)
MOVES = tl.constexpr(Head._fields.index("moves"))
UNITS = tl.constexpr(Head._fields.index("units"))
LOOP_LEVELS = tl.constexpr(Head._fields.index("loop_levels"))
HAS_SUBBLOCKS = tl.constexpr(Head._fields.index("has_subblocks"))
IS_RAGGED = tl.constexpr(Head._fields.index("is_ragged"))
CUTS_ON_SRC = tl.constexpr(Head._fields.index("cuts_on_src"))
SRC_IDS = tl.constexpr(Head._fields.index("src_ids"))
DST_IDS = tl.constexpr(Head._fields.index("dst_ids"))
IDS_ON_DEVICE = tl.constexpr(Head._fields.index("ids_on_device"))
SRC_LIMIT = tl.constexpr(Head._fields.index("src_limit"))
DST_LIMIT = tl.constexpr(Head._fields.index("dst_limit"))
SKIPS_NEGATIVE = tl.constexpr(Head._fields.index("skips_negative"))
FAULT_OP = tl.constexpr(Head._fields.index("fault_op"))
MOVE_COLUMNS = tl.constexpr(columns.MOVE_COLUMNS)
SRC_ADDRESS = tl.constexpr(columns.SRC_ADDRESS)
DST_ADDRESS = tl.constexpr(columns.DST_ADDRESS)
FIRST_UNIT = tl.constexpr(columns.FIRST_UNIT)
FRAGMENT_BYTES = tl.constexpr(columns.FRAGMENT_BYTES)
PARTS = tl.constexpr(columns.PARTS)
LOOPS = tl.constexpr(columns.LOOPS)
LOOP_COLUMNS = tl.constexpr(columns.LOOP_COLUMNS)
SRC_SIDE = tl.constexpr(columns.SRC_SIDE)
DST_SIDE = tl.constexpr(columns.DST_SIDE)
TILE_LANES = tl.constexpr(columns.TILE_LANES)
LINE_BYTES = tl.constexpr(columns.LINE_BYTES)

# Of one program at a time: eight elements of a tile, or four chunks, in flight in each thread of 16 warps.
TILES = tl.constexpr(16)
CHUNKS = tl.constexpr(2048)


@triton.jit
def divide(n, divisor):
    """``n // divisor[0]`` for 0 <= n < 2**63, by the multiplier and the shift beside it."""
    multiplier = tl.load(divisor + 1).to(tl.uint64)
    shift = tl.load(divisor + 2).to(tl.uint64)
    return (tl.umulhi(n.to(tl.uint64) << 1, multiplier) >> shift).to(tl.int64)


@triton.jit
def find_move(moves, count, unit):
    """The row of the last move whose first unit is at or before ``unit``."""
    low = tl.zeros_like(unit)
    while count > 1:
        half = count >> 1
        first_unit = tl.load(moves + (low + half) * MOVE_COLUMNS + FIRST_UNIT)
        low = tl.where(first_unit <= unit, low + half, low)
        count -= half
    return low


@triton.jit
def load_id(table, column, row):
    """A row's id in the column of ids that three columns of the head describe."""
    address = tl.load(table + column) + row * tl.load(table + column + 1)
    width = tl.load(table + column + 2) + tl.zeros_like(row)
    if tl.load(table + IDS_ON_DEVICE) == 0:
        address += table.to(tl.int64)
    # Masks instead of branches: Triton 3.9 fails to compile tensors that leave a branch here.
    wide = tl.load(address.to(tl.pointer_type(tl.int64)), mask=width == 8)
    narrow = tl.load(address.to(tl.pointer_type(tl.int32)), mask=width == 4)
    return tl.where(width == 8, wide, tl.where(width == 4, narrow.to(tl.int64), row))


@triton.jit
def side_offset(side, id, has_subblocks):
    """From a side's first fragment to the same in the block, or sub-block, of an id."""
    offset = id * tl.load(side)
    if has_subblocks != 0:
        block = divide(id, side + 2)
        within = id - block * tl.load(side + 2)
        offset = block * tl.load(side) + within * tl.load(side + 1)
    return offset


@triton.jit
def record(fault, op, row, is_bad):
    """Count bad pairs in the device's word. The first op to fail owns the row, which is kept complemented."""
    if tl.max(is_bad.to(tl.int32), 0) != 0:
        count = fault.to(tl.pointer_type(tl.uint64)) + tl.zeros_like(row)
        tl.atomic_add(count, 1, mask=is_bad, sem="relaxed")
        owner = tl.atomic_cas((fault + 16).to(tl.pointer_type(tl.int32)), 0, op.to(tl.int32), sem="relaxed")
        if (owner == 0) | (owner == op):
            tl.atomic_max(count + 1, (~row).to(tl.uint64), mask=is_bad, sem="relaxed")


@triton.jit
def locate(table, fault, unit, LOOPED: tl.constexpr):
    """Of each unit: its fragment's begin on both sides, which part of it the unit is, its size, and whether to copy."""
    units = tl.load(table + UNITS)
    is_there = unit < units
    unit = tl.minimum(unit, units - 1)  # so that the table can be read without a mask
    moves = table + HEAD_COLUMNS
    move = find_move(moves, tl.load(table + MOVES), unit)
    entry = moves + move * MOVE_COLUMNS
    unit -= tl.load(entry + FIRST_UNIT)
    index = divide(unit, entry + PARTS)
    part = unit - index * tl.load(entry + PARTS)
    is_first = is_there & (move == 0) & (part == 0)
    src = tl.load(entry + SRC_ADDRESS)
    dst = tl.load(entry + DST_ADDRESS)
    if LOOPED:
        for level in range(tl.load(table + LOOP_LEVELS)):
            loop = entry + LOOPS + level * LOOP_COLUMNS
            outer = divide(index, loop)
            step = index - outer * tl.load(loop)
            src += step * tl.load(loop + 3)
            dst += step * tl.load(loop + 4)
            is_first = is_first & (step == 0)
            index = outer
    src_id = load_id(table, SRC_IDS, index)
    dst_id = load_id(table, DST_IDS, index)
    if tl.load(table + IDS_ON_DEVICE) != 0:
        is_good = (src_id >= 0) & (src_id < tl.load(table + SRC_LIMIT))
        is_good = is_good & (dst_id >= 0) & (dst_id < tl.load(table + DST_LIMIT))
        is_skipped = (tl.load(table + SKIPS_NEGATIVE) != 0) & ((src_id < 0) | (dst_id < 0))
        # Each pair has one first unit.
        record(fault, tl.load(table + FAULT_OP), index, is_first & ~is_good & ~is_skipped)
        is_there = is_there & is_good
    has_subblocks = tl.load(table + HAS_SUBBLOCKS)
    src += side_offset(entry + SRC_SIDE, src_id, has_subblocks)
    dst += side_offset(entry + DST_SIDE, dst_id, has_subblocks)
    return src, dst, part, tl.load(entry + FRAGMENT_BYTES), is_there


@triton.jit
def elements(address, lane, WIDTH: tl.constexpr):
    """Pointers to the elements ``lane`` (a row) of spans that begin at ``address`` (a column), a multiple of WIDTH.

    Triton has no type of 16 bytes: such an element is four lanes of int32, and the hint lets a thread take them as one.
    """
    if WIDTH == 16:
        begin = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), [16])
    elif WIDTH == 8:
        begin = address.to(tl.pointer_type(tl.int64))
    elif WIDTH == 4:
        begin = address.to(tl.pointer_type(tl.int32))
    elif WIDTH == 2:
        begin = address.to(tl.pointer_type(tl.int16))
    else:
        begin = address.to(tl.pointer_type(tl.int8))
    return begin[:, None] + lane[None, :]


@triton.jit
def move_elements(src, dst, mask):
    """Copies; reads bypass the first cache and writes are the first to leave the second."""
    tl.store(dst, tl.load(src, mask=mask, cache_modifier=".cg"), mask=mask, cache_modifier=".cs")


@triton.jit
def copy_ends(src, dst, cut, at, fragment_bytes, part, is_there, WIDTH: tl.constexpr):
    """The bytes of a fragment before its first whole element, and those after its last."""
    byte = tl.arange(0, WIDTH)
    head = tl.minimum(-cut & (WIDTH - 1), fragment_bytes)
    in_head = (is_there & (part == 0))[:, None] & (byte[None, :] < head[:, None])
    move_elements(elements(src, byte, 1), elements(dst, byte, 1), in_head)
    tail = head + ((fragment_bytes - head) & -WIDTH)
    has_tail = is_there & (tail >= at) & (tail < at + TILE_LANES * WIDTH)
    in_tail = has_tail[:, None] & (byte[None, :] < (fragment_bytes - tail)[:, None])
    move_elements(elements(src + tail, byte, 1), elements(dst + tail, byte, 1), in_tail)


@triton.jit
def copy_tiles(table, fault, WIDTH: tl.constexpr, LOOPED: tl.constexpr):
    """Fragments of any size and alignment, in tiles that begin on cache lines of one side.

    |<------------- tile ------------->|<- ...
    ^ at       |<- fragment ----------------- ...
               |-|=== elements ========|
                ^ an end: bytes before the first whole element
    """
    WORDS: tl.constexpr = 4 if WIDTH == 16 else 1
    TILE_BYTES: tl.constexpr = TILE_LANES * WIDTH
    lane = tl.arange(0, TILE_LANES * WORDS)
    begin = tl.program_id(0).to(tl.int64) * TILES
    for first in range(begin, tl.load(table + UNITS), tl.num_programs(0).to(tl.int64) * TILES):
        src, dst, part, fragment_bytes, is_there = locate(table, fault, first + tl.arange(0, TILES), LOOPED)
        cut = dst
        if tl.load(table + CUTS_ON_SRC) != 0:
            cut = src
        at = part * TILE_BYTES - (cut & (LINE_BYTES - 1))
        offset = at[:, None] + (lane // WORDS * WIDTH)[None, :]
        is_whole = is_there[:, None] & (offset >= 0) & (offset + WIDTH <= fragment_bytes[:, None])
        move_elements(elements(src + at, lane, WIDTH), elements(dst + at, lane, WIDTH), is_whole)
        if WIDTH > 1:  # noqa: SIM102  (a branch that is compiled or not, round one that is taken or not)
            if tl.load(table + IS_RAGGED) != 0:
                copy_ends(src, dst, cut, at, fragment_bytes, part, is_there, WIDTH)


@triton.jit
def copy_chunks(table, fault, WIDTH: tl.constexpr):
    """Small fragments of whole, aligned elements: a unit an element, so there are no ends to care for."""
    lane = tl.arange(0, 4 if WIDTH == 16 else 1)
    begin = tl.program_id(0).to(tl.int64) * CHUNKS
    for first in range(begin, tl.load(table + UNITS), tl.num_programs(0).to(tl.int64) * CHUNKS):
        src, dst, part, _, is_there = locate(table, fault, first + tl.arange(0, CHUNKS), True)
        at = part * WIDTH
        move_elements(elements(src + at, lane, WIDTH), elements(dst + at, lane, WIDTH), is_there[:, None])
