"""What a call costs its caller: host time of small calls by pools, and of long lists of raw addresses."""

from collections.abc import Iterator

import torch

import kvkernels
from gpu_bench import Bench, Step
from gpu_clock import Effort
from gpu_log import Record
from gpu_transfer import Transfer, pools_of

PAGE_BYTES = 32 << 10
POOLS = (1, 64, 160)
BLOCKS = (1, 64)
EXECUTORS = ("auto", "kernel", "dma")
FORMS = ("pools", "rows")
ROWS = (1_000, 10_000, 64_000)
ROW_BYTES = 16 << 10
EFFORT = Effort(least=5, most=40, seconds=0.05)


def steps(bench: Bench) -> Iterator[Step]:
    for direction in bench.options.directions:
        for form in FORMS:
            for blocks in BLOCKS:
                for pools in POOLS:
                    for executor in EXECUTORS:
                        if executor == "auto" or executor in bench.options.executors:
                            yield _call(bench, direction, form, blocks, pools, executor)
        for rows in ROWS:
            yield _batch(bench, direction, rows)


def _call(bench: Bench, direction: str, form: str, blocks: int, pools: int, executor: str) -> Step:
    pools_here, blocks_here = bench.scaled(pools), bench.scaled(blocks)
    moved = Transfer(direction, PAGE_BYTES, pools_here * blocks_here, pools_here, form, spread_bytes=0)

    def run(key: Record) -> None:
        bench.require(moved.geometry.flat_bytes)
        bench.measure(key, moved.case(*bench.sides(direction), executor), EFFORT)

    key = {"direction": direction, "op": moved.op, "blocks": blocks, "pools": pools, "executor": executor}
    return Step({**key, "fragment_bytes": PAGE_BYTES}, run)


def _batch(bench: Bench, direction: str, rows: int) -> Step:
    def run(key: Record) -> None:
        fragments = bench.scaled(rows, least=4)
        moved = Transfer(direction, ROW_BYTES, fragments, pools_of(fragments), spread_bytes=0)
        bench.require(moved.geometry.flat_bytes)
        src, dst = bench.sides(direction)
        arguments = addresses(moved, src, dst)
        case = moved.other_case(
            src, dst, [lambda: kvkernels.swap_blocks_batch(*arguments)],
            explain=lambda: kvkernels.explain("swap_blocks_batch", *arguments),
        )  # fmt: skip
        bench.measure(key, case, EFFORT)

    key = {"direction": direction, "op": "swap_blocks_batch", "rows": rows, "executor": "auto"}
    return Step({**key, "fragment_bytes": ROW_BYTES}, run)


def addresses(
    moved: Transfer, src: torch.Tensor, dst: torch.Tensor, number: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source, destination and size of each page of a set, a pool after the other, as int64 on the CPU."""
    moves, geometry = moved.set_of(number), moved.geometry
    sides = []
    for flat, ids in ((src, moves.src), (dst, moves.dst)):
        starts = [pool.data_ptr() for pool in geometry.form(flat, "pools")]
        sides.append((torch.tensor(starts)[:, None] + ids[None, :] * moved.fragment_bytes).flatten())
    return sides[0], sides[1], torch.full_like(sides[0], moved.fragment_bytes)
