"""Which bytes are touched: half-open intervals of addresses, and whether two of them share a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_READS_AT_ONCE = 1 << 20


class Steps(NamedTuple):
    """Bytes on one side of a copy: ``fragment_bytes`` at ``offset``, repeated by ``(extent, stride)`` loops."""

    offset: int
    fragment_bytes: int
    loops: tuple[tuple[int, int], ...]

    def hull(self) -> tuple[int, int]:
        """First byte and one past the last byte."""
        reach = [(extent - 1) * stride for extent, stride in self.loops]
        low = self.offset + sum(r for r in reach if r < 0)
        return low, self.offset + sum(r for r in reach if r > 0) + self.fragment_bytes

    def folded(self) -> Steps:
        """The same bytes in ascending loops, with those that continue the fragment made part of it."""
        offset, fragment_bytes, loops = self.offset, self.fragment_bytes, []
        for extent, stride in self.loops:
            offset += min(0, (extent - 1) * stride)
            if extent > 1:
                loops.append((extent, abs(stride)))
        loops.sort(key=lambda loop: loop[1])
        while loops and loops[0][1] == fragment_bytes:
            fragment_bytes *= loops.pop(0)[0]
        return Steps(offset, fragment_bytes, tuple(loops))

    def fragments(self) -> int:
        fragments = 1
        for extent, _ in self.loops:
            fragments *= extent
        return fragments

    def starts(self) -> Tensor:
        """Where each fragment starts, int64 ``[fragments]``."""
        starts = torch.tensor([self.offset], device="cpu")
        for extent, stride in self.loops:
            starts = (starts[:, None] + torch.arange(extent, device="cpu") * stride).flatten()
        return starts


class Intervals(NamedTuple):
    """``[start, end)`` with an owner and a row to name in an error; all int64 ``[n]`` on the CPU."""

    starts: Tensor
    ends: Tensor
    owners: Tensor
    rows: Tensor

    @classmethod
    def of(cls, bases: Tensor, steps: Steps, owner: int, rows: Tensor | None = None) -> Intervals:
        """The bytes of ``steps`` from each base; ``rows`` labels the bases."""
        steps = steps.folded()
        if rows is None:
            rows = torch.arange(bases.numel(), device="cpu")
        starts = (bases[:, None] + steps.starts()).flatten()
        return cls(
            starts,
            starts + steps.fragment_bytes,
            torch.full_like(starts, owner),
            rows[:, None].expand(-1, steps.fragments()).flatten(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Intervals]) -> Intervals:
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def sorted(self) -> Intervals:
        order = torch.argsort(self.starts, stable=True)
        return Intervals(*(column[order] for column in self))

    def first_neighbours_sharing(self) -> tuple[int, int] | None:
        """Of sorted intervals, positions of the first two neighbours that share a byte; None if all are disjoint."""
        shared = (self.starts[1:] < self.ends[:-1]).nonzero()
        return (int(shared[0]), int(shared[0]) + 1) if shared.numel() else None


def first_read_of_written(writes: Intervals, reads: Intervals) -> tuple[int, int] | None:
    """Positions (write, read) of the first read that touches one of the disjoint, sorted writes."""
    if writes.starts.numel() == 0:
        return None
    for begin in range(0, reads.starts.numel(), _READS_AT_ONCE):
        starts = reads.starts[begin : begin + _READS_AT_ONCE]
        ends = reads.ends[begin : begin + _READS_AT_ONCE]
        after = torch.searchsorted(writes.ends, starts, right=True)
        candidate = after.clamp(max=writes.starts.numel() - 1)
        hit = ((after < writes.starts.numel()) & (writes.starts[candidate] < ends)).nonzero()
        if hit.numel():
            return int(candidate[hit[0]]), begin + int(hit[0])
    return None


def intersecting(spans: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> Tensor:
    """Bool ``[len(spans), len(others)]``: which half-open spans share an address."""
    a = torch.tensor(spans, dtype=torch.int64, device="cpu").reshape(-1, 2)
    b = torch.tensor(others, dtype=torch.int64, device="cpu").reshape(-1, 2)
    return (a[:, None, 0] < b[None, :, 1]) & (b[None, :, 0] < a[:, None, 1])


def steps_of_tensor(t: Tensor) -> Steps:
    """The bytes of a strided tensor's elements, from its data pointer."""
    size = t.element_size()
    return Steps(0, size, tuple((n, stride * size) for n, stride in zip(t.shape, t.stride(), strict=True)))


def shares_bytes_with_itself(t: Tensor) -> bool:
    """Whether two elements share a byte."""
    steps = steps_of_tensor(t).folded()
    if t.numel() == 0:
        return False
    reach = steps.fragment_bytes
    for extent, stride in steps.loops:
        if stride < reach:
            break
        reach = stride * (extent - 1) + reach
    else:
        return False
    origin = torch.zeros(1, dtype=torch.int64, device="cpu")
    return Intervals.of(origin, steps, 0).sorted().first_neighbours_sharing() is not None


def first_tensors_sharing(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[str, int, int] | None:
    """``("written", i, j)`` or ``("read", i, j)``: two written tensors, or a written and a read one, share a byte.

    Each written tensor must be free of self-overlap.
    """

    def span(t: Tensor) -> tuple[int, int]:
        low, high = steps_of_tensor(t).hull()
        return (t.data_ptr() + low, t.data_ptr() + high) if t.numel() else (0, 0)

    def intervals(t: Tensor, owner: int) -> Intervals:
        return Intervals.of(torch.tensor([t.data_ptr()], device="cpu"), steps_of_tensor(t), owner)

    written_spans, read_spans = [span(t) for t in written], [span(t) for t in read]
    for i, j in intersecting(written_spans, written_spans).triu(1).nonzero().tolist():
        both = Intervals.joined([intervals(written[i], i), intervals(written[j], j)]).sorted()
        if both.first_neighbours_sharing():
            return "written", i, j
    for i, j in intersecting(written_spans, read_spans).nonzero().tolist():
        if first_read_of_written(intervals(written[i], i).sorted(), intervals(read[j], j)):
            return "read", i, j
    return None
