"""``kvkernels``: all commands under one name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from kvkernels_cli import capture_kv, check_kv, kv_stats, plot
from kvkernels_cli.running import integer, print_json

HELP = {"help_option_names": ["-h", "--help"]}
EPILOG = """\b
Examples:
  kvkernels info
  kvkernels bench --model qwen3-32b --threads 1
  kvkernels explain gather_blocks --pools 64 --page-bytes 32768 --pairs 100
  kvkernels check-kv --baseline a.npz --target b.npz

Each command has examples of its own: kvkernels COMMAND --help
"""
OPS = ("swap_blocks", "gather_blocks", "scatter_blocks", "copy_pages")
DIRECTIONS = ("h2h", "h2d", "d2h", "d2d")
#: What benchmarks/swap.py and the eviction policies have; written down because asking them imports torch.
MODELS = ("deepseek-v3-mla", "gpt-oss-20b", "llama-3.1-70b-tp8", "llama-3.1-8b", "qwen3-32b", "qwen3-next")
EXECUTORS = ("auto", "cpu", "kernel", "bulk", "dma", "staged", "reference")
TRACES = ("chat", "rag", "agent")
POLICIES = ("lru", "lfu", "fifo", "ttl", "priority", "arc", "s3fifo", "sieve", "chain", "belady")


@click.group(epilog=EPILOG, context_settings=HELP)
def COMMAND() -> None:
    """Move, capture and check LLM KV caches."""


COMMAND.add_command(capture_kv.COMMAND, "capture-kv")
COMMAND.add_command(check_kv.COMMAND, "check-kv")
COMMAND.add_command(kv_stats.COMMAND, "kv-stats")
COMMAND.add_command(plot.COMMAND, "plot")


@COMMAND.command(context_settings=HELP, epilog="\b\nExample:\n  kvkernels info --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> int:
    """Which executors serve which op here, and why."""
    return _forward("info", *(["--json"] if as_json else []))


@COMMAND.command(context_settings=HELP, epilog="\b\nExample:\n  kvkernels policy > mine.json")
@click.option("--default", is_flag=True, help="The one that is compiled in.")
def policy(default: bool) -> int:
    """The table by which auto goes on a GPU, as JSON for KVKERNELS_POLICY."""
    return _forward("policy", *(["--default"] if default else []))


@COMMAND.command(context_settings=HELP, epilog="\b\nExample:\n  kvkernels tune --dry-run")
@click.option("--seconds", type=float, metavar="N", help="About how long to measure.")
@click.option("--dry-run", is_flag=True, help="Measure, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the file's content instead of words.")
def tune(seconds: float | None, dry_run: bool, as_json: bool) -> int:
    """Measure this machine, and write what serves best here."""
    flags = [flag for flag, is_set in (("--dry-run", dry_run), ("--json", as_json)) if is_set]
    return _forward("tune", *([] if seconds is None else ["--seconds", str(seconds)]), *flags)


REPLAY_EPILOG = """\b
Examples:
  kvkernels replay trace.jsonl --policy lru,chain --capacity 1000,10000
  kvkernels replay --generate chat -n 5000 -o chat.jsonl.gz
"""


@COMMAND.command(context_settings=HELP, epilog=REPLAY_EPILOG)
@click.argument("traces", nargs=-1, metavar="[TRACE]...")
@click.option("--policy", metavar="NAMES", callback=lambda context, option, names: _policies(names),
              help="Policies, separated by commas, or all (the default).")  # fmt: skip
@click.option("--capacity", metavar="LIST", help="In blocks, or in tokens with tok at the end.")
@click.option("--chains", is_flag=True, help="Hold a block only while the one before it is held.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", metavar="FILE.png", help="Draw hit rates over capacity.")
@click.option("--generate", type=click.Choice(TRACES), help="Write a trace that is made up, and replay nothing.")
@click.option("-n", type=click.IntRange(min=0), metavar="N", help="Requests to generate, 1000 by default.")
@click.option("--seed", type=int, help="Of the generator.")
@click.option("-o", metavar="FILE", help="Where the generated trace goes; compressed if it ends in .gz.")
def replay(
    traces: tuple[str, ...], policy: str | None, capacity: str | None, chains: bool, as_json: bool, plot: str | None,
    generate: str | None, n: int | None, seed: int | None, o: str | None,
) -> int:  # fmt: skip
    """What eviction policies would have hit on a trace."""
    given = {"--policy": policy, "--capacity": capacity, "--plot": plot, "--generate": generate, "-n": n,
             "--seed": seed, "-o": o}  # fmt: skip
    flags = [flag for flag, is_set in (("--chains", chains), ("--json", as_json)) if is_set]
    options = [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]
    return _forward("replay", *options, *flags, "--", *traces)


BENCH_EPILOG = """\b
Examples:
  kvkernels bench
  kvkernels bench --model deepseek-v3-mla --threads 1 --json out.json --plot out.png
