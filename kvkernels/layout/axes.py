"""One letter as both sides step through it: regular positions become loops, whatever is irregular is cut into pieces.

A letter that is cut in two, a range that begins inside of a cut, and tokens that are dealt out in two different ways
are all lists of positions here, one for each coordinate that both sides hold::

    element      5    6    7 |   8    9  ...  15 |  16   17  ...  23 | 24
    source      10   12   14 |  16   18  ...  30 |  32   34  ...  46 | 48     D, 2 bytes each
    destination 10   12   14 | 256  258  ... 270 | 512  514  ... 526 | 768    D/8 ... D%8, the eights 256 bytes apart
    loops              3     |                 2 x 8                 |  1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvkernels.layout.geometry import Digit

#: Pools and bytes on the source's side, then on the destination's.
Offsets: TypeAlias = tuple[int, int, int, int]
_Array: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True)
class Dimension:
    """A loop over both sides."""

    extent: int
    src_pools: int
    dst_pools: int
    src_bytes: int
    dst_bytes: int


@dataclass(frozen=True)
class Stretch:
    """Where a regular piece of an axis begins on both sides, and its loops."""

    src_pools: int
    dst_pools: int
    src_bytes: int
    dst_bytes: int
    loops: tuple[Dimension, ...]


def stretches(
    src: tuple[Digit, ...], dst: tuple[Digit, ...], src_at: Sequence[int], dst_at: Sequence[int]
) -> list[Stretch]:
    """The pieces of an axis whose coordinates are these on the two sides, one after the other."""
    is_plain = isinstance(src_at, range) and isinstance(dst_at, range) and src_at.step == dst_at.step == 1
    if is_plain and all(len(digits) < 2 for digits in (src, dst)):
        (s_pools, s_bytes), (d_pools, d_bytes) = (
            (digits[0].pools, digits[0].bytes) if digits else (0, 0) for digits in (src, dst)
        )
        loop = Dimension(len(src_at), s_pools, d_pools, s_bytes, d_bytes)
        begin = (src_at[0] * s_pools, dst_at[0] * d_pools, src_at[0] * s_bytes, dst_at[0] * d_bytes)
        return [Stretch(*begin, (loop,) if loop.extent > 1 else ())]
    (s_pools_at, s_bytes_at), (d_pools_at, d_bytes_at) = _positions(src, src_at), _positions(dst, dst_at)
    return list(_regular(np.stack((s_pools_at, d_pools_at, s_bytes_at, d_bytes_at), axis=1)))


def _positions(digits: tuple[Digit, ...], at: Sequence[int]) -> tuple[_Array, _Array]:
    """In pools and in bytes."""
    coordinates = np.asarray(at, dtype=np.int64)
    pools = np.zeros_like(coordinates)
    in_bytes = np.zeros_like(coordinates)
    for digit in digits:
        steps = coordinates // digit.divisor % digit.extent
        pools += steps * digit.pools
        in_bytes += steps * digit.bytes
    return pools, in_bytes


def _regular(positions: _Array) -> Iterator[Stretch]:
    """From the first on, the longest nest of loops that the positions are, then that of the rest."""
    while len(positions):
        loops, taken = _loops(positions)
        s_pools, d_pools, s_bytes, d_bytes = positions[0].tolist()
        yield Stretch(s_pools, d_pools, s_bytes, d_bytes, tuple(reversed(loops)))
        positions = positions[taken:]


def _loops(positions: _Array) -> tuple[list[Dimension], int]:
    """Loops, innermost first, and how many of the positions they are, from the first on."""
    loops: list[Dimension] = []
    taken, starts = 1, positions
    while len(starts) > 1:
        steps = np.diff(starts, axis=0)
        breaks = np.flatnonzero((steps != steps[0]).any(axis=1))
        extent = int(breaks[0]) + 1 if len(breaks) else len(starts)
        loops.append(Dimension(extent, *(int(value) for value in steps[0])))
        taken *= extent
        # Another loop around it goes over as many stretches as are like the first.
        groups = starts[: len(starts) // extent * extent].reshape(-1, extent, 4)
        unlike = np.flatnonzero((groups - groups[:, :1] != groups[0] - groups[0, 0]).any(axis=(1, 2)))
        starts = groups[: int(unlike[0]) if len(unlike) else None, 0]
    return loops, taken
