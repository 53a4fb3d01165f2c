"""The charts of the benchmarks. matplotlib is imported only when one is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A bar beyond this is cut, its label is not: where a rival collapses, its neighbours must stay readable.
TALLEST_BAR = 6.0

# One colour a meaning, in both charts; they differ in lightness too.
OURS, TORCH, LOOP, LINE = "#1b6ca8", "#e08e45", "#b8b8b8", "#222222"


def require_matplotlib() -> Any:
    """matplotlib, drawing into files; leaves with a sentence where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit('A chart needs matplotlib: pip install "kvkernels[bench]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def bytes_in_words(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def draw_swap(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """GB/s of each op beside its rivals, under the ceiling measured with it."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.8 * len(rows)), 4.2), layout="constrained")
    width = 0.27
    series = (
        ("gb_per_s", "kvkernels", OURS),
        ("torch_gb_per_s", "torch", TORCH),
        ("copy_loop_gb_per_s", "copy_ loop", LOOP),
    )
    for place, (key, label, colour) in enumerate(series):
        at = [index + (place - 1) * width for index in range(len(rows))]
        bars = axes.bar(at, [row[key] for row in rows], width, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    for index, row in enumerate(rows):
        label = "ceiling" if index == 0 else None
        axes.hlines(row["ceiling_gb_per_s"], index - 0.45, index + 0.45, color=LINE, linewidth=1.5, label=label)
    several = len({row["group"] for row in rows}) > 1
    axes.set_xticks(range(len(rows)), [tick_label(row, several) for row in rows], fontsize=8)
    axes.set_ylim(top=1.25 * max(row["ceiling_gb_per_s"] for row in rows))
    axes.set_ylabel("GB/s of payload")
    axes.set_title(title)
    axes.legend(ncols=4, fontsize=8, loc="upper center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def tick_label(row: dict[str, Any], with_group: bool) -> str:
    lines = [row["op"], bytes_in_words(row["page_bytes"])]
    return "\n".join([*lines, row["group"]] if with_group else lines)


def draw_pages(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Two panels a thread count: the share of the ceiling and the ratio to torch, with the goals as marks."""
    pyplot = require_matplotlib()
    threads = sorted({row["threads"] for row in rows})
    figure, panels = pyplot.subplots(
        2, len(threads), figsize=(6.4 * len(threads), 7), layout="constrained", squeeze=False
    )
    for column, count in enumerate(threads):
        chosen = [row for row in rows if row["threads"] == count]
        labels = [f"{row['op']}\n{row['pages']}" for row in chosen]
        for line, (key, goal, what) in enumerate(
            (
                ("share_of_ceiling", "goal_share", "share of the streaming ceiling"),
                ("ratio_to_torch", "goal_ratio", "times as fast as torch"),
            )
        ):
            axes = panels[line][column]
            heights = [min(row[key], TALLEST_BAR) for row in chosen]
            bars = axes.bar(range(len(chosen)), heights, color=OURS, label="measured")
            axes.bar_label(bars, labels=[f"{row[key]:.2f}" for row in chosen], fontsize=7)
            goals = [(index, row[goal]) for index, row in enumerate(chosen) if row[goal] is not None]
            for index, value in goals:
                label = "goal" if index == goals[0][0] else None
                axes.hlines(value, index - 0.45, index + 0.45, color=TORCH, linewidth=2, label=label)
            axes.set_xticks(range(len(chosen)), labels, fontsize=7, rotation=60, ha="right")
            axes.set_ylabel(what)
            axes.set_title(f"{count} thread{'s' if count > 1 else ''}", fontsize=10)
            axes.margins(y=0.25)
            axes.legend(fontsize=8, ncols=2, loc="upper center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
