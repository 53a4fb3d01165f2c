"""Runs a kernel: all threads of the grid at once, block by block.

The threads whose next block is the lowest run it together, as one NumPy operation an instruction; code that the
compiler laid out forwards joins again by itself. Threads that poll for something let the others go first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .clocks import Clocks, Knowledge
from .control import EXIT, STAY
from .copies import Copies, chain_kinds, chain_name
from .memory import Area, Buffer
from .parse import Instruction
from .program import Kernel, Step
from .report import Findings, Report, place_text
from .spaces import Spaces, private_area
from .sync import LANES, Barriers

MOST_STEPS = 5_000_000
STARVED_AFTER = 5_000


class Registers:
    """Of all threads: by name one value a thread, or one in all."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel = kernel
        self.n = threads
        self.values: dict[str, np.ndarray] = {}

    def get(self, name: str) -> np.ndarray:
        found = self.values.get(name)
        return self.kernel.zero_of(name) if found is None else found

    def merge(self, name: str, value: np.ndarray, index: np.ndarray | None) -> None:
        if index is None:
            self.values[name] = value
            return
        old = self.get(name)
        whole = np.full(self.n, old[0]) if len(old) == 1 else old.copy()
        whole[index] = value
        self.values[name] = whole


class Frame:
    """Some threads in the middle of a block; what they write stays here until it ends."""

    def __init__(
        self, machine: Machine, parent: Any, threads: np.ndarray, index: np.ndarray | None, next_block: int
    ) -> None:
        self.machine = machine
        self.parent = parent
        self.threads = threads
        self.n = len(threads)
        self.index = index
        self.next_block = next_block
        self.cache: dict[str, np.ndarray] = {}
        self.dirty: set[str] = set()

    def get(self, name: str) -> np.ndarray:
        value = self.cache.get(name)
        if value is None:
            value = self.parent.get(name)
            if self.index is not None and len(value) > 1:
                value = value[self.index]
            self.cache[name] = value
        return value

    def set(self, name: str, value: np.ndarray) -> None:
        self.cache[name] = value
        self.dirty.add(name)

    def merge(self, name: str, value: np.ndarray, index: np.ndarray | None) -> None:
        """From a frame of some of this one's threads."""
        old = self.get(name)
        whole = np.full(self.n, old[0]) if len(old) == 1 else old.copy()
        whole[index] = value
        self.set(name, whole)

    def flush(self, kept: set[str] | None) -> None:
        for name in self.dirty:
            if kept is None or name in kept:
                self.parent.merge(name, self.cache[name], self.index)
        self.dirty.clear()

    def sub(self, rows: np.ndarray) -> Frame:
        return Frame(self.machine, self, self.threads[rows], rows, self.next_block)

    def find(self, instruction: Instruction, kind: str, which: np.ndarray) -> None:
        self.machine.findings.add(kind, instruction, self.threads[which])


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    numbers = [size] if isinstance(size, int) else list(size)
    numbers += [1] * (3 - len(numbers))
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"a grid or block has one to three sizes of at least 1, got {size!r}")
    return numbers[0], numbers[1], numbers[2]


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        parameters: bytes,
        areas: Sequence[Area],
        dynamic_shared_bytes: int = 0,
        copies_early: bool = False,
        counts_sectors: bool = True,
        equal_writes_race: bool = True,
        most_steps: int = MOST_STEPS,
    ) -> None:
        self.kernel = kernel
        self.grid, self.block = _three(grid), _three(block)
        self.blocks, self.block_threads = math.prod(self.grid), math.prod(self.block)
        self._check_size()
        self.threads = self.blocks * self.block_threads
        self.warps_per_block = -(-self.block_threads // LANES)
        self.warps = self.blocks * self.warps_per_block
        self.dynamic_shared_bytes = dynamic_shared_bytes
        self.copies_early = copies_early
        self.most_steps = most_steps
        self.report = Report(kernel.name, self.threads)
        self.findings = Findings(self._place)
        self.clocks = Clocks(self.blocks, self.block_threads, chain_kinds(kernel, self.block_threads))
        self.spaces = self._spaces(areas, parameters)
        self.spaces.counts_sectors = counts_sectors
        self.spaces.equal_writes_race = equal_writes_race
        self.load, self.store, self.atomics = self.spaces.load, self.spaces.store, self.spaces.atomics
        self.barriers = Barriers(self)
        self.copies = Copies(self)
        self.pc = np.zeros(self.threads, np.int32)
        self.exited = np.zeros(self.threads, bool)
        self.blocked = np.zeros(self.threads, bool)
        self.polls = np.zeros(self.threads, bool)
        self.last_run = np.zeros(self.threads, np.int64)
        self.fenced = np.zeros(self.threads, bool)
        self.proxy_fences = np.zeros(self.threads, np.int64)
        self._proxy_knowledge: dict[int, Knowledge] = {}
        self.registers = Registers(kernel, self.threads)
        self._all = np.arange(self.threads)
        self._reached: dict[int, int] = {}
        self._seen_progress = -1  # when those who poll last looked again

    def _check_size(self) -> None:
        if self.block_threads > 1024:
            raise ValueError(f"a block has at most 1024 threads, got {self.block_threads}")
        most = self.kernel.limits.get("maxntid")
        if most and self.block_threads > math.prod(most):
            raise ValueError(f"{self.kernel.name} allows {math.prod(most)} threads a block, got {self.block_threads}")
        wanted = self.kernel.limits.get("reqntid")
        if wanted and self.block != _three(wanted):
            raise ValueError(f"{self.kernel.name} needs blocks of {wanted} threads, got {self.block}")

    def _spaces(self, areas: Sequence[Area], parameters: bytes) -> Spaces:
        kernel = self.kernel
        variables = {**kernel.module.variables, **kernel.function.variables}

        def parts(places: dict[str, int]) -> list[tuple[int, int, str]]:
            sizes = {name: variables[name].bytes for name in places}
            if kernel.dynamic_shared in sizes:
                sizes[kernel.dynamic_shared] = self.dynamic_shared_bytes
            return sorted((at, sizes[name], name) for name, at in places.items())

        shared_bytes = kernel.shared.size + (self.dynamic_shared_bytes if kernel.dynamic_shared else 0)
        shared = private_area("shared", parts(kernel.shared.places), shared_bytes, self.blocks, tracks_races=True)
        local = private_area("local", parts(kernel.local.places), kernel.local.size, self.threads, tracks_races=False)
        # Compilers copy structures whole, with the padding that nobody wrote.
        local.unwritten = None
        sizes = {p.name: p.bytes for p in kernel.parameters}
        placed = sorted((at, sizes[name], name) for name, at in kernel.parameter_places.items())
        param = private_area("param", placed, len(parameters), 1, tracks_races=False)
        param.data[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        param.unwritten = None
        own = [
            Buffer(name, data, writable=kernel.module.variables[name].space == "global").area()
            for name, data in kernel.module.storage().items()
            if data.nbytes
        ]
        return Spaces([*areas, *own], shared, local, param, self.block_threads, self.clocks, kernel.synchronises)

    # Where a thread is.

    def _place(self, thread: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        one = np.array([thread])
        block = tuple(int(self.block_index(one, axis)[0]) for axis in range(3))
        inside = tuple(int(self.thread_index(one, axis)[0]) for axis in range(3))
        return block, inside  # type: ignore[return-value]

    def thread_index(self, threads: np.ndarray, axis: int) -> np.ndarray:
        local = threads % self.block_threads
        x, y, _ = self.block
        return (local % x, local // x % y, local // (x * y))[axis]

    def block_index(self, threads: np.ndarray, axis: int) -> np.ndarray:
        block = threads // self.block_threads
        x, y, _ = self.grid
        return (block % x, block // x % y, block // (x * y))[axis]

    def block_of(self, threads: np.ndarray) -> np.ndarray:
        return threads // self.block_threads

    def lane_of(self, threads: np.ndarray) -> np.ndarray:
        return threads % self.block_threads % LANES

    def warp_of(self, threads: np.ndarray) -> np.ndarray:
        return threads // self.block_threads * self.warps_per_block + threads % self.block_threads // LANES

    def threads_of(self, block: int) -> np.ndarray:
        return self._all[block * self.block_threads : (block + 1) * self.block_threads]

    def threads_of_warp(self, warp: int) -> np.ndarray:
        block, inside = divmod(warp, self.warps_per_block)
        return self.threads_of(block)[inside * LANES : (inside + 1) * LANES]

    def agent_name(self, agent: int) -> str:
        kind, thread = divmod(agent, self.threads)
        block, inside = self._place(thread)
        what = f"thread {place_text(inside)}" if kind == 0 else chain_name((kind - 1) // 2, place_text(inside))
        return f"{what} of block {place_text(block)}"

    def step_at(self, thread: int) -> Step:
        return self.kernel.blocks[self.pc[thread]].steps[0]

    def frame_of(self, threads: np.ndarray) -> Frame:
        return Frame(self, self.registers, threads, threads, 0)

    # Running.

    def run(self) -> Report:
        with np.errstate(all="ignore"):
            while (block := self._next_block()) is not None:
                self._run_block(block)
                self.report.steps += 1
                if self.report.steps > self.most_steps:
                    self._stuck("does not end")
                    break
            self.copies.finish()
        self._fill_report()
        return self.report

    def _next_block(self) -> int | None:
        ready = ~(self.exited | self.blocked | self.polls)
        if ready.any():
            waiting = self.report.steps % STARVED_AFTER == STARVED_AFTER - 1
            if waiting and (starved := ready & (self.last_run < self.report.steps - STARVED_AFTER)).any():
                return int(self.pc[starved].max())
            return int(self.pc[ready].min())
        if self.exited.all():
            return None
        return self._next_after_standstill()

    def _next_after_standstill(self) -> int | None:
        """Everyone waits or polls: time for a copy to run, or for those who poll to look again."""
        polling = self.polls & ~self.exited & ~self.blocked
        if self.spaces.progress == self._seen_progress or not polling.any():
            if self.copies.run_one() or self.barriers.open_for_the_rest():
                self.polls[:] = False
                return self._next_block()
            self._stuck("never goes on")
            return None
        self._seen_progress = self.spaces.progress
        self.polls[:] = False
        return self._next_block()

    def _stuck(self, kind: str) -> None:
        """What each of the remaining threads waits at."""
        left = np.flatnonzero(~self.exited)
        for block in np.unique(self.pc[left]).tolist():
            here = left[self.pc[left] == block]
            step = self.kernel.blocks[block].steps[0]
            self.findings.add(kind, step.instruction, here, detail=f"{len(left)} threads are left")

    def _run_block(self, number: int) -> None:
        block = self.kernel.blocks[number]
        here = (self.pc == number) & ~self.exited
        gathers = block.is_alone and getattr(block.steps[0].run, "gathers", False)
        if not gathers:
            here &= ~(self.blocked | self.polls)
        threads = np.flatnonzero(here)
        index = None if len(threads) == self.threads else threads
        f = Frame(self, self.registers, self._all if index is None else threads, index, number + 1)
        self._reached[number] = self._reached.get(number, 0) + 1
        self.last_run[f.threads] = self.report.steps
        where: np.ndarray | None = None
        for step in block.steps:
            found = self._run_step(f, step)
            where = found if block.is_alone else None
        f.flush(block.escaping)
        self._go_on(f, number, where)

    def _run_step(self, f: Frame, step: Step) -> np.ndarray | None:
        if step.guard is None:
            return step.run(f)  # type: ignore[func-returns-value]
        chosen = step.guard(f)
        if chosen.all():
            where = step.run(f)
        elif not chosen.any():
            return np.full(f.n, f.next_block, np.int32)
        else:
            rows = np.flatnonzero(np.broadcast_to(chosen, f.n))
            inner = f.sub(rows)
            part = step.run(inner)
            inner.flush(None)
            where = np.full(f.n, f.next_block, np.int32)
            if part is not None:
                where[rows] = part
        line = step.instruction.line
        self.report.executed[line] += 1
        return where  # type: ignore[return-value]

    def _go_on(self, f: Frame, number: int, where: np.ndarray | None) -> None:
        if where is None:
            self.pc[f.threads] = number + 1
            return
        stays = where == STAY
        leaves = where == EXIT
        moving = ~(stays | leaves)
        self.blocked[f.threads] = stays
        self.pc[f.threads[moving]] = where[moving]
        if leaves.any():
            self.exited[f.threads[leaves]] = True
            self.spaces.progress += 1
            self._wake_warps(f.threads[leaves])

    def _wake_warps(self, left: np.ndarray) -> None:
        """A warp-wide instruction does not wait for lanes that have left."""
        for warp in np.unique(self.warp_of(left)).tolist():
            mine = self.threads_of_warp(warp)
            waiting = mine[self.blocked[mine] & ~self.barriers.waits[mine]]
            self.blocked[waiting] = False

    def wake(self, threads: np.ndarray, votes: np.ndarray) -> None:
        """Past the barrier that these wait at."""
        for number in np.unique(self.pc[threads]).tolist():
            mine = threads[self.pc[threads] == number]
            f = self.frame_of(mine)
            self.kernel.blocks[number].steps[0].run.wake(f, votes)  # type: ignore[attr-defined]
            f.flush(None)
        self.blocked[threads] = False
        self.pc[threads] += 1

    def let_others_go_first(self, threads: np.ndarray) -> None:
        self.polls[threads] = True

    # Warps, fences and copies.

    def warps_together(self, f: Frame, instruction: Instruction, masks: np.ndarray) -> np.ndarray:
        """Which threads' masks have all come; a mask that names a lane that has left is wrong."""
        warps, row = np.unique(self.warp_of(f.threads), return_inverse=True)
        bits = np.uint32(1) << self.lane_of(f.threads).astype(np.uint32)
        present = np.zeros(len(warps), np.uint32)
        np.bitwise_or.at(present, row, bits)
        outside = masks & bits == 0
        if outside.any():
            f.find(instruction, "thread outside its own mask", outside)
        missing = np.where(outside, np.uint32(0), masks & ~present[row])
        if not missing.any():
            return np.ones(f.n, bool)
        gone = np.array([self._lanes(warp, self.exited) for warp in warps.tolist()], np.uint32)[row]
        there = np.array([self._lanes(warp, None) for warp in warps.tolist()], np.uint32)[row]
        absent = missing & (gone | ~there) != 0
        ready = missing & there & ~gone == 0
        if (absent & ready).any():
            f.find(instruction, "mask names a lane that has left", absent & ready)
        return ready

    def _lanes(self, warp: int, which: np.ndarray | None) -> int:
        threads = self.threads_of_warp(warp)
        chosen = threads if which is None else threads[which[threads]]
        return int((np.uint64(1) << self.lane_of(chosen).astype(np.uint64)).sum())

    def join_warps(self, f: Frame, masks: np.ndarray) -> None:
        keys = self.warp_of(f.threads).astype(np.uint64) << np.uint64(32) | masks
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        for rows in np.split(order, cuts):
            self.clocks.join(f.threads[rows], f.threads[rows])

    def fence(self, f: Frame) -> None:
        self.fenced[f.threads] = True

    def has_fenced(self, threads: np.ndarray) -> bool:
        return bool(self.fenced[threads].any())

    def proxy_fence(self, f: Frame) -> None:
        self.clocks.now[f.threads] += 1
        self.proxy_fences[f.threads] = self.clocks.now[f.threads]
        for thread in f.threads.tolist():
            self._proxy_knowledge[thread] = self.clocks.snapshot(thread)

    def proxy_knowledge(self, thread: int) -> Knowledge:
        return self._proxy_knowledge.get(thread, Knowledge())

    def new_copy(self, thread: int, chain: int) -> tuple[Knowledge, int]:
        """What the thread knows as it issues a copy, and the copy's number in its chain."""
        self.clocks.copies[chain] += 1
        return self.clocks.release(thread), self.clocks.copies[chain]

    # Reporting.

    def _fill_report(self) -> None:
        report = self.report
        report.findings = self.findings.list()
        for number, count in self._reached.items():
            for step in self.kernel.blocks[number].steps:
                if step.guard is None:
                    report.executed[step.instruction.line] += count
        report.executed.pop(0, None)
        report.unexecuted = {line: text for line, text in self.kernel.lines().items() if line not in report.executed}
        report.areas = {area.name: area for area in self.spaces.areas}
