#!/usr/bin/env python3
"""Moves a model's KV-cache blocks, checks every byte, and times it against the machine's limit, torch and a copy loop.

GB/s is 1e9 bytes of payload a second. The sides take turns in one process, and medians are compared; see harness.py.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import contest
import harness
import kvkernels
import machine
import plot
from geometry import Geometry, Moves, random_moves
from models import MODELS, Group, blocks_for
from verify import Verifier

DIRECTIONS = ("h2h", "h2d", "d2h", "d2d")
EXECUTORS = ("auto", "cpu", "kernel", "bulk", "dma", "staged", "reference")
SIDE_BYTES = 256 << 20
MEASURING_SECONDS = 20.0


@dataclass
class Row:
    """One line of the result: an op on one group of layers."""

    group: str
    op: str
    executor: str
    pools: int
    page_bytes: int
    moved_blocks: int
    payload_bytes: int
    gb_per_s: float
    share_of_ceiling: float
    ratio_to_torch: float
    ratio_to_copy_loop: float
    ceiling_gb_per_s: float
    torch_gb_per_s: float
    copy_loop_gb_per_s: float
    times: dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--block-tokens", type=positive, default=16, metavar="N", help="token slots in a block (16)")
    parser.add_argument(
        "--blocks", type=positive, metavar="N", help="blocks of full attention to move (default: 256 MiB of pages)"
    )
    parser.add_argument("--direction", choices=DIRECTIONS, default="h2h")
    parser.add_argument(
        "--executor", choices=EXECUTORS, nargs="+", default=["auto"], help="for the ops that let a caller choose"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--sm-budget", type=int, default=0, metavar="N", help="SMs that a kernel may use (0: its policy)"
    )
    parser.add_argument("--seconds", type=float, default=MEASURING_SECONDS, help="time for measuring, without checks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a chart")
    options = parser.parse_args(arguments)
    if options.plot:
        plot.require_matplotlib()
    if options.direction != "h2h" and not torch.cuda.is_available():
        parser.exit(2, f"--direction {options.direction} needs a CUDA device, and torch sees none: {why_no_cuda()}\n")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but no driver or device answers"


def sides_of(direction: str) -> tuple[torch.device, torch.device]:
    devices = {"h": torch.device("cpu"), "d": torch.device("cuda", 0)}
    return devices[direction[0]], devices[direction[-1]]


def allocate(nbytes: int, device: torch.device, direction: str) -> harness.HostMemory | harness.PlainMemory:
    """Huge pages for a copy inside the host; where a device takes part, memory it can reach."""
    return harness.HostMemory(nbytes) if direction == "h2h" else harness.PlainMemory(nbytes, device)


@dataclass(frozen=True)
class Entry:
    """One of our sides, and the executor that kvkernels.explain says it takes."""

    op: str
    side: contest.Contestant
    executor: str


def entries_of(
    geometry: Geometry,
    moves: Moves,
    options: argparse.Namespace,
    src: torch.Tensor,
    dst: torch.Tensor,
    say: Callable[[str], None],
) -> list[Entry]:
    """Each op by each executor asked for; what an executor refuses is said and left out."""
    entries = []
    for op in contest.KIND_OF:
        executors = dict.fromkeys(options.executor) if op in contest.CHOOSES_EXECUTOR else ("auto",)
        for executor in executors:
            side = contest.ours(op, executor, options.sm_budget, geometry, moves, src, dst)
            try:
                explained = kvkernels.explain(op, *side.arguments, **side.keywords)
            except ValueError as refusal:
                say(f"left out: {refusal}")
                continue
            entries.append(Entry(op, side, explained.executor))
    return entries


class Reporter:
    """The progress bar: one step a side checked, then the share of the measuring time used."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, transient=True)
        self._said: set[str] = set()

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.progress.console.print(text, markup=False)

    def task(self, description: str, total: float) -> Callable[[float], None]:
        task = self.progress.add_task(description, total=total)
        return lambda done: self.progress.update(task, completed=done)


