"""Barriers, warp-wide instructions and special registers.

Threads that wait for others stay in a block of their own until all have come: a ``run`` here returns STAY for those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .build import PRED, Build, Run, Type, opcode
from .control import STAY, everyone

LANES = 32
U32 = Type("u", 32)

# Special registers, as functions of a frame.

_ZERO = np.zeros(1, np.uint64)


def _dimension(name: str, axis: int) -> Callable[[Any], np.ndarray]:
    return {
        "tid": lambda f: f.machine.thread_index(f.threads, axis),
        "ntid": lambda f: np.array([f.machine.block[axis]]),
        "ctaid": lambda f: f.machine.block_index(f.threads, axis),
        "nctaid": lambda f: np.array([f.machine.grid[axis]]),
    }[name]


def _lane_mask(name: str) -> Callable[[Any], np.ndarray]:
    def run(f: Any) -> np.ndarray:
        bit = np.uint64(1) << f.machine.lane_of(f.threads).astype(np.uint64)
        below = bit - np.uint64(1)
        masks = {"eq": bit, "lt": below, "le": below | bit, "ge": ~below, "gt": ~(below | bit)}
        return masks[name] & np.uint64(0xFFFFFFFF)

    return run


def _clock(f: Any) -> np.ndarray:
    return np.array([f.machine.report.steps])


SPECIALS: dict[str, Callable[[Any], np.ndarray]] = {
    f"{name}.{letter}": _dimension(name, axis)
    for name in ("tid", "ntid", "ctaid", "nctaid")
    for axis, letter in enumerate("xyz")
}
SPECIALS |= {f"lanemask_{name}": _lane_mask(name) for name in ("eq", "lt", "le", "ge", "gt")}
SPECIALS |= {
    "laneid": lambda f: f.machine.lane_of(f.threads),
    "warpid": lambda f: f.machine.warp_of(f.threads) % f.machine.warps_per_block,
    "nwarpid": lambda f: np.array([f.machine.warps_per_block]),
    "smid": lambda f: f.machine.block_of(f.threads),
    "nsmid": lambda f: np.array([f.machine.blocks]),
    "gridid": lambda f: _ZERO,
    "clock": _clock,
    "clock_hi": lambda f: _ZERO,
    "clock64": _clock,
    "globaltimer": _clock,
    "globaltimer_lo": _clock,
    "dynamic_smem_size": lambda f: np.array([f.machine.dynamic_shared_bytes]),
    "total_smem_size": lambda f: np.array([f.machine.kernel.shared.size + f.machine.dynamic_shared_bytes]),
}
# No clusters: each block is one of its own.
SPECIALS |= {name: lambda f: _ZERO for name in ("clusterid.x", "cluster_ctarank", "cluster_ctaid.x")}
SPECIALS |= {name: lambda f: np.ones(1, np.uint64) for name in ("cluster_nctarank", "cluster_nctaid.x")}


def special(name: str) -> Callable[[Any], np.ndarray] | None:
    return SPECIALS.get(name)


# Barriers of a block.


def _barrier(b: Build, aligned: bool) -> Run:
    b.take("cta")
    kind = b.need("sync", "arrive", "red")
    aligned = bool(b.take("aligned")) or aligned
    operands = list(b.operands)
    write = combine = value = None
    if kind == "red":
        combine = b.need("popc", "and", "or")
        type_ = b.type("up", (32,))
        write = b.write(operands.pop(0), type_)
        value = b.read(operands.pop(), PRED)
    if not operands or len(operands) > 2:
        raise b.refuse("a barrier's number, and how many threads, are expected")
    number = b.read(operands[0], U32)
    count = b.read(operands[1], U32) if len(operands) == 2 else None
    if kind == "arrive" and count is None:
        raise b.refuse("bar.arrive needs the number of threads")

    def run(f: Any) -> np.ndarray:
        numbers = np.broadcast_to(number(f), f.n).astype(np.int64)
        counts = np.broadcast_to(count(f), f.n).astype(np.int64) if count else np.zeros(f.n, np.int64)
        votes = np.broadcast_to(value(f), f.n) if value else np.zeros(f.n, bool)
        waits = f.machine.barriers.arrive(f, numbers, counts, votes, kind, aligned)
        return np.where(waits, STAY, f.next_block).astype(np.int32)

    def wake(f: Any, votes: np.ndarray) -> None:
        """After the barrier: what all voted."""
        if write and combine:
            total = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[combine]
            write(f, np.array([total], np.uint32 if combine == "popc" else np.bool_))

    run.wake = wake  # type: ignore[attr-defined]
    return run


@opcode("bar", 1, 2, 3, 4, alone=True)
def bar(b: Build) -> Run:
    if b.take("warp"):
        b.need("sync")
        return _warp_barrier(b)
    return _barrier(b, aligned=True)


@opcode("barrier", 1, 2, 3, 4, alone=True)
def barrier(b: Build) -> Run:
    return _barrier(b, aligned=False)


# Instructions of a warp. Each waits until all threads that its mask names have come.


def _warp_wide(b: Build, mask: Any, do: Callable[[Any, np.ndarray], None]) -> Run:
    """``do(frame, masks)`` once the frame holds every thread of each of its masks."""
    read = b.read(mask, U32)
    instruction = b.instruction

    def run(f: Any) -> np.ndarray:
        masks = np.broadcast_to(read(f), f.n)
        ready = f.machine.warps_together(f, instruction, masks)
        if ready.any():
            rows = np.flatnonzero(ready)
            sub = f if len(rows) == f.n else f.sub(rows)
            do(sub, masks[rows])
            if sub is not f:
                sub.flush(None)
        return np.where(ready, f.next_block, STAY).astype(np.int32)

    run.gathers = True  # type: ignore[attr-defined]
    return run


def _warp_barrier(b: Build) -> Run:
    return _warp_wide(b, b.operands[0], lambda f, masks: f.machine.join_warps(f, masks))


def by_lane(f: Any, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The frame's values in rows of 32 lanes: rows, which lanes are there, and each thread's row and lane."""
    warps, row = np.unique(f.machine.warp_of(f.threads), return_inverse=True)
    lane = f.machine.lane_of(f.threads)
    table = np.zeros((len(warps), LANES), values.dtype)
    there = np.zeros((len(warps), LANES), bool)
    table[row, lane] = values
    there[row, lane] = True
    return table, there, row, lane


