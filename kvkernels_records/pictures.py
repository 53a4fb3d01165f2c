"""Pictures of access statistics and of a mover's trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvkernels_records.errors import CaptureFileError, missing_extra

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
Said = Mapping[str, Any]


def draw_picture(kind: str, said: Said, path: str | Path) -> None:
    """Draw one picture.

    Parameters
    ----------
    kind : str
        Of ``PICTURES``.
    said : mapping
        What ``AccessStatsCollector.export_stats`` gave, or, for ``timeline`` and ``bandwidth``, a mover's Chrome trace.
    path : path-like

    Raises
    ------
    CaptureFileError
        ``said`` lacks what the picture shows.
    MissingExtraError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise missing_extra("kv-stats: visualize", "matplotlib", "cli") from None
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    try:
        PICTURES[kind](figure.subplots(), figure, said)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CaptureFileError(f"kv-stats: the input has nothing for a {kind} picture: {error!r}") from None
    if said.get("made_up"):
        figure.suptitle("made-up accesses (kv-stats demo)", fontsize=9, color="#666666", x=0.99, ha="right")
    figure.savefig(path, dpi=150)


def kinds_of(said: Said) -> tuple[str, ...]:
    """The pictures that can be drawn of what a file says."""
    return TRACE_KINDS if "traceEvents" in said else STATS_KINDS


def _heatmap(axis: Any, figure: Any, said: Said) -> None:
    from matplotlib.colors import LogNorm

    heat = said["heatmap"]
    counts, starts, column_s = np.array(heat["counts"], float), heat["starts_s"], heat["column_s"]
    used = np.flatnonzero(counts.any(axis=0))
    rows = np.flatnonzero(counts.any(axis=1))
    if not len(used):
        raise ValueError("no access")
    counts = counts[: rows[-1] + 1, used[0] : used[-1] + 1]
    width_s = counts.shape[1] * column_s
    image = axis.imshow(
        np.where(counts > 0, counts, np.nan), aspect="auto", interpolation="nearest", cmap="cividis", origin="lower",
        norm=LogNorm(1, max(2.0, counts.max())), extent=(0, width_s, 0, counts.shape[0] * heat["row_blocks"]),
    )  # fmt: skip
    axis.set_facecolor("#eeeeee")
    axis.set_xlabel(f"seconds since {_clock(starts[used[0]])} (cells of {column_s} s)")
    axis.set_ylabel(f"block (rows of {heat['row_blocks']})")
    axis.set_title(_sampled("Accesses by block and time", said))
    figure.colorbar(image, ax=axis).set_label("accesses (grey: none)")


def _frequency(axis: Any, figure: Any, said: Said) -> None:
    rows = said["frequency_histogram"]
    labels = [
        str(row["accesses_from"]) if row["accesses_from"] == row["accesses_to"]
        else f"{row['accesses_from']}-{row['accesses_to']}" for row in rows
    ]  # fmt: skip
    bars = axis.bar(range(len(rows)), [row["blocks"] for row in rows], color=BLUE)
    axis.bar_label(bars, fontsize=8)
    turned = {"rotation": 35, "ha": "right"} if len(rows) > 8 else {}
    axis.set_xticks(range(len(rows)), labels, **turned)
    axis.set_xlabel("accesses of a block")
    axis.set_ylabel("blocks")
    axis.margins(y=0.12)
    axis.set_title(_sampled("How often blocks are used", said))


