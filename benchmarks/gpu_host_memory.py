"""What the host's memory is made of, and whether it matters: torch's pinned memory, registered huge pages, pageable."""

from collections.abc import Callable, Iterator

import torch

import gpu_grid
from gpu_bench import Bench, CannotRun, Step
from gpu_log import Record
from gpu_transfer import Transfer
from harness import HostMemory

KIB = 1024
FRAGMENTS = (4 * KIB, 32 * KIB)
COUNT = 10_000
EXECUTORS = ("auto", "kernel", "bulk", "dma", "staged")
# Rows, so that all executors have their part: what staged moves is long on the host.
FORM = "rows"
KINDS = ("torch-pinned", "registered huge pages", "pageable huge pages", "pageable")


class Registered:
    """Huge pages that CUDA knows for as long as this lives."""

    def __init__(self, nbytes: int) -> None:
        self._memory = HostMemory(nbytes)
        self.flat = self._memory.flat
        error = torch.cuda.cudart().cudaHostRegister(self.flat.data_ptr(), nbytes, 0)
        if int(error) != 0:
            raise CannotRun(f"cudaHostRegister of {nbytes} bytes on huge pages: {error}")

    def huge_page_share(self) -> float:
        return self._memory.huge_page_share()

    def free(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self.flat.data_ptr())


def steps(bench: Bench) -> Iterator[Step]:
    wanted = [fragment for fragment in FRAGMENTS if fragment in bench.options.fragments]
    cases = [gpu_grid.transfer(bench, "h2d", fragment, COUNT, FORM) for fragment in wanted]
    span_bytes = max((moved.geometry.flat_bytes for moved in cases), default=0)
    if span_bytes == 0:
        return
    for kind in KINDS:
        held = Held(bench, kind, span_bytes)
        for direction in bench.options.directions:
            for fragment in wanted:
                moved = gpu_grid.transfer(bench, direction, fragment, COUNT, FORM)
                for executor in EXECUTORS:
                    if executor == "auto" or executor in bench.options.executors:
                        yield _step(bench, held, kind, moved, executor)
        held.free()


class Held:
    """One kind of host memory, made when the first cell needs it, so that its failure is that cell's."""

    def __init__(self, bench: Bench, kind: str, nbytes: int) -> None:
        self._bench, self._kind, self._nbytes = bench, kind, nbytes
        self._flat: torch.Tensor | None = None
        self._free: Callable[[], None] = lambda: None
        self.huge_page_share: float | None = None

    def flat(self) -> torch.Tensor:
        if self._flat is None:
            self._flat = self._make()
        return self._flat

    def _make(self) -> torch.Tensor:
        if self._kind == "torch-pinned":
            return self._bench.host
        if self._kind == "pageable":
            return torch.empty(self._nbytes, dtype=torch.uint8).fill_(0)
        memory = Registered(self._nbytes) if self._kind.startswith("registered") else HostMemory(self._nbytes)
        if isinstance(memory, Registered):
            self._free = memory.free
        self.huge_page_share = memory.huge_page_share()
        return memory.flat

    def free(self) -> None:
        if self._flat is not None and self._flat is not self._bench.host:
            self._bench.checker.forget(self._flat)
            self._free()
        self._flat = None


def _step(bench: Bench, held: Held, kind: str, moved: Transfer, executor: str) -> Step:
    def run(key: Record) -> None:
        flat = held.flat()
        bench.require(moved.geometry.flat_bytes, flat, bench.near)
        sides = (flat, bench.near) if moved.direction == "h2d" else (bench.near, flat)
        case = moved.case(*sides, executor)
        case.facts = {"pools": moved.pools, "huge_page_share": held.huge_page_share}
        bench.measure(key, case)

    key = {**moved.key(), "memory": kind, "count": COUNT, "executor": executor, "sm_budget": 0}
    return Step(key, run)
