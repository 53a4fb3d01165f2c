"""What can be compared: a file of arrays, the files of several ranks as one, or a folder of SGLang's dumps."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvkernels_records.arrayfile import ArrayFile
from kvkernels_records.capture import parse_name
from kvkernels_records.dtypes import BFLOAT16, DTYPES, Array, dtype_name
from kvkernels_records.errors import CaptureFileError, MissingExtraError
from kvkernels_records.files import check_sums, open_arrays
from kvkernels_records.measure import Joined, Rows

#: Orders of axes that a file's ``layout`` may name: heads, tokens, dim.
_LAYOUTS = {"H T D": (0, 1, 2), "T H D": (1, 0, 2), "H D T": (0, 2, 1), "T D H": (2, 0, 1), "D H T": (1, 2, 0)}


class Source(ABC):
    """Arrays by name, and what is known of them. Nothing is read before it is asked for.

    Parameters
    ----------
    label : str
        For messages.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.metadata: Mapping[str, Any] = {}
        self.names: list[str] = []

    @abstractmethod
    def rows(self, name: str) -> Rows:
        """One array, perhaps in parts."""

    def first_token(self, name: str) -> int:
        """The place of an array's first token in its request."""
        parsed = parse_name(name)
        notes = self.metadata.get("layers")
        note = notes.get(f"{parsed[0]} {parsed[1]}") if parsed and isinstance(notes, dict) else None
        first = note.get("first_token") if isinstance(note, dict) else 0
        return first if type(first) is int else 0


class FilesSource(Source):
    """One file, or one a rank, whose heads are joined in the order of the ranks."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        super().__init__(" + ".join(map(str, paths)))
        files = [open_arrays(path) for path in paths]
        for file in files:
            check_sums(file)
        self._files = _by_rank(files) if len(files) > 1 else files
        self.metadata = self._files[0].metadata or {}
        self.names = list(self._files[0].entries)
        for file in self._files[1:]:
            if file.entries.keys() != self._files[0].entries.keys():
                differing = sorted(file.entries.keys() ^ self._files[0].entries.keys())
                raise CaptureFileError(f"{file.path}: does not have the arrays of the first rank: {differing[0]}")
        layout = self.metadata.get("layout", "H T D")
        if layout not in _LAYOUTS:
            raise CaptureFileError(f"{self.label}: its layout must be of {', '.join(_LAYOUTS)}, got {layout!r}")
        self._axes = _LAYOUTS[layout]

    def rows(self, name: str) -> Rows:
        parts = [self._arranged(name, file.array(name)) for file in self._files]
        parsed = parse_name(name)
        if len(parts) == 1 or (parsed and parsed[2] not in ("key", "value")):
            return parts[0]  # what has no heads every rank has
        first = parts[0]
        for rank, part in enumerate(parts):
            if part.ndim != first.ndim or not part.ndim or part.shape[1:] != first.shape[1:]:
                raise CaptureFileError(
                    f"{self._files[rank].path}: {name} is {part.shape}, which cannot be joined with {first.shape}"
                )
            if part.dtype != first.dtype:
                raise CaptureFileError(f"{self._files[rank].path}: {name} is not of the first rank's dtype")
        return Joined(parts)

    def _arranged(self, name: str, array: Array) -> Array:
        parsed = parse_name(name)
        return array.transpose(self._axes) if parsed and parsed[2] in ("key", "value") and array.ndim == 3 else array


class DumpSource(Source):
    """Tensors that SGLang's dumper saved, a file each, or one such file; by torch's loader that runs no code."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
        self._files: dict[str, Path] = {}
        for file in files:
            fields = [field for field in file.stem.split("___") if not field.startswith("dump_index=")]
            name = "___".join(fields)
            if name in self._files:
                raise CaptureFileError(f"{path}: {name} is there twice")
            self._files[name] = file
        self.names = list(self._files)

    def rows(self, name: str) -> Rows:
        try:
            import torch
        except ModuleNotFoundError:
            raise MissingExtraError(f"{self._files[name]}: a .pt file needs torch, which is not installed") from None
        try:
            found = torch.load(self._files[name], map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the loader meets in a file that is none
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise CaptureFileError(f"{self._files[name]}: torch's safe loader refuses it: {reason}") from None
        tensor = found.get("value") if isinstance(found, dict) else found
        if not isinstance(tensor, torch.Tensor):
            raise CaptureFileError(f"{self._files[name]}: holds no tensor")
        return numpy_of(tensor)


def open_source(paths: Sequence[str | os.PathLike[str]]) -> Source:
    """What one side of a comparison names.

    Raises
    ------
    FileNotFoundError
        Something is not there.
    CaptureFileError
        It is nothing that can be compared, or damaged.
    """
    first = Path(paths[0])
    if not first.exists():
        raise FileNotFoundError(f"{first}: there is no such file")
    if len(paths) == 1 and (first.is_dir() or first.suffix == ".pt"):
        return DumpSource(first)
    return FilesSource(paths)


def numpy_of(tensor: Any) -> Array:
    """A torch tensor on the host as an array, without a copy where numpy has its dtype.

    Raises
    ------
    CaptureFileError
        No capture holds its dtype.
    """
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CaptureFileError(f"a tensor of dtype {name} cannot be captured")
    tensor = tensor.detach().cpu()
    dtype = DTYPES[name]
    if not dtype.names:
        return np.asarray(tensor.numpy())
    bits = tensor.contiguous().view(torch.uint16 if dtype == BFLOAT16 else torch.uint8)
    found: Array = bits.numpy().view(dtype)
    assert dtype_name(found.dtype) == name
    return found


def _by_rank(files: list[ArrayFile]) -> list[ArrayFile]:
    """In the order of the ranks that the files say they are, or as given where none says so."""
    ranks = [(file.metadata or {}).get("tp_rank") for file in files]
    if all(rank is None for rank in ranks):
        return files
    if sorted(map(str, ranks)) != sorted(map(str, range(len(files)))):
        raise CaptureFileError(
            f"{files[0].path}: the files must be of the ranks 0 to {len(files) - 1}, got {', '.join(map(str, ranks))}"
        )
    return [file for _, file in sorted(zip(ranks, files, strict=True), key=lambda pair: int(str(pair[0])))]
