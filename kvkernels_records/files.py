"""Captures as files: what is written is written whole or not at all, and what is read is checked first."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvkernels_records import npz, tensors
from kvkernels_records.arrayfile import ArrayFile
from kvkernels_records.capture import CaptureResult, LayerCapture, parse_name
from kvkernels_records.dtypes import Array, dtype_name
from kvkernels_records.errors import CaptureFileError

FORMAT = "kvkernels-capture/1"
SUFFIXES = (".npz", ".safetensors")
_OURS = ("format", "layers", "checksum")
_SLAB_BYTES = 8 << 20


def save_capture(result: CaptureResult, path: str | os.PathLike[str]) -> Path:
    """Write a capture.

    Folders are made, and the file appears under its name when all of it is on the disk. With it go the checksums of
    every array and of the metadata. Equal captures give equal files.

    Parameters
    ----------
    result : CaptureResult
    path : path-like
        ``.npz``, or ``.safetensors``, which has bfloat16 and 8-bit floats. Where it ends in neither, the one is added
        that has the capture's dtypes, ``.npz`` if both have.

    Returns
    -------
    Path
        Where it is.

    Raises
    ------
    ValueError
        The format lacks a dtype, or the metadata is no strict JSON.
    OSError
        It cannot be written; nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> from kvkernels_records import capture_kv_mock
    >>> folder = tempfile.mkdtemp()
    >>> path = save_capture(capture_kv_mock("a b c", layers=[0]), f"{folder}/new/capture")
    >>> path.name, load_capture(path).get(0).key.shape
    ('capture.npz', (32, 3, 128))
    """
    arrays = result.arrays()
    return save_arrays(arrays, {"layers": _notes_of(result), **result.metadata}, path)


def save_arrays(arrays: Mapping[str, Array], metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write named arrays with metadata and checksums, as ``save_capture`` does."""
    target = Path(path)
    if target.suffix not in SUFFIXES:
        needs_more = any(array.dtype.names for array in arrays.values())
        target = target.with_name(target.name + (".safetensors" if needs_more else ".npz"))
    whole = {**metadata, "format": FORMAT}
    whole["checksum"] = {"algorithm": "sha256", "arrays": {name: _digest(array) for name, array in arrays.items()}}
    whole["checksum"]["metadata"] = _metadata_digest(whole)
    try:
        text = json.dumps(whole, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_capture: metadata must be strict JSON: {error}") from None
    write = npz.write if target.suffix == ".npz" else tensors.write
    try:
        write_whole(target, lambda file: write(file, arrays, text))
    except ValueError as error:
        raise ValueError(f"save_capture: path must fit the dtypes, got {target}: {error}") from None
    return target


def load_capture(path: str | os.PathLike[str], *, verify: bool = True) -> CaptureResult:
    """Read a capture. Its arrays are read-only views of the file's pages.

    Parameters
    ----------
    path : path-like
    verify : bool
        Compare the checksums, which reads all of it.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CaptureFileError
        It is no capture, or a damaged one.
    """
    with open_arrays(path) as file:
        if file.metadata is None:
            raise CaptureFileError(f"{path}: is no capture: it has no metadata")
        if verify:
            check_sums(file)
        places: dict[tuple[int, str], dict[str, Array]] = {}
        for name in file.entries:
            parsed = parse_name(name)
            if parsed is None:
                raise CaptureFileError(f"{path}: is no capture: it holds {name}")
            places.setdefault(parsed[:2], {})[parsed[2]] = file.array(name)
        notes = file.metadata.get("layers", {})
        try:
            layers = [
                _layer(layer, point, parts, notes.get(f"{layer} {point}", {}))
                for (layer, point), parts in places.items()
            ]
            rest = {key: value for key, value in file.metadata.items() if key not in _OURS}
            return CaptureResult(layers, rest)
        except (ValueError, TypeError, AttributeError) as error:
            raise CaptureFileError(f"{path}: is no capture: {error}") from None


def open_arrays(path: str | os.PathLike[str]) -> ArrayFile:
    """Open an ``.npz`` or ``.safetensors`` file, a capture or not.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CaptureFileError
        It is neither, or damaged.
    """
    found = Path(path)
    if found.is_dir():
        raise CaptureFileError(f"{path}: is a folder")
    if not found.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if found.suffix not in SUFFIXES:
        raise CaptureFileError(f"{path}: must end in {' or '.join(SUFFIXES)}")
    return ArrayFile(found, npz.parse if found.suffix == ".npz" else tensors.parse)


def check_sums(file: ArrayFile) -> None:
    """Compare a file with the checksums in it, or else with the archive's.

    Raises
    ------
    CaptureFileError
        Something differs; the text says what.
    """
    metadata = file.metadata or {}
    if metadata.get("format", FORMAT) != FORMAT:
        raise CaptureFileError(f"{file.path}: is of the format {metadata['format']!r}, and this reads {FORMAT!r}")
    sums = metadata.get("checksum")
    if sums is None and "format" not in metadata:
        for name in file.entries:
            file.check_crc(name)
        return
    said = sums.get("arrays") if isinstance(sums, dict) else None
    if not isinstance(sums, dict) or not isinstance(said, dict) or sums.get("metadata") != _metadata_digest(metadata):
        raise CaptureFileError(f"{file.path}: its metadata is damaged: the checksum differs")
    if said.keys() != file.entries.keys():
        differing = sorted(said.keys() ^ file.entries.keys())
        raise CaptureFileError(f"{file.path}: the arrays are not those that were written: {', '.join(differing[:4])}")
    for name, digest in said.items():
        if digest != _digest(file.array(name)):
            raise CaptureFileError(f"{file.path}: {name} is damaged: the checksum differs")


def write_whole(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, and give it its own when all of it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def slabs_of(array: Array, most_bytes: int = _SLAB_BYTES) -> Iterator[Array]:
    """An array's parts in order, contiguous, a few MiB each."""
    if array.nbytes <= most_bytes or array.ndim == 0:
        yield np.ascontiguousarray(array)
    elif array.ndim == 1:
        step = max(1, most_bytes // array.itemsize)
        for start in range(0, len(array), step):
            yield np.ascontiguousarray(array[start : start + step])
    else:
        for row in array:
            yield from slabs_of(row, most_bytes)


def _digest(array: Array) -> str:
    digest = hashlib.sha256(f"{dtype_name(array.dtype)} {array.shape}".encode())
    for slab in slabs_of(array):
        little = slab if slab.dtype.names else slab.astype(slab.dtype.newbyteorder("<"), copy=False)
        digest.update(little.tobytes() if little.size == 0 else little.data.cast("B"))
    return digest.hexdigest()


def _metadata_digest(metadata: Mapping[str, Any]) -> str:
    """Of everything but itself."""
    sums = {key: value for key, value in metadata["checksum"].items() if key != "metadata"}
    try:
        text = json.dumps({**metadata, "checksum": sums}, sort_keys=True)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"save_capture: metadata must be strict JSON: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _notes_of(result: CaptureResult) -> dict[str, dict[str, Any]]:
    """What is to be known of a layer beside its arrays."""
    return {
        f"{one.layer_index} {one.capture_point}": {"kind": one.kind, "first_token": one.first_token} for one in result
    }


def _layer(index: int, point: str, parts: dict[str, Array], notes: dict[str, Any]) -> LayerCapture:
    first_token = notes.get("first_token", 0)
    if type(first_token) is not int or first_token < 0:
        raise ValueError(f"layer {index} begins with token {first_token!r}")
    key, value = parts.pop("key", None), parts.pop("value", None)
    return LayerCapture(index, point, key, value, notes.get("kind", "full_attention"), parts, first_token)
