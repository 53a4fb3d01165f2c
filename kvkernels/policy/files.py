"""Policy files: where they are, what is in one, and how one is written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvkernels.common.text import shortened
from kvkernels.policy import cpu, rows

VARIABLE = "KVKERNELS_POLICY"
FORMAT = 1
_KEYS = ("comment", "format", "machine", "measured", "cpu", "rows")


def cache_path() -> Path | None:
    """Where ``python -m kvkernels tune`` writes, and what is read where no variable names a file.

    Returns
    -------
    Path or None
        ``kvkernels/policy.json`` in ``XDG_CACHE_HOME``, or in ``~/.cache`` where that is not an absolute path; None
        where the user has no home.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "kvkernels" / "policy.json"


def load(path: str | Path) -> dict[str, Any]:
    """What a file says, checked, without what is written there for people.

    Parameters
    ----------
    path : str or Path
        JSON as ``kvkernels.policy`` describes it.

    Returns
    -------
    dict
        ``rows``, ``cpu``, ``machine`` and ``measured``, as far as they are there.

    Raises
    ------
    ValueError
        The file cannot be read, or is no such table; the message has the file, the row and the key.
    """
    where = f"{VARIABLE}: {path}"
    try:
        table = json.loads(Path(path).read_text(), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a file with JSON, got {error}") from error
    if not isinstance(table, dict) or not ("rows" in table or "cpu" in table):
        raise ValueError(f"{where} must be an object with 'rows' or 'cpu', got {shortened(table)}")
    if table.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{where}: format must be {FORMAT}, got {shortened(table['format'])}: measure again")
    if unknown := table.keys() - set(_KEYS):
        raise ValueError(f"{where} must have the keys {', '.join(_KEYS)} alone, got {min(unknown)!r}")
    found: dict[str, Any] = {}
    for key in ("machine", "measured"):
        if key in table:
            if not isinstance(table[key], dict):
                raise ValueError(f"{where}: {key} must be an object, got {shortened(table[key])}")
            found[key] = table[key]
    if "cpu" in table:
        found["cpu"] = cpu.checked(f"{where}: cpu", table["cpu"])
    if "rows" in table:
        if not isinstance(table["rows"], list):
            raise ValueError(f"{where}: rows must be a list, got {shortened(table['rows'])}")
        found["rows"] = [rows.checked(f"{where}: rows[{i}]", row) for i, row in enumerate(table["rows"])]
    return found


def text_of(table: Mapping[str, Any]) -> str:
    """A table as a file that ``KVKERNELS_POLICY`` may name, a row a line."""
    parts = {"comment": table["source"]} if table.get("source") else {}
    parts |= {key: table[key] for key in _KEYS[1:-1] if table.get(key) is not None}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()]
    if table.get("rows") is not None:
        listed = ",\n".join("    " + json.dumps(row) for row in table["rows"])
        lines.append(f'  "rows": [\n{listed}\n  ]')
    return "{\n" + ",\n".join(lines) + "\n}"


def write(path: str | Path, table: Mapping[str, Any]) -> None:
    """Put a table where a file is, or will be: whoever reads meanwhile, or after a crash, finds the old or the new one.

    Raises
    ------
    OSError
        The folder cannot be made, or nothing can be written there. What was there is as it was.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text_of(table) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object with a key that comes twice among {[key for key, _ in pairs]}")
    return found
