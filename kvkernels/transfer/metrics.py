"""What a mover has moved: integers that the library adds up, read when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from ctypes import c_int64
from typing import Any, Protocol

PRIORITIES = ("expedited", "load", "store")
DIRECTIONS = ("h2h", "h2d", "d2h", "d2d")
#: In the order of core/executors.inc.
EXECUTORS = ("auto", "cpu", "kernel", "bulk", "dma", "staged", "triton", "reference")

_BUCKETS = 11
_FIELDS = ("done", "failed", "cancelled", "bytes", "copy_ns", "queue_ns", "chunks")
_ROW = 3 + len(_FIELDS) + 3 * _BUCKETS  # direction, priority and executor first
_MOST_ROWS = len(DIRECTIONS) * len(PRIORITIES) * len(EXECUTORS)
#: Upper bounds of the buckets, as in transfer/metrics.h; what is above them is in the last.
BYTES_BOUNDS = tuple(4096 * 4**i for i in range(_BUCKETS - 1))
SECONDS_BOUNDS = tuple(1e-5 * 4**i for i in range(_BUCKETS - 1))


def read_stats(fill: Callable[[Any], int]) -> dict[str, Any]:
    """``Mover.stats``, from the numbers that ``fill`` writes and counts."""
    numbers = (c_int64 * (2 + _ROW * _MOST_ROWS))()
    count = fill(numbers)
    rows = [_row(numbers[at : at + 3], numbers[at + 3 : at + _ROW]) for at in range(2, count, _ROW)]
    return {"queued": numbers[0], "running": numbers[1], "transfers": rows}


def _row(names: list[int], numbers: list[int]) -> dict[str, Any]:
    direction, priority, executor = names
    said = dict(zip(_FIELDS, numbers, strict=False))
    buckets = [numbers[len(_FIELDS) + i * _BUCKETS :][:_BUCKETS] for i in range(3)]
    return {
        "direction": DIRECTIONS[direction],
        "priority": PRIORITIES[priority],
        "executor": EXECUTORS[executor],
        **{name: said[name] for name in ("done", "failed", "cancelled", "bytes", "chunks")},
        "seconds": said["copy_ns"] / 1e9,
        "queue_seconds": said["queue_ns"] / 1e9,
        "bytes_buckets": list(zip((*BYTES_BOUNDS, math.inf), buckets[0], strict=True)),
        "seconds_buckets": list(zip((*SECONDS_BOUNDS, math.inf), buckets[1], strict=True)),
        "queue_seconds_buckets": list(zip((*SECONDS_BOUNDS, math.inf), buckets[2], strict=True)),
    }


class HasStats(Protocol):
    """A mover, as its collector sees it."""

    def stats(self) -> dict[str, Any]:
        """As ``Mover.stats``."""


class MoverCollector:
    """A collector for ``prometheus_client``: ``REGISTRY.register(MoverCollector(mover))``.

    Nothing is counted twice, and nothing is done while bytes move: a scrape reads the mover's own integers. Needs
    ``pip install kvkernels[metrics]``.

    Parameters
    ----------
    mover : Mover
    prefix : str
        What the names of the metrics begin with.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    """

    def __init__(self, mover: HasStats, prefix: str = "kvkernels_transfer") -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise ImportError(
                "MoverCollector: prometheus_client must be installed: pip install kvkernels[metrics]"
            ) from error
        self._core = core
        self._mover = mover
        self._prefix = prefix

    def collect(self) -> Iterator[Any]:
        """The metric families, at a scrape."""
        said = self._mover.stats()
        core, prefix, labels = self._core, self._prefix, ("direction", "priority", "executor")
        for name in ("queued", "running"):
            yield core.GaugeMetricFamily(f"{prefix}_{name}", f"Transfers that are {name}.", said[name])
        ended = core.CounterMetricFamily(f"{prefix}s", "Transfers that ended.", labels=(*labels, "state"))
        chunks = core.CounterMetricFamily(f"{prefix}_chunks", "Chunks that they were cut into.", labels=labels)
        histograms = {
            name: core.HistogramMetricFamily(f"{prefix}_{name}", about, labels=labels)
            for name, about in (
                ("bytes", "Bytes of a transfer."),
                ("seconds", "Seconds from a transfer's first chunk to its last."),
                ("queue_seconds", "Seconds from submit to a transfer's first chunk."),
            )
        }
        for row in said["transfers"]:
            of_row = [row[label] for label in labels]
            for state in ("done", "failed", "cancelled"):
                ended.add_metric([*of_row, state], row[state])
            chunks.add_metric(of_row, row["chunks"])
            for name, family in histograms.items():
                family.add_metric(of_row, _cumulative(row[f"{name}_buckets"]), row[name])
        yield from (ended, chunks, *histograms.values())


def _cumulative(buckets: list[tuple[float, int]]) -> list[tuple[str, int]]:
    total, result = 0, []
    for bound, count in buckets:
        total += count
        result.append(("+Inf" if math.isinf(bound) else str(float(bound)), total))
    return result
