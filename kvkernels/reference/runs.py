"""The runs of copy_pages: what a row of 16 int64 means, and the checks that need its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.common.arguments import INT64_MAX
from kvkernels.reference.checks import Pool
from kvkernels.reference.overlap import Intervals, Steps

_INT64_MIN = -INT64_MAX - 1


class Run(NamedTuple):
    """A nest of loops ``(extent, src_stride, dst_stride)``, outermost first, over one fragment size; in bytes."""

    src_pool: int
    dst_pool: int
    src_offset: int
    dst_offset: int
    fragment_bytes: int
    src_subblock_stride: int
    dst_subblock_stride: int
    loops: tuple[tuple[int, int, int], ...]

    def src_steps(self) -> Steps:
        return Steps(self.src_offset, self.fragment_bytes, tuple((n, s) for n, s, _ in self.loops))

    def dst_steps(self) -> Steps:
        return Steps(self.dst_offset, self.fragment_bytes, tuple((n, d) for n, _, d in self.loops))

    def bytes_per_pair(self) -> int:
        return self.src_steps().fragments() * self.fragment_bytes

    def folded(self) -> Run:
        """The same copy with the loops that continue the fragment on both sides made part of it."""
        fragment_bytes, loops = self.fragment_bytes, [loop for loop in self.loops if loop[0] > 1]
        while True:
            joins = [i for i, (_, s, d) in enumerate(loops) if s == d == fragment_bytes]
            if not joins:
                return self._replace(fragment_bytes=fragment_bytes, loops=tuple(loops))
            fragment_bytes *= loops.pop(joins[0])[0]


def whole_page(src_pool: int, dst_pool: int, src_offset: int, dst_offset: int, page_bytes: int) -> Run:
    return Run(src_pool, dst_pool, src_offset, dst_offset, page_bytes, 0, 0, ())


def parse_runs(runs: Tensor) -> list[Run]:
    """Rows of an int64 ``[r, 16]`` tensor."""
    return [
        Run(a, b, c, d, e, f, g, tuple((loops[i], loops[i + 1], loops[i + 2]) for i in (0, 3, 6)))
        for a, b, c, d, e, f, g, *loops in runs.tolist()
    ]


def with_subblocks(steps: Steps, subblocks: int, subblock_stride: int) -> Steps:
    return steps._replace(loops=((subblocks, subblock_stride), *steps.loops))


def check_runs(
    op: str, runs: Sequence[Run], src: Sequence[Pool], dst: Sequence[Pool], src_subblocks: int, dst_subblocks: int
) -> None:
    """Every run inside its pages, and no byte of a destination page written twice."""
    written: dict[int, dict[int, Steps]] = {}
    for r, run in enumerate(runs):
        _check_numbers(f"{op}: runs[{r}]", run, len(src), len(dst))
        src_all = with_subblocks(run.src_steps(), src_subblocks, run.src_subblock_stride)
        dst_all = with_subblocks(run.dst_steps(), dst_subblocks, run.dst_subblock_stride)
        for steps, pool in ((src_all, src[run.src_pool]), (dst_all, dst[run.dst_pool])):
            _check_fits(f"{op}: runs[{r}]", steps)
            _check_inside(f"{op}: runs[{r}]", steps, pool)
        written.setdefault(run.dst_pool, {})[r] = dst_all
    for index, steps_of_run in sorted(written.items()):
        pool = dst[index]
        shared = _first_two_sharing(steps_of_run, pool.page_bytes)
        if shared is not None:
            a, b = shared
            raise ValueError(
                f"{op}: runs must write each byte once, got runs[{a}] and runs[{b}] sharing bytes of {pool.name}"
            )


def _check_numbers(prefix: str, run: Run, src_pools: int, dst_pools: int) -> None:
    for name, value, pools in (("src_pool", run.src_pool, src_pools), ("dst_pool", run.dst_pool, dst_pools)):
        if not 0 <= value < pools:
            raise ValueError(f"{prefix} {name} must be below {pools} and not negative, got {value}")
    if run.fragment_bytes <= 0:
        raise ValueError(f"{prefix} fragment_bytes must be positive, got {run.fragment_bytes}")
    for i, (extent, _, _) in enumerate(run.loops):
        if extent <= 0:
            raise ValueError(f"{prefix} extent {i} must be positive, got {extent}")


def _check_fits(prefix: str, steps: Steps) -> None:
    reach = [(extent - 1) * stride for extent, stride in steps.loops]
    if any(not _INT64_MIN <= value <= INT64_MAX for value in (*reach, *steps.hull())):
        raise ValueError(f"{prefix} must fit in int64, got an offset that overflows")


def _check_inside(prefix: str, steps: Steps, pool: Pool) -> None:
    low, high = steps.hull()
    if low < 0 or high > pool.page_bytes:
        raise ValueError(
            f"{prefix} must stay inside {pool.name}'s page of {pool.page_bytes} bytes, got bytes {low} to {high}"
        )


def _first_two_sharing(written: dict[int, Steps], page_bytes: int) -> tuple[int, int] | None:
    """Two runs that write the same byte of a page. A page is all that is ever expanded, however large the extents."""
    parts, total_bytes = [], 0
    for r, steps in written.items():
        run_bytes = steps.fragments() * steps.fragment_bytes
        if run_bytes > page_bytes:
            return r, r
        parts.append(Intervals.of(torch.zeros(1, dtype=torch.int64, device="cpu"), steps, r))
        total_bytes += run_bytes
        if total_bytes > page_bytes:
            break
    if not parts:
        return None
    intervals = Intervals.joined(parts).sorted()
    shared = intervals.first_neighbours_sharing()
    if shared is None:
        return None
    a, b = sorted((int(intervals.owners[shared[0]]), int(intervals.owners[shared[1]])))
    return a, b
