"""What a file may say of copies on the host: numbers by name, each with its range.

``lanes``
    The most threads that a call is cut for; also what a mover takes by default, but for one core.
``serial_bytes``
    Calls below this size run on one thread.
``stream_pool_bytes``, ``stream_soon_read_bytes``
    Calls from this size on have stores that bypass the caches: into pools, and into buffers that are read soon.
``interleave``, ``piece_bytes``, ``prefetches_within``
    So many long pieces are copied in turns, 2 or 4; how long one is; whether lines ahead inside of one are prefetched.
``prefetches_strips``
    Whether short fragments ahead in a strip are prefetched.
``writes_rows``
    The order of loops: rows of the destination written whole, or else rows of the source read whole.
``rows_interleave_from_bytes``
    From which size on pieces of such rows are copied in turns.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from kvkernels.common.arguments import INT64_MAX
from kvkernels.common.text import ask, shortened

# In the order in which the compiled library takes them.
BYTES = {
    "serial_bytes": 0,
    "stream_pool_bytes": 0,
    "stream_soon_read_bytes": 0,
    "piece_bytes": 4096,
    "rows_interleave_from_bytes": 256,
}
WORDS = ("prefetches_within", "prefetches_strips", "writes_rows")
NAMES = (
    "lanes", "serial_bytes", "stream_pool_bytes", "stream_soon_read_bytes", "interleave", "piece_bytes",
    "prefetches_within", "prefetches_strips", "writes_rows", "rows_interleave_from_bytes",
)  # fmt: skip
_MOST = {"lanes": 1024, "piece_bytes": 1 << 30}


def checked(where: str, given: Any) -> dict[str, int | bool]:
    """The numbers of a file; ValueError, which names the one, where there are others or one is out of its range."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be an object, got {shortened(given)}")
    found = {name: value for name, value in given.items() if name != "comment"}
    if unknown := found.keys() - set(NAMES):
        raise ValueError(f"{where} must have the keys {', '.join(NAMES)} and comment alone, got {min(unknown)!r}")
    for name, value in found.items():
        _check(f"{where}.{name}", name, value)
    return found


def _check(where: str, name: str, value: Any) -> None:
    if name in WORDS:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {shortened(value)}")
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if name == "interleave":
        if not is_integer or value not in (2, 4):
            raise ValueError(f"{where} must be 2 or 4, got {shortened(value)}")
        return
    least, most = BYTES.get(name, 1), _MOST.get(name, INT64_MAX)
    if not is_integer or not least <= value <= most:
        raise ValueError(f"{where} must be an integer from {least} to {most}, got {shortened(value)}")


def serve(given: dict[str, int | bool], source: str) -> None:
    """Have what begins from now on, in any thread, go by these; by the machine's own where there is none.

    Notes
    -----
    Safe to call from any thread. A transfer that a mover has taken keeps those of its submission.
    """
    torch.ops.kvkernels._set_cpu_numbers(_numbers(given), source)


def _numbers(given: dict[str, int | bool]) -> Tensor:
    return torch.tensor([int(given.get(name, -1)) for name in NAMES], dtype=torch.int64, device="cpu")


def in_force() -> dict[str, Any]:
    """Every number that serves, ``table``, which says where they are from, and what else is decided by; else empty."""
    found: dict[str, Any] = json.loads(ask(torch.ops.kvkernels._cpu_numbers))
    return {name: bool(value) if name in WORDS else value for name, value in found.items()}
