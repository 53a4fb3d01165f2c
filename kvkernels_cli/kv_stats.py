"""``kv-stats``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvkernels_cli.running import integer

HELP = {"help_option_names": ["-h", "--help"]}
TYPES = ("heatmap", "frequency", "interval", "hitrate", "timeline", "bandwidth", "all")
EPILOG = """\b
Examples:
  kv-stats demo -n 20000 -o demo.json
  kv-stats visualize -i demo.json -o pictures/ --summary
  kv-stats visualize -i stats.json -o heat.png --type heatmap
  kv-stats visualize -i mover-trace.json -o when.png --type timeline
"""


@click.group(epilog=EPILOG, context_settings=HELP)
def COMMAND() -> None:
    """Access statistics of a KV cache: a demonstration, and pictures."""


@COMMAND.command(context_settings=HELP, epilog="\b\nExample:\n  kv-stats demo -n 20000 -o demo.json")
@click.option("-n", "--num-accesses", default="10000", show_default=True, metavar="N", help="Accesses to make up.")
@click.option(
    "-o", "--output", required=True, metavar="FILE.json", help="Where the statistics go; - is standard output."
)
@click.option("--seed", default="0", show_default=True)
def demo(num_accesses: str, output: str, seed: str) -> None:
    """Write the statistics of accesses that are made up; the file says so."""
    from kvkernels_records.demo import demo_stats

    found = demo_stats(
        integer(num_accesses, "kv-stats demo: --num-accesses", 1), integer(seed, "kv-stats demo: --seed", 0)
    )
    text = json.dumps(found, allow_nan=False) + "\n"
    if output == "-":
        click.echo(text, nl=False)
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text)
    print(f"{found['total_accesses']} made-up accesses: {output}", file=sys.stderr)


@COMMAND.command(context_settings=HELP, epilog=EPILOG)
@click.option("-i", "--input", "source", required=True, metavar="FILE.json",
              help="What AccessStatsCollector.export_stats or Mover.trace wrote.")  # fmt: skip
@click.option("-o", "--output", metavar="PATH", help="A PNG for one type, a folder for all.")
@click.option("--type", "kind", type=click.Choice(TYPES), default="all", show_default=True,
              help="Which picture; timeline and bandwidth are of a mover's trace.")  # fmt: skip
@click.option("--summary", is_flag=True, help="Print the totals as well.")
def visualize(source: str, output: str | None, kind: str, summary: bool) -> None:
    """Draw statistics as PNG files."""
    from kvkernels_records.pictures import draw_picture, kinds_of

    if output is None and not summary:
        raise click.UsageError("--output or --summary must be given")
    said = read_object(source)
    if summary:
        print_summary(said)
    if output is None:
        return
    if kind != "all":
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        draw_picture(kind, said, output)
        print(output, file=sys.stderr)
        return
    Path(output).mkdir(parents=True, exist_ok=True)
    for one in kinds_of(said):
        path = Path(output) / f"{one}.png"
        draw_picture(one, said, path)
        print(path, file=sys.stderr)


def read_object(path: str) -> dict[str, Any]:
    """A file's JSON object.

    Raises
    ------
    OSError, ValueError
        There is none.
    """
    from kvkernels_records.arrayfile import json_of

    try:
        found = json_of(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no JSON object")
    return found


def print_summary(said: dict[str, Any]) -> None:
    """The totals, a line each."""
    names = ("made_up", "total_accesses", "total_hits", "total_misses", "hit_rate", "unique_blocks", "tracked_blocks",
             "mean_interval_s")  # fmt: skip
    lines = [f"{name:16} {said[name]}" for name in names if name in said]
    if "windows" in said:
        lines += [f"last {name:11} {window['accesses']} accesses, hit rate {window['hit_rate']:.3f}"
                  for name, window in said["windows"].items()]  # fmt: skip
    if not lines:
        raise ValueError("kv-stats: the input has no totals")
    click.echo("\n".join(lines))
