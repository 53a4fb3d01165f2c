"""The blocks that statistics know one by one: a table of numpy columns, a row a block."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BlockId = int | str | bytes
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

HASHES = 1 << 32
_COLUMNS = {"hits": np.int64, "misses": np.int64, "first": np.float64, "last": np.float64, "row": np.int64}


class KnownBlocks:
    """Blocks with a hash below a limit, which is halved until they are few enough.

    Parameters
    ----------
    most : int
        How many there may be.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = HASHES
        self.numbered = 0
        self._slots: dict[BlockId, int] = {}
        self._columns: dict[str, npt.NDArray[Any]] = {name: np.zeros(64, kind) for name, kind in _COLUMNS.items()}

    def __len__(self) -> int:
        return len(self._slots)

    def column(self, name: str) -> npt.NDArray[Any]:
        """``hits``, ``misses``, ``first``, ``last`` (seconds since the epoch) or ``row`` of every block."""
        return self._columns[name][: len(self._slots)]

    def ids(self) -> list[BlockId]:
        """In the columns' order."""
        return list(self._slots)

    def add(self, ids: Sequence[BlockId], hits: npt.NDArray[np.bool_], times: Floats) -> tuple[Ints, Ints, Floats]:
        """Count accesses in the order in which they were made.

        Returns
        -------
        tuple of array
            Of those to known blocks: which accesses, their blocks' rows; and the seconds since each block's last one,
            where it had one.
        """
        slots = np.fromiter(map(self._slots.get, ids, itertools.repeat(-1)), np.int64, len(ids))
        for place in np.flatnonzero(slots < 0).tolist():
            slots[place] = self._new(ids[place], float(times[place]))
        known = np.flatnonzero(slots >= 0)
        slots, hits, times = slots[known], hits[known], times[known]
        columns = self._columns
        fresh = columns["hits"][slots] + columns["misses"][slots] == 0
        # Together by block, in the order of time: what lies between two neighbours is an interval.
        order = np.argsort(slots, kind="stable")
        in_order, at = slots[order], times[order]
        before = np.empty_like(at)
        before[1:] = at[:-1]
        starts = np.ones(len(at), bool)
        starts[1:] = in_order[1:] != in_order[:-1]
        before[starts] = columns["last"][in_order[starts]]
        waited = (at - before)[~(starts & fresh[order])]
        np.add.at(columns["hits"], slots[hits], 1)
        np.add.at(columns["misses"], slots[~hits], 1)
        np.maximum.at(columns["last"], slots, times)
        rows = columns["row"][slots]
        self.forget()
        return known, rows, np.maximum(waited, 0.0)

    def put(self, block_id: BlockId, hits: int, misses: int, first: float, last: float, row: int) -> None:
        """Add what somebody else counted of a block."""
        slot = self._slots.get(block_id)
        if slot is None:
            slot = self._new(block_id, first, row)
            if slot < 0:
                return
        columns = self._columns
        columns["hits"][slot] += hits
        columns["misses"][slot] += misses
        columns["first"][slot] = min(columns["first"][slot], first)
        columns["last"][slot] = max(columns["last"][slot], last)

    def rows_of(self) -> Iterable[tuple[BlockId, list[Any]]]:
        """Each block with its columns."""
        values = [self.column(name).tolist() for name in _COLUMNS]
        return zip(self._slots, map(list, zip(*values, strict=True)), strict=True)

    def forget(self, limit: int | None = None) -> None:
        """Halve the limit until the blocks are few enough, or to another one's."""
        wanted = min(self.limit, limit or HASHES)
        while len(self._slots) > self.most or wanted < self.limit:
            self.limit //= 2
            keep = [slot for block_id, slot in self._slots.items() if hash_of(block_id) < self.limit]
            ids = self.ids()
            self._columns = {name: column[keep] for name, column in self._columns.items()}
            self._slots = {ids[slot]: place for place, slot in enumerate(keep)}

    def _new(self, block_id: BlockId, now: float, row: int | None = None) -> int:
        """A new block's slot, or that which it got meanwhile, or -1 where it is not among the known."""
        slot = self._slots.get(block_id)
        if slot is not None:
            return slot
        if hash_of(block_id) >= self.limit:
            return -1
        slot = self._slots[block_id] = len(self._slots)
        if slot >= len(self._columns["row"]):
            self._columns = {
                name: np.concatenate([column, np.zeros(len(column) + 64, column.dtype)])
                for name, column in self._columns.items()
            }
        if row is None:
            if isinstance(block_id, int) and 0 <= block_id < 1 << 40:
                row = block_id
            else:
                row, self.numbered = self.numbered, self.numbered + 1
        for name, value in (("hits", 0), ("misses", 0), ("first", now), ("last", now), ("row", row)):
            self._columns[name][slot] = value
        return slot


def hash_of(block_id: BlockId) -> int:
    """32 bits, the same in every process, unlike Python's own."""
    if isinstance(block_id, int):
        return (block_id * 0x9E3779B97F4A7C15 >> 32) & 0xFFFFFFFF
    return zlib.crc32(block_id if isinstance(block_id, bytes) else block_id.encode("utf-8", "surrogatepass"))
