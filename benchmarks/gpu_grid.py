"""Which executor is fastest where: fragments by counts by executors by directions; and SMs against speed.

A cell is one call's copy. On the host its pages lie in pools like the device's; for some executors the same pages are
also measured in long rows, which is what ``staged`` is for. ``auto`` needs no cells of its own: the executor that
``kvkernels.explain`` says it would take has been measured. Where it was not, or to see that this holds, the part
``auto`` measures ``auto`` itself.
"""

from collections.abc import Iterator

from gpu_bench import Bench, Step
from gpu_log import Record
from gpu_transfer import SPREAD_BYTES, Transfer, pools_of

KIB = 1024
FRAGMENTS = (512, *(kib * KIB for kib in (1, 2, 4, 8, 16, 24, 28, 32, 64, 128, 256, 2048)))
# Those that the goals are about first: what time is too short for is at the end.
COUNTS = (10_000, 1_000, 64, 50_000)
EXECUTORS = ("kernel", "bulk", "dma", "staged", "triton")
DIRECTIONS = ("h2d", "d2h")
ROW_EXECUTORS = ("staged", "kernel", "dma")
MOST_PAYLOAD_BYTES = 4 << 30

CONTIGUOUS_FRAGMENTS = (4 * KIB, 32 * KIB, 256 * KIB)
CONTIGUOUS_COUNT = 10_000
AUTO_FRAGMENTS = (512, 4 * KIB, 32 * KIB, 256 * KIB)
AUTO_COUNTS = (10_000, 64)

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
BUDGET_FRAGMENTS = (4 * KIB, 16 * KIB, 32 * KIB)
BUDGET_EXECUTORS = ("kernel", "bulk", "triton")
BUDGET_COUNT = 10_000


def transfer(bench: Bench, direction: str, fragment_bytes: int, count: int, form: str, ids: str = "random") -> Transfer:
    fragments = bench.scaled(count, least=4)
    spread = bench.scaled(SPREAD_BYTES)
    return Transfer(direction, fragment_bytes, fragments, pools_of(fragments), form, ids, spread)


def largest_span(bench: Bench) -> int:
    """The bytes of each side's memory that the cells of the grid ask for."""
    options = bench.options
    spans = [
        transfer(bench, "h2d", fragment, count, "pools").geometry.flat_bytes
        for count in options.counts
        for fragment in options.fragments
        if fragment * count <= MOST_PAYLOAD_BYTES
    ]
    return max(spans, default=0)


class Cells:
    """Makes the steps of parts whose cells are transfers; a run of steps on one transfer makes it once."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._chosen: dict[str, Record] = {}

    def step(self, moved: Transfer, count: int, executor: str, sm_budget: int = 0) -> Step:
        key = {**moved.key(), "count": count, "executor": executor, "sm_budget": sm_budget}
        return Step(key, lambda full: self._measure(full, moved, count, executor, sm_budget))

    def _measure(self, key: Record, moved: Transfer, count: int, executor: str, sm_budget: int) -> Record | None:
        bench = self._bench
        payload = moved.fragment_bytes * count
        if payload > MOST_PAYLOAD_BYTES:
            error = f"{payload} bytes of payload are more than the grid's {MOST_PAYLOAD_BYTES}"
            bench.log.write({**key, "status": "skipped", "error": error})
            return None
        bench.require(moved.geometry.flat_bytes)
        src, dst = bench.sides(moved.direction)
        case = moved.case(src, dst, executor, sm_budget)
        case.facts = {"pools": moved.pools, "fragments": moved.pools * moved.pairs, "auto": self.auto_for(moved)}
        return bench.measure(key, case)

    def auto_for(self, moved: Transfer) -> Record:
        """What ``auto`` would take for these pages, and why."""
        name = repr(moved)
        if name not in self._chosen:
            src, dst = self._bench.sides(moved.direction)
            explanation = moved.case(src, dst, "auto").explain()
            self._chosen = {name: {"executor": explanation.executor, "reason": explanation.reason}}
        return self._chosen[name]


def steps(bench: Bench) -> Iterator[Step]:
    options, cells = bench.options, Cells(bench)
    for count in options.counts:
        for direction in options.directions:
            for fragment in options.fragments:
                moved = transfer(bench, direction, fragment, count, "pools")
                if fragment * count > MOST_PAYLOAD_BYTES:
                    yield cells.step(moved, count, "any")
                    continue
                for executor in options.executors:
                    yield cells.step(moved, count, executor)
                in_rows = transfer(bench, direction, fragment, count, "rows")
                for executor in options.executors:
                    if executor in ROW_EXECUTORS:
                        yield cells.step(in_rows, count, executor)
    for direction in options.directions:
        for fragment in CONTIGUOUS_FRAGMENTS:
            if fragment in options.fragments:
                moved = transfer(bench, direction, fragment, CONTIGUOUS_COUNT, "pools", "contiguous")
                for executor in options.executors:
                    yield cells.step(moved, CONTIGUOUS_COUNT, executor)


def auto_steps(bench: Bench) -> Iterator[Step]:
    """``auto`` itself, where its executor is none of those measured, and in a few cells where it is."""
    options, cells = bench.options, Cells(bench)
    for count in options.counts:
        for direction in options.directions:
            for fragment in options.fragments:
                if fragment * count > MOST_PAYLOAD_BYTES:
                    continue
                for form in ("pools", "rows"):
                    moved = transfer(bench, direction, fragment, count, form)
                    if moved.geometry.flat_bytes > min(len(bench.host), len(bench.near)):
                        continue
                    sampled = fragment in AUTO_FRAGMENTS and count in AUTO_COUNTS
                    measured = [e for e in options.executors if form == "pools" or e in ROW_EXECUTORS]
                    if sampled or cells.auto_for(moved)["executor"] not in measured:
                        yield cells.step(moved, count, "auto")


def budget_steps(bench: Bench) -> Iterator[Step]:
    options, cells = bench.options, Cells(bench)
    for direction in options.directions:
        for fragment in BUDGET_FRAGMENTS:
            if fragment not in options.fragments:
                continue
            moved = transfer(bench, direction, fragment, BUDGET_COUNT, "pools")
            for executor in BUDGET_EXECUTORS:
                if executor in options.executors:
                    for budget in BUDGETS:
                        yield cells.step(moved, BUDGET_COUNT, executor, budget)
