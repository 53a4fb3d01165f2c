"""Asynchronous copies into and out of shared memory, and the mbarriers that count them.

A copy runs as late as it may: when something waits for it, or when every thread waits for something. Until then its
destination holds what it held. Whoever reads too early therefore gets old bytes, and races with the copy's agent.
Nothing orders copies but waiting for them, not even those of one thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .access import WINDOWS, in_window, read_address, take_space
from .build import PRED, Build, Run, Type, opcode
from .clocks import Knowledge
from .memory import Area, sparse_zeros
from .parse import SINK, Address, Imm, Instruction, Reg
from .races import Who

U32, U64 = Type("u", 32), Type("u", 64)
MAX_COUNT = (1 << 20) - 1
# Kinds of chains (clocks.py), of which those of mbarriers come last, a block's as many as it has threads.
CP_ASYNC, BULK_GROUPS, MBARRIERS = 0, 1, 2
MOST_MBARRIERS = 64  # in small blocks
BULK_SIDES = (("shared::cluster", "global"), ("shared::cta", "global"), ("global", "shared::cta"))


@dataclass
class Copy:
    """One thread's copy; ``tick`` numbers the copies of its chain."""

    instruction: Instruction
    thread: int
    chain: int
    tick: int
    source: tuple[str, int]  # space and address
    destination: tuple[str, int]
    bytes: int
    zeros: int  # that follow
    knows: Knowledge
    barrier: tuple[int, int] | None = None  # whose transaction count it completes
    through_proxy: bool = False
    is_done: bool = False


@dataclass
class Mbarrier:
    """Counts arrivals and bytes; a phase ends when both are as expected."""

    expected: int
    pending: int
    transactions: int = 0
    phase: int = 0
    gathering: Knowledge = field(default_factory=Knowledge)
    finished: Knowledge = field(default_factory=Knowledge)

    def settle(self) -> bool:
        if self.pending > 0 or self.transactions != 0:
            return False
        self.phase += 1
        self.pending = self.expected
        # What a later phase's waiters know, an earlier one's knew: phases follow each other.
        self.finished = self.gathering
        self.gathering = Knowledge({block: row.copy() for block, row in self.finished.rows.items()})
        return True


