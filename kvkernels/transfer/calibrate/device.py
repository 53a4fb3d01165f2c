"""Which executor carries copies to and from a GPU fastest, up to which sizes, and on how many SMs.

Unverified on hardware.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvkernels import prepared
from kvkernels.explain import explain
from kvkernels.transfer.calibrate.settle import Settled, best, best_threshold, fewest, in_turns, mean_cost, settle

KIB = 1 << 10
FRAGMENTS = tuple(KIB << i for i in range(2, 12))  # 4 KiB to 2 MiB
SMALL = FRAGMENTS[:4]
SOME, MANY = 256, 1024  # fragments
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
TOTAL_BYTES = 64 << 20
SETTINGS = 8  # at most that are measured


@dataclass(frozen=True)
class Cell:
    """So many fragments in one direction, by an executor on at most so many SMs, 0 being its own choice."""

    direction: str
    executor: str
    fragment_bytes: int
    count: int
    sm_budget: int = 0


#: Seconds of a cell; infinite where the executor does not serve it.
Timer = Callable[[Cell], float]


def tune_device(
    timer: Timer, copies: str, default_rows: Sequence[Mapping[str, Any]], has_time: Callable[[int], bool],
    told: Callable[[Settled], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows that are to serve: what was measured, and of ``default_rows`` those for what was not.

    Parameters
    ----------
    timer : Timer
        Seconds of a cell.
    copies : {'batched', 'one_by_one'}
        How copies go to the copy engine in what ``timer`` measures: rows are for that alone.
    default_rows : sequence
        As ``kvkernels.policy.default`` has them.
    has_time : callable
        Whether another run may begin, while so many settings are left.
    told : callable
        Is given each setting once it is settled.
    """
    search = _Search(timer, copies, default_rows, has_time, told)
    rows = [row for direction in ("h2d", "d2h", "d2d") for row in search.rows(direction)]
    measured = {(row["direction"], row.get("copies")) for row in rows}
    kept = [dict(row) for row in default_rows if (row["direction"], row.get("copies")) not in measured]
    return rows + kept


class _Search:
    def __init__(
        self, timer: Timer, copies: str, default_rows: Sequence[Mapping[str, Any]], has_time: Callable[[int], bool],
        told: Callable[[Settled], None],
    ) -> None:  # fmt: skip
        self._timer, self._copies, self._default_rows = timer, copies, default_rows
        self._has_time, self._told = has_time, told
        self._left = SETTINGS

    def rows(self, direction: str) -> list[dict[str, Any]]:
        """Of one direction; none where nothing was stable."""
        is_inside = direction == "d2d"
        own = [row for row in self._default_rows if row["direction"] == direction]
        executors = ("kernel", "bulk") if is_inside else ("kernel", "bulk", "staged")

        def find_executor() -> int:
            return best([self._mean(Cell(direction, one, size, MANY) for size in SMALL) for one in executors], 0)

        executor = self._settled(f"{direction} executor", executors, 0, find_executor, 0)
        row: dict[str, Any] = {"direction": direction, "executor": executor.value}
        if executor.value != "staged":
            row |= self._budget(direction, executor.value)
        if is_inside:
            return [row, *map(dict, own)] if executor.is_stable else []
        first = next(one for one in own if one["executor"] == "kernel" and one["copies"] == self._copies)
        below = self._below(row, first["fragment_bytes_below"])
        if not (executor.is_stable and below.is_stable):
            return []
        row |= {"copies": self._copies, "count_at_least": first["count_at_least"], "fragment_bytes_below": below.value}
        if executor.value == "staged":
            # It serves where neighbours on the host make its copies as long as those that the copy engine is left.
            row["ring_copy_bytes_at_least"] = below.value
        return [row]

    def _budget(self, direction: str, executor: str) -> dict[str, int]:
        budgets = (*BUDGETS, 0)

        def run() -> int:
            return fewest([self._mean(Cell(direction, executor, size, MANY, n) for size in SMALL) for n in budgets])

        budget = self._settled(f"{direction} sm_budget", budgets, len(BUDGETS), run, 1)
        return {"sm_budget": budget.value} if budget.value else {}

    def _below(self, row: Mapping[str, Any], own: int) -> Settled:
        """From which size of a fragment on the copy engine is faster."""
        default = min(range(len(FRAGMENTS)), key=lambda i: abs(math.log2(FRAGMENTS[i] / own)))
        sizes = [*FRAGMENTS, 2 * FRAGMENTS[-1]]
        sizes[default] = own

        def run() -> int:
            pairs = [
                in_turns([
                    partial(self._timer, Cell(row["direction"], row["executor"], size, SOME, row.get("sm_budget", 0))),
                    partial(self._timer, Cell(row["direction"], "dma", size, SOME)),
                ])
                for size in FRAGMENTS
            ]  # fmt: skip
            return best_threshold([one for one, _ in pairs], [other for _, other in pairs], default)

        return self._settled(f"{row['direction']} fragment_bytes_below", sizes, default, run, 1)

    def _mean(self, cells: Iterable[Cell]) -> float:
        costs = in_turns([partial(self._timer, cell) for cell in cells])
        return math.inf if math.inf in costs else mean_cost(costs)

    def _settled(
        self, name: str, candidates: Sequence[Any], default: int, run: Callable[[], int], step: int
    ) -> Settled:
        left = self._left
        self._left = max(1, left - 1)
        settled = settle(name, candidates, default, run, step, lambda: self._has_time(left))
        self._told(settled)
        return settled


class DeviceTimer:
    """Times cells on the current GPU, in a stream of its own, with pinned memory."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._host = torch.ones(TOTAL_BYTES, dtype=torch.uint8, pin_memory=True)
        self._device = [torch.ones(TOTAL_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self._copies: dict[Cell, tuple[prepared.PreparedCopy | prepared.SlabbedCopy, torch.Tensor]] = {}

    def copies(self) -> str:
        """How the driver takes copies in this stream: ``batched`` or ``one_by_one``."""
        pools = [flat.view(-1, KIB) for flat in (self._host, self._device[0])]
        with torch.cuda.stream(self._stream):
            said = explain("copy_pages", [pools[0]], [pools[1]], *_call(KIB, 4))
        return "batched" if "copies are batched" in said.reason else "one_by_one"

    def __call__(self, cell: Cell) -> float:
        with torch.cuda.stream(self._stream):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                copy, mapping = self._copy(cell)
                begin.record()
                copy.run(mapping)
                end.record()
            except ValueError:  # the executor's refusal
                return math.inf
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def _copy(self, cell: Cell) -> tuple[prepared.PreparedCopy | prepared.SlabbedCopy, torch.Tensor]:
        if cell not in self._copies:
            src, dst = {
                "h2d": (self._host, self._device[0]),
                "d2h": (self._device[0], self._host),
                "d2d": (self._device[0], self._device[1]),
            }[cell.direction]
            size = cell.fragment_bytes
            mapping, _ = _call(size, min(cell.count, TOTAL_BYTES // size))
            copy = prepared.prepare(
                [src.view(-1, size)], [dst.view(-1, size)], executor=cell.executor, sm_budget=cell.sm_budget
            )
            copy.run(mapping)  # what is done once only
            self._copies[cell] = copy, mapping
        return self._copies[cell]


def _call(size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pages, and the run that copies one."""
    blocks = TOTAL_BYTES // size
    mapping = torch.stack([torch.randperm(blocks, device="cpu")[:count] for _ in range(2)], dim=1)
    run = [[0, 0, 0, 0, size, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]]
    return mapping, torch.tensor(run, device="cpu")
