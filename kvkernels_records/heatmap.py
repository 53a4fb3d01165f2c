"""A picture of where two captures differ: layers over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvkernels_records.errors import CaptureFileError, missing_extra

if TYPE_CHECKING:
    from kvkernels_records.check import Report


def draw(report: Report, path: str | Path) -> None:
    """Draw the largest absolute difference of each layer and token, a panel for each part of the captures.

    Parameters
    ----------
    report : Report
    path : path-like
        A PNG, or whatever matplotlib knows by its ending.

    Raises
    ------
    CaptureFileError
        No layer of the two could be compared.
    MissingExtraError
        matplotlib is not installed.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise missing_extra("check-kv: --plot", "matplotlib", "cli") from None
    panels = report.error_map
    if not panels:
        raise CaptureFileError(f"{report.baseline}, {report.target}: there is no layer to draw")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    most_layers = max(len(panel["layers"]) for panel in panels.values())
    height = rows * min(6.0, 2.6 + 0.1 * most_layers) + 0.6
    figure = Figure(figsize=(5.4 * columns + 1.2, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    errors = [value for panel in panels.values() for row in panel["max_abs_diff"] for value in row if value]
    # What is equal has no colour, and what is NaN or infinite on one side the last one.
    norm = LogNorm(min(errors, default=1e-3), max([*errors, 2 * min(errors, default=1e-3)]))
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        width = max(map(len, panel["max_abs_diff"]))
        cells = np.full((len(panel["layers"]), width), np.nan)
        for row, values in zip(cells, panel["max_abs_diff"], strict=True):
            row[: len(values)] = [norm.vmax if value is None else value or np.nan for value in values]
        axis.imshow(
            cells, aspect="auto", interpolation="nearest", cmap="cividis", norm=norm,
            extent=(-0.5, panel["tokens"] - 0.5, len(cells) - 0.5, -0.5),
        )  # fmt: skip
        axis.set_facecolor("#eeeeee")
        step = max(1, len(cells) // 12)
        axis.set_yticks(range(0, len(cells), step), [str(layer) for layer in panel["layers"][::step]])
        axis.set_title(title.replace("_", " "), fontsize=11)
        axis.set_xlabel("token")
        axis.set_ylabel("layer")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes)
    bar.set_label("max abs difference (grey: none)")
    figure.savefig(path, dpi=150)
