"""The table that C++ hands over: csrc/ops/triton_table.cpp writes what stands here, column for column.

All int64: a head, then a row of ``MOVE_COLUMNS`` a move, then, where the ids are on the host, a row of two a pair. A
divisor is three columns (divisor, multiplier, shift), which ``divide`` in copy_body.py uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# What copies are cut into.
TILE_LANES = 256  # a tile is so many elements of the call's width
LINE_BYTES = 128  # tiles begin on cache lines

# The ops that take ids on a device, by the code in a fault word.
FAULT_OPS = ("", "gather_blocks", "scatter_blocks", "copy_pages", "PreparedCopy.run")

HEAD_COLUMNS = 32


class Head(NamedTuple):
    """What holds for a whole call; flags are 0 or 1."""

    kernel: int  # 0 page, 1 row, 2 bytes
    width: int  # bytes of an element; both sides' addresses have the same remainder by it
    is_chunked: int  # all fragments are few whole, aligned elements
    links_host: int
    moves: int
    units: int  # tiles, or elements where chunked, of all moves and pairs
    loop_levels: int  # the most that a move has
    has_subblocks: int
    is_ragged: int  # some fragment begins or ends inside an element
    cuts_on_src: int  # tiles begin on cache lines of the source, not of the destination
    src_ids: int  # address; in this table, from its begin
    src_ids_stride_bytes: int
    src_ids_width: int  # 8 or 4 bytes; 0 where row i's id is i
    dst_ids: int
    dst_ids_stride_bytes: int
    dst_ids_width: int
    ids_on_device: int  # pairs outside the limits are skipped and recorded
    src_limit: int
    dst_limit: int
    skips_negative: int
    fault_op: int
    fault: int  # address of the device's fault word; 0 where C++ has none
    sm_budget: int
    device: int  # -1 is the host, which only the interpreter reaches

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Head:
        """The head from the numbers that C++ passed."""
        return cls(*numbers[: len(cls._fields)])


# Of a move's row.
MOVE_COLUMNS = 32
SRC_ADDRESS = 0
DST_ADDRESS = 1
FIRST_UNIT = 2
FRAGMENT_BYTES = 3
PARTS = 4  # a divisor: units of one fragment
LOOPS = 7  # three, innermost first: extent as a divisor, stride of the source, of the destination
LOOP_COLUMNS = 5
SRC_SIDE = 22  # block stride, sub-block stride, sub-blocks of a block as a divisor
DST_SIDE = 27
