"""Who wrote and read each byte last, and whether the next access was ordered after it.

Stamps are kept for granules of 16 bytes, which wide accesses touch as a whole, and for single bytes only in the
granules that a narrower access has touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import GRAIN, Area, sparse_zeros

NARROW = -1  # in a granule: see its bytes
# What stands for shadows that are not kept: agents are, ticks are all 1, and nothing was atomic.
NONE = (None, np.ones((1, 1), np.int32), np.zeros((1, 1), bool))
MANY = -2  # several agents; only where nothing orders threads anyway

Knows = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Who:
    """Stamps an access: an agent and its tick for each row; ``knows(rows, agents, ticks)`` tells what came before.

    A thread's accesses come one after the other, copies of one chain in any order.
    """

    agents: np.ndarray
    ticks: np.ndarray
    knows: Knows
    in_order: bool = True

    def of(self, rows: np.ndarray) -> Who:
        knows = self.knows
        of_rows = lambda at, agents, ticks: knows(rows[at], agents, ticks)  # noqa: E731
        return Who(self.agents[rows], self.ticks[rows], of_rows, self.in_order)


@dataclass
class Conflict:
    """Rows of an access that race with an earlier one."""

    rows: np.ndarray
    agents: np.ndarray  # who else
    kind: str


class Stamps:
    """Agent (plus 1; 0: nobody) and tick of every byte's last access, and whether it was an atomic one.

    Without ``ticks``, which a kernel that never synchronises has no use for, all are 1.
    """

    def __init__(self, size: int, ticks: bool) -> None:
        self.size = size
        kinds = [np.int32, np.int32 if ticks else None, None]
        self.wide = [kind and sparse_zeros(size // GRAIN, kind) for kind in kinds]
        self.narrow = [kind and sparse_zeros(size, kind) for kind in kinds]

    def mark_atomics(self) -> None:
        if self.wide[2] is None:
            self.wide[2] = sparse_zeros(self.size // GRAIN, np.bool_)
            self.narrow[2] = sparse_zeros(self.size, np.bool_)

    def find(self, offsets: np.ndarray, width: int) -> Iterator[tuple[np.ndarray | None, list[np.ndarray]]]:
        """Rows (None: all) and their stamps, in columns: one of a whole granule, or one a byte."""
        if width == GRAIN:
            granule = self.wide[0][offsets // GRAIN]
            narrow = granule == NARROW
            if not narrow.any():
                yield None, self._granules(offsets)
                return
            whole = np.flatnonzero(~narrow)
            if len(whole):
                yield whole, self._granules(offsets[whole])
            rows = np.flatnonzero(narrow)
            yield rows, self._bytes(offsets[rows], width)
            return
        self._split(offsets)
        yield None, self._bytes(offsets, width)

    def _granules(self, offsets: np.ndarray) -> list[np.ndarray]:
        at = offsets // GRAIN
        return [NONE[i] if s is None else s[at][:, None] for i, s in enumerate(self.wide)]

    def _bytes(self, offsets: np.ndarray, width: int) -> list[np.ndarray]:
        at = offsets // width
        return [NONE[i] if s is None else s.reshape(-1, width)[at] for i, s in enumerate(self.narrow)]

    def _split(self, offsets: np.ndarray) -> None:
        """Gives each byte of these granules a stamp of its own."""
        granules = offsets // GRAIN
        agents = self.wide[0][granules]
        whole = (agents != NARROW) & (agents != 0)
        if whole.any():
            for wide, narrow in zip(self.wide, self.narrow, strict=True):
                if wide is not None:
                    narrow.reshape(-1, GRAIN)[granules[whole]] = wide[granules[whole]][:, None]
        self.wide[0][granules] = NARROW

    def put(self, offsets: np.ndarray, width: int, agents: np.ndarray, ticks: np.ndarray, atomic: bool) -> None:
        """After ``find`` of the same place, which has split what had to be."""
        if atomic:
            self.mark_atomics()
        shadows, columns = (self.wide, 1) if width == GRAIN else (self.narrow, width)
        at = offsets // width
        for shadow, value in zip(shadows, (agents, ticks, np.full(1, atomic)), strict=True):
            if shadow is not None:
                shadow.reshape(-1, columns)[at] = value[:, None]

    def agents(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Of each row's first byte."""
        return self.wide[0][offsets // GRAIN] if width == GRAIN else self.narrow[0][offsets]

    def touched(self) -> np.ndarray:
        found = np.repeat(self.wide[0] > 0, GRAIN)
        split = np.flatnonzero(self.wide[0] == NARROW)
        found.reshape(-1, GRAIN)[split] = self.narrow[0].reshape(-1, GRAIN)[split] != 0
        return found


class Readers(Stamps):
    """Also keeps aside the readers that do not know of each other."""

    def __init__(self, size: int, ticks: bool) -> None:
        super().__init__(size, ticks)
        self.aside: list[tuple[np.ndarray, ...]] = []  # byte, agent and tick

    def keep(self, offsets: np.ndarray, width: int, agents: np.ndarray, ticks: np.ndarray) -> None:
        if len(offsets):
            places = (offsets[:, None] + np.arange(width)).reshape(-1)
            self.aside.append((places, np.repeat(agents, width), np.repeat(ticks, width)))

    def all_aside(self) -> tuple[np.ndarray, ...]:
        if len(self.aside) > 1:
            self.aside = [tuple(np.concatenate(column) for column in zip(*self.aside, strict=True))]
        return self.aside[0]


class RaceDetector:
    """Happens-before over bytes."""

    def __init__(self, synchronises: bool) -> None:
        # Where nothing orders threads, that there were other readers is all there is to know of them.
        self.synchronises = synchronises

    def load(self, area: Area, offsets: np.ndarray, width: int, who: Who, atomic: bool = False) -> list[Conflict]:
        if width > GRAIN:
            return self._in_halves(self.load, area, offsets, width, who, atomic)
        found = []
        if area.writers is not None:
            found = _against(area.writers, offsets, width, who, "read after write", atomic)
        elif not self.synchronises:
            # Most memory that is read is never written: what is not needed is not stamped.
            area.unstamped_reads.append((offsets, width, who, atomic))
            return found
        self._stamp_reads(area, offsets, width, who, atomic)
        return found

    def store(
        self, area: Area, offsets: np.ndarray, width: int, who: Who, atomic: bool = False, agrees: Any = False
    ) -> list[Conflict]:
        """``agrees``: rows whose bytes another row of this store has, too, so that it does not matter which is last."""
        if width > GRAIN:
            return self._in_halves(self.store, area, offsets, width, who, atomic, agrees)
        found = []
        for read in area.unstamped_reads:
            self._stamp_reads(area, *read)
        area.unstamped_reads.clear()
        for readers in (area.readers, None if atomic else area.atomic_readers):
            if readers is not None:
                found += _against(readers, offsets, width, who, "write after read", False)
                found += _against_aside(readers, offsets, width, who)
        if area.writers is None:
            area.writers = Stamps(len(area.data), self.synchronises)
        found += _against(area.writers, offsets, width, who, "write after write", atomic)
        area.writers.put(offsets, width, who.agents + 1, who.ticks, atomic)
        if not atomic and len(offsets) > 1:
            last = area.writers.agents(offsets, width)
            lost = (last != who.agents + 1) & ~np.asarray(agrees)
            if lost.any():
                found.append(Conflict(np.flatnonzero(lost), last[lost] - 1, "write after write"))
        return found

    def _in_halves(
        self, check: Callable[..., list[Conflict]], area: Area, offsets: np.ndarray, width: int, who: Who, *how: Any
    ) -> list[Conflict]:
        found = []
        for at in range(0, width, GRAIN):
            found += check(area, offsets + at, GRAIN, who, *how)
        return found

    def _stamp_reads(self, area: Area, offsets: np.ndarray, width: int, who: Who, atomic: bool) -> None:
        """Keeps the last reader where it knows of the one before it, and both where it does not."""
        readers = area.atomic_readers if atomic else area.readers
        if readers is None:
            readers = Readers(len(area.data), self.synchronises)
            if atomic:
                area.atomic_readers = readers
            else:
                area.readers = readers
        agents, ticks = who.agents + 1, who.ticks
        several = np.zeros(len(offsets), bool)
        for rows, (before, when, _) in readers.find(offsets, width):
            mine = slice(None) if rows is None else rows
            other = (before != 0) & (before != agents[mine][:, None])
            if not other.any():
                continue
            several[mine] |= other.any(axis=1)
            if self.synchronises:
                _keep_unknown(readers, offsets[mine], width, who if rows is None else who.of(rows), before, when, other)
        if self.synchronises:
            readers.put(offsets, width, agents, ticks, False)
            lost = readers.agents(offsets, width) != agents
            readers.keep(offsets[lost], width, who.agents[lost], ticks[lost])
            return
        readers.put(offsets, width, np.where(several, MANY, agents), ticks, False)
        last = readers.agents(offsets, width)
        lost = (last != agents) | several
        if lost.any():
            readers.put(offsets[lost], width, np.full(int(lost.sum()), MANY, np.int32), ticks[lost], False)


def _keep_unknown(
    readers: Readers, offsets: np.ndarray, width: int, who: Who, before: np.ndarray, when: np.ndarray, other: np.ndarray
) -> None:
    rows, columns = np.nonzero(other)
    agents, ticks = before[rows, columns] - 1, when[rows, columns]
    unknown = ~who.knows(rows, agents, ticks)
    step = width // before.shape[1]
    readers.keep(offsets[rows[unknown]] + columns[unknown] * step, step, agents[unknown], ticks[unknown])


def _against(stamps: Stamps, offsets: np.ndarray, width: int, who: Who, kind: str, atomic: bool) -> list[Conflict]:
    found = []
    for rows, (agents, ticks, by_atomics) in stamps.find(offsets, width):
        mine = who.agents if rows is None else who.agents[rows]
        other = agents != 0
        if who.in_order:
            other &= agents != (mine + 1)[:, None]
        if atomic:
            other &= ~by_atomics
        if not other.any():
            continue
        at, columns = np.nonzero(other)
        whole = at if rows is None else rows[at]
        others = agents[at, columns] - 1
        when = np.broadcast_to(ticks, agents.shape)[at, columns]
        unknown = (others < 0) | ~who.knows(whole, np.maximum(others, 0), when)
        if unknown.any():
            first, where = np.unique(whole[unknown], return_index=True)
            found.append(Conflict(first, others[unknown][where], kind))
    return found


def _against_aside(readers: Readers, offsets: np.ndarray, width: int, who: Who) -> list[Conflict]:
    if not readers.aside:
        return []
    places, agents, ticks = readers.all_aside()
    order = np.argsort(offsets, kind="stable")
    at = np.searchsorted(offsets[order], places, side="right") - 1
    row = order[np.maximum(at, 0)]
    hit = (at >= 0) & (places < offsets[row] + width) & (agents != who.agents[row])
    unknown = np.zeros(len(hit), bool)
    if hit.any():
        unknown[hit] = ~who.knows(row[hit], agents[hit], ticks[hit])
    if not unknown.any():
        return []
    rows, where = np.unique(row[unknown], return_index=True)
    return [Conflict(rows, agents[unknown][where], "write after read")]
