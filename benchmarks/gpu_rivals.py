"""Others' ways to do the same on the same bytes: torch's, the driver's, and two engines' own kernels.

The engines' files are no part of this repository. They are read where the command line names them: --lmcache DIR for an
unpacked wheel of LMCache 0.5.3, --sglang FILE for common_ops.abi3.so of sglang-kernel 0.4.3. Their bytes are checked
like ours before a time counts.
"""

from collections.abc import Callable, Iterator

import torch

import contest
import gpu_lmcache
import gpu_sglang
from gpu_bench import Bench, Step
from gpu_calls import addresses
from gpu_d2d import LLAMA, PAYLOAD_BYTES, TP_SIZES, shards_of
from gpu_driver import batched_copy
from gpu_log import Record
from gpu_memory import Case
from gpu_transfer import SPREAD_BYTES, Transfer, pools_of

KIB = 1024
SIZES = ((4 * KIB, 1_000), (4 * KIB, 10_000), (32 * KIB, 1_000), (32 * KIB, 10_000), (256 * KIB, 1_000))
OURS = "kvkernels"

Build = Callable[[Bench, Transfer, torch.Tensor, torch.Tensor], Case]


def steps(bench: Bench) -> Iterator[Step]:
    for direction in bench.options.directions:
        for fragment, count in SIZES:
            if fragment in bench.options.fragments:
                yield from _transfers(bench, direction, fragment, count)
    for ranks in TP_SIZES:
        yield _torch_cat(bench, ranks)
    yield from gpu_lmcache.steps(bench)


def _transfers(bench: Bench, direction: str, fragment: int, count: int) -> Iterator[Step]:
    fragments = bench.scaled(count, least=4)
    pools = pools_of(fragments)
    spread = bench.scaled(SPREAD_BYTES)
    in_pools, in_rows = (
        Transfer(direction, fragment, fragments, pools, form, spread_bytes=spread, most_sets=1)
        for form in ("pools", "rows")
    )
    yield _step(bench, in_pools, count, OURS, _ours)
    yield _step(bench, in_pools, count, "copy_ loop", _copy_loop)
    yield _step(bench, in_pools, count, "torch: index, copy, index", _torch, needs_torch_kernels=True)
    yield _step(bench, in_pools, count, "cuMemcpyBatchAsync", _batch)
    for name, build in gpu_sglang.RIVALS.items():
        yield _step(bench, in_pools, count, name, build)
    yield _step(bench, in_rows, count, OURS, _ours)
    yield _step(bench, in_rows, count, "torch: index, copy, index", _torch, needs_torch_kernels=True)


def _step(
    bench: Bench, moved: Transfer, count: int, rival: str, build: Build, needs_torch_kernels: bool = False
) -> Step:
    def run(key: Record) -> None:
        bench.require(moved.geometry.flat_bytes)
        bench.measure(key, build(bench, moved, *bench.sides(moved.direction)))

    return Step({**moved.key(), "count": count, "rival": rival}, run, needs_torch_kernels)


def _ours(bench: Bench, moved: Transfer, src: torch.Tensor, dst: torch.Tensor) -> Case:
    return moved.case(src, dst, "auto")


def _copy_loop(bench: Bench, moved: Transfer, src: torch.Tensor, dst: torch.Tensor) -> Case:
    loop = contest.copy_loop("swap", moved.geometry, moved.moves, src, dst)
    return moved.other_case(src, dst, [loop.run])


def _torch(bench: Bench, moved: Transfer, src: torch.Tensor, dst: torch.Tensor) -> Case:
    """index_select into pinned memory or out of it, one copy a pool, and index_copy_: it waits between the steps."""
    staging = torch.empty(moved.payload_bytes, dtype=torch.uint8, device=dst.device, pin_memory=not dst.is_cuda)
    kind = {"copy_pages": "swap", "gather_blocks": "gather", "scatter_blocks": "scatter"}[moved.op]
    rival = contest.torch_rival(kind, moved.geometry, moved.moves, src, dst, staging)
    return moved.other_case(src, dst, [rival.run], waits=True)


def _batch(bench: Bench, moved: Transfer, src: torch.Tensor, dst: torch.Tensor) -> Case:
    return moved.other_case(src, dst, [batched_copy(*addresses(moved, src, dst))])


def _torch_cat(bench: Bench, ranks: int) -> Step:
    def run(key: Record) -> None:
        shards = shards_of(bench.scaled(PAYLOAD_BYTES), ranks)
        bench.require(shards.span_bytes, bench.near)
        far = torch.empty_like(bench.near[: shards.span_bytes])
        parts, whole = shards.cut(bench.near), shards.whole(far)
        call = [lambda: torch.cat(parts, 1, out=whole)]
        bench.measure(key, Case(bench.near, far, shards.span_bytes, call, shards.payload_bytes, shards.expect_whole))

    key = {"direction": "d2d", "kind": f"concat TP{ranks}", "rival": "torch.cat", "heads": LLAMA["H"]}
    return Step(key, run, needs_torch_kernels=True)
