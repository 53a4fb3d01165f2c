"""A file of named arrays, mapped into memory and read without trust.

Nothing is believed that the file says of itself before it fits into the file's size: not the sizes of arrays, nor what
a compressed one will come to. No object is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from kvkernels_records.dtypes import Array
from kvkernels_records.errors import CaptureFileError

Buffer = mmap.mmap | bytes
#: No deflated stream comes to more than this times its own size.
MOST_INFLATION = 1032
_IN_MEMORY_BYTES = 16 << 20
_STEP_BYTES = 1 << 20


class Entry(NamedTuple):
    """Where an array lies in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    column_major: bool
    offset: int  # in the file; of the stream where it is deflated
    skipped_bytes: int = 0  # of a header before the array, inside of a stream where it is deflated
    deflated_bytes: int = 0  # 0: it is stored as it is
    crc: int | None = None  # of header and array

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


#: What reads a format: the file's entries, and its metadata as text, or None where it has none.
Parser = Callable[[Path, Buffer], tuple[dict[str, Entry], str | None]]


class ArrayFile:
    """Named arrays of a file that is open, and the metadata beside them.

    Arrays are views of the file's pages, read-only; they stay valid after ``close``. Compressed ones are inflated when
    they are asked for, large ones into an unnamed temporary file. Not for several threads.

    Parameters
    ----------
    path : Path
    parse : Parser

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CaptureFileError
        It is not of the format, or damaged.
    """

    def __init__(self, path: Path, parse: Parser) -> None:
        self.path = path
        self._map: Buffer = map_file(path)
        self.entries, text = parse(path, self._map)
        self.metadata: dict[str, Any] | None = None if text is None else _metadata_of(path, text)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back, at once or when the last array is gone."""
        if isinstance(self._map, mmap.mmap):
            with contextlib.suppress(BufferError):  # arrays still look at it
                self._map.close()

    def array(self, name: str) -> Array:
        """One array.

        Raises
        ------
        KeyError
            There is none of that name.
        CaptureFileError
            It is compressed, and damaged.
        """
        entry = self.entries[name]
        buffer, offset = self._map, entry.offset
        if entry.deflated_bytes:
            buffer, offset = self._inflated(name, entry), 0
        flat = np.frombuffer(buffer, entry.dtype, math.prod(entry.shape), offset)
        return flat.reshape(entry.shape, order="F" if entry.column_major else "C")

    def check_crc(self, name: str) -> None:
        """Compare an array with the archive's own checksum, where the format has one.

        Raises
        ------
        CaptureFileError
            They differ.
        """
        entry = self.entries[name]
        if entry.deflated_bytes:
            self.array(name)
        elif entry.crc is not None:
            crc = 0
            end = entry.offset + entry.nbytes
            for start in range(entry.offset - entry.skipped_bytes, end, _STEP_BYTES):
                crc = zlib.crc32(self._map[start : min(end, start + _STEP_BYTES)], crc)
            if crc != entry.crc:
                raise CaptureFileError(f"{self.path}: {name} is damaged: its CRC differs")

    def _inflated(self, name: str, entry: Entry) -> Buffer:
        stream = zlib.decompressobj(-15)
        position, end = entry.offset, entry.offset + entry.deflated_bytes
        crc = 0
        skip, missing = entry.skipped_bytes, entry.nbytes
        in_memory = entry.nbytes <= _IN_MEMORY_BYTES
        parts: list[bytes] = []
        with tempfile.TemporaryFile() as spool:
            pending = b""
            while missing or skip:
                if not pending and position < end:
                    pending = bytes(self._map[position : min(end, position + _STEP_BYTES)])
                    position += len(pending)
                try:
                    out = stream.decompress(pending, min(_STEP_BYTES, skip + missing))
                except zlib.error:
                    raise CaptureFileError(f"{self.path}: {name} cannot be inflated") from None
                pending = stream.unconsumed_tail
                if not out and not pending and (position >= end or stream.eof):
                    raise CaptureFileError(f"{self.path}: {name} ends early")
                crc = zlib.crc32(out, crc)
                out, skip = out[skip:], max(0, skip - len(out))
                missing -= len(out)
                if in_memory:
                    parts.append(out)
                else:
                    spool.write(out)
            if crc != entry.crc:
                raise CaptureFileError(f"{self.path}: {name} is damaged: its CRC differs")
            if in_memory:
                return b"".join(parts)
            spool.flush()
            return mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)


def map_file(path: Path) -> Buffer:
    """A file's bytes."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def shape_of(path: Path, name: str, sizes: list[int], dtype: np.dtype[Any], nbytes: int) -> tuple[int, ...]:
    """A shape, once it is known to be that of as many bytes as there are."""
    if len(sizes) > 32:
        raise CaptureFileError(f"{path}: {name} has {len(sizes)} dimensions")
    if any(size < 0 for size in sizes) or math.prod(sizes) * dtype.itemsize != nbytes:
        raise CaptureFileError(f"{path}: {name} has {nbytes} bytes, which are not those of its shape and dtype")
    if math.prod(size for size in sizes if size) > np.iinfo(np.intp).max:
        raise CaptureFileError(f"{path}: {name} is empty and of a shape that is too large")
    return tuple(sizes)


def json_of(text: str | bytes) -> Any:
    """JSON in which no key is given twice, or ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _metadata_of(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json_of(text)
    except ValueError as error:
        raise CaptureFileError(f"{path}: its metadata is no JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise CaptureFileError(f"{path}: its metadata is no JSON object")
    return dict(found)
