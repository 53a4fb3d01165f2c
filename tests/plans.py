"""Random valid plans for copy_pages: the loops of one page, put into memory in another order on either side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import Arena, Case, View, as_ids, counts, dtypes_for, neighbouring_pairs, offsets, pool_view, seeds
from hypothesis import strategies as st

_RUBBISH = 1 << 40  # the stride of a loop of one step says nothing
_NEST_BYTES = 1 << 16


@dataclass(frozen=True)
class Inside:
    """How one side's page holds what a pair copies: strides by axis, and the bytes that all of it spans."""

    strides: tuple[int, ...]
    subblock_stride: int
    bytes: int


def lay_out(order: Sequence[int], extents: Sequence[int], fragment_bytes: int, gaps: Sequence[int]) -> Inside:
    """Strides of axes nested in ``order``, innermost first; the last axis is the sub-blocks."""
    strides = [0] * len(extents)
    reach = fragment_bytes
    for axis, gap in zip(order, gaps, strict=True):
        strides[axis] = reach + gap
        reach += strides[axis] * (extents[axis] - 1)
    return Inside(tuple(strides[:-1]), strides[-1], reach)


def run_row(
    pools: tuple[int, int],
    offsets: tuple[int, int],
    fragment_bytes: int,
    subblock_strides: tuple[int, int],
    loops: Sequence[tuple[int, int, int]] = (),
) -> list[int]:
    """One row of ``runs``."""
    unused = [(1, 0, 0)] * (3 - len(loops))
    return [*pools, *offsets, fragment_bytes, *subblock_strides, *(v for loop in (*loops, *unused) for v in loop)]


def runs_tensor(*rows: Sequence[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 16)


def _flip(offset: int, extent: int, stride: int) -> tuple[int, int]:
    """The same bytes, walked downwards."""
    return offset + (extent - 1) * stride, -stride


fragment_sizes = st.one_of(
    st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)),
    st.sampled_from((1, 3, 7, 15, 17, 24, 48, 65, 80, 96, 160, 1008, 1040, 4096, 4112)),
    st.integers(1, 100),
)


@st.composite
def _nest(draw: Callable[..., Any], subblocks: tuple[int, int]) -> tuple[list[list[int]], list[int], list[int]]:
    """Rows of one nest, whose pools and offsets count from 0, and the bytes it spans on the two sides."""
    fragment_bytes = draw(fragment_sizes)
    extents = draw(st.lists(st.sampled_from((1, 2, 2, 3, 4, 5, 8, 16)), min_size=3, max_size=3))
    while fragment_bytes * math.prod(extents) * max(subblocks) > _NEST_BYTES and max(extents) > 1:
        extents[extents.index(max(extents))] //= 2
    unit = 16 if fragment_bytes % 16 == 0 and draw(st.booleans()) else 1
    insides = []
    for side in (0, 1):
        gaps = [unit * g for g in draw(st.lists(st.sampled_from((0, 0, 0, 0, 1, 5)), min_size=4, max_size=4))]
        order = draw(st.permutations(range(4)))
        insides.append(lay_out(order, [*extents, subblocks[side]], fragment_bytes, gaps))
    loops = [(e, insides[0].strides[i], insides[1].strides[i]) for i, e in enumerate(extents)]
    begin = [0, 0]
    for i, (extent, s, d) in enumerate(loops):
        if draw(st.integers(0, 5)) == 0:
            begin[0], s = _flip(begin[0], extent, s)
            begin[1], d = _flip(begin[1], extent, d)
        loops[i] = (extent, s, d)
    strides = [i.subblock_stride for i in insides]
    for side in (0, 1):
        if subblocks[side] == 1:
            strides[side] = _RUBBISH
        elif draw(st.integers(0, 5)) == 0:
            begin[side], strides[side] = _flip(begin[side], subblocks[side], strides[side])
    rows = []
    for part_begin, loops_of_part in _split(draw, begin, loops):
        shown = [loop if loop[0] > 1 or draw(st.booleans()) else (1, _RUBBISH, -_RUBBISH) for loop in loops_of_part]
        rows.append(run_row((0, 0), part_begin, fragment_bytes, tuple(strides), draw(st.permutations(shown))))
    return rows, [insides[0].bytes, insides[1].bytes]


