"""The file of a GPU run: one JSON object a line, written as the run goes, so that a kill loses only what was running.

The first line of a run describes the machine, the last one says that the run came to its end. Every other line is one
cell: ``part``, ``status``, what identifies it, and, where it was measured, raw samples in microseconds.

    measured      the bytes were checked, and device_us, host_us and elapsed_us have a number a repetition
    wrong bytes   the copy was wrong; ``error`` says where, and there are no samples
    refused       the library cannot serve the call; ``error`` is its sentence
    failed        something raised; ``error`` says what
    not run       this machine cannot; ``error`` says why
    skipped       more bytes than the grid is about
    dropped       there was no time left
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BAD = ("wrong bytes", "failed")


class Log:
    """Appends lines to ``path``; each is whole and flushed before the next cell starts."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a")
        if torn:
            self._file.write("\n")
        self.bad = 0

    def write(self, record: Record) -> None:
        self.bad += record.get("status") in BAD
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of several files; each gets ``run``, the number of the run that it belongs to.

    A line that a kill cut short is left out.
    """
    records: list[Record] = []
    run = -1
    for path in paths:
        found = 0
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record.get("part") == "machine":
                run += 1
                found += 1
            if not found:
                raise SystemExit(f"{path} is not the output of benchmarks/gpu.py: its first line describes no machine")
            records.append({**record, "run": run})
        if not found:
            raise SystemExit(f"{path} is not the output of benchmarks/gpu.py: it has no line that describes a machine")
    return records


def median_us(record: Record, clock: str = "device_us") -> float:
    return statistics.median(record[clock])


def quartiles_us(record: Record, clock: str = "device_us") -> tuple[float, float]:
    samples = record[clock]
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def gb_per_s(record: Record) -> float:
    """1e9 bytes of payload a second, by the median of the device's time."""
    return record["bytes"] / max(median_us(record), 1e-3) / 1e3
