"""Which blocks of a cache are used: counted as it happens, in bounded memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvkernels_records.grid import Grid
from kvkernels_records.known import HASHES, BlockId, KnownBlocks

FORMAT = "kvkernels-access-stats/1"
WINDOWS = {"1m": 60, "5m": 300, "1h": 3600}
_BATCH_ITEMS = 3 * 4096
_TIMES = 40  # buckets of seconds: below 1 us, and each twice the one before
_ROWS, _COLUMNS = 64, 60


class AccessStatsCollector:
    """Counts hits and misses of blocks, and remembers some blocks one by one.

    Exact, however long it runs: accesses, hits and misses, those of the last minute, five minutes and hour, and the hit
    rate over time. Of at most ``max_blocks`` blocks each is known on its own. Where there are more blocks, they are
    sampled: a block is known if a hash of its id is below a limit, which is halved whenever there are too many. A
    block is known from its first access on or not at all, so shares among the known ones are shares among all.
    ``sampling.rate`` says how many are known. Intervals, histograms, top and cold blocks and the heatmap are of those.

    An access is noted, and every 4,096 are counted together; docs/observe.md has what that costs. Any thread may
    record, export or merge.

    Parameters
    ----------
    max_blocks : int
        From 1 on.
    cold_after_s : float
        A block that was not used for as long is cold.
    clock : callable
        Seconds since the epoch.

    Raises
    ------
    ValueError
        A number is out of range.

    Examples
    --------
    >>> stats = AccessStatsCollector()
    >>> for block in (1, 2, 1, 1):
    ...     stats.record_access(block, is_hit=block == 1)
    >>> stats.get_stats_summary()["hit_rate"]
    0.75
    >>> stats.export_stats()["top_blocks"][0]["block_id"]
    1
    """

    def __init__(
        self, max_blocks: int = 65536, cold_after_s: float = 300.0, clock: Callable[[], float] = time.time
    ) -> None:
        if max_blocks < 1:
            raise ValueError(f"AccessStatsCollector: max_blocks must be from 1 on, got {max_blocks}")
        if not cold_after_s > 0:
            raise ValueError(f"AccessStatsCollector: cold_after_s must be above 0, got {cold_after_s}")
        self.max_blocks = max_blocks
        self.cold_after_s = cold_after_s
        self._clock = clock
        self._lock = threading.RLock()
        #: Id, hit and time of each access in turn: a tuple for each would have Python's collector look at them all.
        self._noted: list[Any] = []
        self._note = self._noted.extend
        self._known = KnownBlocks(max_blocks)
        self._hits = self._misses = 0
        self._seconds: dict[int, list[int]] = {}
        self._intervals = np.zeros(_TIMES, np.int64)
        self._interval_sum = 0.0
        self._heat, self._rate = Grid(_ROWS, _COLUMNS), Grid(2, _COLUMNS)

    def record_access(self, block_id: BlockId, is_hit: bool = True) -> None:
        """Note an access.

        Parameters
        ----------
        block_id : int, str or bytes
        is_hit : bool
        """
        self._note((block_id, is_hit, self._clock()))
        if len(self._noted) >= _BATCH_ITEMS:
            self._count()

    def get_stats_summary(self) -> dict[str, Any]:
        """The few figures that a log line has.

        Returns
        -------
        dict
            ``total_accesses``, ``total_hits``, ``total_misses``, ``hit_rate`` (0 where nothing was accessed),
            ``unique_blocks`` (an estimate where blocks are sampled), ``tracked_blocks``, ``mean_interval_s`` (None
            where no block was used twice).
        """
        with self._lock:
            self._count()
            total = self._hits + self._misses
            repeats = int(self._intervals.sum())
            return {
                "total_accesses": total,
                "total_hits": self._hits,
                "total_misses": self._misses,
                "hit_rate": self._hits / total if total else 0.0,
                "unique_blocks": round(len(self._known) * HASHES / self._known.limit),
                "tracked_blocks": len(self._known),
                "mean_interval_s": self._interval_sum / repeats if repeats else None,
            }

    def export_stats(
        self, path: str | os.PathLike[str] | None = None, *, top: int = 20, details: int = 1000
    ) -> dict[str, Any]:
        """Everything, as docs/access_stats.schema.json describes it.

        Parameters
        ----------
        path : path-like, optional
            Write it there as JSON, too.
        top : int
            How many of the most used and of the coldest blocks are named.
        details : int
            How many blocks, the most used first, are described one by one.

        Returns
        -------
        dict
        """
        with self._lock:
            found = {"format": FORMAT, **self.get_stats_summary(), **self._detail(top, details)}
        if path is not None:
            Path(path).write_text(json.dumps(found, allow_nan=False) + "\n")
        return found

    def merge(self, other: AccessStatsCollector) -> None:
        """Add what another one has seen, perhaps in another process (``from_state``). It stays as it is.

        A block's intervals are those that each of the two saw; blocks without a number (text, bytes) have rows of the
        heatmap by when they were first seen, which mean different blocks in the two.
        """
        state = other.state()
        with self._lock:
            self._count()
            self._known.forget(state["limit"])
            for key, values in state["blocks"]:
                self._known.put(_id_of(key), *values)
            self._known.forget()
            self._hits += state["hits"]
            self._misses += state["misses"]
            self._known.numbered = max(self._known.numbered, state["numbered"])
            for second, hits, misses in state["seconds"]:
                mine = self._seconds.setdefault(second, [0, 0])
                mine[0] += hits
                mine[1] += misses
            self._trim()
            self._intervals += np.array(state["intervals"])
            self._interval_sum += state["interval_sum"]
            self._heat.merge(Grid.from_state(state["heat"]))
            self._rate.merge(Grid.from_state(state["rate"]))

    def state(self) -> dict[str, Any]:
        """All that is known, as JSON for ``from_state`` in another process."""
        with self._lock:
            self._count()
            return {
                "format": FORMAT, "max_blocks": self.max_blocks, "cold_after_s": self.cold_after_s,
                "limit": self._known.limit, "numbered": self._known.numbered,
                "hits": self._hits, "misses": self._misses,
                "blocks": [[_key_of(block_id), values] for block_id, values in self._known.rows_of()],
                "seconds": [[second, *counts] for second, counts in self._seconds.items()],
                "intervals": self._intervals.tolist(), "interval_sum": self._interval_sum,
                "heat": self._heat.state(), "rate": self._rate.state(),
            }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AccessStatsCollector:
        """A collector that has seen what ``state`` says.

        Raises
        ------
        ValueError
            It is no state.
        """
        if state.get("format") != FORMAT or "limit" not in state:
            raise ValueError(f"AccessStatsCollector: state must be of {FORMAT}, got {state.get('format')!r}")
        found, other = cls(state["max_blocks"], state["cold_after_s"]), _State(dict(state))
        found.merge(other)
        return found

    def _count(self) -> None:
        """Count what was noted."""
        with self._lock:
            # Others append meanwhile: what is taken away is exactly what is counted.
            batch = self._noted[:]
            del self._noted[: len(batch)]
            if not batch:
                return
            ids, hits, times = batch[::3], np.array(batch[1::3], bool), np.array(batch[2::3])
            seconds = times.astype(np.int64)
            known, rows, waited = self._known.add(ids, hits, times)
            self._heat.add(rows, seconds[known])
            self._interval_sum += float(waited.sum())
            np.add.at(self._intervals, _buckets(waited), 1)
            self._hits += int(hits.sum())
            self._misses += len(ids) - int(hits.sum())
            self._rate.add((~hits).astype(np.int64) * self._rate.row_width, seconds)
            of_seconds, places = np.unique(seconds, return_inverse=True)
            both = [np.bincount(places, part, len(of_seconds)).astype(np.int64) for part in (hits, ~hits)]
            for second, mine in zip(of_seconds.tolist(), np.stack(both, 1).tolist(), strict=True):
                counts = self._seconds.setdefault(second, [0, 0])
                counts[0] += mine[0]
                counts[1] += mine[1]
            self._trim()

    def _trim(self) -> None:
        """Keep the seconds of the last hour."""
        longest = max(WINDOWS.values())
        if len(self._seconds) > longest:
            for second in sorted(self._seconds)[:-longest]:
                del self._seconds[second]

    def _detail(self, top: int, details: int) -> dict[str, Any]:
        now = self._clock()
        known, ids = self._known, self._known.ids()
        counts = known.column("hits") + known.column("misses")
        used = np.argsort(-counts, kind="stable")
        last = known.column("last")
        cold = np.flatnonzero(now - last >= self.cold_after_s)
        coldest = cold[np.argsort(last[cold], kind="stable")]
        lives = last - known.column("first")

        def described(slots: Any) -> list[dict[str, Any]]:
            return [_described(ids[slot], known, slot) for slot in slots]

        return {
            "exported_at": now,
            "sampling": {
                "rate": self._known.limit / HASHES, "tracked_blocks": len(self._known), "max_blocks": self.max_blocks,
            },
            "intervals": {**_percentiles(self._intervals), "histogram": _time_histogram(self._intervals)},
            "top_blocks": described(used[:top]),
            "frequency_histogram": _power_histogram(counts),
            "lifetime_histogram": _time_histogram(np.bincount(_buckets(lives), minlength=_TIMES), "blocks"),
            "blocks": described(used[:details]),
            "windows": {name: self._window(now, seconds) for name, seconds in WINDOWS.items()},
            "cold_blocks": {
                "after_s": self.cold_after_s, "count": len(cold), "blocks": described(coldest[:top]),
            },
            "heatmap": {
                "starts_s": self._heat.starts_s(), "column_s": self._heat.column_s,
                "row_blocks": self._heat.row_width, "counts": self._heat.counts.tolist(),
            },
            "hit_rate_over_time": [
                {"start_s": start, "seconds": self._rate.column_s, "hits": int(hits), "misses": int(misses)}
                for start, hits, misses in zip(self._rate.starts_s(), *self._rate.counts, strict=False)
                if hits or misses
            ],
        }  # fmt: skip

    def _window(self, now: float, seconds: int) -> dict[str, Any]:
        recent = [counts for second, counts in self._seconds.items() if now - seconds < second + 1 and second <= now]
        hits, misses = sum(counts[0] for counts in recent), sum(counts[1] for counts in recent)
        total = hits + misses
        return {"accesses": total, "hits": hits, "misses": misses, "hit_rate": hits / total if total else 0.0}


class _State(AccessStatsCollector):
    """A state in the place of the collector that said it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._said = state

    def state(self) -> dict[str, Any]:
        return self._said


