"""What the reference keeps of its calls: the explain scope of this thread, and counters of what was issued."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """What one call comes to; the compiled library's ``_explain_end`` has the same keys."""

    op: str
    executor: str
    reason: str
    direction: str
    descriptors: int
    bytes: int
    pairs: int
    moves: int
    shape: str = "reference"
    launches: int = 0
    lanes: int = 1
    streaming: bool = False
    table: str = ""
    device: dict[str, Any] = field(default_factory=dict)


_EXECUTORS = ("cpu", "kernel", "bulk", "dma", "staged", "triton", "reference")
_COUNTED = ("calls", "launches", "descriptors", "bytes")

_scope = threading.local()
_counters_lock = threading.Lock()
_counters = {executor: dict.fromkeys(_COUNTED, 0) for executor in _EXECUTORS}


def explain_begin() -> None:
    """From here to ``explain_end``, ops on this thread check and lower but move nothing."""
    _scope.record = None
    _scope.open = True


def explain_end() -> str:
    """JSON of the last call's record, ``{}`` where there was none."""
    record = getattr(_scope, "record", None)
    _scope.open = False
    _scope.record = None
    return json.dumps(asdict(record) if record else {})


def explains(record: Record) -> bool:
    """Keep the record and say so where an explain scope is open: the caller then moves nothing."""
    if not getattr(_scope, "open", False):
        return False
    _scope.record = record
    return True


def count(descriptors: int, bytes: int) -> None:
    """One call of the reference, by what it issued."""
    if bytes == 0:
        return
    with _counters_lock:
        entry = _counters["reference"]
        entry["calls"] += 1
        entry["descriptors"] += descriptors
        entry["bytes"] += bytes


def counters() -> str:
    """JSON of ``{executor: {calls, launches, descriptors, bytes}}``."""
    with _counters_lock:
        return json.dumps(_counters)


def reset_counters() -> None:
    with _counters_lock:
        for entry in _counters.values():
            entry.update(dict.fromkeys(_COUNTED, 0))
