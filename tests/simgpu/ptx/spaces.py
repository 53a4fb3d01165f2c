"""Every access of a launch: which memory an address means, what the sanitizer says of it, and the bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .access import WINDOWS, in_window
from .clocks import Clocks, Knowledge
from .memory import Area
from .parse import Instruction
from .races import Conflict, RaceDetector, Who
from .report import Access

SECTOR_BYTES = 32
POISON = 0xDB


def private_area(name: str, parts: Sequence[tuple[int, int, str]], size: int, copies: int, tracks_races: bool) -> Area:
    """Memory of which every block or thread has its own copy; ``parts`` are (begin, bytes, name)."""
    stride = -(-max(size, 1) // 16) * 16
    area = Area(name, np.full(copies * stride, POISON, np.uint8), 0, 0, copies * stride, tracks_races=tracks_races)
    area.unwritten = np.ones(copies * stride, bool)
    area.stride = stride
    area.parts = [(begin, part) for begin, _, part in parts]
    inside = np.zeros(stride + 1, np.int64)
    for begin, count, _ in parts:
        inside[begin + 1 : begin + count + 1] = 1
    area.inside = np.cumsum(inside)
    return area


class Spaces:
    def __init__(
        self,
        areas: Sequence[Area],
        shared: Area,
        local: Area,
        param: Area,
        block_threads: int,
        clocks: Clocks,
        synchronises: bool,
    ) -> None:
        self.areas = sorted(areas, key=lambda area: area.base + area.begin)
        for before, after in zip(self.areas, self.areas[1:], strict=False):
            if before.base + before.end > after.base + after.begin:
                raise ValueError(f"{before.name} and {after.name} overlap")
        self.begins = np.array([area.base + area.begin for area in self.areas], np.uint64)
        self.private = {"shared": shared, "local": local, "param": param}
        self.block_threads = block_threads
        self.clocks = clocks
        self.races = RaceDetector(synchronises)
        self.released: dict[tuple[int, int], Knowledge] = {}
        self.counts_sectors = True
        self.equal_writes_race = True
        self.progress = 0

    # Addresses.

    def split(
        self, f: Any, instruction: Instruction, space: str, addresses: np.ndarray, width: int, writes: bool
    ) -> Any:
        """Area, rows and offsets of what may be accessed; the rest is reported."""
        aligned = addresses & np.uint64(width - 1) == 0
        if not aligned.all():
            self._report_address(f, instruction, "misaligned access", space, addresses, ~aligned, width)
        if space == "global":
            yield from self._split_global(f, instruction, addresses, width, writes, aligned)
        else:
            yield from self._split_private(f, instruction, space, addresses, width, aligned)

    def _split_private(
        self, f: Any, instruction: Instruction, space: str, addresses: np.ndarray, width: int, aligned: np.ndarray
    ) -> Iterator[tuple[Area, np.ndarray, np.ndarray]]:
        area = self.private[space]
        last = np.uint64(area.stride)
        begin = np.minimum(addresses, last).astype(np.int64)
        end = np.minimum(begin + width, area.stride)
        inside = area.inside[end] - area.inside[begin] == width
        if not inside.all():
            self._report_address(f, instruction, "out of bounds", space, addresses, ~inside, width)
        good = inside & aligned
        rows = np.arange(len(addresses)) if good.all() else np.flatnonzero(good)
        if space == "param":
            yield area, rows, begin[rows]
            return
        if len(addresses) == 1 and f.n > 1:
            # One address, but every thread's or block's own memory.
            rows = np.arange(f.n) if good[0] else rows[:0]
            begin = np.broadcast_to(begin, f.n)
        owner = f.threads[rows] if space == "local" else f.threads[rows] // self.block_threads
        yield area, rows, owner * area.stride + begin[rows]

    def _split_global(
        self, f: Any, instruction: Instruction, addresses: np.ndarray, width: int, writes: bool, aligned: np.ndarray
    ) -> Iterator[tuple[Area, np.ndarray, np.ndarray]]:
        which = np.searchsorted(self.begins, addresses, side="right").astype(np.int64) - 1
        first = int(which[0])
        for number in [first] if (which == first).all() else np.unique(which).tolist():
            mine = which == number
            if number < 0:
                self._report_address(f, instruction, "out of bounds", "global", addresses, mine, width)
                continue
            area = self.areas[number]
            offsets = (addresses - np.uint64(area.base)).astype(np.int64)
            inside = offsets + width <= area.end
            if not inside[mine].all():
                self._report_address(f, instruction, "out of bounds", "global", addresses, mine & ~inside, width)
            good = mine & inside & aligned
            if writes and not area.writable and good.any():
                self._report(f, instruction, "write to read-only memory", area, np.flatnonzero(good), offsets[good])
                continue
            rows = np.arange(len(addresses)) if good.all() else np.flatnonzero(good)
            if len(rows):
                yield area, rows, offsets[rows]

    def space_by_address(self, f: Any, addresses: np.ndarray) -> Iterator[tuple[str, np.ndarray | None, np.ndarray]]:
        """Generic addresses: each space, the rows that lie in it (None: all), and their addresses in it."""
        if not (addresses >> np.uint64(48) >= np.uint64(0x7FF1)).any():
            yield "global", None, addresses
            return
        for space in ("global", *WINDOWS):
            inside = in_window(addresses, space)
            if inside.any():
                rows = None if inside.all() else np.flatnonzero(inside)
                local = addresses - np.uint64(WINDOWS.get(space, 0))
                yield space, rows, local if rows is None else local[rows]

    # Reports.

    def _report_address(
        self,
        f: Any,
        instruction: Instruction,
        kind: str,
        space: str,
        addresses: np.ndarray,
        bad: np.ndarray,
        width: int,
    ) -> None:
        row = int(np.flatnonzero(bad)[0])
        address = int(addresses[row])
        threads = f.threads if len(addresses) == 1 else f.threads[bad]
        if space != "global":
            name, offset = self.private[space].part(min(address, self.private[space].stride - 1))
            name, offset = f"{space} {name}", offset + max(0, address - self.private[space].stride + 1)
        else:
            name, offset = self._nearest(address, width)
        f.machine.findings.add(kind, instruction, threads, name, offset, f"{width} bytes at {address:#x}")

    def _nearest(self, address: int, width: int) -> tuple[str, int | None]:
        """The buffer that the address misses by least."""
        if not self.areas:
            return "no buffer", None

        def distance(area: Area) -> int:
            begin, end = area.base + area.begin, area.base + area.end
            return max(begin - address, address + width - end, 0)

        area = min(self.areas, key=distance)
        return area.name, address - area.base - area.begin

    def _report(
        self,
        f: Any,
        instruction: Instruction,
        kind: str,
        area: Area,
        rows: np.ndarray,
        offsets: np.ndarray,
        detail: str = "",
    ) -> None:
        name, offset = area.part(int(offsets[0]))
        threads = f.threads[rows] if len(rows) <= f.n and rows.max() < f.n else f.threads[:1]
        f.machine.findings.add(kind, instruction, threads, name, offset, detail)

    def report_conflicts(
        self, f: Any, instruction: Instruction, area: Area, rows: np.ndarray, offsets: np.ndarray, found: list[Conflict]
    ) -> None:
        for conflict in found:
            other = int(conflict.agents[0])
            who = "threads of more than one kind" if other < 0 else f.machine.agent_name(other)
            at = conflict.rows
            self._report(f, instruction, f"race ({conflict.kind})", area, rows[at], offsets[at], f"with {who}")

    # Accesses.

    def load(
        self,
        f: Any,
        instruction: Instruction,
        space: str,
        addresses: np.ndarray,
        width: int,
        read_only: bool = False,
        strong: bool = False,
        acquires: bool = False,
    ) -> np.ndarray:
        """Rows of ``width`` bytes; one row where every thread reads the same."""
        if not space:
            return self._load_generic(f, instruction, addresses, width, read_only, strong, acquires)
        rows_wanted = f.n if space in ("shared", "local") else len(addresses)
        result = np.full((rows_wanted, width), POISON, np.uint8)
        for area, rows, offsets in self.split(f, instruction, space, addresses, width, writes=False):
            moved = area.load(offsets, width)
            if len(rows) == rows_wanted:
                result = moved
            else:
                result[rows] = moved
            self._check_load(f, instruction, area, rows, offsets, width, read_only, strong)
            if acquires:
                self._acquire(f, area, rows, offsets)
        if space == "global" and self.counts_sectors:
            self.count_sectors(f, f.machine.report.loads, instruction, addresses, width)
        return result

    def _load_generic(
        self, f: Any, instruction: Instruction, addresses: np.ndarray, width: int, *how: bool
    ) -> np.ndarray:
        result = np.full((f.n, width), POISON, np.uint8)
        addresses = np.broadcast_to(addresses, f.n)
        for space, rows, local in self.space_by_address(f, addresses):
            if rows is None:
                return self.load(f, instruction, space, local, width, *how)
            result[rows] = self.load(f.sub(rows), instruction, space, local, width, *how)
        return result

    def _check_load(
        self,
        f: Any,
        instruction: Instruction,
        area: Area,
        rows: np.ndarray,
        offsets: np.ndarray,
        width: int,
        read_only: bool,
        strong: bool,
    ) -> None:
        self._check_written(f, instruction, area, rows, offsets, width)
        if not area.tracks_races or not area.writable or not len(rows):
            return
        if read_only and area.writers is not None:
            written = np.zeros(len(rows), bool)
            for some, (agents, _, _) in area.writers.find(offsets, width):
                written[slice(None) if some is None else some] = agents.any(axis=1)
            if written.any():
                detail = ".nc promises that nobody writes it"
                self._report(f, instruction, "non-coherent read", area, rows[written], offsets[written], detail)
        threads, at = f.threads[rows], offsets
        if len(rows) < f.n and len(rows) == 1:
            # One address for all threads: the first two stand for them.
            threads, at = f.threads[:2], np.repeat(offsets, min(2, f.n))
        found = self.races.load(area, at, width, self._who(threads), strong)
        self.report_conflicts(f, instruction, area, np.arange(len(at)) if len(at) > len(rows) else rows, at, found)

    def _check_written(
        self, f: Any, instruction: Instruction, area: Area, rows: np.ndarray, offsets: np.ndarray, width: int
    ) -> None:
        if area.unwritten is None or not len(rows):
            return
        bad = area.words(area.unwritten, width)[offsets // width].any(axis=1)
        if bad.any():
            self._report(f, instruction, "read of unwritten bytes", area, rows[bad], offsets[bad])

    def _who(self, threads: np.ndarray) -> Who:
        clocks = self.clocks

        def knows(rows: np.ndarray, agents: np.ndarray, ticks: np.ndarray) -> np.ndarray:
            return clocks.ordered(agents, ticks, threads[rows])

        return Who(threads.astype(np.int32), clocks.now[threads], knows)

    def store(
        self,
        f: Any,
        instruction: Instruction,
        space: str,
        addresses: np.ndarray,
        values: np.ndarray,
        strong: bool = False,
        releases: bool = False,
    ) -> None:
        """``values`` has a row for every thread."""
        addresses = np.broadcast_to(addresses, f.n)
        if not space:
            for found, rows, local in self.space_by_address(f, addresses):
                if rows is None:
                    self.store(f, instruction, found, local, values, strong, releases)
                else:
                    self.store(f.sub(rows), instruction, found, local, values[rows], strong, releases)
            return
        width = values.shape[1]
        self.progress += 1
        if space == "param":
            self._report_address(
                f, instruction, "write to read-only memory", space, addresses, np.ones(f.n, bool), width
            )
            return
        for area, rows, offsets in self.split(f, instruction, space, addresses, width, writes=True):
            area.store(offsets, values if len(rows) == len(values) else values[rows])
            if area.unwritten is not None:
                area.words(area.unwritten, width)[offsets // width] = False
            if area.tracks_races:
                agrees: Any = np.False_
                if not self.equal_writes_race and space == "shared":
                    agrees = (area.load(offsets, width) == values[rows]).all(axis=1)
                found = self.races.store(area, offsets, width, self._who(f.threads[rows]), strong, agrees)
                self.report_conflicts(f, instruction, area, rows, offsets, found)
            if releases:
                self._release(f, area, rows, offsets)
        if space == "global" and self.counts_sectors:
            self.count_sectors(f, f.machine.report.stores, instruction, addresses, width)

    def atomics(
        self,
        f: Any,
        instruction: Instruction,
        space: str,
        addresses: np.ndarray,
        type_: Any,
        one: Callable[[int, Any], Any],
        order: str,
    ) -> None:
        """One thread after the other; what one has released there, the next knows."""
        addresses = np.broadcast_to(addresses, f.n)
        self.progress += 1
        if not space:
            for found, rows, local in self.space_by_address(f, addresses):
                whole = np.arange(f.n) if rows is None else rows
                inner = lambda i, old, whole=whole: one(int(whole[i]), old)  # noqa: E731
                self.atomics(f.sub(whole), instruction, found, local, type_, inner, order)
            return
        width = type_.bytes
        for area, rows, offsets in self.split(f, instruction, space, addresses, width, writes=True):
            words = area.data.view(type_.dtype)
            self._check_written(f, instruction, area, rows, offsets, width)
            for row, offset in zip(rows.tolist(), offsets.tolist(), strict=True):
                words[offset // width] = one(row, words[offset // width])
            if area.tracks_races:
                found = self.races.store(area, offsets, width, self._who(f.threads[rows]), True)
                self.report_conflicts(f, instruction, area, rows, offsets, found)
                self._acquire(f, area, rows, offsets)
                if order in ("release", "acq_rel") or f.machine.has_fenced(f.threads[rows]):
                    self._release(f, area, rows, offsets)
                    self._acquire(f, area, rows, offsets)

    def check_alignment(self, f: Any, instruction: Instruction, space: str, addresses: np.ndarray, width: int) -> None:
        bad = addresses & np.uint64(width - 1) != 0
        if bad.any():
            self._report_address(f, instruction, "misaligned access", space, addresses, bad, width)

    def touch_atomic(self, f: Any, instruction: Instruction, addresses: np.ndarray) -> None:
        """An mbarrier's word: races with plain accesses, not with other uses of it."""
        for area, rows, offsets in self.split(f, instruction, "shared", addresses, 8, writes=True):
            found = self.races.load(area, offsets, 8, self._who(f.threads[rows]), True)
            self.report_conflicts(f, instruction, area, rows, offsets, found)

    # What is handed over through a location.

    def _release(self, f: Any, area: Area, rows: np.ndarray, offsets: np.ndarray) -> None:
        for thread, offset in zip(f.threads[rows].tolist(), offsets.tolist(), strict=True):
            self.released.setdefault((id(area), offset), Knowledge()).merge(self.clocks.release(thread))

    def _acquire(self, f: Any, area: Area, rows: np.ndarray, offsets: np.ndarray) -> None:
        if not self.released:
            return
        for thread, offset in zip(f.threads[rows].tolist(), offsets.tolist(), strict=False):
            knowledge = self.released.get((id(area), offset))
            if knowledge is not None:
                self.clocks.acquire(thread, knowledge)

    # Coalescing.

    def count_sectors(
        self, f: Any, counted: dict[int, Access], instruction: Instruction, addresses: np.ndarray, width: int
    ) -> None:
        """Distinct sectors of each warp's request, against as few as its bytes could lie in."""
        found = counted.setdefault(instruction.line, Access())
        warps = f.machine.warp_of(f.threads)
        requests = int((warps[1:] != warps[:-1]).sum()) + 1
        found.requests += requests
        if len(addresses) == 1 and f.n > 1:
            found.sectors += requests * max(1, width // SECTOR_BYTES)
            found.least_sectors += requests * max(1, width // SECTOR_BYTES)
            found.bytes += requests * width
            return
        keys = warps.astype(np.uint64) << np.uint64(43) | addresses >> np.uint64(5)
        sectors = _distinct(keys)
        exact = warps.astype(np.uint64) << np.uint64(48) | addresses
        distinct_bytes = _distinct(exact) * width
        found.sectors += sectors
        found.bytes += distinct_bytes
        if distinct_bytes == f.n * width:
            lanes = np.diff(np.flatnonzero(np.concatenate(([True], warps[1:] != warps[:-1], [True]))))
            found.least_sectors += int((-(-lanes * width // SECTOR_BYTES)).sum())
        else:
            found.least_sectors += min(sectors, requests * -(-distinct_bytes // (requests * SECTOR_BYTES)))


def _distinct(keys: np.ndarray) -> int:
    steps = keys[1:] != keys[:-1]
    if (keys[1:] >= keys[:-1]).all():
        return int(steps.sum()) + 1
    return len(np.unique(keys))
