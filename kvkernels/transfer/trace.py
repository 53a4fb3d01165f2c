"""Chrome traces of what a mover copied."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from kvkernels.transfer.metrics import DIRECTIONS, PRIORITIES


def names_of_lanes(lanes: int) -> dict[int, str]:
    """What the threads of a mover on the host are called, by their numbers."""
    names = [f"{kind} {lane}" for kind in ("urgent", "stores") for lane in range(lanes)]
    return dict(enumerate(names))


def names_of_streams(chunks: Sequence[Sequence[int]]) -> dict[int, str]:
    """What the streams of chunks are called, by their numbers: device, direction and priority in one."""
    numbers = sorted({chunk[5] for chunk in chunks})
    of_device = len(PRIORITIES) * len(DIRECTIONS[1:])
    return {
        number: f"cuda:{number // of_device} {DIRECTIONS[1:][number % of_device // len(PRIORITIES)]} "
        f"{PRIORITIES[number % len(PRIORITIES)]}"
        for number in numbers
    }


def write_trace(path: str | os.PathLike[str], chunks: Sequence[Sequence[int]], names: dict[int, str]) -> int:
    """Write chunks, each the eight numbers of transfer/metrics.h, as a trace of threads, or streams, and queues."""
    events: list[dict[str, Any]] = [
        _name("process_name", 1, 0, "copies"),
        *(_name("thread_name", 1, number, name) for number, name in names.items()),
        _name("process_name", 2, 0, "queues"),
    ]
    queued: set[int] = set()
    for ticket, priority, size, submitted, chunk, thread, begin, end in sorted(chunks, key=lambda one: one[6]):
        name = f"{PRIORITIES[priority]} {ticket}"
        arguments = {"transfer": ticket, "chunk": chunk, "bytes of the transfer": size}
        events.append({"ph": "X", "pid": 1, "tid": thread, "name": name, "args": arguments,
                       "ts": begin / 1e3, "dur": (end - begin) / 1e3})  # fmt: skip
        if chunk == 0 and ticket not in queued:
            queued.add(ticket)
            of_queue = {"cat": PRIORITIES[priority], "id": ticket, "pid": 2, "tid": priority, "name": name}
            events.append({"ph": "b", "ts": submitted / 1e3, **of_queue})
            events.append({"ph": "e", "ts": begin / 1e3, **of_queue})
    with open(path, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
    return len(chunks)


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}
