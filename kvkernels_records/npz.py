"""``.npz``: numpy's arrays in a zip archive, ours stored as they are, so that they can be mapped."""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kvkernels_records.arrayfile import MOST_INFLATION, Buffer, Entry, shape_of
from kvkernels_records.dtypes import Array, dtype_name
from kvkernels_records.errors import CaptureFileError

METADATA = "metadata"
_HEADER = re.compile(r"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? *\}\s*")
_MOST_HEADER_BYTES = 10_000
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
# zipfile raises all of these for archives that are not what they seem.
_ZIP_ERRORS = (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError, LookupError, RuntimeError,
               OverflowError, struct.error)  # fmt: skip


def parse(path: Path, data: Buffer) -> tuple[dict[str, Entry], str | None]:
    """The arrays of an archive, and the text of its ``metadata``."""
    entries: dict[str, Entry] = {}
    text = None
    left = len(data)
    for member in _members(path):
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise CaptureFileError(f"{path}: {name!r} is no array")
        if name in entries or (name == METADATA and text is not None):
            raise CaptureFileError(f"{path}: {name} is there twice")
        left -= member.compress_size
        if left < 0:
            raise CaptureFileError(f"{path}: its members come to more than the file")
        offset = _start(path, data, member, name)
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CaptureFileError(f"{path}: {name} is encrypted or compressed by something else than deflate")
        deflated = member.compress_type == zipfile.ZIP_DEFLATED
        most = member.compress_size * MOST_INFLATION if deflated else member.compress_size
        if member.file_size > most or (not deflated and member.file_size != most):
            raise CaptureFileError(
                f"{path}: {name} says it has {member.file_size} bytes, which {member.compress_size} cannot come to"
            )
        packed = data[offset : offset + member.compress_size] if name == METADATA else None
        head = _head(path, data, offset, member, name, deflated=deflated)
        if name == METADATA and (found := _text(path, head, packed, member, deflated=deflated)) is not None:
            text = found
            continue
        entries[name] = _entry(path, name, head, offset, member, deflated=deflated)
    return entries, text


def write(file: BinaryIO, arrays: Mapping[str, Array], metadata: str) -> None:
    """Write an archive that numpy's ``load`` reads without pickles.

    Raises
    ------
    ValueError
        An array is of a dtype that numpy does not have.
    """
    for name, array in arrays.items():
        if array.dtype.names:
            raise ValueError(f"{name} is {dtype_name(array.dtype)}, which .npz does not have and .safetensors has")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in {**arrays, METADATA: np.array(metadata)}.items():
            # One date for all: equal captures are equal files.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=array.nbytes >= 1 << 31) as out:
                np.lib.format.write_array(out, np.asarray(array), allow_pickle=False)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except FileNotFoundError:
        raise
    except _ZIP_ERRORS as error:
        raise CaptureFileError(f"{path}: is no .npz file, or a damaged one: {error}") from None


def _start(path: Path, data: Buffer, member: zipfile.ZipInfo, name: str) -> int:
    """Where a member's bytes begin: its header in the file says so, not the directory at the end."""
    at = member.header_offset
    if at < 0 or at + _LOCAL.size > len(data):
        raise CaptureFileError(f"{path}: {name} begins outside of the file")
    fields = _LOCAL.unpack_from(data, at)
    start = at + _LOCAL.size + fields[-2] + fields[-1]
    if fields[0] != b"PK\x03\x04" or start + member.compress_size > len(data):
        raise CaptureFileError(f"{path}: {name} does not lie where the archive says")
    return int(start)


def _head(
    path: Path, data: Buffer, offset: int, member: zipfile.ZipInfo, name: str, *, deflated: bool
) -> tuple[str, bool, list[int], int]:
    """Type, order and sizes that an array's header says, and the header's bytes."""
    packed = data[offset : offset + min(member.compress_size, _MOST_HEADER_BYTES)]
    try:
        head = zlib.decompressobj(-15).decompress(packed, _MOST_HEADER_BYTES) if deflated else packed
    except zlib.error:
        raise CaptureFileError(f"{path}: {name} cannot be inflated") from None
    if head[:6] != b"\x93NUMPY" or len(head) < 12 or head[6] not in (1, 2, 3):
        raise CaptureFileError(f"{path}: {name} is no numpy array")
    begin, kind = (10, "<H") if head[6] == 1 else (12, "<I")
    size = begin + struct.unpack_from(kind, head, 8)[0]
    found = _HEADER.fullmatch(head[begin:size].decode("latin-1")) if size <= len(head) else None
    if not found:
        raise CaptureFileError(f"{path}: {name} is no plain array of numbers")
    sizes = [part.strip() for part in found[3].split(",") if part.strip()]
    if not all(part.isdigit() and len(part) < 20 for part in sizes):
        raise CaptureFileError(f"{path}: {name} has a shape that is none: ({found[3]})")
    return found[1], found[2] == "True", [int(part) for part in sizes], size


def _entry(
    path: Path, name: str, head: tuple[str, bool, list[int], int], offset: int, member: zipfile.ZipInfo,
    *, deflated: bool,
) -> Entry:  # fmt: skip
    descr, column_major, sizes, head_bytes = head
    if not re.fullmatch(r"[<>|=]?[fiub][1248]", descr):
        raise CaptureFileError(f"{path}: {name} is of numpy's type {descr!r}, which is no number that captures hold")
    try:
        dtype = np.dtype(descr)
        dtype_name(dtype)
    except TypeError:
        raise CaptureFileError(f"{path}: {name} is of numpy's type {descr!r}, which no capture holds") from None
    shape = shape_of(path, name, sizes, dtype, member.file_size - head_bytes)
    if deflated:
        return Entry(shape, dtype, column_major, offset, head_bytes, member.compress_size, member.CRC)
    return Entry(shape, dtype, column_major, offset + head_bytes, head_bytes, 0, member.CRC)


def _text(
    path: Path, head: tuple[str, bool, list[int], int], packed: bytes | None, member: zipfile.ZipInfo,
    *, deflated: bool,
) -> str | None:  # fmt: skip
    """What the member ``metadata`` says, or None where it is an array of numbers."""
    descr, _, sizes, head_bytes = head
    if not re.fullmatch(r"<U\d{1,10}", descr):
        return None
    try:
        raw = zlib.decompressobj(-15).decompress(packed or b"", member.file_size) if deflated else packed or b""
        text = raw[head_bytes:].decode("utf-32-le").rstrip("\0")
    except (zlib.error, UnicodeDecodeError):
        raise CaptureFileError(f"{path}: its metadata is damaged") from None
    if len(raw) != member.file_size or math.prod(sizes) != 1 or zlib.crc32(raw) != member.CRC:
        raise CaptureFileError(f"{path}: its metadata is damaged")
    return text
