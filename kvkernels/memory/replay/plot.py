"""Hit rates over capacity as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart, and a form for each line besides.
_STYLES = {
    "belady": ("#000000", "--", ""),
    "chain": ("#D55E00", "-", "o"),
    "s3fifo": ("#0072B2", "-", "s"),
    "arc": ("#009E73", "-", "^"),
    "lru": ("#000000", "-", "v"),
    "fifo": ("#E69F00", "-", "D"),
    "sieve": ("#56B4E9", "-", "P"),
    "lfu": ("#CC79A7", ":", "x"),
    "ttl": ("#777777", ":", "+"),
    "priority": ("#777777", "-.", "1"),
}


def plot(found: list[dict[str, Any]], path: str | Path) -> None:
    """Draw what ``replay_file`` found, a panel for each trace.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "replay: --plot must have matplotlib, which is not installed: pip install kvkernels[bench]"
        ) from None
    figure = Figure(figsize=(5.2 * len(found) + 1.6, 4.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, trace in zip(panels, found, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in trace["results"]:
            lines.setdefault(row["policy"], []).append((row["capacity_blocks"], 100 * row["hit_rate"]))
        for group in _together(lines):
            colour, dashes, mark = _STYLES[group[0]]
            label = "Belady's optimum, bypassing" if group == ["belady"] else " = ".join(group)
            panel.plot(*zip(*lines[group[0]], strict=True), color=colour, linestyle=dashes, marker=mark, markersize=5,
                       linewidth=2.2 if group[0] == "chain" else 1.3, label=label)  # fmt: skip
        panel.axhline(
            100 * trace["unbounded_hits"] / max(1, trace["accesses"]),
            color="#999999", linewidth=0.8, linestyle=(0, (1, 3)), label="without a bound",
        )  # fmt: skip
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(bottom=0)
        panel.set_title(Path(trace["trace"]).name.split(".")[0].replace("_", " "), fontsize=11)
        panel.set_xlabel("capacity (blocks of 512 tokens)")
        panel.set_ylabel("prefix hits (% of all blocks)")
        panel.grid(alpha=0.25)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _together(lines: dict[str, list[tuple[int, float]]]) -> list[list[str]]:
    """The policies, those with equal lines as one, the best first."""
    groups: list[list[str]] = []
    for name in sorted(lines, key=lambda name: -sum(rate for _, rate in lines[name])):
        if groups and lines[groups[-1][0]] == lines[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
