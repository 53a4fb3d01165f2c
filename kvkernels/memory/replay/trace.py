"""Traces: one request a line, as JSON, in files that may be compressed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

BLOCK_TOKENS = 512  #: of a block of the traces


class TraceError(ValueError):
    """A trace cannot be read; the message has the file and the line."""


class Request(NamedTuple):
    """A request of a trace."""

    timestamp_ms: float
    hash_ids: list[int]  #: its prefix's blocks; equal ids are equal prefixes


def read_trace(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> Iterator[Request]:
    """The requests of a file, one at a time.

    Parameters
    ----------
    path : str or Path
        Text, or gzip, which its first bytes say. A line is an object with ``hash_ids``, a list of integers, and
        ``timestamp`` in milliseconds, which may be absent; other keys are not looked at. Empty lines are passed over.
    on_bytes : callable, optional
        Is told after each line how many bytes of the file have been read.

    Yields
    ------
    Request

    Raises
    ------
    TraceError
        A file that cannot be read, or a line that is no request.
    """
    number = 0
    try:
        with open(path, "rb") as raw:
            is_compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            lines = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if is_compressed else raw)
            for number, line in enumerate(lines, 1):  # noqa: B007
                if line.strip():
                    yield _request(line)
                if on_bytes:
                    on_bytes(raw.tell())
    except _Malformed as error:
        raise TraceError(f"replay: {path}:{number}: a line must be {error}") from None
    except (OSError, EOFError) as error:
        raise TraceError(f"replay: {path}:{number + 1}: the file must be readable, got {error}") from error


class _Malformed(Exception):
    """What a line must be, and what it is."""


def _request(line: bytes) -> Request:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"JSON, got {error}") from None
    if not isinstance(found, dict) or "hash_ids" not in found:
        raise _Malformed(f"an object with hash_ids, got {_short(found)}")
    ids, timestamp = found["hash_ids"], found.get("timestamp", 0)
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise _Malformed(f"an object whose hash_ids are a list of integers, got {_short(ids)}")
    if len(set(ids)) < len(ids):
        raise _Malformed(f"an object whose hash_ids are different, got {_short(ids)}")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        raise _Malformed(f"an object whose timestamp is a number, got {_short(timestamp)}")
    return Request(timestamp, ids)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
