"""The charts of a GPU run: GB/s by executor, fragment and count; share of the link by SMs; others beside us."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_log import Record, gb_per_s
from gpu_results import Results
from plot import LINE, LOOP, OURS, TORCH, bytes_in_words, require_matplotlib

DIRECTIONS = ("h2d", "d2h")
BUDGET_STYLES = {4 << 10: ":", 16 << 10: "--", 32 << 10: "-"}
RIVAL_FRAGMENT, RIVAL_COUNT = 32 << 10, 10_000


def draw(path: Path, card: str, results: Results) -> bool:
    """One picture of what was measured; False, and no file, where nothing was that has a chart."""
    cells = [cell for cell in results.cells() if cell.named and cell.place.ids == "random"]
    executors = list(dict.fromkeys(name for cell in cells for name in cell.named))
    strips: list[Callable[[Any], None]] = []
    for direction in DIRECTIONS:
        here = [cell for cell in cells if cell.place.direction == direction]
        if here:
            strips.append(lambda figure, here=here, way=direction: _heatmaps(figure, way, here, executors, results))
    if results.of("budget"):
        strips.append(lambda figure: _budgets(figure, results))
    if _rivals_of(results):
        strips.append(lambda figure: _rivals(figure, results))
    if not strips:
        return False
    pyplot = require_matplotlib()
    figure = pyplot.figure(figsize=(max(9.0, 2.9 * len(executors) + 1), 4.4 * len(strips)), layout="constrained")
    figure.suptitle(f"{card}: GB/s of payload")
    parts = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for part, strip in zip(parts, strips, strict=True):
        strip(part)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _heatmaps(figure: Any, direction: str, cells: Sequence[Any], executors: Sequence[str], results: Results) -> None:
    """A map an executor; of the host's two forms and of several streams the faster one."""
    fragments = sorted({cell.place.fragment_bytes for cell in cells})
    counts = sorted({cell.place.count for cell in cells})
    top = max((results.ceiling(record) or gb_per_s(record)) for cell in cells for record in cell.named.values())
    panels = figure.subplots(1, len(executors), squeeze=False, sharey=True)[0]
    figure.suptitle(direction, fontsize=10)
    image = None
    for axes, executor in zip(panels, executors, strict=True):
        speeds = [[float("nan")] * len(counts) for _ in fragments]
        for cell in cells:
            if executor in cell.named:
                row, column = fragments.index(cell.place.fragment_bytes), counts.index(cell.place.count)
                speed = gb_per_s(cell.named[executor])
                if not speed <= speeds[row][column]:
                    speeds[row][column] = speed
        image = axes.imshow(speeds, vmin=0, vmax=top, cmap="viridis", aspect="auto", origin="lower")
        for row, line in enumerate(speeds):
            for column, speed in enumerate(line):
                if speed == speed:  # a cell that was measured
                    colour = "black" if speed > 0.6 * top else "white"
                    axes.text(column, row, f"{speed:.1f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set_title(executor, fontsize=9)
        axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts], fontsize=7, rotation=30)
        axes.set_yticks(range(len(fragments)), [bytes_in_words(size) for size in fragments], fontsize=7)
    panels[0].set_ylabel("fragment", fontsize=8)
    figure.colorbar(image, ax=list(panels), label="GB/s")


def _budgets(figure: Any, results: Results) -> None:
    figure.suptitle("share of the link's ceiling by SMs", fontsize=10)
    panels = figure.subplots(1, len(DIRECTIONS), squeeze=False, sharey=True)[0]
    colours = {"kernel": OURS, "bulk": TORCH}
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        lines: dict[tuple[str, int], list[Record]] = {}
        for record in results.of("budget", direction=direction):
            lines.setdefault((record["executor"], record["fragment_bytes"]), []).append(record)
        for (executor, fragment), records in lines.items():
            records.sort(key=lambda record: record["sm_budget"])
            axes.plot(
                [record["sm_budget"] for record in records],
                [results.share(record) or 0.0 for record in records],
                BUDGET_STYLES.get(fragment, "-."), marker=".", color=colours.get(executor, LOOP),
                label=f"{executor}, {bytes_in_words(fragment)}",
            )  # fmt: skip
        axes.set_title(direction, fontsize=9)
        axes.set_xlabel("SMs")
        axes.set_ylim(bottom=0)
        axes.axhline(1.0, color=LINE, linewidth=0.8)
        if lines:
            axes.legend(fontsize=7, ncols=2)


def _rivals_of(results: Results) -> list[Record]:
    """The copies of whole pages of one size."""
    return results.of("rivals", fragment_bytes=RIVAL_FRAGMENT, count=RIVAL_COUNT, host_form="pools")


def _rivals(figure: Any, results: Results) -> None:
    size = f"{RIVAL_COUNT:,} pages of {bytes_in_words(RIVAL_FRAGMENT)}"
    figure.suptitle(f"{size}, from pools to pools", fontsize=10)
    panels = figure.subplots(1, len(DIRECTIONS), squeeze=False, sharex=True)[0]
    for axes, direction in zip(panels, DIRECTIONS, strict=True):
        records = [record for record in _rivals_of(results) if record["direction"] == direction]
        names = [record["rival"] for record in records]
        colours = [OURS if name == "kvkernels" else LOOP for name in names]
        bars = axes.barh(range(len(names)), [gb_per_s(record) for record in records], color=colours)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(direction, fontsize=9)
        axes.set_xlabel("GB/s")
        axes.margins(x=0.15)
        ceiling = max((results.ceiling(record) or 0.0 for record in records), default=0.0)
        if ceiling:
            axes.axvline(ceiling, color=LINE, linewidth=1.0)