def run_group(group: Group, options: argparse.Namespace, reporter: Reporter, seconds: float) -> tuple[list[Row], Any]:
    full_blocks = options.blocks or blocks_for(MODELS[options.model], options.block_tokens, SIDE_BYTES)
    moved = max(1, round(group.blocks(full_blocks, options.block_tokens)))
    # A sixteenth of the blocks is named by no pair, so that the check sees a write to a wrong block.
    geometry = Geometry(group.pools, moved + moved // 16 + 1, group.page_bytes(options.block_tokens), moved)
    moves = random_moves(geometry)
    src_device, dst_device = sides_of(options.direction)
    src_memory = allocate(geometry.flat_bytes, src_device, options.direction)
    dst_memory = allocate(geometry.flat_bytes, dst_device, options.direction)
    staging = allocate(geometry.payload_bytes, dst_device, options.direction)
    harness.fill_random(src_memory.flat, seed=1)
    staging.flat.zero_()
    src, dst = src_memory.flat, dst_memory.flat
    entries = entries_of(geometry, moves, options, src, dst, reporter.say_once)
    sides = [entry.side for entry in entries]
    for kind in dict.fromkeys(contest.KIND_OF[entry.op] for entry in entries):
        sides.append(contest.torch_rival(kind, geometry, moves, src, dst, staging.flat))
        sides.append(contest.copy_loop(kind, geometry, moves, src, dst))

    verifier = Verifier(geometry, moves, src, dst)
    checked = reporter.task(f"{group.name}: checking every byte", len(sides))
    for index, side in enumerate(sorted(sides, key=lambda side: (side.src_form, side.dst_form))):
        verifier.check(side.name, side.run, side.src_form, side.dst_form)
        checked(index + 1)
    del verifier

    on_host = options.direction == "h2h"
    threads = torch.get_num_threads()
    payload = geometry.payload_bytes
    racing = [harness.Side(side.name, side.run, payload) for side in sides]
    racing += harness.ceiling_sides(dst, src, payload, threads)
    clock = harness.host_seconds if on_host else harness.event_seconds
    timed = reporter.task(f"{group.name}: measuring", 1.0)
    times = harness.measure(racing, harness.Budget(seconds), clock, timed)

    _, ceiling = harness.fastest_ceiling(times)
    rows = []
    for entry in entries:
        ours = times[entry.side.name]
        kind = contest.KIND_OF[entry.op]
        torch_times, loop_times = times[f"{contest.TORCH} {kind}"], times[f"{contest.LOOP} {kind}"]
        rows.append(
            Row(
                group=group.name,
                op=entry.side.name,
                executor=entry.executor,
                pools=geometry.pools,
                page_bytes=geometry.page_bytes,
                moved_blocks=moved,
                payload_bytes=payload,
                gb_per_s=ours.gb_per_s,
                share_of_ceiling=ours.gb_per_s / ceiling.gb_per_s,
                ratio_to_torch=torch_times.median_s / ours.median_s,
                ratio_to_copy_loop=loop_times.median_s / ours.median_s,
                ceiling_gb_per_s=ceiling.gb_per_s,
                torch_gb_per_s=torch_times.gb_per_s,
                copy_loop_gb_per_s=loop_times.gb_per_s,
                times={other: side.as_json() for other, side in times.items()},
            )
        )
    return rows, dst_memory.huge_page_share()


def table_of(rows: Sequence[Row]) -> Table:
    """The table of one group's rows."""
    first = rows[0]
    title = f"{first.group}: {first.pools} pools, {first.moved_blocks} blocks moved in each"
    table = Table(title=title, title_justify="left")
    for heading in ("op", "page", "GB/s", "of ceiling", "vs torch", "vs copy_", "executor"):
        table.add_column(heading, justify="left" if heading in ("op", "executor") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.op,
            plot.bytes_in_words(row.page_bytes),
            f"{row.gb_per_s:.2f}",
            f"{row.share_of_ceiling:.2f}",
            f"{row.ratio_to_torch:.2f}x",
            f"{row.ratio_to_copy_loop:.2f}x",
            row.executor,
        )
    table.add_section()
    table.add_row("ceiling", "", f"{first.ceiling_gb_per_s:.2f}", "1.00", "", "", "")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log has no edge
    groups = MODELS[options.model]
    rows: list[Row] = []
    reporter = Reporter(console)
    with reporter.progress:
        for group in groups:
            group_rows, huge_page_share = run_group(group, options, reporter, options.seconds / len(groups))
            rows += group_rows
    device = sides_of(options.direction)[1 if options.direction == "h2d" else 0]
    described = machine.describe(device, huge_page_share)
    described["threads"] = torch.get_num_threads()
    console.print(
        f"{options.model}, {options.block_tokens} tokens a block, {options.direction}, random block order, "
        f"{torch.get_num_threads()} threads; every byte and guard byte checked"
    )
    for group in groups:
        console.print(table_of([row for row in rows if row.group == group.name]))
    console.print(
        "GB/s is 1e9 bytes of payload a second. The ceiling is as many contiguous bytes on as many threads; torch is"
        " its fastest spelling; copy_ is a loop with one copy a page."
    )
    console.print(f"Ran on {machine.in_words(described)}")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        result = {"machine": described, "settings": settings, "checked": True, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot.draw_swap(options.plot, f"{options.model}, {options.direction}", [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
