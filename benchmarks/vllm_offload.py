"""What the connector costs an engine: the table of benchmarks/results/vllm_offload_cost.md.

Submission is timed on the thread's own clock, contestants taking turns. --vllm names vLLM's
vllm/v1/kv_offload/cpu/gpu_worker.py, of which one function is run: what it builds a transfer's descriptors with.
--model runs an engine, in an environment that has vLLM: tokens a second of a decoding batch, while one lane stores all
the time and while it does not, in turns.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import kvkernels
import machine
from kvkernels.connectors.worker import HostWorker
from kvkernels.transfer import PreparedJob
from mover import function_of, in_turns, low, own_time
from publish import publish

BLOCKS, LAYERS, BURST = 64, 32, 20
ROOT = Path(__file__).resolve().parents[1]


def submissions(rounds: int, vllm: Path | None) -> dict[str, float]:
    """Microseconds of a store of 64 blocks of 32 layers, up to where its copy begins."""
    page, blocks = 64, 2048
    device = [torch.zeros(blocks, page, dtype=torch.int8) for _ in range(LAYERS)]
    refs = [SimpleNamespace(tensor_idx=i, page_size_bytes=page) for i in range(LAYERS)]
    tensors = [SimpleNamespace(tensor=tensor, page_size_bytes=page) for tensor in device]
    worker = HostWorker(SimpleNamespace(tensors=tensors, group_data_refs=[refs]), blocks, 1, lanes=1)
    draw = np.random.default_rng(1)
    ids, chunks = (draw.permutation(blocks)[:BLOCKS].astype(np.int32) for _ in range(2))
    numbers = iter(range(1 << 40))

    def submit() -> int:
        job = next(numbers)
        worker.submit_store(job, ids, chunks, [BLOCKS], [0])
        return job

    def burst() -> float:
        jobs: list[int] = []
        with worker._mover.held():
            seconds = own_time(lambda: jobs.extend(submit() for _ in range(BURST))) / BURST
        worker.wait(jobs), worker.finished()
        return seconds

    def alone() -> float:
        jobs: list[int] = []
        seconds = own_time(lambda: jobs.append(submit()))
        worker.wait(jobs), worker.finished()
        return seconds

    def a_call_a_layer() -> None:
        """What examples/vllm_offload did before there was a connector; the copies are done when it returns."""
        mapping = torch.from_numpy(np.stack([ids, chunks], axis=1).astype(np.int64))
        for layer, rows in zip(device, worker.host, strict=True):
            torch.ops.kvkernels.swap_blocks(layer[:, :page], rows[:, :page], page, mapping)

    contestants: dict[str, Callable[[], float]] = {
        "connector, in a burst": burst,
        "connector, alone": alone,
        "swap_blocks a layer, copies included": lambda: own_time(a_call_a_layer),
    }
    if vllm:
        pointers, out = function_of(vllm, "compute_sub_block_ptrs"), np.empty((3, BLOCKS * LAYERS), np.uint64)

        def descriptors() -> None:
            at = 0
            for layer, rows in zip(device, worker.host, strict=True):
                pointers(ids, 1, out[0][at : at + BLOCKS], layer)
                pointers(chunks, 1, out[1][at : at + BLOCKS], rows)
                out[2][at : at + BLOCKS] = page
                at += BLOCKS

        contestants["vLLM's descriptors, unchecked, copies not included"] = lambda: own_time(descriptors)
    times = in_turns(contestants, rounds)
    worker.close()
    return {name: 1e6 * low(of) for name, of in times.items()}


def decoding(model: Path, rounds: int) -> dict[str, float]:
    """Tokens a second of 8 requests that decode together, and what one lane stores meanwhile."""
    sys.path.insert(0, str(ROOT / "tests" / "e2e"))
    from engine import Engine

    engine = Engine(model, "KVKernelsConnector", extra={"lanes": 1}, max_num_seqs=8)
    mover = engine.worker.host_worker._mover
    sides = [torch.zeros(1024, 64 << 10, dtype=torch.uint8) for _ in range(2)]
    copy, mapping = kvkernels.prepare([sides[0]], [sides[1]]), torch.arange(1024).repeat(2, 1).T.contiguous()
    stop, moved = threading.Event(), [0]

    def keep_busy() -> None:
        while not stop.is_set():
            moved[0] += mover.submit(PreparedJob(copy, mapping), priority="store").result().bytes

    def tokens_a_second() -> float:
        prompts = [[(request * 31 + i * 7) % 500 + 3 for i in range(40)] for request in range(8)]
        started = time.perf_counter()
        answers = engine.generate(prompts, [96] * 8)
        return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - started)

    idle, busy, rates = [], [], []
    for _ in range(rounds):
        idle.append(tokens_a_second())
        stop.clear()
        moved[0], thread, started = 0, threading.Thread(target=keep_busy), time.perf_counter()
        thread.start()
        busy.append(tokens_a_second())
        stop.set()
        thread.join()
        rates.append(moved[0] / (time.perf_counter() - started) / 1e9)
    return {
        "idle": statistics.median(idle),
        "busy": statistics.median(busy),
        "gb_per_s": statistics.median(rates),
    }


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# What the connector costs an engine",
        "",
        f"Measured by `python benchmarks/vllm_offload.py` on {found['machine']}; load {found['load']:.1f}.",
        "",
        f"## Microseconds to submit a store of {BLOCKS} blocks of {LAYERS} layers",
        "",
        "Lower quartiles on the thread's own clock. In a burst jobs wait for those before, which have the same pools;",
        "alone, each was carried out before the next, and another thread has had the caches. Goal: 60 us.",
        "",
        "| | us |",
        "| --- | ---: |",
        *(f"| {name} | {us:.1f} |" for name, us in found["submissions"].items()),
        "",
    ]
    if "decoding" in found:
        rates = found["decoding"]
        lines += [
            "## Tokens a second of 8 requests that decode together",
            "",
            "| | tokens a second |",
            "| --- | ---: |",
            f"| no copies | {rates['idle']:.0f} |",
            f"| one lane stores all the time, {rates['gb_per_s']:.1f} GB/s | {rates['busy']:.0f} |",
            "",
            f"Medians of rounds in turns: {rates['busy'] / rates['idle']:.2f} of what it is without. A tiny model",
            "decodes on one core; the lane has the other where nobody else wants it.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": machine.in_words(machine.describe(torch.device("cpu"), None)),
        "submissions": submissions(options.rounds, options.vllm),
    }
    if options.model:
        found["decoding"] = decoding(options.model, max(1, options.rounds // 12))
    found["load"] = os.getloadavg()[0]
    publish(options.out, "vllm_offload_cost", found, markdown(found))


if __name__ == "__main__":
    main()