@opcode("shfl", 5, alone=True)
def shfl(b: Build) -> Run:
    """Reads another lane's value; the predicate says whether that lane is inside the segment."""
    b.need("sync")
    mode = b.need("up", "down", "bfly", "idx")
    type_ = b.type("b", (32,))
    first, second = b.two(b.operands[0])
    write, write_inside = b.write(first, type_), b.write(second, PRED)
    value, distance, clamp = b.read(b.operands[1], type_), b.read(b.operands[2], U32), b.read(b.operands[3], U32)
    instruction = b.instruction

    def do(f: Any, masks: np.ndarray) -> None:
        values = np.broadcast_to(value(f), f.n)
        table, there, row, lane = by_lane(f, values)
        by = (np.broadcast_to(distance(f), f.n) & np.uint32(31)).astype(np.int64)
        control = np.broadcast_to(clamp(f), f.n).astype(np.int64)
        segment, limit = control >> 8 & 31, control & 31
        last = (lane & segment) | (limit & ~segment)
        source = {
            "up": lambda: lane - by,
            "down": lambda: lane + by,
            "bfly": lambda: lane ^ by,
            "idx": lambda: (lane & segment) | (by & ~segment),
        }[mode]()
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        absent = ~there[row, source] | (masks >> source.astype(np.uint32) & 1 == 0)
        if absent.any():
            f.find(instruction, "shuffle from an absent lane", absent)
        write(f, table[row, source])
        write_inside(f, inside)

    return _warp_wide(b, b.operands[4], do)


@opcode("vote", 3, alone=True)
def vote(b: Build) -> Run:
    b.need("sync")
    mode = b.need("all", "any", "uni", "ballot")
    type_ = b.type("pb", (32,))
    if (mode == "ballot") != (type_.kind == "b"):
        raise b.refuse(f".{mode} of {type_}")
    read, write = b.read(b.operands[1], PRED), b.write(b.operands[0], type_)

    def do(f: Any, masks: np.ndarray) -> None:
        votes = np.broadcast_to(read(f), f.n)
        table, _, row, _ = by_lane(f, votes)
        ballot = (table.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1).astype(np.uint32)[row] & masks
        results = {
            "ballot": lambda: ballot,
            "all": lambda: ballot == masks,
            "any": lambda: ballot != 0,
            "uni": lambda: (ballot == masks) | (ballot == 0),
        }
        write(f, results[mode]())

    return _warp_wide(b, b.operands[2], do)


@opcode("match", 3, alone=True)
def match(b: Build) -> Run:
    mode = b.need("any", "all")
    b.need("sync")
    type_ = b.type("b", (32, 64))
    first, second = b.two(b.operands[0])
    write, write_all, read = b.write(first, U32), b.write(second, PRED), b.read(b.operands[1], type_)

    def do(f: Any, masks: np.ndarray) -> None:
        values = np.broadcast_to(read(f), f.n)
        table, there, row, _ = by_lane(f, values)
        bits = np.uint64(1) << np.arange(LANES, dtype=np.uint64)
        named = (masks[:, None].astype(np.uint64) & bits) != 0
        same = (table[row] == values[:, None]) & there[row] & named
        equal = (same * bits).sum(1).astype(np.uint32)
        if mode == "any":
            return write(f, equal)
        write(f, np.where(equal == masks, masks, np.uint32(0)))
        write_all(f, equal == masks)

    return _warp_wide(b, b.operands[2], do)