def _split(
    draw: Callable[..., Any], begin: Sequence[int], loops: Sequence[tuple[int, int, int]]
) -> list[tuple[tuple[int, int], list[tuple[int, int, int]]]]:
    """The nest as one run, or as two that share a loop's steps between them, or only some of the steps."""
    extent, s, d = loops[0]
    kind = draw(st.sampled_from(("whole", "whole", "two", "some"))) if extent > 1 else "whole"
    if kind == "whole":
        return [((begin[0], begin[1]), list(loops))]
    at = draw(st.integers(1, extent - 1))
    first = ((begin[0], begin[1]), [(at, s, d), *loops[1:]])
    rest = ((begin[0] + at * s, begin[1] + at * d), [(extent - at, s, d), *loops[1:]])
    return [rest, first] if kind == "two" else [rest]


@st.composite
def copy_pages_cases(draw: Callable[..., Any]) -> Case:
    """Several nests, each between one of the source's and one of the destination's pools."""
    rng = np.random.default_rng(draw(seeds))
    subblocks = tuple(draw(st.sampled_from((1, 1, 1, 2, 3, 4, 16))) for _ in range(2))
    pool_counts = [draw(st.integers(1, 3)) for _ in range(2)]
    filled = [[draw(st.sampled_from((0, 0, 16, 5)))] * pool_counts[side] for side in (0, 1)]
    rows = []
    for _ in range(draw(st.integers(0 if draw(st.integers(0, 19)) == 0 else 1, 4))):
        nest, spans = draw(_nest(subblocks))
        pools = [draw(st.integers(0, pool_counts[side] - 1)) for side in (0, 1)]
        begins = [filled[side][pools[side]] for side in (0, 1)]
        for row in nest:
            row[0:2] = pools
            row[2] += begins[0]
            row[3] += begins[1]
            rows.append(row)
        for side in (0, 1):
            gap = draw(st.sampled_from((0, 0, 16, 3)))
            filled[side][pools[side]] = begins[side] + spans[side] + gap
    order = rng.permutation(len(rows))
    rows = [rows[i] for i in order]
    arena = Arena()
    blocks = [draw(st.integers(1, 6)) for _ in range(2)]
    sides = [
        [draw(_padded_pool(arena, name, blocks[side], max(bytes, 1))) for bytes in filled[side]]
        for side, name in enumerate(("src", "dst"))
    ]
    pairs = neighbouring_pairs(rng, blocks[0] * subblocks[0], blocks[1] * subblocks[1], draw(counts))
    skip_negative = draw(st.booleans())
    if skip_negative:
        pairs = _with_negatives(rng, pairs)
    return arena.case(
        "copy_pages",
        *(sides[0], sides[1], as_ids(rng, pairs), runs_tensor(*rows)),
        seed=draw(seeds),
        src_subblocks_per_block=subblocks[0],
        dst_subblocks_per_block=subblocks[1],
        skip_negative=skip_negative,
    )


@st.composite
def _padded_pool(draw: Callable[..., Any], arena: Arena, side: str, blocks: int, page_bytes: int) -> View:
    page_bytes += draw(st.sampled_from((0, -page_bytes % 16, -page_bytes % 16 + 16)))
    dtype = draw(dtypes_for(page_bytes))
    stride_bytes = page_bytes + dtype.itemsize * draw(st.sampled_from((0, 0, 1, 16)))
    return pool_view(arena.reserve(side, blocks * stride_bytes, draw(offsets)), blocks, page_bytes, stride_bytes, dtype)


def _with_negatives(rng: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
    """Pairs to skip among the others; what their other column holds does not matter."""
    extra = rng.choice([-1, -2, -(2**31), -(2**63), 2**62], (int(rng.integers(1, 5)), 2))
    extra[np.arange(len(extra)), rng.integers(0, 2, len(extra))] = -1
    return rng.permutation(np.concatenate((pairs, extra)))
