"""Ops run without the GIL: many Python threads at once, on bytes of their own or on one cache, refusals among them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kvkernels

THREADS = 8
ROUNDS = 60
TIMEOUT_S = 120


def in_threads(work: Callable[[int], None]) -> None:
    """Run ``work(thread)`` on all threads from one start; a deadlock is a failure, not a hang."""
    start = threading.Barrier(THREADS)

    def run(thread: int) -> None:
        start.wait(TIMEOUT_S)
        work(thread)

    pool = ThreadPoolExecutor(THREADS)
    try:
        futures = [pool.submit(run, thread) for thread in range(THREADS)]
        for future in futures:
            future.result(TIMEOUT_S)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def permutation(seed: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def test_each_thread_gets_its_own_bytes() -> None:
    """Pools of many sizes, so that what a thread keeps between calls is grown, reused and refused over."""

    def work(thread: int) -> None:
        for i in range(ROUNDS):
            seed = thread * ROUNDS + i
            blocks, page = 3 + seed % 97, 1 + seed * 7 % 211
            src, dst = noise(seed, blocks, page), noise(seed + 1, blocks, page)
            mapping = torch.stack((permutation(seed, blocks), permutation(seed + 1, blocks)), 1)[: 1 + seed % blocks]
            wanted = dst.clone()
            wanted[mapping[:, 1]] = src[mapping[:, 0]]
            bad = mapping.clone()
            bad[-1, seed % 2] = blocks
            with pytest.raises(IndexError, match=f"= {blocks} is out of range for"):
                torch.ops.kvkernels.swap_blocks(src, dst, page, bad)
            torch.ops.kvkernels.swap_blocks(src, dst, page, torch.cat((mapping, mapping[:1])))
            assert torch.equal(dst, wanted)
            out = torch.empty(len(mapping), page, dtype=torch.uint8)
            torch.ops.kvkernels.gather_blocks([dst], mapping[:, 1], out)
            assert torch.equal(out, src[mapping[:, 0]])

    in_threads(work)


def test_threads_write_parts_of_one_pool() -> None:
    blocks, page = 64 * THREADS, 333
    src, dst = noise(1, blocks, page), torch.zeros(blocks, page, dtype=torch.uint8)
    order = permutation(2, blocks).reshape(THREADS, -1)

    def work(thread: int) -> None:
        mapping = torch.stack((order[thread], order[thread].flip(0)), 1)
        for _ in range(ROUNDS):
            torch.ops.kvkernels.swap_blocks(src, dst, page, mapping)

    in_threads(work)
    wanted = torch.zeros_like(dst)
    wanted[order.flip(1)] = src[order]
    assert torch.equal(dst, wanted)


def test_threads_verify_and_use_plans_at_once() -> None:
    """More plans than are remembered, the same ones on all threads, wrong ones between them."""
    blocks, page = 4, 64
    src = noise(3, blocks, page)
    mapping = torch.tensor([[i, blocks - 1 - i] for i in range(blocks)])

    def work(thread: int) -> None:
        for i in range(4 * ROUNDS):
            size = 1 + (i + thread // 2) % 60
            run = [0, 0, page - size, i % (page - size + 1), size, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
            dst = torch.zeros(blocks, page, dtype=torch.uint8)
            torch.ops.kvkernels.copy_pages([src], [dst], mapping, torch.tensor([run]))
            wanted = torch.zeros_like(dst)
            wanted[:, run[3] : run[3] + size] = src.flip(0)[:, page - size :]
            assert torch.equal(dst, wanted)
            with pytest.raises(ValueError, match=r"got runs\[0\] and runs\[1\] sharing bytes"):
                torch.ops.kvkernels.copy_pages([src], [dst], mapping, torch.tensor([run, run]))

    in_threads(work)


@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_calls_that_use_torch_threads_do_not_wait_for_each_other(executor: str, threads: int) -> None:
    """Above 4 MiB a call asks torch for threads itself; the reference goes back into Python, and so for the GIL."""
    blocks, page = 40, 128 << 10
    src = noise(4, blocks, page)

    def work(thread: int) -> None:
        ids = permutation(thread, blocks)
        out = torch.empty(blocks, page, dtype=torch.uint8)
        torch.ops.kvkernels.gather_blocks([src], ids, out, executor)
        assert torch.equal(out, src[ids])
        dst = torch.empty_like(src)
        torch.ops.kvkernels.scatter_blocks(out, ids, [dst], executor)
        assert torch.equal(dst, src)

    in_threads(work)


def test_explain_belongs_to_its_thread() -> None:
    src = noise(5, 8, 100)
    ids = torch.arange(8)

    def work(thread: int) -> None:
        for i in range(ROUNDS):
            n = 1 + (thread + i) % 8
            out = torch.zeros(n, 100, dtype=torch.uint8)
            if thread % 2:
                explained = kvkernels.explain("gather_blocks", [src], ids[:n], out)
                assert explained.bytes == 100 * n and not out.any()
            else:
                torch.ops.kvkernels.gather_blocks([src], ids[:n], out)
                assert torch.equal(out, src[:n])

    in_threads(work)


def test_counters_lose_nothing() -> None:
    src = noise(6, 8, 16)
    kvkernels.reset_counters()

    def work(thread: int) -> None:
        out = torch.empty(8, 16, dtype=torch.uint8)
        for _ in range(ROUNDS):
            torch.ops.kvkernels.gather_blocks([src], torch.arange(8).flip(0), out, "cpu")

    in_threads(work)
    counted = kvkernels.counters()["cpu"]
    calls = THREADS * ROUNDS
    assert (counted["calls"], counted["bytes"]) == (calls, calls * 128)
