"""``check-kv``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from kvkernels_cli.running import integer, number, print_json, progress

if TYPE_CHECKING:
    from kvkernels_records.check import Report
    from kvkernels_records.sources import Source

EPILOG = """\b
Examples:
  check-kv --baseline a.npz --target b.npz
  check-kv --baseline a.npz --target b.safetensors --json
  check-kv --baseline whole.npz --target rank0.npz --target rank1.npz
  check-kv --baseline a.npz --target b.npz --rule '_key$ max_abs < 0.01 and cosine > 0.999'
  check-kv --baseline a.npz --target b.npz --by token --plot error.png
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--baseline", required=True, multiple=True, metavar="FILE",
              help="The capture to compare with; several times for the files of several ranks.")  # fmt: skip
@click.option("--target", required=True, multiple=True, metavar="FILE", help="The capture that is compared.")
@click.option("--max-abs-threshold", default="1e-3", show_default=True, help="The most that two elements may differ.")
@click.option("--cosine-threshold", default="0.999", show_default=True, help="The least cosine of two arrays.")
@click.option("--rule", "rules", multiple=True, metavar="'REGEX EXPRESSION'",
              help="In place of both thresholds, for arrays that REGEX is found in: an expression of max_abs, "
                   "mean_abs, rel, cosine, numbers, < <= > >= and or not. The first that matches counts.")  # fmt: skip
@click.option("--by", metavar="UNIT", help="Figures by head, token, layer or page as well.")
@click.option("--page-tokens", metavar="N", help="Tokens of a page; by default what the baseline says.")
@click.option("--plot", metavar="FILE.png", help="Draw the error by layer and token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--jsonl", is_flag=True, help="Print a JSON line for each array as it is compared, and one at the end.")
def COMMAND(
    baseline: tuple[str, ...], target: tuple[str, ...], max_abs_threshold: str, cosine_threshold: str,
    rules: tuple[str, ...], by: str | None, page_tokens: str | None, plot: str | None, as_json: bool, jsonl: bool,
) -> int:  # fmt: skip
    """Compare two captures, or the digests of a pool's pages before and after.

    FILE is .npz or .safetensors, or a .pt file or folder that SGLang's dumper wrote. Exit status 1 says that something
    differs, is missing or cannot be read.
    """
    from kvkernels_records.check import Limits, compare
    from kvkernels_records.pages import is_digests
    from kvkernels_records.rules import parse_rule
    from kvkernels_records.sources import open_source

    limits = Limits(
        number(max_abs_threshold, "check-kv: --max-abs-threshold"),
        number(cosine_threshold, "check-kv: --cosine-threshold"),
        [parse_rule(rule) for rule in rules],
    )
    tokens = None if page_tokens is None else integer(page_tokens, "check-kv: --page-tokens", 1)
    if as_json and jsonl:
        raise click.UsageError("--json and --jsonl cannot go together")
    first, second = open_source(baseline), open_source(target)
    if is_digests(first) or is_digests(second):
        return _print_pages(first, second, as_json or jsonl)
    count = len({*first.names, *second.names})
    with progress("comparing", count) as done:
        compared = 0

        def on_key(found: dict[str, Any]) -> None:
            nonlocal compared
            compared += 1
            done(compared)
            if jsonl:
                click.echo(json.dumps(found, allow_nan=False))

        report = compare(first, second, limits, by=by, page_tokens=tokens, on_key=on_key)
    if plot:
        from kvkernels_records.heatmap import draw

        draw(report, plot)
    if jsonl:
        click.echo(json.dumps({**report.as_json(), "keys": len(report.keys)}, allow_nan=False))
    elif as_json:
        print_json(report.as_json())
    else:
        _print(report)
    return 1 if report.divergent else 0


def _print(report: Report) -> None:
    """A table of what diverges, or of everything where that is little, and the verdict."""
    shown = [key for key in report.keys if key["divergent"]] or report.keys
    width = max(len(key["key"]) for key in shown[:40])
    click.echo(f"{'':{width}}  {'max abs':>9}  {'mean abs':>9}  {'cosine':>9}")
    for key in shown[:40]:
        figures = "  ".join(_cell(key[name]) for name in ("max_abs_diff", "mean_abs_diff", "cosine"))
        click.echo(f"{key['key']:{width}}  {figures}  {key['reason'] or ''}".rstrip())
    if len(shown) > 40:
        click.echo(f"and {len(shown) - 40} more")
    for unit in report.units:
        name = next(iter(unit))
        figures = "  ".join(_cell(unit[one]) for one in ("max_abs_diff", "mean_abs_diff", "cosine"))
        click.echo(f"{name + ' ' + str(unit[name]):{width}}  {figures}")
    diverging = sum(key["divergent"] for key in report.keys)
    if not diverging:
        click.echo(f"{len(report.keys)} arrays agree")
        return
    first = report.first or {}
    place = first["key"]
    if first["token"] is not None:
        place += f", head {first['head']}, token {first['token']}"
    click.echo(f"{diverging} of {len(report.keys)} arrays diverge, first {place}")


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>9}"
    return f"{value:9.6f}" if 0.9 <= abs(value) <= 1 else f"{value:9.3g}"


def _print_pages(before: Source, after: Source, as_json: bool) -> int:
    from kvkernels_records.errors import CaptureFileError
    from kvkernels_records.pages import is_digests, written_pages

    if not (is_digests(before) and is_digests(after)):
        raise CaptureFileError(f"{before.label}, {after.label}: one holds digests of pages and the other does not")
    written = written_pages(before, after)
    pages = sum(len(found) for found in written.values())
    if as_json:
        print_json({"baseline": before.label, "target": after.label, "divergent": pages > 0, "written_pages": written})
    else:
        for name, found in written.items():
            click.echo(f"{name}: {_ranges(found) or 'no page'} written in between")
    print(f"{pages} pages were written in between", file=sys.stderr)
    return 1 if pages else 0


def _ranges(pages: list[int]) -> str:
    """``3-5, 9`` for 3, 4, 5, 9."""
    parts: list[list[int]] = []
    for page in pages:
        if parts and page == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], page]
        else:
            parts.append([page])
    return ", ".join("-".join(map(str, part)) for part in parts)
