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
``sm_budget``
    Not a limit: the most SMs that the executor's kernel may use, for calls that name none.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from kvkernels.common.arguments import INT64_MAX
from kvkernels.common.text import ask, shortened
from kvkernels.reference.checks import EXECUTORS

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
    "sm_budget",
)


def checked(where: str, row: Any) -> dict[str, Any]:
    """A row of a file, without what is written there for people; ValueError, which names the key, where it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {shortened(row)}")
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
    if "sm_budget" in found and found["executor"] not in ("kernel", "bulk"):
        raise ValueError(
            f"{where}.sm_budget must be of a row with the executor 'kernel' or 'bulk', got {found['executor']!r}"
        )
    return found


def _check_value(where: str, key: str, value: Any) -> None:
    if key in _WORDS:
        if value not in _WORDS[key]:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, _WORDS[key]))}, got {shortened(value)}")
    elif key.startswith("capability"):
        if not isinstance(value, str) or re.fullmatch(r"\d{1,3}\.\d", value) is None:
            raise ValueError(f"{where} must be a compute capability such as '9.0', got {shortened(value)}")
    elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < INT64_MAX:
        raise ValueError(f"{where} must be an integer from 0 to {INT64_MAX - 1}, got {shortened(value)}")


def _number(key: str, value: Any) -> int:
    """A value as the compiled library takes it."""
    if key in _NUMBERED:
        return _NUMBERED[key].index(value)
    return int(value.replace(".", "") if isinstance(value, str) else value)


def numbers(rows: list[dict[str, Any]]) -> Tensor:
    """The rows as the compiled library takes them."""
    columns = [[_number(key, row[key]) if key in row else -1 for key in _KEYS] for row in rows]
    return torch.tensor(columns, dtype=torch.int64, device="cpu").reshape(len(rows), len(_KEYS))


def in_force(is_default: bool = False) -> list[dict[str, Any]]:
    """The rows that serve, or those that are compiled in; none without a compiled library."""
    rows = json.loads(ask(torch.ops.kvkernels._policy, is_default))
    return [{key: row[key] for key in (*_KEYS[1:], _KEYS[0]) if key in row} for row in rows]
