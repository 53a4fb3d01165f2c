"""Which executor ``auto`` takes for calls with a tensor on a GPU: a table, compiled in or from a file.

The first row that fits a call, and whose executor does not refuse it, is taken; where none is, the first of ``dma``,
``kernel`` and ``triton`` that serves. A row is an object with the key ``executor`` and any of these, each of which
limits what it is for:

``direction``
    ``h2d``, ``d2h`` or ``d2d``.
``link``
    ``coherent`` where the device follows the host's page tables, ``pcie`` elsewhere.
``capability_at_least``, ``capability_below``
    Compute capabilities as text, such as ``"9.0"``.
``copies``
    ``batched`` where the driver and the stream let many copies go to the copy engine by one call; elsewhere, which
    includes graph capture and the legacy default stream, ``one_by_one``.
``count_at_least``, ``count_below``
    Contiguous fragments, after neighbours were joined.
``fragment_bytes_below``
    Of a fragment on average.
``ring_copy_bytes_at_least``
    Of ``staged`` alone: bytes of its copies over the link, on average.

A file is JSON: ``{"rows": [...]}``, with a ``comment`` beside ``rows`` and in each row where one is wanted.
``KVKERNELS_POLICY`` names it, and is read when kvkernels is imported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvkernels import registration  # noqa: F401  (the private ops exist once it is imported)
from kvkernels.common.arguments import INT64_MAX
from kvkernels.common.text import ask
from kvkernels.reference.checks import EXECUTORS

VARIABLE = "KVKERNELS_POLICY"
DEFAULT = "default"

_WORDS = {
    "executor": ("kernel", "bulk", "dma", "staged", "triton"),
    "direction": ("h2d", "d2h", "d2d"),
    "link": ("pcie", "coherent"),
    "copies": ("one_by_one", "batched"),
}
# Words by their number in the compiled library.
_NUMBERED = {**_WORDS, "executor": EXECUTORS, "direction": ("h2h", *_WORDS["direction"])}
_RANGES = (("capability_at_least", "capability_below"), ("count_at_least", "count_below"))
# In the order in which the compiled library takes them.
_KEYS = (
    "executor",
    "direction",
    "link",
    "capability_at_least",
    "capability_below",
    "copies",
    "count_at_least",
    "count_below",
    "fragment_bytes_below",
    "ring_copy_bytes_at_least",
)


def in_force() -> dict[str, Any]:
    """The table that ``auto`` goes by, and where it came from.

    Returns
    -------
    dict
        ``source``, ``"default"`` or the file that ``KVKERNELS_POLICY`` named, and ``rows``. Without a compiled library
        there is nothing to choose from and no row.

    Examples
    --------
    >>> from kvkernels import policy
    >>> policy.in_force()["source"]
    'default'
    """
    return {"source": _SOURCE, "rows": _rows(is_default=False)}


def default() -> dict[str, Any]:
    """The table that is compiled in, as ``in_force`` has it."""
    return {"source": DEFAULT, "rows": _rows(is_default=True)}


def load(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, checked, without what is written there for people.

    Parameters
    ----------
    path : str or Path
        JSON as this module describes it.

    Returns
    -------
    list of dict

    Raises
    ------
    ValueError
        The file cannot be read or is no such table; the message has the file, the row and the key.
    """
    try:
        table = json.loads(Path(path).read_text(), object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: {path} must be a file with JSON, got {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
        raise ValueError(f"{VARIABLE}: {path} must be an object with a list 'rows', got {_short(table)}")
    if unknown := table.keys() - {"rows", "comment"}:
        raise ValueError(f"{VARIABLE}: {path} must have the keys 'rows' and 'comment' alone, got {min(unknown)!r}")
    return [_checked(f"{VARIABLE}: {path}: rows[{i}]", row) for i, row in enumerate(table["rows"])]


def text_of(table: Mapping[str, Any]) -> str:
    """A table as a file that ``KVKERNELS_POLICY`` may name, a row a line."""
    rows = ",\n".join("    " + json.dumps(row) for row in table["rows"])
    return f'{{\n  "comment": {json.dumps(table["source"])},\n  "rows": [\n{rows}\n  ]\n}}'


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object with a key that comes twice among {[key for key, _ in pairs]}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _checked(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {_short(row)}")
    found = {key: value for key, value in row.items() if key != "comment"}
    if unknown := found.keys() - set(_KEYS):
        raise ValueError(f"{where} must have the keys {', '.join(_KEYS)} and comment alone, got {min(unknown)!r}")
    if "executor" not in found:
        raise ValueError(f"{where}.executor must be there, got a row without")
    for key, value in found.items():
        _check_value(f"{where}.{key}", key, value)
    for at_least, below in _RANGES:
        if at_least in found and below in found and _number(at_least, found[at_least]) >= _number(below, found[below]):
            raise ValueError(f"{where}.{below} must be more than {at_least}, got {found[below]!r}")
    if "ring_copy_bytes_at_least" in found and found["executor"] != "staged":
        raise ValueError(
            f"{where}.ring_copy_bytes_at_least must be of a row with the executor 'staged', got {found['executor']!r}"
        )
    return found


def _check_value(where: str, key: str, value: Any) -> None:
    if key in _WORDS:
        if value not in _WORDS[key]:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, _WORDS[key]))}, got {_short(value)}")
    elif key.startswith("capability"):
        if not isinstance(value, str) or re.fullmatch(r"\d{1,3}\.\d", value) is None:
            raise ValueError(f"{where} must be a compute capability such as '9.0', got {_short(value)}")
    elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < INT64_MAX:
        raise ValueError(f"{where} must be an integer from 0 to {INT64_MAX - 1}, got {_short(value)}")


def _number(key: str, value: Any) -> int:
    """A value as the compiled library takes it."""
    if key in _NUMBERED:
        return _NUMBERED[key].index(value)
    return int(value.replace(".", "") if isinstance(value, str) else value)


def _numbers(rows: list[dict[str, Any]]) -> Tensor:
    columns = [[_number(key, row[key]) if key in row else -1 for key in _KEYS] for row in rows]
    return torch.tensor(columns, dtype=torch.int64, device="cpu").reshape(len(rows), len(_KEYS))


def _rows(is_default: bool) -> list[dict[str, Any]]:
    rows = json.loads(ask(torch.ops.kvkernels._policy, is_default))
    return [{key: row[key] for key in (*_KEYS[1:], _KEYS[0]) if key in row} for row in rows]


def _read_environment() -> str:
    """Sets the table that the environment names, and says where the one in force is from."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return DEFAULT
    rows = load(path)
    with _disable_current_modes():
        torch.ops.kvkernels._set_policy(_numbers(rows))
    return path


_SOURCE = _read_environment()