@opcode("redux", 3, alone=True)
def redux(b: Build) -> Run:
    b.need("sync")
    operation = b.need("add", "min", "max", "and", "or", "xor")
    type_ = b.type("usb", (32,))
    read, write = b.read(b.operands[1], type_), b.write(b.operands[0], type_)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    reduce = function.get(operation, np.bitwise_xor)

    def do(f: Any, masks: np.ndarray) -> None:
        values = np.broadcast_to(read(f), f.n)
        warps = f.machine.warp_of(f.threads).astype(np.uint64)
        groups, group = np.unique(warps << np.uint64(32) | masks, return_inverse=True)
        totals = np.array([reduce.reduce(values[group == i]) for i in range(len(groups))], type_.dtype)
        write(f, totals[group])

    return _warp_wide(b, b.operands[2], do)


@opcode("elect", 2, alone=True)
def elect(b: Build) -> Run:
    """The lowest lane of the mask."""
    b.need("sync")
    first, second = b.two(b.operands[0])
    write, write_elected = b.write(first, U32), b.write(second, PRED)

    def do(f: Any, masks: np.ndarray) -> None:
        lowest = np.bitwise_count((masks & (0 - masks)) - np.uint32(1)).astype(np.uint32)
        write(f, lowest)
        write_elected(f, f.machine.lane_of(f.threads) == lowest)

    return _warp_wide(b, b.operands[1], do)


@opcode("activemask", 1, alone=True)
def activemask(b: Build) -> Run:
    type_ = b.type("b", (32,))
    write = b.write(b.operands[0], type_)

    def run(f: Any) -> np.ndarray:
        table, _, row, _ = by_lane(f, np.ones(f.n, bool))
        write(f, (table.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1).astype(np.uint32)[row])
        return everyone(f, f.next_block)

    return run


class Barriers:
    """Who waits at which of the blocks' barriers."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.number = np.full(machine.threads, -1, np.int64)  # that a thread has come to, or -1
        self.waits = np.zeros(machine.threads, bool)  # not: it only arrived
        self.votes = np.zeros(machine.threads, bool)
        self.aligned = np.zeros(machine.threads, bool)
        self.wanted: dict[tuple[int, int], int] = {}

    def arrive(
        self,
        f: Any,
        numbers: np.ndarray,
        counts: np.ndarray,
        votes: np.ndarray,
        kind: str,
        aligned: bool,
    ) -> np.ndarray:
        """Whether each thread has to wait; who waited for these is sent on."""
        machine = self.machine
        self.number[f.threads] = numbers
        self.waits[f.threads] = kind != "arrive"
        self.votes[f.threads] = votes
        blocks = machine.block_of(f.threads)
        self.aligned[f.threads] = aligned
        still = np.full(f.n, kind != "arrive")
        keys = blocks * 16 + numbers
        for key in np.unique(keys).tolist():
            block, number = divmod(key, 16)
            wanted = int(counts[np.flatnonzero(keys == key)[0]])
            self.wanted[block, number] = wanted
            came = machine.threads_of(block)[self.number[machine.threads_of(block)] == number]
            if len(came) >= (wanted or machine.block_threads):
                self._open(block, number, came)
                still[keys == key] = False
        return still

    def _check_aligned(self, came: np.ndarray) -> None:
        """All of a warp's live threads have to come to the same barrier instruction."""
        machine = self.machine
        warps = machine.warp_of(came)
        for warp in np.unique(warps[self.aligned[came]]).tolist():
            mine = came[warps == warp]
            live = machine.threads_of_warp(warp)
            live = live[~machine.exited[live]]
            if len(mine) != len(live) or len(np.unique(machine.pc[mine])) > 1:
                instruction = machine.step_at(int(mine[-1])).instruction
                machine.findings.add("barrier in divergent code", instruction, mine)

    def _open(self, block: int, number: int, came: np.ndarray) -> None:
        machine = self.machine
        self._check_aligned(came)
        waiting = came[self.waits[came]]
        machine.clocks.join(came, waiting)
        votes = self.votes[came]
        self.number[came] = -1
        self.waits[came] = False
        machine.spaces.progress += 1
        machine.wake(waiting, votes)

    def open_for_the_rest(self) -> bool:
        """At a standstill: lets those go on whose barrier only threads that have left did not come to."""
        machine = self.machine
        for thread in np.flatnonzero(self.waits).tolist():
            number = int(self.number[thread])
            if number < 0:
                continue
            block = thread // machine.block_threads
            mine = machine.threads_of(block)
            came = mine[self.number[mine] == number]
            missing = mine[(self.number[mine] != number) & ~machine.exited[mine]]
            step = machine.step_at(thread)
            if self.wanted[block, number] == 0 and not len(missing):
                gone = mine[machine.exited[mine]]
                detail = f"thread {int(gone[0]) % machine.block_threads} of the block had left"
                machine.findings.add("barrier missed", step.instruction, came[:1], detail=detail)
                self._open(block, number, came)
                return True
        return False