"""


@COMMAND.command(context_settings=HELP, epilog=BENCH_EPILOG)
@click.option("--model", type=click.Choice(MODELS), help="Whose pages; llama-3.1-8b by default.")
@click.option("--block-tokens", type=click.IntRange(min=1), metavar="N", help="Token slots in a block (16).")
@click.option("--blocks", type=click.IntRange(min=1), metavar="N", help="Blocks to move (256 MiB of pages).")
@click.option("--direction", type=click.Choice(DIRECTIONS), help="h2h by default.")
@click.option("--executor", type=click.Choice(EXECUTORS), multiple=True, help="Several times for several.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads; torch's by default.")
@click.option("--sm-budget", type=click.IntRange(min=0), metavar="N", help="SMs that a kernel may use (0: its policy).")
@click.option("--seconds", type=float, help="Time for measuring, without checks (20).")
@click.option("--json", metavar="FILE", help="Write everything measured.")
@click.option("--plot", metavar="FILE.png", help="Write a chart.")
def bench(executor: tuple[str, ...], **given: object) -> int:
    """Move a model's pages, check every byte, and time it."""
    script = swap_script()
    options = [
        str(word)
        for name, value in given.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    options += ["--executor", *executor] if executor else []
    return subprocess.run([sys.executable, str(script), *options], check=False).returncode


EXPLAIN_EPILOG = """\b
Examples:
  kvkernels explain swap_blocks --page-bytes 32768 --pairs 64
  kvkernels explain gather_blocks --pools 160 --page-bytes 656 --pairs 4096 --json
"""


@COMMAND.command(context_settings=HELP, epilog=EXPLAIN_EPILOG)
@click.argument("op", type=click.Choice(OPS))
@click.option("--page-bytes", default="32768", show_default=True, metavar="N", help="Bytes of a block in one pool.")
@click.option("--pairs", default="64", show_default=True, metavar="N", help="Blocks that are copied, in random order.")
@click.option("--pools", default="1", show_default=True, metavar="N", help="Pools a side.")
@click.option("--direction", type=click.Choice(DIRECTIONS), default="h2h", show_default=True)
@click.option("--executor", type=click.Choice((*EXECUTORS, "triton")), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(op: str, page_bytes: str, pairs: str, pools: str, direction: str, executor: str, as_json: bool) -> int:
    """What a call would come to here, and why; nothing is moved."""
    sizes = (
        integer(page_bytes, "explain: --page-bytes", 1),
        integer(pairs, "explain: --pairs", 1),
        integer(pools, "explain: --pools", 1),
    )
    from dataclasses import asdict

    from kvkernels_cli.explaining import explain_pages

    found = asdict(explain_pages(op, *sizes, direction, executor))
    if as_json:
        print_json(found)
        return 0
    for name, value in found.items():
        if value not in ("", {}):
            click.echo(f"{name:12} {value}")
    return 0


def _policies(names: str | None) -> str | None:
    for name in [] if names in (None, "all") else str(names).split(","):
        if name not in POLICIES:
            raise click.BadParameter(f"must be all, or of {', '.join(POLICIES)}, separated by commas, got {name!r}")
    return names


def swap_script() -> Path:
    """Where benchmarks/swap.py is: beside this package in a clone, inside of it in a wheel.

    Raises
    ------
    FileNotFoundError
        Nowhere.
    """
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "benchmarks", here / "benchmarks"):
        if (folder / "swap.py").is_file():
            return folder / "swap.py"
    raise FileNotFoundError("bench: benchmarks/swap.py is missing from this installation: install kvkernels again")


def _forward(*arguments: str) -> int:
    """What ``python -m kvkernels`` does with them."""
    from kvkernels.cli import main

    try:
        return main(arguments)
    except SystemExit as end:  # argparse has said why
        return end.code if isinstance(end.code, int) else 1