def _interval(axis: Any, figure: Any, said: Said) -> None:
    rows = said["intervals"]["histogram"]
    if not rows:
        raise ValueError("no block was used twice")
    shortest = rows[0]["below_s"]
    counts = {round(math.log2(row["below_s"] / shortest)): row["count"] for row in rows}
    bars = range(max(counts) + 1)
    axis.bar(bars, [counts.get(bar, 0) for bar in bars], color=GREEN)
    ticks = bars[:: -(-len(bars) // 7)]
    axis.set_xticks(ticks, [_seconds(shortest * 2.0**tick) for tick in ticks])
    axis.set_xlabel("time between two accesses of a block, below")
    axis.set_ylabel("intervals")
    axis.set_title(_sampled("Intervals", said))


def _hit_rate(axis: Any, figure: Any, said: Said) -> None:
    rows = said["hit_rate_over_time"]
    start = rows[0]["start_s"]
    edges = [row["start_s"] - start for row in rows] + [rows[-1]["start_s"] + rows[-1]["seconds"] - start]
    rates = [100 * row["hits"] / max(1, row["hits"] + row["misses"]) for row in rows]
    volume = axis.twinx()
    volume.bar(
        edges[:-1], [row["hits"] + row["misses"] for row in rows], width=rows[0]["seconds"], align="edge",
        color="#dddddd", edgecolor="white", linewidth=0.3,
    )  # fmt: skip
    volume.set_ylabel(f"accesses in {rows[0]['seconds']} s (grey)")
    axis.set_zorder(volume.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.plot([edge + rows[0]["seconds"] / 2 for edge in edges[:-1]], rates, color=RED, linewidth=2)
    axis.set_ylim(0, 105)
    axis.set_xlabel(f"seconds since {_clock(start)}")
    axis.set_ylabel("hit rate (%)", color=RED)
    axis.set_title("Hit rate over time")


def _timeline(axis: Any, figure: Any, said: Said) -> None:
    chunks = _chunks(said)
    colours = {"expedited": RED, "load": BLUE, "store": ORANGE}
    start = min(event["ts"] for event in chunks)
    names = {event["tid"]: event["args"]["name"] for event in said["traceEvents"]
             if event.get("name") == "thread_name" and event["pid"] == 1}  # fmt: skip
    threads = sorted({event["tid"] for event in chunks})
    for priority, colour in colours.items():
        mine = [event for event in chunks if event["name"].startswith(priority)]
        for place, thread in enumerate(threads):
            spans = [((event["ts"] - start) / 1e3, event["dur"] / 1e3) for event in mine if event["tid"] == thread]
            axis.broken_barh(spans, (place - 0.38, 0.76), color=colour)
        if mine:
            axis.plot([], [], color=colour, linewidth=7, label=priority)
    axis.set_yticks(range(len(threads)), [names.get(thread, str(thread)) for thread in threads])
    axis.set_xlabel("milliseconds since the first chunk")
    axis.set_ylabel("thread")
    axis.set_title("What the mover copied when")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _bandwidth(axis: Any, figure: Any, said: Said) -> None:
    transfers: dict[int, list[Any]] = {}
    for event in _chunks(said):
        transfers.setdefault(event["args"]["transfer"], []).append(event)
    sizes, rates = [], []
    for events in transfers.values():
        seconds = (max(one["ts"] + one["dur"] for one in events) - min(one["ts"] for one in events)) / 1e6
        size = events[0]["args"]["bytes of the transfer"]
        if seconds > 0 and size > 0:
            sizes.append(size)
            rates.append(size / seconds / 1e9)
    axis.scatter(sizes, rates, s=18, color=BLUE, alpha=0.6, linewidths=0)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    low, high = math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes)))
    ticks = [2**power for power in range(low, high + 1, max(1, (high - low) // 7))]
    axis.set_xticks(ticks, [_bytes(tick) for tick in ticks])
    axis.set_xlabel("bytes of a transfer")
    axis.set_ylabel("GB/s, first chunk to last")
    axis.set_title("Speed of transfers by size")
    axis.grid(alpha=0.25)


PICTURES: dict[str, Callable[[Any, Any, Said], None]] = {
    "heatmap": _heatmap, "frequency": _frequency, "interval": _interval, "hitrate": _hit_rate, "timeline": _timeline,
    "bandwidth": _bandwidth,
}  # fmt: skip
STATS_KINDS = ("heatmap", "frequency", "interval", "hitrate")
TRACE_KINDS = ("timeline", "bandwidth")


def _chunks(said: Said) -> list[Any]:
    chunks = [event for event in said["traceEvents"] if event.get("ph") == "X"]
    if not chunks:
        raise ValueError("no chunk was copied")
    return chunks


def _sampled(title: str, said: Said) -> str:
    rate = said["sampling"]["rate"]
    return title if rate == 1 else f"{title} (1 block of {round(1 / rate):,})"


def _clock(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _seconds(value: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.2g} {unit}" if value < 99 * size else f"{value / size:.0f} {unit}"
    return f"{value / 1e-6:.0f} us"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"
