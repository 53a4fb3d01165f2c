"""By which tables calls are carried out: what is compiled in, or a file that was measured or written by hand.

A file is JSON:

``rows``
    Which executor ``auto`` takes for calls with a tensor on a GPU; ``kvkernels.policy.rows`` has their keys.
``cpu``
    Numbers by which copies on the host go; ``kvkernels.policy.cpu`` has their names.
``machine``, ``measured``
    Where, when and how it was measured. A file that says on which machine serves on that one alone.
``format``, ``comment``
    1, and what people want to say; rows and ``cpu`` may have comments, too.

What is not there is as compiled in; ``rows`` or ``cpu`` must be. When kvkernels is imported it reads the file that
``KVKERNELS_POLICY`` names, and where that is wrong, or another machine's, the import fails: it was asked for. Without
the variable it reads what ``python -m kvkernels tune`` left in the user's cache directory. Where that does not serve, a
warning says why, as do ``info`` and ``explain``. ``KVKERNELS_POLICY=default`` reads neither.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from kvkernels import registration  # noqa: F401  (the private ops exist once it is imported)
from kvkernels.common.text import ask
from kvkernels.policy import cpu, rows
from kvkernels.policy.files import VARIABLE, cache_path, load, text_of, write
from kvkernels.policy.machine import difference, machine

DEFAULT = "default"

__all__ = [
    "DEFAULT", "VARIABLE", "cache_path", "default", "difference", "in_force", "load", "machine", "text_of", "trying",
    "use", "write",
]  # fmt: skip


@dataclass(frozen=True)
class _State:
    source: str = DEFAULT
    refused: str | None = None
    table: dict[str, Any] = field(default_factory=dict)


_state = _State()
_lock = threading.Lock()


def in_force() -> dict[str, Any]:
    """The tables that serve, and where they came from.

    Returns
    -------
    dict
        ``source``, ``"default"`` or a file; ``refused``, why the file in the cache directory does not serve, or None;
        ``rows``, and without a compiled library there is none; and what a file had of ``cpu``, ``machine`` and
        ``measured``.

    Examples
    --------
    >>> from kvkernels import policy
    >>> policy.in_force()["source"]
    'default'
    """
    state = _state
    return {"source": state.source, "refused": state.refused, **state.table, "rows": rows.in_force()}


def default() -> dict[str, Any]:
    """What is compiled in, as ``in_force`` has it."""
    return {"source": DEFAULT, "refused": None, "rows": rows.in_force(is_default=True)}


def use(path: str | Path | None) -> None:
    """Go by a file from now on, or by what is compiled in.

    Parameters
    ----------
    path : str, Path or None
        None is for what is compiled in.

    Raises
    ------
    ValueError
        The file is no such table, or another machine's. What served does so still.

    Notes
    -----
    For the whole process, and safe to call while other threads copy: a call, and a transfer that a mover has taken,
    goes by what served when it began.
    """
    if path is None:
        return _serve(_State())
    table = load(path)
    if why := difference(table["machine"], machine()) if "machine" in table else "":
        raise ValueError(f"{VARIABLE}: {path}: {why}")
    _serve(_State(str(path), None, table))


@contextmanager
def trying() -> Iterator[None]:
    """What served before the ``with`` block does so again after it, whatever ``cpu.serve`` was told inside."""
    try:
        yield
    finally:
        _serve(_state)


def _serve(state: _State) -> None:
    global _state
    said = state.source
    if measured := state.table.get("measured"):
        said += f", tuned on {state.table.get('machine', {}).get('processor', 'a machine')} at {measured.get('at')}"
    refusal = f" ({state.refused})" if state.refused else ""
    is_default = "rows" not in state.table
    given = rows.in_force(is_default=True) if is_default else state.table["rows"]
    on_host = said if "cpu" in state.table else ""
    if refusal and not on_host:
        tuning = json.loads(ask(torch.ops.kvkernels._build_info)).get("tuning")
        on_host = f"compiled in: {tuning}{refusal}"
    with _lock, _disable_current_modes():
        name = f"the default policy{refusal}" if is_default else f"the policy of {said}"
        torch.ops.kvkernels._set_policy(rows.numbers(given), name)
        cpu.serve(state.table.get("cpu", {}), on_host)
        _state = state


def _read_files() -> None:
    named = os.environ.get(VARIABLE)
    if named == DEFAULT:
        return
    if named is not None:
        return use(named)
    path = cache_path()
    if path is None or not os.path.lexists(path):
        return
    try:
        use(path)
    except ValueError as error:
        why = f"not by {str(error).removeprefix(f'{VARIABLE}: ')}"
        _serve(_State(refused=why))
        warnings.warn(f"kvkernels goes by what is compiled in, {why}", RuntimeWarning, stacklevel=2)


_read_files()
