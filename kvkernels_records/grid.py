"""Counts over time in a fixed number of cells: when time runs over the edge, cells become twice as wide."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Grid:
    """Rows of block numbers by columns of time.

    Both begin at width 1 and are folded in pairs whenever something lies beyond the last, so that a grid never grows.
    Columns are multiples of their width since the epoch, so that grids of different processes have the same ones.

    Parameters
    ----------
    rows, columns : int
        Even.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.counts: Ints = np.zeros((rows, columns), np.int64)
        self.row_width = 1
        self.column_s = 1
        self.first_column: int | None = None

    def add(self, rows: Ints, seconds: Ints, counts: Ints | None = None) -> None:
        """Add points: a block's number and the second since the epoch, each once or ``counts`` times."""
        if not len(rows):
            return
        self._make_room(int(seconds.min()), int(seconds.max()), int(rows.max()))
        assert self.first_column is not None
        columns = seconds // self.column_s - self.first_column
        np.add.at(self.counts, (rows // self.row_width, columns), 1 if counts is None else counts)

    def merge(self, other: Grid) -> None:
        """Add another grid of the same size."""
        if other.first_column is None:
            return
        rows, columns = np.nonzero(other.counts)
        seconds = (columns + other.first_column) * other.column_s
        self.add(rows * other.row_width, seconds, other.counts[rows, columns])

    def starts_s(self) -> list[int]:
        """When each column begins."""
        if self.first_column is None:
            return []
        return [(self.first_column + column) * self.column_s for column in range(self.counts.shape[1])]

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"counts": self.counts.tolist(), "row_width": self.row_width, "column_s": self.column_s,
                "first_column": self.first_column}  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Grid:
        """What ``state`` said."""
        counts = np.array(state["counts"], np.int64)
        found = cls(*counts.shape)
        found.counts = counts
        found.row_width, found.column_s = int(state["row_width"]), int(state["column_s"])
        found.first_column = state["first_column"]
        return found

    def _make_room(self, first_s: int, last_s: int, last_row: int) -> None:
        rows, columns = self.counts.shape
        while last_row >= rows * self.row_width:
            self.counts = self._folded(self.counts)
            self.row_width *= 2
        if self.first_column is None:
            self.first_column = first_s // self.column_s
        while True:
            first = min(self.first_column, first_s // self.column_s)
            if max(last_s // self.column_s, self._last_column()) - first < columns:
                break
            # Columns are paired by their place since the epoch, not by their place in the grid.
            padded = np.zeros((rows, columns + 2), np.int64)
            odd = self.first_column % 2
            padded[:, odd : odd + columns] = self.counts
            halves = padded.reshape(rows, -1, 2).sum(axis=2)
            self.counts = np.zeros((rows, columns), np.int64)
            self.counts[:, : halves.shape[1]] = halves
            self.column_s *= 2
            self.first_column //= 2
        if first < self.first_column:  # an access of another process, earlier than all of ours
            moved = self.first_column - first
            self.counts = np.roll(self.counts, moved, axis=1)  # the last columns are empty
            self.first_column = first

    def _last_column(self) -> int:
        used = np.flatnonzero(self.counts.any(axis=0))
        return (self.first_column or 0) + (int(used[-1]) if len(used) else 0)

    @staticmethod
    def _folded(counts: Ints) -> Ints:
        rows, columns = counts.shape
        found = np.zeros_like(counts)
        found[: rows // 2] = counts.reshape(rows // 2, 2, columns).sum(axis=1)
        return found
