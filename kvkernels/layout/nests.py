"""Loops as rows of runs, as few and with fragments as long as they can be."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvkernels.common.arguments import RUN_COLUMNS
from kvkernels.layout.axes import Dimension

#: More than these would cost more to go through than the copy itself.
MAX_RUNS = 4096

LOOPS = 3
SRC_POOL, DST_POOL, SRC_OFFSET, DST_OFFSET, FRAGMENT, SRC_SUBBLOCK, DST_SUBBLOCK, FIRST_LOOP = range(8)
#: The columns of the run the other way round.
INVERSE = [1, 0, 3, 2, 4, 6, 5, *(c for first in (7, 10, 13) for c in (first, first + 2, first + 1))]
EXTENTS = [FIRST_LOOP + 3 * i for i in range(LOOPS)]

Rows: TypeAlias = NDArray[np.int64]


def bytes_of(rows: Rows) -> int:
    """Bytes that one pair of ids moves."""
    return int((rows[:, FRAGMENT] * rows[:, EXTENTS].prod(axis=1)).sum())


def nest(base: list[int], fragment_bytes: int, subblock_strides: tuple[int, int], dimensions: list[Dimension]) -> Rows:
    """Rows for a box of coordinates: what stays inside a page on both sides is looped over, the rest listed."""
    listed = [d for d in dimensions if d.src_pools or d.dst_pools]
    fragment_bytes, loops = _merged(fragment_bytes, [d for d in dimensions if not (d.src_pools or d.dst_pools)])
    loops.sort(key=lambda d: (-d.dst_bytes, -d.src_bytes))
    while len(loops) > LOOPS:
        smallest = min(loops, key=lambda d: d.extent)
        loops.remove(smallest)
        listed.append(smallest)
    total = math.prod(d.extent for d in listed)
    if total > MAX_RUNS:
        # Counted by the caller, never written out.
        return np.broadcast_to(np.int64(0), (total, RUN_COLUMNS))
    rows = np.ones((total, RUN_COLUMNS), dtype=np.int64)
    rows[:, : DST_OFFSET + 1] = base
    rows[:, FRAGMENT : DST_SUBBLOCK + 1] = (fragment_bytes, *subblock_strides)
    rows[:, FIRST_LOOP:] = (1, 0, 0) * LOOPS
    for i, loop in enumerate(loops):
        rows[:, FIRST_LOOP + 3 * i : FIRST_LOOP + 3 * i + 3] = (loop.extent, loop.src_bytes, loop.dst_bytes)
    grid = np.indices([d.extent for d in listed]).reshape(len(listed), total)
    for dimension, index in zip(listed, grid, strict=True):
        rows[:, SRC_POOL] += index * dimension.src_pools
        rows[:, DST_POOL] += index * dimension.dst_pools
        rows[:, SRC_OFFSET] += index * dimension.src_bytes
        rows[:, DST_OFFSET] += index * dimension.dst_bytes
    return rows


def _merged(fragment_bytes: int, loops: list[Dimension]) -> tuple[int, list[Dimension]]:
    """With loops that continue the fragment, or another loop, on both sides made part of it."""
    loops = list(loops)
    while True:
        into = next((d for d in loops if d.src_bytes == d.dst_bytes == fragment_bytes), None)
        if into is not None:
            fragment_bytes *= into.extent
            loops.remove(into)
            continue
        pair = next(
            (
                (outer, inner)
                for outer in loops
                for inner in loops
                if outer.src_bytes == inner.src_bytes * inner.extent
                and outer.dst_bytes == inner.dst_bytes * inner.extent
            ),
            None,
        )
        if pair is None:
            return fragment_bytes, loops
        outer, inner = pair
        loops.remove(outer)
        loops[loops.index(inner)] = Dimension(outer.extent * inner.extent, 0, 0, inner.src_bytes, inner.dst_bytes)


def joined(rows: Rows) -> Rows:
    """With runs made one that are the same nest of neighbouring fragments."""
    same = [SRC_POOL, DST_POOL, SRC_SUBBLOCK, DST_SUBBLOCK, *range(FIRST_LOOP, RUN_COLUMNS)]
    rows = rows[np.lexsort(tuple(rows[:, column] for column in (SRC_OFFSET, *reversed(same))))]
    before, after = rows[:-1], rows[1:]
    joins = (before[:, same] == after[:, same]).all(axis=1)
    for offset in (SRC_OFFSET, DST_OFFSET):
        joins &= before[:, offset] + before[:, FRAGMENT] == after[:, offset]
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    if len(heads) == len(rows):
        return rows
    kept = rows[heads]
    kept[:, FRAGMENT] = np.add.reduceat(rows[:, FRAGMENT], heads)
    return np.concatenate([_folded(row) for row in kept])


def _folded(row: Rows) -> Rows:
    """With loops that continue a fragment that has grown made part of it."""
    loops = [Dimension(int(row[i]), 0, 0, int(row[i + 1]), int(row[i + 2])) for i in EXTENTS if row[i] > 1]
    base = [int(value) for value in row[: DST_OFFSET + 1]]
    return nest(base, int(row[FRAGMENT]), (int(row[SRC_SUBBLOCK]), int(row[DST_SUBBLOCK])), loops)