def chain_kinds(kernel: Any, block_threads: int) -> int:
    copies = [s.instruction for block in kernel.blocks for s in block.steps if s.instruction.opcode == "cp"]
    if not any("bulk" in copy.modifiers for copy in copies):
        return MBARRIERS - 1 if copies else 0
    return MBARRIERS + -(-MOST_MBARRIERS // block_threads)


def chain_name(kind: int, thread: str) -> str:
    return f"a copy issued by thread {thread}" if kind < MBARRIERS else "a copy that an mbarrier counts"


class Copies:
    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.pending: list[Copy] = []
        self.open: dict[tuple[int, bool], list[Copy]] = defaultdict(list)  # not committed; by thread and whether bulk
        self.groups: dict[tuple[int, bool], list[list[Copy]]] = defaultdict(list)
        self.barriers: dict[tuple[int, int], Mbarrier] = {}
        self.barrier_chains: dict[int, dict[int, int]] = defaultdict(dict)  # of a block: by the barrier's address

    # Copies.

    def chain_of_barrier(self, instruction: Instruction, block: int, address: int) -> int:
        chains = self.barrier_chains[block]
        if address not in chains:
            clocks = self.machine.clocks
            kind, place = divmod(len(chains), clocks.block_threads)
            if MBARRIERS + kind >= clocks.chain_kinds:
                raise instruction.refuse(f"a block's copies complete on more than {len(chains)} mbarriers")
            chains[address] = clocks.chain(MBARRIERS + kind, block * clocks.block_threads + place)
        return chains[address]

    def issue(self, copy: Copy, is_bulk: bool) -> None:
        self.pending.append(copy)
        if copy.barrier is None:
            self.open[copy.thread, is_bulk].append(copy)
        if self.machine.copies_early:
            self.run(copy)
        else:
            self._void(copy)

    def _void(self, copy: Copy) -> None:
        """Until the copy has run, its destination holds nothing that may be read."""
        f = self.machine.frame_of(np.array([copy.thread]))
        place = self._places(f, copy, copy.destination, copy.bytes + copy.zeros, writes=True)
        if place is not None:
            area, offset = place
            if area.unwritten is None:
                area.unwritten = sparse_zeros(len(area.data), np.bool_)
            area.unwritten[offset : offset + copy.bytes + copy.zeros] = True

    def commit(self, f: Any, is_bulk: bool) -> None:
        for thread in f.threads.tolist():
            self.groups[thread, is_bulk].append(self.open.pop((thread, is_bulk), []))

    def wait(self, f: Any, is_bulk: bool, left: int | None, reads_only: bool = False) -> None:
        """Until at most ``left`` of the thread's newest groups are pending; None: all, committed or not."""
        for thread in f.threads.tolist():
            groups = self.groups[thread, is_bulk]
            done = groups if left is None else groups[: max(0, len(groups) - left)]
            copies = [copy for group in done for copy in group]
            if left is None:
                copies += self.open.pop((thread, is_bulk), [])
            for copy in copies:
                self.run(copy)
                self.machine.clocks.learn(thread, self.machine.clocks.reader(copy.chain), copy.tick)
                if not reads_only:
                    self.machine.clocks.learn(thread, self.machine.clocks.writer(copy.chain), copy.tick)
            if not reads_only:
                del groups[: len(done)]

    def run_one(self) -> bool:
        """The oldest that somebody may be waiting for: who waits for groups has made them run."""
        if not self.pending:
            return False
        self.run(next((copy for copy in self.pending if copy.barrier is not None), self.pending[0]))
        return True

    def run(self, copy: Copy) -> None:
        if copy.is_done:
            return
        copy.is_done = True
        self.pending.remove(copy)
        self.machine.spaces.progress += 1
        f = self.machine.frame_of(np.array([copy.thread]))
        data = np.concatenate([self._read(f, copy), np.zeros(copy.zeros, np.uint8)])
        self._write(f, copy, data)
        if copy.barrier is not None:
            self._complete(copy)

    def _places(self, f: Any, copy: Copy, place: tuple[str, int], count: int, writes: bool) -> tuple[Area, int] | None:
        """The area and offset of a copy's side, all of which has to be there."""
        space, address = place
        spaces = self.machine.spaces
        if not space:
            ((space, _, local),) = spaces.space_by_address(f, np.array([address], np.uint64))
            address = int(local[0])
        units = np.arange(0, count, 4 if count % 4 == 0 else 1)
        addresses = np.uint64(address) + units.astype(np.uint64)
        whole = self.machine.frame_of(np.full(len(units), copy.thread))
        width = 4 if count % 4 == 0 else 1
        found = list(spaces.split(whole, copy.instruction, space, addresses, width, writes))
        if len(found) != 1 or len(found[0][1]) != len(units):
            return None
        return found[0][0], int(found[0][2][0])

    def _stamp(self, copy: Copy, agent: int, area: Area, offset: int, count: int, writes: bool) -> None:
        if not area.tracks_races or not area.writable or count == 0:
            return
        machine = self.machine
        offsets = np.arange(offset, offset + count)

        def knows(rows: np.ndarray, agents: np.ndarray, ticks: np.ndarray) -> np.ndarray:
            return machine.clocks.known_to(copy.knows, agents, ticks)

        check = machine.spaces.races.store if writes else machine.spaces.races.load
        f = machine.frame_of(np.full(count, copy.thread))
        who = Who(np.full(count, agent, np.int32), np.full(count, copy.tick, np.int32), knows, in_order=False)
        found = check(area, offsets, 1, who)
        machine.spaces.report_conflicts(f, copy.instruction, area, np.arange(count), offsets, found)

    def _read(self, f: Any, copy: Copy) -> np.ndarray:
        if copy.bytes == 0:
            return np.zeros(0, np.uint8)
        place = self._places(f, copy, copy.source, copy.bytes, writes=False)
        if place is None:
            return np.full(copy.bytes, 0xDB, np.uint8)
        area, offset = place
        machine = self.machine
        if area.unwritten is not None:
            bad = np.flatnonzero(area.unwritten[offset : offset + copy.bytes])
            if len(bad):
                name, at = area.part(offset + int(bad[0]))
                machine.findings.add("read of unwritten bytes", copy.instruction, f.threads, name, at)
        if copy.through_proxy:
            self._check_proxy(f, copy, area, offset)
        self._stamp(copy, machine.clocks.reader(copy.chain), area, offset, copy.bytes, writes=False)
        return area.data[offset : offset + copy.bytes].copy()

    def _check_proxy(self, f: Any, copy: Copy, area: Area, offset: int) -> None:
        """What threads wrote reaches the bulk copy only past a proxy fence of the writer or of the issuer."""
        if area.writers is None:
            return
        ((_, stamps),) = area.writers.find(np.arange(offset, offset + copy.bytes), 1)
        agents, ticks = stamps[0][:, 0], stamps[1][:, 0]
        threads = np.flatnonzero((agents > 0) & (agents <= self.machine.threads))
        if not len(threads):
            return
        agents, ticks = agents[threads] - 1, ticks[threads]
        fenced = ticks < self.machine.proxy_fences[agents]
        fenced |= self.machine.clocks.known_to(self.machine.proxy_knowledge(copy.thread), agents, ticks)
        fenced |= (agents == copy.thread) & (ticks < self.machine.proxy_fences[copy.thread])
        if not fenced.all():
            name, at = area.part(offset + int(threads[np.flatnonzero(~fenced)[0]]))
            self.machine.findings.add("missing proxy fence", copy.instruction, f.threads, name, at)

    def _write(self, f: Any, copy: Copy, data: np.ndarray) -> None:
        if not len(data):
            return
        place = self._places(f, copy, copy.destination, len(data), writes=True)
        if place is None:
            return
        area, offset = place
        area.data[offset : offset + len(data)] = data
        if area.unwritten is not None:
            area.unwritten[offset : offset + len(data)] = False
        self._stamp(copy, self.machine.clocks.writer(copy.chain), area, offset, len(data), writes=True)

    def finish(self) -> None:
        """At the end: what nobody waited for."""
        while self.pending:
            copy = self.pending[0]
            if copy.source[0] == "shared" or copy.through_proxy:
                detail = "its block may have left, and its shared memory with it"
                self.machine.findings.add(
                    "copy not waited for", copy.instruction, np.array([copy.thread]), detail=detail
                )
            self.run(copy)

    # Mbarriers.

    def find(
        self, f: Any, instruction: Instruction, thread: int, address: int
    ) -> tuple[tuple[int, int], Mbarrier] | None:
        key = (thread // self.machine.block_threads, address)
        found = self.barriers.get(key)
        if found is None or address % 8:
            self.machine.findings.add("no mbarrier there", instruction, np.array([thread]), "shared", address)
            return None
        return key, found

    def _complete(self, copy: Copy) -> None:
        barrier = self.barriers.get(copy.barrier)
        if barrier is None:
            self.machine.findings.add(
                "no mbarrier there", copy.instruction, np.array([copy.thread]), "shared", copy.barrier[1]
            )
            return
        knows = Knowledge({block: row.copy() for block, row in copy.knows.rows.items()})
        block = copy.thread // self.machine.block_threads
        for agent in (self.machine.clocks.reader(copy.chain), self.machine.clocks.writer(copy.chain)):
            column = self.machine.clocks.column(np.array([agent]))[0]
            knows.rows[block][column] = max(knows.rows[block][column], copy.tick)
        barrier.gathering.merge(knows)
        barrier.transactions -= copy.bytes
        barrier.settle()


def _shared_addresses(b: Build, operand: Any) -> Callable[[Any], np.ndarray]:
    """Of something in shared memory, as offsets, whatever the address's form."""
    read, space = read_address(b, operand, "shared" if _is_narrow(b, operand) else take_space(b))

    def run(f: Any) -> np.ndarray:
        addresses = np.broadcast_to(read(f), f.n)
        if not space:
            return np.where(in_window(addresses, "shared"), addresses - np.uint64(WINDOWS["shared"]), addresses)
        return addresses

    return run


def _is_narrow(b: Build, operand: Any) -> bool:
    return isinstance(operand, Address) and isinstance(operand.base, Reg) and b.register_bits(operand.base) == 32


@opcode("cp", 0, 1, 2, 3, 4, 5)
def cp(b: Build) -> Run:
    b.need("async")
    if b.take("bulk"):
        return _bulk(b)
    if b.take("mbarrier"):
        return _async_arrive(b)
    if b.take("commit_group"):
        return lambda f: f.machine.copies.commit(f, False)
    if b.take("wait_all"):
        return lambda f: f.machine.copies.wait(f, False, None)
    if b.take("wait_group"):
        left = _constant(b, 0)
        return lambda f: f.machine.copies.wait(f, False, left)
    return _cp_async(b)


def _constant(b: Build, place: int) -> int:
    if len(b.operands) != place + 1 or not isinstance(b.operands[place], Imm):
        raise b.refuse("expected one constant")
    return b.operands[place].value


def _cp_async(b: Build) -> Run:
    """``[destination], [source], size {, bytes to read | predicate to ignore}``."""
    level = b.need("ca", "cg")
    b.need("shared", "shared::cta")
    b.need("global")
    while b.take("L2::64B", "L2::128B", "L2::256B"):
        pass
    operands = list(b.operands)
    if b.take("L2::cache_hint"):
        operands.pop()
    size = operands[2].value if len(operands) > 2 and hasattr(operands[2], "value") else 0
    if size not in ((16,) if level == "cg" else (4, 8, 16)):
        raise b.refuse("copies of 4, 8 or 16 bytes are known, with .cg of 16")
    if len(operands) > 4:
        raise b.refuse("too many operands")
    ignores = taken = None
    if len(operands) == 4:
        is_predicate = isinstance(operands[3], Reg) and b.register_bits(operands[3]) == 1
        ignores = b.read(operands[3], PRED) if is_predicate else None
        taken = None if is_predicate else b.read(operands[3], U32)
    destination, _ = read_address(b, operands[0], "shared")
    source, _ = read_address(b, operands[1], "global")
    instruction = b.instruction

    def run(f: Any) -> None:
        machine = f.machine
        to, at = np.broadcast_to(destination(f), f.n), np.broadcast_to(source(f), f.n)
        counts = np.broadcast_to(taken(f), f.n).astype(np.int64) if taken else np.full(f.n, size)
        if ignores:
            counts = np.where(ignores(f), 0, counts)
        machine.spaces.check_alignment(f, instruction, "shared", to, size)
        machine.spaces.check_alignment(f, instruction, "global", at, size)
        for thread, a, d, n in zip(f.threads.tolist(), at.tolist(), to.tolist(), counts.tolist(), strict=True):
            chain = machine.clocks.chain(CP_ASYNC, thread)
            knows, tick = machine.new_copy(thread, chain)
            read = min(n, size)
            copy = Copy(instruction, thread, chain, tick, ("global", a), ("shared", d), read, size - read, knows)
            machine.copies.issue(copy, is_bulk=False)

    return run


def _async_arrive(b: Build) -> Run:
    """cp.async.mbarrier.arrive: an arrival once the thread's earlier copies have run."""
    b.need("arrive")
    increments = not b.take("noinc")
    b.take("shared", "shared::cta")
    b.need("b64")
    address = _shared_addresses(b, b.operands[0])
    instruction = b.instruction

    def run(f: Any) -> None:
        machine = f.machine
        for thread, at in zip(f.threads.tolist(), address(f).tolist(), strict=True):
            found = machine.copies.find(f, instruction, thread, at)
            if found is None:
                continue
            _, barrier = found
            knows = machine.clocks.snapshot(thread)
            clocks = machine.clocks
            chain = clocks.chain(CP_ASYNC, thread)
            for copy in [c for c in machine.copies.pending if c.chain == chain]:
                machine.copies.run(copy)
            row = knows.rows[thread // machine.block_threads]
            for agent in (clocks.reader(chain), clocks.writer(chain)):
                row[clocks.column(np.array([agent]))[0]] = clocks.copies[chain]
            barrier.gathering.merge(knows)
            if not increments:
                barrier.pending -= 1
                barrier.settle()

    return run


def _bulk(b: Build) -> Run:
    if b.take("commit_group"):
        return lambda f: f.machine.copies.commit(f, True)
    if b.take("wait_group"):
        reads_only = bool(b.take("read"))
        left = _constant(b, 0)
        return lambda f: f.machine.copies.wait(f, True, left, reads_only)
    if b.take("prefetch"):
        b.need("L2")
        b.need("global")
        b.take("L2::cache_hint")
        return lambda f: None
    # Destination and source, in this order.
    sides = tuple(b.modifiers[:2])
    if sides not in BULK_SIDES:
        raise b.refuse("copies between global and shared memory are known")
    del b.modifiers[:2]
    into_shared = sides[1] == "global"
    b.need("mbarrier::complete_tx::bytes" if into_shared else "bulk_group")
    hints = 1 if b.take("L2::cache_hint") else 0
    if len(b.operands) != (4 if into_shared else 3) + hints:
        raise b.refuse("another number of operands")
    sides = ("shared", "global") if into_shared else ("global", "shared")
    destination, _ = read_address(b, b.operands[0], sides[0])
    source, _ = read_address(b, b.operands[1], sides[1])
    size = b.read(b.operands[2], U32)
    barrier = _shared_addresses(b, b.operands[3]) if into_shared else None
    instruction = b.instruction

    def run(f: Any) -> None:
        machine = f.machine
        to, at = np.broadcast_to(destination(f), f.n), np.broadcast_to(source(f), f.n)
        sizes = np.broadcast_to(size(f), f.n)
        machine.spaces.check_alignment(f, instruction, sides[0], to, 16)
        machine.spaces.check_alignment(f, instruction, sides[1], at, 16)
        if (sizes % 16 != 0).any():
            f.find(instruction, "bulk copy of a size that is no multiple of 16", sizes % 16 != 0)
        for i, thread in enumerate(f.threads.tolist()):
            key, chain = None, machine.clocks.chain(BULK_GROUPS, thread)
            if barrier:
                found = machine.copies.find(f, instruction, thread, int(barrier(f)[i]))
                if found is None:
                    continue
                key = found[0]
                chain = machine.copies.chain_of_barrier(instruction, *key)
            knows, tick = machine.new_copy(thread, chain)
            places = (sides[1], int(at[i])), (sides[0], int(to[i]))
            copy = Copy(instruction, thread, chain, tick, *places, int(sizes[i]), 0, knows, key, not into_shared)
            machine.copies.issue(copy, is_bulk=True)

    return run


# Mbarriers.


@opcode("mbarrier", 1, 2, 3, 4)
def mbarrier(b: Build) -> Run:
    kind = b.need(
        "init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait", "pending_count"
    )
    build = {
        "init": _init,
        "inval": _inval,
        "arrive": _arrive,
        "expect_tx": _expect,
        "test_wait": _wait,
        "try_wait": _wait,
    }.get(kind)
    if build is None:
        raise b.refuse(f"mbarrier.{kind} is not supported")
    _orders(b)
    return build(b)


def _orders(b: Build) -> None:
    b.take("release", "acquire", "relaxed")
    b.take("cta", "cluster")
    b.take("shared", "shared::cta", "shared::cluster")


def _each(b: Build, operand: Any, do: Callable[[Any, int, int, Mbarrier, int], None]) -> Run:
    """``do(frame, row, thread, barrier, address)`` for each thread whose address is an mbarrier's."""
    address = _shared_addresses(b, operand)
    instruction = b.instruction

    def run(f: Any) -> None:
        f.machine.spaces.touch_atomic(f, instruction, address(f))
        for i, (thread, at) in enumerate(zip(f.threads.tolist(), address(f).tolist(), strict=True)):
            found = f.machine.copies.find(f, instruction, thread, at)
            if found is not None:
                do(f, i, thread, found[1], at)

    return run


def _init(b: Build) -> Run:
    b.need("b64")
    address, count = _shared_addresses(b, b.operands[0]), b.read(b.operands[1], U32)
    instruction = b.instruction

    def run(f: Any) -> None:
        machine = f.machine
        counts = np.broadcast_to(count(f), f.n)
        bad = (counts < 1) | (counts > MAX_COUNT)
        if bad.any():
            f.find(instruction, "mbarrier count out of range", bad)
        at = address(f)
        machine.store(f, instruction, "shared", at, np.zeros((f.n, 8), np.uint8))
        for thread, where, n in zip(f.threads.tolist(), at.tolist(), counts.tolist(), strict=True):
            machine.copies.barriers[thread // machine.block_threads, where] = Mbarrier(n, n)

    return run


def _inval(b: Build) -> Run:
    b.need("b64")

    def do(f: Any, row: int, thread: int, barrier: Mbarrier, address: int) -> None:
        del f.machine.copies.barriers[thread // f.machine.block_threads, address]

    return _each(b, b.operands[0], do)


def _expect(b: Build) -> Run:
    b.need("b64")
    size = b.read(b.operands[1], U32)

    def do(f: Any, row: int, thread: int, barrier: Mbarrier, address: int) -> None:
        barrier.transactions += int(np.broadcast_to(size(f), f.n)[row])
        f.machine.spaces.progress += 1

    return _each(b, b.operands[0], do)


def _arrive(b: Build) -> Run:
    """``state, [address] {, count}``; with expect_tx the third operand is bytes."""
    expects = bool(b.take("expect_tx"))
    b.take("noComplete")
    _orders(b)
    b.need("b64")
    operands = list(b.operands)
    state = operands.pop(0) if not isinstance(operands[0], Address) else SINK
    number = b.read(operands[1], U32) if len(operands) == 2 else None
    if len(operands) > 2 or (expects and number is None):
        raise b.refuse("another number of operands")
    write = b.write(state, U64)
    states: dict[str, np.ndarray] = {}
    instruction = b.instruction

    def do(f: Any, row: int, thread: int, barrier: Mbarrier, address: int) -> None:
        given = int(np.broadcast_to(number(f), f.n)[row]) if number else 1
        states["now"][row] = barrier.phase
        barrier.gathering.merge(f.machine.clocks.release(thread))
        if expects:
            barrier.transactions += given
        count = 1 if expects else given
        if count > barrier.pending:
            f.find(instruction, "more arrivals than an mbarrier expects", np.arange(f.n) == row)
        barrier.pending -= count
        barrier.settle()
        f.machine.spaces.progress += 1

    each = _each(b, operands[0], do)

    def run(f: Any) -> None:
        states["now"] = np.zeros(f.n, np.uint64)
        each(f)
        write(f, states["now"])

    return run


def _wait(b: Build) -> Run:
    """``done, [address], state or parity {, time}``. A thread that has to wait lets the others go first."""
    by_parity = bool(b.take("parity"))
    _orders(b)
    b.need("b64")
    operands = list(b.operands)
    write = b.write(operands[0], PRED)
    wanted = b.read(operands[2], U32 if by_parity else U64)
    results: dict[str, np.ndarray] = {}

    def do(f: Any, row: int, thread: int, barrier: Mbarrier, address: int) -> None:
        asked = int(np.broadcast_to(wanted(f), f.n)[row])
        done = (barrier.phase & 1) != (asked & 1) if by_parity else barrier.phase > asked
        results["now"][row] = done
        if done:
            f.machine.clocks.acquire(thread, barrier.finished)

    each = _each(b, operands[1], do)

    def run(f: Any) -> None:
        results["now"] = np.zeros(f.n, bool)
        each(f)
        write(f, results["now"])
        f.machine.let_others_go_first(f.threads[~results["now"]])

    return run
