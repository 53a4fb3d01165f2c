#!/usr/bin/env python3
"""The page-size table of benchmarks/results: swap, gather, scatter and concat on the CPU, and what one call costs.

Writes pages.json, pages.md and pages.png. GB/s is 1e9 bytes of payload a second; harness.py says how sides are timed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

import contest
import harness
import kvkernels
import machine
import plot
from geometry import GUARD_BYTES, Geometry, random_moves
from kvkernels import ops
from publish import publish
from verify import POISON, Verifier, WrongBytes

KIB = 1 << 10
PAGE_BYTES = (4 * KIB, 32 * KIB, 512 * KIB)
OPS = {"swap": "swap_blocks", "gather": "gather_blocks", "scatter": "scatter_blocks"}

# The goals of this project: share of the ceiling by op and page, at 1 and 2 threads.
GOAL_SHARE = {
    ("swap", 4 * KIB): (0.64, 0.68),
    ("swap", 32 * KIB): (0.90, 0.85),
    ("swap", 512 * KIB): (0.90, 0.85),
    ("gather", 4 * KIB): (0.70, 0.80),
    ("gather", 32 * KIB): (0.90, 0.85),
    ("gather", 512 * KIB): (0.92, 0.85),
    ("scatter", 4 * KIB): (0.75, 0.80),
    ("scatter", 32 * KIB): (0.90, 0.85),
    ("scatter", 512 * KIB): (0.90, 0.85),
}
GOAL_CONCAT_RATIO = 1.5
GOAL_ONE_BLOCK_US = 8.0
GOAL_SIXTEEN_BLOCKS_US = 35.0
GOAL_CHECK_MS = 0.8
GOAL_FEW_ADDRESSES_US = 15.0
GOAL_MANY_ADDRESSES_MS = 2.5

# A block of 16 token slots with 8 heads of 128 elements in bfloat16.
BLOCK_TOKENS, HEADS, HEAD_DIM = 16, 8, 128
LATENCY_PAGE_BYTES = 16 * KIB
CHECKED_PAIRS, CHECKED_IDS = 100_000, 1_000_000
FEW_ADDRESSES, MANY_ADDRESSES = 1_000, 160_000
ADDRESS_POOLS, BLOCKS_PER_POOL = 64, 10_000


@dataclass
class Row:
    """One line of the table."""

    op: str
    pages: str
    threads: int
    gb_per_s: float
    ceiling_gb_per_s: float
    ceiling_loop: str
    share_of_ceiling: float
    goal_share: float | None
    torch_gb_per_s: float
    ratio_to_torch: float
    goal_ratio: float | None
    times: dict[str, Any]


@dataclass
class Cost:
    """What one small call costs."""

    what: str
    measured: float
    goal: float
    unit: str


def goal_ratio(op: str, page_bytes: int) -> float:
    if op == "gather":
        return 1.25 if page_bytes == 4 * KIB else 1.4
    return {"swap": 3.0, "scatter": 2.0}[op]


@dataclass(frozen=True)
class Race:
    """Sides that are timed together: ``ours`` names pairs of (label, our side, torch's side, goals)."""

    pages: str
    payload_bytes: int
    sides: list[harness.Side]
    ours: list[tuple[str, str, str, tuple[float, ...] | None, float | None]]


def page_race(page_bytes: int, side_bytes: int, src: torch.Tensor, dst: torch.Tensor, staging: torch.Tensor) -> Race:
    blocks = (side_bytes - 2 * GUARD_BYTES) // page_bytes
    geometry = Geometry(1, blocks, page_bytes, blocks)
    moves = random_moves(geometry)
    src, dst = src[: geometry.flat_bytes], dst[: geometry.flat_bytes]
    verifier = Verifier(geometry, moves, src, dst)
    sides, ours = [], []
    for label, op in OPS.items():
        mine = contest.ours(op, "auto", 0, geometry, moves, src, dst)
        rival = contest.torch_rival(label, geometry, moves, src, dst, staging)
        for side in (mine, rival):
            verifier.check(side.name, side.run, side.src_form, side.dst_form)
            sides.append(harness.Side(side.name, side.run, geometry.payload_bytes))
        ours.append((label, mine.name, rival.name, GOAL_SHARE[label, page_bytes], goal_ratio(label, page_bytes)))
    return Race(plot.bytes_in_words(page_bytes), geometry.payload_bytes, sides, ours)


def concat_race(order: str, shard_count: int, side_bytes: int, src: torch.Tensor, dst: torch.Tensor) -> Race:
    """Shards along the heads, in NHD or HND order, to one tensor."""
    block_bytes = BLOCK_TOKENS * HEADS * HEAD_DIM * 2
    blocks = (side_bytes - 2 * GUARD_BYTES) // block_bytes
    nbytes = blocks * block_bytes
    dim = 2 if order == "NHD" else 1

    def shape(heads: int) -> tuple[int, ...]:
        return (blocks, BLOCK_TOKENS, heads, HEAD_DIM) if order == "NHD" else (blocks, heads, BLOCK_TOKENS, HEAD_DIM)

    inside = slice(GUARD_BYTES, GUARD_BYTES + nbytes)
    out = dst[inside].view(torch.bfloat16).view(shape(HEADS))
    shards = [shard.view(torch.bfloat16).view(shape(HEADS // shard_count)) for shard in src[inside].chunk(shard_count)]
    runs = {
        "concat_tp_shards_out": lambda: ops.concat_tp_shards_out(shards, dim, out),
        "torch.cat": lambda: torch.cat(shards, dim, out=out),
    }
    expected = torch.full_like(dst, POISON)
    whole = np.concatenate([shard.view(torch.int16).numpy() for shard in shards], axis=dim)
    expected[inside] = torch.from_numpy(whole.reshape(-1).view(np.uint8))
    for name, run in runs.items():
        dst.fill_(POISON)
        run()
        if not torch.equal(dst, expected):
            raise WrongBytes(f"{name} of {shard_count} {order} shards wrote other bytes than numpy.concatenate")
    sides = [harness.Side(name, run, nbytes) for name, run in runs.items()]
    ours = [("concat", "concat_tp_shards_out", "torch.cat", None, GOAL_CONCAT_RATIO)]
    return Race(f"{order} TP{shard_count}", nbytes, sides, ours)


def rows_of(race: Race, threads: int, times: dict[str, harness.Times]) -> Iterator[Row]:
    loop, ceiling = harness.fastest_ceiling(times)
    for label, mine, rival, shares, ratio in race.ours:
        yield Row(
            op=label,
            pages=race.pages,
            threads=threads,
            gb_per_s=times[mine].gb_per_s,
            ceiling_gb_per_s=ceiling.gb_per_s,
            ceiling_loop=loop.removeprefix("ceiling: "),
            share_of_ceiling=times[mine].gb_per_s / ceiling.gb_per_s,
            goal_share=shares[min(threads, 2) - 1] if shares else None,
            torch_gb_per_s=times[rival].gb_per_s,
            ratio_to_torch=times[rival].median_s / times[mine].median_s,
            goal_ratio=ratio,
            times={name: times[name].as_json() for name in (mine, rival, loop)},
        )


def hot_seconds(run: Callable[[], Any], calls: int) -> float:
    """The seconds of the median call in a loop that does nothing else; reading the clock, about 0.1 us, is in them."""
    times = harness.measure([harness.Side("hot", run, 0)], harness.Budget(0.0, calls, calls))
    return times["hot"].median_s


def raw_addresses(rows: int) -> tuple[torch.Tensor, ...]:
    """Random blocks of 64 pools to as many others, layer by layer; nothing is behind these addresses."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(rows)
    pool, in_pool = row * ADDRESS_POOLS // rows, row % -(-rows // ADDRESS_POOLS)
    sides = []
    for begin in (1 << 44, 1 << 45):
        block = torch.randperm(BLOCKS_PER_POOL, generator=generator)[in_pool]
        sides.append(begin + (pool * BLOCKS_PER_POOL + block) * LATENCY_PAGE_BYTES)
    return *sides, torch.full((rows,), LATENCY_PAGE_BYTES)


def costs(calls: int) -> list[Cost]:
    """One call through torch.ops, and the checks and coalescing alone, which kvkernels.explain runs without a copy."""
    swap = torch.ops.kvkernels.swap_blocks
    small_src = torch.zeros(64, LATENCY_PAGE_BYTES, dtype=torch.uint8)
    small_dst = torch.zeros_like(small_src)
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    one = torch.stack([ids[:1], ids[1:2]], dim=1)
    sixteen = torch.stack([ids[:16], ids[16:32]], dim=1)
    # Explaining moves nothing, so that these stay untouched and cost no memory.
    big_src, big_dst = (torch.empty(CHECKED_IDS, 64, dtype=torch.uint8) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randperm(CHECKED_IDS, generator=generator)[:CHECKED_PAIRS] for _ in range(2)]
    many = torch.stack(sides, dim=1)
    explained = hot_seconds(lambda: kvkernels.explain("swap_blocks", big_src, big_dst, 64, many), calls // 40 + 1)
    explained_one = hot_seconds(
        lambda: kvkernels.explain("swap_blocks", big_src, big_dst, 64, many[:1]), calls // 40 + 1
    )
    one_row, few_rows, many_rows = (
        hot_seconds(partial(kvkernels.explain, "swap_blocks_batch", *raw_addresses(rows)), calls // 40 + 1)
        for rows in (1, FEW_ADDRESSES, MANY_ADDRESSES)
    )
    page = plot.bytes_in_words(LATENCY_PAGE_BYTES)
    return [
        Cost(
            f"swap_blocks of one block of {page}",
            hot_seconds(lambda: swap(small_src, small_dst, LATENCY_PAGE_BYTES, one), calls) * 1e6,
            GOAL_ONE_BLOCK_US,
            "us",
        ),
        Cost(
            f"swap_blocks of 16 blocks of {page}",
            hot_seconds(lambda: swap(small_src, small_dst, LATENCY_PAGE_BYTES, sixteen), calls) * 1e6,
            GOAL_SIXTEEN_BLOCKS_US,
            "us",
        ),
        Cost(
            f"check and coalesce {CHECKED_PAIRS:,} random pairs, ids below {CHECKED_IDS:,}",
            (explained - explained_one) * 1e3,
            GOAL_CHECK_MS,
            "ms",
        ),
        Cost(
            f"check and join {FEW_ADDRESSES:,} rows of addresses, blocks of {page}",
            (few_rows - one_row) * 1e6,
            GOAL_FEW_ADDRESSES_US,
            "us",
        ),
        Cost(
            f"check and join {MANY_ADDRESSES:,} rows of addresses, blocks of {page}",
            (many_rows - one_row) * 1e3,
            GOAL_MANY_ADDRESSES_MS,
            "ms",
        ),
    ]


def against(measured: float, goal: float | None, at_least: bool = True) -> str:
    if goal is None:
        return f"{measured:.2f}"
    met = measured >= goal if at_least else measured <= goal
    return f"{measured:.2f} / {goal:.2f}" + ("" if met else " (missed)")


def table(rows: Sequence[dict[str, Any]], what: str, pages: str) -> list[str]:
    """The rows in Markdown, under these names for the first two columns."""
    lines = [
        f"| {what} | {pages} | threads | GB/s | ceiling | share of ceiling | torch | ratio to torch |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = (
            row["op"],
            row["pages"],
            str(row["threads"]),
            f"{row['gb_per_s']:.2f}",
            f"{row['ceiling_gb_per_s']:.2f} ({row['ceiling_loop']})",
            against(row["share_of_ceiling"], row["goal_share"]),
            f"{row['torch_gb_per_s']:.2f}",
            against(row["ratio_to_torch"], row["goal_ratio"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(result: dict[str, Any]) -> str:
    rows, machine_line = result["rows"], machine.in_words(result["machine"])
    lines = [
        "# Pages on the CPU",
        "",
        f"Measured by `python benchmarks/pages.py` on {machine_line}.",
        f"{result['settings']['total_mib']} MiB in all (half source, half destination), warm, blocks in random order,"
        f" medians of {min_rounds(rows)} rounds or more in which all sides take turns in one process. Every byte and"
        " the guard bytes were checked before. GB/s is 1e9 bytes of payload a second.",
        "",
        "The *ceiling* is the fastest of three in-repo loops of streaming stores that copy as many contiguous bytes on"
        " as many threads. *torch* is its fastest spelling: `index_select(out=)`, `index_copy_` on int64 views, both"
        " through a warm staging tensor for swap, `torch.cat(out=)`. Where two figures stand in a cell, the second is"
        " the goal.",
        "",
        *table(rows, "op", "pages"),
    ]
    lines += ["", "| one call | measured / goal |", "| --- | ---: |"]
    for cost in result["costs"]:
        lines.append(f"| {cost['what']} | {against(cost['measured'], cost['goal'], at_least=False)} {cost['unit']} |")
    lines += [
        "",
        "The median call of a hot loop through `torch.ops`. Checking and coalescing is what `kvkernels.explain` takes"
        " for the pairs or rows beyond what it takes for one: it runs the op's own checks, coalescing and lowering, and"
        " moves nothing.",
        "",
        "![share of the ceiling and ratio to torch](pages.png)",
        "",
    ]
    return "\n".join(lines)


def min_rounds(rows: Sequence[dict[str, Any]]) -> int:
    return min(times["rounds"] for row in rows for times in row["times"].values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mib", type=int, default=512, help="source and destination together (512)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="measuring time for each page size and thread count"
    )
    parser.add_argument("--calls", type=int, default=20_000, help="calls in a hot loop")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    plot.require_matplotlib()
    side_bytes = options.total_mib << 19
    if side_bytes < 2 * GUARD_BYTES + max(PAGE_BYTES):
        raise SystemExit(f"--total-mib must be at least 2, got {options.total_mib}")
    options.out.mkdir(parents=True, exist_ok=True)
    src, dst, staging = (harness.HostMemory(side_bytes) for _ in range(3))
    harness.fill_random(src.flat, seed=1)
    staging.flat.zero_()
    makers: list[Callable[[], Race]] = [
        lambda page=page: page_race(page, side_bytes, src.flat, dst.flat, staging.flat) for page in PAGE_BYTES
    ]
    makers += [
        lambda order=order, tp=tp: concat_race(order, tp, side_bytes, src.flat, dst.flat)
        for order in ("NHD", "HND")
        for tp in (2, 8)
    ]
    rows: list[Row] = []
    before = torch.get_num_threads()
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(makers) * len(options.threads))
        for make in makers:
            race = make()
            for threads in options.threads:
                torch.set_num_threads(threads)
                sides = race.sides + harness.ceiling_sides(dst.flat, src.flat, race.payload_bytes, threads)
                times = harness.measure(sides, harness.Budget(options.seconds))
                rows += rows_of(race, threads, times)
                progress.advance(task)
        torch.set_num_threads(before)
    result = {
        "machine": machine.describe(torch.device("cpu"), dst.huge_page_share()),
        "settings": {"total_mib": options.total_mib, "seconds": options.seconds, "calls": options.calls},
        "checked": True,
        "rows": [asdict(row) for row in rows],
        "costs": [asdict(cost) for cost in costs(options.calls)],
    }
    plot.draw_pages(options.out / "pages.png", result["rows"])
    publish(options.out, "pages", result, markdown(result))


if __name__ == "__main__":
    main()
