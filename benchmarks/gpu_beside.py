"""What copies cost a model, and the model them: a loop of large matrix products alone, and beside each executor.

The products are on one stream, the copies on another, a few of them in flight at any time, for as long as the products
take. Slowdowns are of the time for one product, and of the copies' rate.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

import gpu_grid
from gpu_bench import NO_TORCH_KERNELS, NO_TRITON, ON_STAND_IN, Bench, CannotRun, Step, explained
from gpu_log import Record
from gpu_memory import Case

KIB = 1024
SIDE = 8192
SECONDS = 0.12
MOST_PRODUCTS = 500  # fewer than a stream's queue has places, so that the copies start together with them
FRAGMENT_BYTES, COUNT, FORM = 16 * KIB, 10_000, "rows"
IN_FLIGHT = 3
EXECUTORS = ("auto", "kernel", "bulk", "dma", "staged", "triton")
BUDGETS = {"kernel": (0, 2, 4, 12), "bulk": (0, 2, 12), "triton": (0, 12), "staged": (0, 8)}


def steps(bench: Bench) -> Iterator[Step]:
    products = Products(bench)
    for direction in bench.options.directions:
        for executor in EXECUTORS:
            if executor == "auto" or executor in bench.options.executors:
                for budget in BUDGETS.get(executor, (0,)):
                    yield _step(bench, products, direction, executor, budget)


class Products:
    """The loop of products. Its operands are made when first needed, by torch's own kernels."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.stream = torch.cuda.Stream()
        self.side = max(64, round(SIDE * bench.options.scale ** (1 / 3)))

    @cached_property
    def _operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        one, other = (torch.randn(self.side, self.side, device=self._bench.device).to(torch.bfloat16) for _ in range(2))
        torch.cuda.synchronize()  # they were made on another stream
        return one, other, torch.empty_like(one)

    @cached_property
    def alone_us(self) -> float:
        """Of one product, with nothing beside it."""
        count = 5
        for _ in range(2):
            self.start(count).synchronize()
        return self.start(count).each_us()

    def count(self) -> int:
        wanted = round(SECONDS * self._bench.options.scale * 1e6 / self.alone_us)
        return max(3, min(wanted, MOST_PRODUCTS))

    def start(self, count: int) -> "Running":
        one, other, out = self._operands
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            first.record()
            for _ in range(count):
                torch.matmul(one, other, out=out)
            last.record()
        return Running(first, last, count)


@dataclass
class Running:
    first: torch.cuda.Event
    last: torch.cuda.Event
    count: int

    def synchronize(self) -> None:
        self.last.synchronize()

    def is_done(self) -> bool:
        return bool(self.last.query())

    def each_us(self) -> float:
        self.last.synchronize()
        return float(self.first.elapsed_time(self.last)) * 1e3 / self.count


def copies_us(case: Case, goes_on: Callable[[int], bool]) -> float:
    """The time of one copy where copies follow each other, for as long as ``goes_on``, asked with their number."""
    events: deque[torch.cuda.Event] = deque()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    done = 0
    while goes_on(done):
        case.calls[done % len(case.calls)]()
        last = torch.cuda.Event(enable_timing=True)
        last.record()
        events.append(last)
        done += 1
        if len(events) >= IN_FLIGHT:
            events.popleft().synchronize()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3 / done


def _step(bench: Bench, products: Products, direction: str, executor: str, budget: int) -> Step:
    def run(key: Record) -> None:
        moved = gpu_grid.transfer(bench, direction, FRAGMENT_BYTES, COUNT, FORM)
        src, dst = bench.sides(direction)
        bench.require(moved.geometry.flat_bytes)
        case = moved.case(src, dst, executor, budget)
        record = {**key, "bytes": case.bytes, "checked": True}
        try:
            record["explained"] = explained(case.explain())
        except ValueError as refusal:
            return bench.log.write({**record, "status": "refused", "error": str(refusal)})
        if ON_STAND_IN and record["explained"]["executor"] == "triton":
            raise CannotRun(NO_TRITON)
        wrong = bench.checker.check(case)
        if wrong:
            return bench.log.write({**record, "status": "wrong bytes", "error": wrong})
        record["alone_us"] = [_alone(case, bench) for _ in range(3)]
        if ON_STAND_IN:
            return bench.log.write({**record, "status": "not run", "error": f"matmul: {NO_TORCH_KERNELS}"})
        record["product_side"] = products.side
        record["product_alone_us"] = [products.start(products.count()).each_us()]
        pairs = [_beside(case, products) for _ in range(2)]
        record["beside_us"], record["product_beside_us"] = ([pair[i] for pair in pairs] for i in range(2))
        return bench.log.write({**record, "status": "measured"})

    key = {"direction": direction, "fragment_bytes": FRAGMENT_BYTES, "count": COUNT, "host_form": FORM}
    return Step({**key, "executor": executor, "sm_budget": budget}, run)


def _alone(case: Case, bench: Bench) -> float:
    until = time.perf_counter() + SECONDS / 3 * bench.options.scale
    return copies_us(case, lambda done: done < 3 or time.perf_counter() < until)


def _beside(case: Case, products: Products) -> tuple[float, float]:
    """Of one copy and of one product while the other goes on."""
    running = products.start(products.count())
    copy_us = copies_us(case, lambda done: done < 1 or not running.is_done())
    return copy_us, running.each_us()
