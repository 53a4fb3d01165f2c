"""What a list of moves copies, fragment by fragment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Side:
    """One side of a move: ``base`` is an offset in its buffer, in bytes."""

    base: int
    block_stride: int
    subblock_stride: int = 0
    subblocks: int = 1

    def at(self, id_: int) -> int:
        block, subblock = divmod(id_, self.subblocks)
        return self.base + block * self.block_stride + subblock * self.subblock_stride


@dataclass(frozen=True)
class Move:
    """``loops`` are (extent, source stride, destination stride), outermost first."""

    src: Side
    dst: Side
    fragment_bytes: int
    loops: tuple[tuple[int, int, int], ...] = ()
    merges: bool = False

    def row(self, src_address: int, dst_address: int) -> list[int]:
        loops = [number for loop in self.loops for number in loop]
        loops += [0] * (9 - len(loops))
        sides = []
        for side, address in ((self.src, src_address), (self.dst, dst_address)):
            sides += [address + side.base, side.block_stride, side.subblock_stride, side.subblocks]
        return [*sides, self.fragment_bytes, len(self.loops), *loops, int(self.merges)]

    def offsets(self) -> np.ndarray:
        """Source and destination offsets of every fragment of a pair."""
        offsets = np.zeros((1, 2), np.int64)
        for extent, src_stride, dst_stride in self.loops:
            steps = np.arange(extent)[:, None] * np.array([src_stride, dst_stride])
            offsets = (offsets[:, None, :] + steps[None, :, :]).reshape(-1, 2)
        return offsets


def copy_naively(
    moves: Sequence[Move], pairs: Sequence[tuple[int, int]], src: np.ndarray, dst: np.ndarray
) -> np.ndarray:
    """Copies fragment by fragment; how often each byte of ``dst`` was written."""
    writes = np.zeros(len(dst), np.uint8)
    for move in moves:
        offsets = move.offsets()
        for src_id, dst_id in pairs:
            for src_offset, dst_offset in offsets + np.array([move.src.at(src_id), move.dst.at(dst_id)]):
                dst[dst_offset : dst_offset + move.fragment_bytes] = src[src_offset : src_offset + move.fragment_bytes]
                writes[dst_offset : dst_offset + move.fragment_bytes] += 1
    return writes


def segments_of(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Runs of pairs that count up on both sides."""
    segments: list[list[int]] = []
    for src, dst in pairs:
        if segments and (src, dst) == (segments[-1][0] + segments[-1][2], segments[-1][1] + segments[-1][2]):
            segments[-1][2] += 1
        else:
            segments.append([src, dst, 1])
    return [(src, dst, count) for src, dst, count in segments]


PAGE = Move(Side(0, 64), Side(0, 64), 64)


def random_pairs(count: int, blocks: int) -> list[tuple[int, int]]:
    """Any sources, each destination once."""
    rng = np.random.default_rng(0)
    return list(zip(rng.integers(0, blocks, count).tolist(), rng.permutation(blocks)[:count].tolist(), strict=True))
