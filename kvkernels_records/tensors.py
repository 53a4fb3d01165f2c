"""``.safetensors``: eight bytes of length, a JSON header, and the arrays' bytes end to end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kvkernels_records.arrayfile import Buffer, Entry, json_of, shape_of
from kvkernels_records.dtypes import DTYPES, Array, dtype_name
from kvkernels_records.errors import CaptureFileError

#: The metadata's key beside those of others.
METADATA = "kvkernels_capture"
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {code: DTYPES[name] for name, code in _CODES.items()}


def parse(path: Path, data: Buffer) -> tuple[dict[str, Entry], str | None]:
    """The arrays of a file, and the text of our metadata."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise CaptureFileError(f"{path}: is no .safetensors file, or is cut off")
    try:
        header = json_of(bytes(data[8 : 8 + size]))
    except ValueError as error:
        raise CaptureFileError(f"{path}: is no .safetensors file: its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise CaptureFileError(f"{path}: is no .safetensors file: its header is no JSON object")
    given = header.pop("__metadata__", {})
    text = given.get(METADATA) if isinstance(given, dict) else None
    if text is not None and not isinstance(text, str):
        raise CaptureFileError(f"{path}: its metadata is no text")
    start = 8 + size
    entries = {name: _entry(path, name, said, start) for name, said in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise CaptureFileError(f"{path}: {name} does not begin where the array before it ends")
        end += entry.nbytes
    if end != len(data):
        raise CaptureFileError(f"{path}: has {len(data)} bytes, and its header says {end}")
    return entries, text


def write(file: BinaryIO, arrays: Mapping[str, Array], metadata: str) -> None:
    """Write a file."""
    header: dict[str, object] = {"__metadata__": {METADATA: metadata}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _CODES[dtype_name(array.dtype)], "shape": list(array.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        little = array if array.dtype.names else array.astype(array.dtype.newbyteorder("<"), copy=False)
        for slab in little if little.ndim > 1 else [little]:
            file.write(np.ascontiguousarray(slab).data.cast("B") if slab.size else b"")


def _entry(path: Path, name: str, said: object, start: int) -> Entry:
    fault = CaptureFileError(f"{path}: {name} is not described as an array")
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise fault
    code, sizes, ends = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(sizes, list) or not isinstance(ends, list) or len(ends) != 2:
        raise fault
    if not all(type(number) is int and number >= 0 for number in (*sizes, *ends)) or ends[0] > ends[1]:
        raise fault
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CaptureFileError(f"{path}: {name} is of dtype {code!r}, which no capture holds")
    return Entry(shape_of(path, name, sizes, dtype, ends[1] - ends[0]), dtype, False, start + ends[0])
