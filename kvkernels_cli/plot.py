"""``kvkernels plot``."""

from __future__ import annotations

import subprocess
import sys

import click

EPILOG = """\b
Examples:
  kvkernels bench --json swap.json && kvkernels plot swap.json swap.png
  kvkernels replay trace.jsonl --json > replay.json && kvkernels plot replay.json replay.png
  kvkernels plot stats.json heat.png --type heatmap
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="FILE.json")
@click.argument("output", metavar="FILE.png")
@click.option("--type", "kind", metavar="TYPE", help="Of statistics and traces: what kv-stats visualize takes.")
def COMMAND(source: str, output: str, kind: str | None) -> int:
    """Draw what another command wrote: bench --json, replay --json, access statistics, or a mover's trace."""
    from kvkernels_cli.kv_stats import read_object
    from kvkernels_records.arrayfile import json_of
    from kvkernels_records.pictures import PICTURES, draw_picture, kinds_of

    with open(source) as file:
        is_list = file.read(64).lstrip().startswith("[")
    if is_list:
        from pathlib import Path

        from kvkernels.memory.replay.plot import plot

        try:
            plot(json_of(Path(source).read_text()), output)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"plot: {source} is nothing that kvkernels replay wrote") from None
        return 0
    said = read_object(source)
    if "rows" in said and "settings" in said:
        from kvkernels_cli.house import swap_script

        script = (
            "import json, pathlib, sys; import plot; said = json.load(open(sys.argv[1])); s = said['settings']; "
            "plot.draw_swap(pathlib.Path(sys.argv[2]), f\"{s['model']}, {s['direction']}\", said['rows'])"
        )
        folder = str(swap_script().parent)
        done = subprocess.run(
            [sys.executable, "-c", script, source, output], cwd=None, env=_with_path(folder), check=False
        )
        return 1 if done.returncode else 0
    kind = kind or kinds_of(said)[0]
    if kind not in PICTURES:
        raise ValueError(f"plot: --type must be of {', '.join(PICTURES)}, got {kind!r}")
    draw_picture(kind, said, output)
    return 0


def _with_path(folder: str) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}
