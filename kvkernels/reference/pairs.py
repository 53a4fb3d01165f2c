"""The ids of a call: read from their tensors, checked against the pools, repeats dropped, overlaps refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.reference.checks import Pool
from kvkernels.reference.overlap import Intervals, Steps, first_read_of_written, intersecting
from kvkernels.reference.runs import Run, with_subblocks


def host_ids(t: Tensor) -> Tensor:
    return t.detach().to(device="cpu", dtype=torch.int64)


def _check_in_range(op: str, name: str, columns: Sequence[tuple[Tensor, str, int, str]], kept: Tensor) -> None:
    """Each column is (ids, index text after the row, limit, what the limit is)."""
    first: tuple[int, str] | None = None
    for ids, index, limit, what in columns:
        bad = (((ids < 0) | (ids >= limit)) & kept).nonzero()
        if bad.numel() and (first is None or int(bad[0]) < first[0]):
            row = int(bad[0])
            first = row, f"{op}: {name}[{row}{index}] = {int(ids[row])} is out of range for {what}"
    if first is not None:
        raise IndexError(first[1])


def _limit(pools: Sequence[Pool], subblocks: int) -> tuple[int, str]:
    fewest = min(pools, key=lambda pool: pool.blocks)
    of_subblocks = f" of {subblocks} sub-blocks" if subblocks > 1 else ""
    return fewest.blocks * subblocks, f"{fewest.name} with {fewest.blocks} blocks{of_subblocks}"


def pairs_of_mapping(
    op: str,
    name: str,
    mapping: Tensor,
    src: Sequence[Pool],
    dst: Sequence[Pool],
    src_subblocks: int = 1,
    dst_subblocks: int = 1,
    skip_negative: bool = False,
) -> Tensor:
    """The pairs of a ``[n, 2]`` mapping to copy, int64 on the CPU, each once."""
    ids = host_ids(mapping)
    kept = (ids >= 0).all(1) if skip_negative else torch.ones(ids.shape[0], dtype=torch.bool, device="cpu")
    src_limit, src_what = _limit(src, src_subblocks)
    dst_limit, dst_what = _limit(dst, dst_subblocks)
    _check_in_range(op, name, ((ids[:, 0], ", 0", src_limit, src_what), (ids[:, 1], ", 1", dst_limit, dst_what)), kept)
    return distinct_pairs(op, name, ids[kept])


def pairs_of_ids(op: str, block_ids: Tensor, pools: Sequence[Pool], ids_are_sources: bool) -> Tensor:
    """The pairs of gather (block id, row) or scatter (row, block id)."""
    ids = host_ids(block_ids)
    limit, what = _limit(pools, 1)
    _check_in_range(op, "block_ids", ((ids, "", limit, what),), torch.ones_like(ids, dtype=torch.bool))
    rows = torch.arange(ids.shape[0], device="cpu")
    return distinct_pairs(op, "block_ids", torch.stack((ids, rows) if ids_are_sources else (rows, ids), 1))


def distinct_pairs(op: str, name: str, pairs: Tensor) -> Tensor:
    """Drop repeats of a pair; raise where two sources go to one destination."""
    order = torch.argsort(pairs[:, 1], stable=True)
    src, dst = pairs[order, 0], pairs[order, 1]
    again = dst[1:] == dst[:-1]
    clash = dst[1:][again & (src[1:] != src[:-1])]
    if clash.numel():
        raise ValueError(
            f"{op}: {name} must name each destination once, got two sources for destination {int(clash[0])}"
        )
    first = torch.ones(pairs.shape[0], dtype=torch.bool, device="cpu")
    first[order[1:][again]] = False
    return pairs[first]


def check_bytes_touched(
    op: str,
    id_name: str,
    list_name: str,
    src: Sequence[Pool],
    dst: Sequence[Pool],
    runs: Sequence[Run],
    pairs: Tensor,
    src_subblocks: int = 1,
    dst_subblocks: int = 1,
) -> None:
    """No byte written through two pools, and none both read and written.

    Inside one destination pool the runs and the ids have been found distinct already. Only pools whose touched spans
    meet are looked at byte by byte, so that disjoint tensors cost nothing.
    """
    reads, writes = _Touched(src, src_subblocks), _Touched(dst, dst_subblocks)
    for run in runs:
        reads.add(run.src_pool, run.src_steps(), run.src_subblock_stride)
        writes.add(run.dst_pool, run.dst_steps(), run.dst_subblock_stride)
    read_spans, write_spans = reads.spans(pairs[:, 0]), writes.spans(pairs[:, 1])
    if not write_spans:
        return
    between_writes = intersecting(write_spans, write_spans).fill_diagonal_(False)
    across = intersecting(write_spans, read_spans)
    close = [writes.used[i] for i in (between_writes.any(1) | across.any(1)).nonzero().flatten().tolist()]
    if not close:
        return
    written = Intervals.joined([part for p in close for part in writes.intervals(p, pairs[:, 1])]).sorted()
    shared = written.first_neighbours_sharing()
    if shared is not None:
        a, b = sorted(int(written.owners[i]) for i in shared)
        raise ValueError(
            f"{op}: {list_name} must not overlap where they are written, "
            f"got {dst[a].name} and {dst[b].name} sharing bytes"
        )
    for p in (reads.used[i] for i in across.any(0).nonzero().flatten().tolist()):
        for part in reads.intervals(p, pairs[:, 0]):
            hit = first_read_of_written(written, part)
            if hit is not None:
                raise ValueError(
                    f"{op}: {id_name} must not write what it reads, got destination "
                    f"{int(pairs[written.rows[hit[0]], 1])} overlapping source {int(pairs[part.rows[hit[1]], 0])}"
                )


class _Touched:
    """The bytes that the runs touch on one side, by pool, as addresses."""

    def __init__(self, pools: Sequence[Pool], subblocks: int) -> None:
        self._pools = pools
        self._subblocks = subblocks
        self._steps: dict[int, set[tuple[Steps, int]]] = {}

    @property
    def used(self) -> list[int]:
        return list(self._steps)

    def add(self, pool: int, steps: Steps, subblock_stride: int) -> None:
        self._steps.setdefault(pool, set()).add((steps, subblock_stride if self._subblocks > 1 else 0))

    def spans(self, ids: Tensor) -> list[tuple[int, int]]:
        """Per pool in use, the addresses from the first byte touched to one past the last."""
        if ids.numel() == 0:
            return []
        blocks = int(ids.min()) // self._subblocks, int(ids.max()) // self._subblocks
        spans = []
        for index, family in self._steps.items():
            pool = self._pools[index]
            hulls = [with_subblocks(steps, self._subblocks, stride).hull() for steps, stride in family]
            base = pool.tensor.data_ptr()
            low = base + blocks[0] * pool.block_stride + min(hull[0] for hull in hulls)
            spans.append((low, base + blocks[1] * pool.block_stride + max(hull[1] for hull in hulls)))
        return spans

    def intervals(self, index: int, ids: Tensor) -> list[Intervals]:
        pool = self._pools[index]
        parts = []
        for steps, subblock_stride in sorted(self._steps[index]):
            block, subblock = ids // self._subblocks, ids % self._subblocks
            bases = pool.tensor.data_ptr() + block * pool.block_stride + subblock * subblock_stride
            parts.append(Intervals.of(bases, steps, index))
        return parts
