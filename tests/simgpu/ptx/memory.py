"""Memory as kernels see it, with what the sanitizer has to know of each byte.

An ``Area`` is one piece of it: a buffer in global memory, or all blocks' shared memory. Beside the data lie shadows:
which bytes nobody may rely on, and who wrote and read what (races.py). They are mapped sparsely, so an area of
gigabytes costs what is touched of it.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GRAIN = 16
_MAP_NORESERVE = 0x4000


def sparse_zeros(count: int, dtype: Any) -> np.ndarray:
    size = max(1, count * np.dtype(dtype).itemsize)
    if size < 1 << 20:
        return np.zeros(count, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype, count)


def host_bytes(begin: int, end: int) -> np.ndarray:
    """The process's own memory as an array."""
    return np.frombuffer((ctypes.c_uint8 * (end - begin)).from_address(begin), np.uint8)


@dataclass
class Buffer:
    """Global memory of a launch: an array, at its own address.

    ``written`` says which bytes may be read before the kernel writes them: all, none, or a mask.
    """

    name: str
    data: np.ndarray
    writable: bool = True
    written: bool | np.ndarray = True

    @property
    def address(self) -> int:
        return self.data.ctypes.data

    def area(self) -> Area:
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or not self.data.flags.c_contiguous:
            raise TypeError(f"{self.name} must be a flat array of uint8")
        return Area.of_host(self.name, self.address, self.data.nbytes, self.writable, self.written)


@dataclass
class Area:
    """``data[0]`` lies at ``base``, a multiple of 16; the bytes from ``begin`` to ``end`` (offsets) are there."""

    name: str
    data: np.ndarray
    base: int
    begin: int
    end: int
    writable: bool = True
    tracks_races: bool = True
    unwritten: np.ndarray | None = None
    # Names of the parts, as (offset, name), where there are several.
    parts: list[tuple[int, str]] = field(default_factory=list)
    # One copy of the area a block or thread.
    stride: int = 0

    def __post_init__(self) -> None:
        self.writers: Any = None
        self.readers: Any = None
        self.atomic_readers: Any = None  # which race with plain writes alone
        self.unstamped_reads: list[Any] = []
        # Of a private area: how many bytes of variables lie below an offset.
        self.inside = np.zeros(0, np.int64)

    @classmethod
    def of_host(cls, name: str, address: int, size: int, writable: bool, written: bool | np.ndarray) -> Area:
        base = address // GRAIN * GRAIN
        end = -(-(address + size) // GRAIN) * GRAIN
        area = cls(name, host_bytes(base, end), base, address - base, address - base + size, writable)
        if written is not True:
            area.unwritten = sparse_zeros(end - base, np.bool_)
            area.unwritten[area.begin : area.end] = True if written is False else ~written
        return area

    def words(self, shadow: np.ndarray, width: int) -> np.ndarray:
        """A shadow or the data, one row of ``width`` a word."""
        return shadow[: len(shadow) // width * width].reshape(-1, width)

    def part(self, offset: int) -> tuple[str, int]:
        """The buffer's name and the offset in it."""
        if self.stride:
            offset %= self.stride
        found = [part for part in self.parts if part[0] <= offset]
        if found:
            return found[-1][1], offset - found[-1][0]
        return self.name, offset - self.begin

    def load(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Rows of ``width`` bytes, at multiples of it."""
        if width <= 8:
            dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
            return self.data.view(dtype)[offsets // width].view(np.uint8).reshape(-1, width)
        wide = self.data.view(np.uint64).reshape(-1, width // 8) if width == 16 else self.words(self.data, width)
        return wide[offsets // width].view(np.uint8).reshape(-1, width)

    def store(self, offsets: np.ndarray, rows: np.ndarray) -> None:
        width = rows.shape[1]
        if width <= 8:
            dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
            self.data.view(dtype)[offsets // width] = rows.view(dtype).reshape(-1)
        elif width == 16:
            self.data.view(np.uint64).reshape(-1, 2)[offsets // width] = rows.view(np.uint64).reshape(-1, 2)
        else:
            self.words(self.data, width)[offsets // width] = rows

    def written_map(self) -> np.ndarray:
        """Which bytes were written since the launch."""
        if self.writers is None:
            return np.zeros(self.end - self.begin, bool)
        return self.writers.touched()[self.begin : self.end]
