"""How copies on the host go fastest here: which loops, from which sizes on, on how many threads."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from kvkernels import ops, policy, prepared
from kvkernels.common.arguments import INT64_MAX
from kvkernels.policy import cpu
from kvkernels.transfer.calibrate.settle import Settled, best, best_threshold, fewest, in_turns, mean_cost, settle

KIB, MIB = 1 << 10, 1 << 20
NEVER = INT64_MAX
POOL_BYTES = 128 * MIB  # of each side

Settings = Mapping[str, int | bool]


@dataclass(frozen=True)
class Case:
    """A copy that is timed.

    ``pages`` go from pool to pool; ``gather`` into a buffer that is read at once; ``join`` and ``split`` are two shards
    side by side, rows of which are ``page_bytes`` each; ``strips`` change the order of heads and tokens.
    """

    kind: str
    page_bytes: int
    total_bytes: int = 32 * MIB
    is_parallel: bool = False


#: Seconds of a case under settings.
Timer = Callable[[Settings, Case], float]

PAGES = tuple(Case("pages", kib * KIB) for kib in (4, 18, 32, 512))
ROWS = tuple(Case(kind, size) for kind in ("join", "split") for size in (1 * KIB, 4 * KIB))
STRIPS = (Case("strips", 256), Case("strips", 128))
LADDER = tuple(KIB << i for i in range(8, 16))  # 256 KiB to 32 MiB


class Choice(NamedTuple):
    """Numbers that are chosen together: how each candidate does on some cases, and how far apart runs may be."""

    name: str
    candidates: tuple[dict[str, int | bool], ...]
    cases: tuple[Case, ...]
    step: int


def _loops(interleave: int, piece_bytes: int, prefetches_within: bool) -> dict[str, int | bool]:
    return {"interleave": interleave, "piece_bytes": piece_bytes, "prefetches_within": prefetches_within}


CHOICES = (
    Choice("loops", tuple(_loops(n, *rest) for n in (2, 4) for rest in ((4 * KIB, True), (MIB, False))), PAGES, 0),
    Choice("writes_rows", ({"writes_rows": False}, {"writes_rows": True}), ROWS, 0),
    Choice(
        "rows_interleave_from_bytes",
        tuple({"rows_interleave_from_bytes": size} for size in (1 * KIB, 2 * KIB, NEVER)),
        ROWS,
        1,
    ),
    Choice("prefetches_strips", ({"prefetches_strips": False}, {"prefetches_strips": True}), STRIPS, 0),
)
# Which sizes decide on stores that bypass the caches, and what is copied to find out.
STREAMING = (("stream_pool_bytes", "pages"), ("stream_soon_read_bytes", "gather"))
SETTINGS = len(CHOICES) + len(STREAMING) + 2


def tune_host(
    timer: Timer, compiled_in: Mapping[str, Any], threads: int, has_time: Callable[[int], bool],
    told: Callable[[Settled], None],
) -> dict[str, int | bool]:  # fmt: skip
    """The numbers that are to serve where they differ from those that are compiled in.

    Parameters
    ----------
    timer : Timer
        Seconds of a case under settings.
    compiled_in : mapping
        ``kvkernels.policy.cpu.in_force()`` without a file.
    threads : int
        That a copy may have.
    has_time : callable
        Whether another run may begin, while so many settings are left.
    told : callable
        Is given each setting once it is settled.
    """
    search = _Search(timer, compiled_in, has_time, told)
    for choice in CHOICES:
        search.choose(choice)
    for name, kind in STREAMING:
        search.find_threshold(name, LADDER, Case(kind, 32 * KIB), {name: NEVER}, {name: 0})
    lanes = search.find_lanes(threads)
    if lanes > 1:
        case = Case("pages", 32 * KIB, is_parallel=True)
        sizes = [size for size in LADDER if size >= 2 * MIB]  # a lane has 1 MiB at least
        search.find_threshold("serial_bytes", sizes, case, {"lanes": 1}, {"serial_bytes": 0})
    return search.found


class _Search:
    """What was found so far, which what comes later is measured with."""

    def __init__(
        self, timer: Timer, compiled_in: Mapping[str, Any], has_time: Callable[[int], bool],
        told: Callable[[Settled], None],
    ) -> None:  # fmt: skip
        self.found: dict[str, int | bool] = {}
        self._timer, self._compiled_in, self._has_time, self._told = timer, compiled_in, has_time, told
        self._left = SETTINGS

    def choose(self, choice: Choice) -> None:
        own = {name: self._compiled_in[name] for name in choice.candidates[0]}
        candidates = list(choice.candidates) if own in choice.candidates else [own, *choice.candidates]
        default = candidates.index(own)

        def run() -> int:
            columns = [self._seconds(candidates, [case] * len(candidates)) for case in choice.cases]
            return best([mean_cost(costs) for costs in zip(*columns, strict=True)], default)

        self._keep(self._settled(choice.name, candidates, default, run, choice.step))

    def find_threshold(
        self, name: str, sizes: Sequence[int], case: Case, below: dict[str, int], from_on: dict[str, int]
    ) -> None:
        """From which size on the second settings are faster."""
        own = self._compiled_in[name]
        default = min(range(len(sizes)), key=lambda i: abs(math.log2(sizes[i] / max(own, 1))))
        candidates = [*sizes, NEVER]
        candidates[default] = own

        def run() -> int:
            pairs = [self._seconds([below, from_on], [replace(case, total_bytes=size)] * 2) for size in sizes]
            return best_threshold([one for one, _ in pairs], [other for _, other in pairs], default)

        self._keep({name: self._settled(name, candidates, default, run, 1)})

    def find_lanes(self, threads: int) -> int:
        """The fewest that are as fast as any."""
        lanes = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n < threads] + [threads]
        case = Case("pages", 32 * KIB, 2 * max(LADDER), is_parallel=True)

        def run() -> int:
            return fewest(self._seconds([{"lanes": n} for n in lanes], [case] * len(lanes)))

        few: int = self._settled("lanes", lanes, len(lanes) - 1, run, 1)
        if few < threads:
            self.found["lanes"] = few
        return few

    def _seconds(self, settings: Sequence[Settings], cases: Sequence[Case]) -> list[float]:
        given = [{**self.found, **one} for one in settings]
        return in_turns([partial(self._timer, one, case) for one, case in zip(given, cases, strict=True)])

    def _settled(self, name: str, candidates: Sequence[Any], default: int, run: Callable[[], int], step: int) -> Any:
        left = self._left
        self._left -= 1
        settled = settle(name, candidates, default, run, step, lambda: self._has_time(left))
        self._told(settled)
        return settled.value

    def _keep(self, values: dict[str, int | bool]) -> None:
        self.found |= {name: value for name, value in values.items() if value != self._compiled_in[name]}


class HostTimer:
    """Times cases on this machine, on memory that is no longer in the caches."""

    def __init__(self) -> None:
        self._flat = [torch.ones(POOL_BYTES, dtype=torch.uint8, device="cpu") for _ in range(2)]
        self._out = torch.ones(max(LADDER), dtype=torch.uint8, device="cpu")
        self._copies: dict[tuple[str, int], Callable[[int], Any]] = {}
        self._at = 0

    def __call__(self, settings: Settings, case: Case) -> float:
        """Seconds: of this thread alone, where one lane copies, so that others on its core do not count."""
        run = self._copies.get((case.kind, case.page_bytes))
        if run is None:
            run = self._copies[case.kind, case.page_bytes] = self._made(case)
        given = dict(settings) if case.is_parallel else {**settings, "lanes": 1}
        cpu.serve(given, "being tuned")
        clock = time.perf_counter if case.is_parallel else time.thread_time
        repeats = max(1, 8 * MIB // case.total_bytes)  # short ones often, for clocks that tick in microseconds
        began = clock()
        for _ in range(repeats):
            run(case.total_bytes)
        return (clock() - began) / repeats

    def _made(self, case: Case) -> Callable[[int], Any]:
        """The case's copy of so many bytes, from the next blocks each time."""
        if case.kind in ("pages", "gather"):
            return self._of_pages(case.page_bytes, is_gather=case.kind == "gather")
        size, tokens, heads = case.page_bytes, 16, 8
        if case.kind == "strips":  # token first to head first
            page = tokens * heads * size
            runs = [[0, 0, 0, 0, size, 0, 0, 1, 0, 0, tokens, heads * size, size, heads, size, tokens * size]]
            return self._of_runs([self._flat[0]], page, [self._flat[1]], page, runs)
        half, whole = tokens * size, 2 * tokens * size
        shards, row = self._flat[0].chunk(2), 2 * size
        ends = [0, 0, 1, 0, 0, 1, 0, 0, tokens]
        if case.kind == "join":
            runs = [[i, 0, 0, i * size, size, *ends, size, row] for i in range(2)]
            return self._of_runs(shards, half, [self._flat[1]], whole, runs)
        runs = [[0, i, i * size, 0, size, *ends, row, size] for i in range(2)]
        return self._of_runs([self._flat[1]], whole, shards, half, runs)

    def _of_pages(self, page: int, is_gather: bool) -> Callable[[int], Any]:
        count = POOL_BYTES // page
        src, dst = (flat[: count * page].view(count, page) for flat in self._flat)
        order = torch.stack([torch.randperm(count, device="cpu") for _ in range(2)], dim=1)
        copy = prepared.prepare([src], [dst])

        def gather(total: int) -> None:
            rows = self._next(order, total // page)
            out = self._out[: len(rows) * page]
            ops.gather_blocks([src], rows[:, 0], out.view(len(rows), page))
            out.view(torch.int64).sum()

        return gather if is_gather else lambda total: copy.run(self._next(order, total // page))

    def _of_runs(self, src: Any, src_page: int, dst: Any, dst_page: int, runs: list[list[int]]) -> Callable[[int], Any]:
        pools = [[flat.view(-1, page) for flat in side] for side, page in ((src, src_page), (dst, dst_page))]
        order = torch.stack([torch.randperm(len(pools[0][0]), device="cpu") for _ in range(2)], dim=1)
        copy = prepared.prepare(pools[0], pools[1], torch.tensor(runs, device="cpu"))
        page = max(src_page, dst_page)
        return lambda total: copy.run(self._next(order, total // page))

    def _next(self, order: torch.Tensor, count: int) -> torch.Tensor:
        count = max(1, min(count, len(order)))
        begin = self._at % (len(order) - count + 1)
        self._at += count
        return order[begin : begin + count]


@contextmanager
def as_compiled_in() -> Iterator[int]:
    """Copies may use every core, and go by what is compiled in, until the ``with`` block ends; gives the cores."""
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    try:
        with policy.trying():
            cpu.serve({}, "")
            yield cores
    finally:
        torch.set_num_threads(threads)