def _key_of(block_id: BlockId) -> list[Any]:
    return ["bytes", block_id.hex()] if isinstance(block_id, bytes) else [type(block_id).__name__, block_id]


def _id_of(key: list[Any]) -> BlockId:
    kind, value = key
    return bytes.fromhex(value) if kind == "bytes" else int(value) if kind == "int" else str(value)


def _described(block_id: BlockId, known: KnownBlocks, slot: int) -> dict[str, Any]:
    hits, misses = int(known.column("hits")[slot]), int(known.column("misses")[slot])
    return {
        "block_id": block_id.hex() if isinstance(block_id, bytes) else block_id,
        "accesses": hits + misses,
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / max(1, hits + misses),
        "first_access": float(known.column("first")[slot]),
        "last_access": float(known.column("last")[slot]),
    }


def _buckets(seconds: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which bucket each time is in: 0 below a microsecond, then doubling."""
    with np.errstate(divide="ignore"):
        found = np.floor(np.log2(np.maximum(seconds, 0.0) * 1e6)) + 1
    buckets: np.ndarray[Any, np.dtype[np.int64]] = np.clip(found, 0, _TIMES - 1).astype(np.int64)
    return buckets


def _bound_s(bucket: int) -> float:
    return float(1e-6 * 2.0**bucket)


def _time_histogram(counts: np.ndarray[Any, Any], what: str = "count") -> list[dict[str, Any]]:
    return [{"below_s": _bound_s(bucket), what: int(count)} for bucket, count in enumerate(counts) if count]


def _power_histogram(counts: np.ndarray[Any, np.dtype[np.int64]]) -> list[dict[str, Any]]:
    """How many blocks have 1, 2 to 3, 4 to 7 and so on accesses."""
    powers = np.bincount(np.floor(np.log2(counts)).astype(np.int64)) if len(counts) else np.zeros(0, np.int64)
    return [
        {"accesses_from": 1 << power, "accesses_to": (2 << power) - 1, "blocks": int(count)}
        for power, count in enumerate(powers)
        if count
    ]


def _percentiles(counts: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float | None]:
    """Upper bounds of the buckets that a share of the intervals is in."""
    total = counts.sum()
    reached = np.cumsum(counts)
    return {
        f"p{share}_below_s": _bound_s(int(np.searchsorted(reached, total * share / 100))) if total else None
        for share in (50, 90, 99)
    }
