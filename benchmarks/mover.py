"""What the mover costs and moves: the tables of benchmarks/results/mover.md, and the picture of a trace.

Contestants take turns; a figure is the lower quartile of the rounds for times, the upper one for rates, which another
program beside it moves least. --vllm names vllm/v1/kv_offload/cpu/gpu_worker.py of an unpacked wheel of vLLM, of which
one function is run: what it builds a transfer's descriptors with. --lmcache names
lmcache/v1/platform/torch_ops/mem_alloc.py of one of LMCache, of which another is: what it copies lists of host memory
with, to which the addresses are given. vLLM's build for the CPU (0.32) has no function that copies blocks.
"""

import argparse
import ast
import ctypes
import json
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
import kvkernels
import machine
from kvkernels.transfer import Mover, PreparedJob, SwapJob, Transfer
from publish import publish

MIB = 1 << 20
CHUNK_BYTES = 16 * MIB
PAGES = (4 << 10, 16 << 10, 32 << 10, 128 << 10, 512 << 10, 2 * MIB)
POOLS = 160
BURST = 20
DEVICE = torch.device("cpu")

Seconds = Callable[[], float]


def low(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def high(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[2] if len(values) > 1 else values[0]


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def own_time(call: Callable[[], Any]) -> float:
    """On the thread's own clock, which leaves out whoever else has the core."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def in_turns(contestants: dict[str, Seconds], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, seconds in contestants.items():
            found[name].append(seconds())
    return found


class PythonWorker:
    """What the mover is not: a thread of Python that takes calls from a queue."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> threading.Event:
        done = threading.Event()
        self._calls.put((call, done))
        return done

    def _work(self) -> None:
        while True:
            call, done = self._calls.get()
            call()
            done.set()


def function_of(path: Path, name: str) -> Callable[..., Any]:
    """One function of a file alone."""
    found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == name]
    space: dict[str, Any] = {"np": np, "torch": torch, "ctypes": ctypes}
    exec(compile(ast.Module(found, []), str(path), "exec"), space)
    return space[name]


LMCACHE = "LMCache"


def rates(rounds: int, payload: int, lmcache: Path | None) -> list[dict[str, Any]]:
    """Bytes a second of random pages, against a loop of ``copy_`` in a thread, and LMCache's function in one."""
    src, dst = harness.HostMemory(payload).flat, harness.HostMemory(payload).flat
    harness.fill_random(src, 1), dst.zero_()
    worker, rows = PythonWorker(), []
    batched_memcpy = function_of(lmcache, "batched_memcpy") if lmcache else None
    movers = {lanes: Mover(lanes=lanes, chunk_bytes=CHUNK_BYTES) for lanes in (1, 2)}
    for page in PAGES:
        blocks = payload // page
        pools = [flat[: blocks * page].view(blocks, page) for flat in (src, dst)]
        mapping = torch.stack([torch.randperm(blocks) for _ in range(2)], dim=1)
        copy = kvkernels.prepare([pools[0]], [pools[1]])
        pairs = mapping.tolist()

        def loop(pools: list[torch.Tensor] = pools, pairs: list[list[int]] = pairs) -> None:
            source, target = pools
            for i, j in pairs:
                target[j].copy_(source[i])

        def moved(lanes: int, copy: Any = copy, mapping: torch.Tensor = mapping) -> float:
            return timed(lambda: movers[lanes].submit(PreparedJob(copy, mapping), priority="load").wait())

        contestants = {f"{lanes} lanes": (lambda lanes=lanes: moved(lanes)) for lanes in movers}
        for threads in (1, 2):

            def copied(threads: int = threads, loop: Callable[[], None] = loop) -> float:
                torch.set_num_threads(threads)
                seconds = timed(lambda: worker.submit(loop).wait())
                torch.set_num_threads(1)
                return seconds

            contestants[f"copy_, {threads} threads"] = copied
        if batched_memcpy:
            lists = [(pool.data_ptr() + mapping[:, side] * page).tolist() for side, pool in enumerate(pools)]
            call = partial(batched_memcpy, *lists, [page] * blocks)
            contestants[LMCACHE] = lambda call=call: timed(lambda: worker.submit(call).wait())
        times = in_turns(contestants, rounds)
        bytes_ = blocks * page
        assert torch.equal(pools[1][mapping[:, 1]], pools[0][mapping[:, 0]])
        row = {name: high([bytes_ / one / 1e9 for one in of]) for name, of in times.items()}
        rows.append({"page": page, **row})
    for mover in movers.values():
        mover.close()
    return rows


def submits(rounds: int, vllm: Path | None) -> list[dict[str, Any]]:
    """Microseconds of a submit of 160 pools a side, checks included, beside vLLM's building of descriptors.

    In a burst they wait, each for those before, which have the same pools; alone, each was carried out before the next,
    and another thread has had the caches.
    """
    src, dst = ([torch.zeros(2048, 64, dtype=torch.uint8) for _ in range(POOLS)] for _ in range(2))
    copy = kvkernels.prepare(src, dst)
    pointers = function_of(vllm, "compute_sub_block_ptrs") if vllm else None
    rows = []
    with Mover(lanes=1) as mover:
        for blocks in (64, 1000):
            mapping = torch.stack([torch.randperm(2048)[:blocks] for _ in range(2)], dim=1)
            ids = [np.ascontiguousarray(column) for column in mapping.numpy().T]
            out = [torch.empty(blocks * POOLS, dtype=torch.int64) for _ in range(3)]

            def burst(mapping: torch.Tensor = mapping) -> float:
                job = PreparedJob(copy, mapping)
                with mover.held():
                    seconds = own_time(lambda: [mover.submit(job) for _ in range(BURST)]) / BURST
                mover.drain(), mover.poll()
                return seconds

            def alone(mapping: torch.Tensor = mapping) -> float:
                job, sent = PreparedJob(copy, mapping), []
                seconds = own_time(lambda: sent.append(mover.submit(job)))
                sent[0].wait()
                return seconds

            def build(blocks: int = blocks, ids: list[Any] = ids, out: list[Any] = out) -> None:
                arrays, at = [one.numpy().view(np.uint64) for one in out], 0
                for source, target in zip(src, dst, strict=True):
                    pointers(ids[0], 1, arrays[0][at : at + blocks], source)
                    pointers(ids[1], 1, arrays[1][at : at + blocks], target)
                    arrays[2][at : at + blocks] = 64
                    at += blocks

            def theirs(build: Callable[[], None] = build) -> float:
                return own_time(lambda: [build() for _ in range(5)]) / 5

            contestants = {"in a burst": burst, "alone": alone} | ({"vLLM": theirs} if pointers else {})
            times = in_turns(contestants, rounds * 4)
            rows.append({"blocks": blocks, **{name: low(of) * 1e6 for name, of in times.items()}})
    return rows


def latencies(rounds: int) -> dict[str, float]:
    """Microseconds from submit to done, of 2 pages of 4 KiB: one after the other, and after a pause of 2 ms."""
    src, dst = (torch.zeros(64, 4096, dtype=torch.uint8) for _ in range(2))
    copy, mapping = kvkernels.prepare([src], [dst]), torch.tensor([[3, 0], [0, 2]])
    job, worker = PreparedJob(copy, mapping), PythonWorker()

    def each(call: Callable[[], Any]) -> float:
        return statistics.median(timed(call) for _ in range(10 * BURST))

    def after_a_pause(call: Callable[[], Any]) -> float:
        time.sleep(0.002)
        return timed(call)

    with Mover(lanes=1) as mover:

        def seen() -> None:
            one = mover.submit(job)
            while not one.done():
                pass

        calls = {
            "op": lambda: copy.run(mapping),
            "done": seen,
            "wait": lambda: mover.submit(job).wait(),
            "python": lambda: worker.submit(job.call).wait(),
        }
        contestants = {name: (lambda call=call: each(call)) for name, call in calls.items()}
        contestants |= {f"{name}, paused": (lambda call=call: after_a_pause(call)) for name, call in calls.items()}
        times = in_turns(contestants, rounds * 8)
    return {name: low(of) * 1e6 for name, of in times.items()}


@contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """This thread is Python's busy main thread; who measures is another."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin, daemon=True)
    if is_busy:
        thread.start()
    yield
    stop.set()
    if is_busy:
        thread.join()


def chunk_times(rounds: int) -> dict[str, float]:
    """Milliseconds a 16 MiB chunk of 4, with Python idle and busy: in the mover and by ops in a thread of Python."""
    src, dst = (torch.zeros(4, CHUNK_BYTES, dtype=torch.uint8) for _ in range(2))
    copy, every = kvkernels.prepare([src], [dst]), torch.arange(4).repeat(2, 1).T.contiguous()
    worker, found = PythonWorker(), {}

    def by_ops() -> None:
        for i in range(4):
            copy.run(every[i : i + 1])

    with Mover(lanes=1, chunk_bytes=CHUNK_BYTES) as mover:
        for is_busy in (False, True):

            def ours() -> float:
                return mover.submit(PreparedJob(copy, every)).result().seconds / 4

            with busy(is_busy):
                times = in_turns({"mover": ours, "thread": lambda: timed(lambda: worker.submit(by_ops).wait()) / 4},
                                 rounds)  # fmt: skip
            found |= {f"{name}, {'busy' if is_busy else 'idle'}": low(of) * 1e3 for name, of in times.items()}
    return found


def waits(rounds: int, payload: int) -> dict[str, float]:
    """Chunk times that a load waits behind a store, as far as it got, at 16 MiB chunks."""
    src, dst = harness.HostMemory(payload).flat.view(-1, MIB), harness.HostMemory(payload).flat.view(-1, MIB)
    src.zero_(), dst.zero_()
    small = [torch.zeros(8, 64, dtype=torch.uint8) for _ in range(2)]
    copy, every = kvkernels.prepare([src], [dst]), torch.arange(len(src)).repeat(2, 1).T.contiguous()
    load = SwapJob(*small, 64, torch.tensor([[0, 0]]))
    found: dict[str, list[float]] = {"wait": [], "chunk": []}
    with Mover(lanes=1, chunk_bytes=CHUNK_BYTES) as mover:
        for round_ in range(rounds):
            store = mover.submit(PreparedJob(copy, every), priority="store")
            while store.state == "queued":
                pass
            loads: list[Transfer] = []
            while not store.done():
                time.sleep(0.002 + 0.0007 * (round_ % 5))
                loads.append(mover.submit(load))
                loads[-1].wait()
            result = store.result()
            found["chunk"].append(result.seconds / result.chunks)
            found["wait"] += [one.result().queue_seconds for one in loads[:-1] or loads]
    chunk = low(found["chunk"])
    ordered = sorted(found["wait"])
    at = {"median": 0.5, "95 %": 0.95, "longest": 1.0}
    return {
        "chunk_ms": chunk * 1e3,
        "loads": len(ordered),
        **{name: ordered[int(share * (len(ordered) - 1))] / chunk for name, share in at.items()},
    }


def beside_matmul(rounds: int) -> dict[str, float]:
    """How much slower a matmul of one thread is beside stores of one lane, and their share of memory bandwidth."""
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    src, dst = (harness.HostMemory(256 * MIB).flat.view(-1, MIB) for _ in range(2))
    src.zero_(), dst.zero_()
    copy, every = kvkernels.prepare([src], [dst]), torch.arange(len(src)).repeat(2, 1).T.contiguous()
    torch.set_num_threads(1)

    def matmuls() -> float:
        return timed(lambda: [torch.mm(a, b) for _ in range(20)])

    alone, beside, rate, both = [], [], [], []
    with Mover(lanes=1) as mover, Mover(lanes=2) as all_lanes:
        for _ in range(rounds):
            matmuls()
            alone.append(matmuls())
            sent = [mover.submit(PreparedJob(copy, every), priority="store") for _ in range(8)]
            while sent[0].state == "queued":
                pass
            began, before = time.perf_counter(), mover.stats()["transfers"][2]["bytes"]
            beside.append(matmuls())
            while not sent[1].done():
                pass
            rate.append((mover.stats()["transfers"][2]["bytes"] - before) / (time.perf_counter() - began))
            for one in sent:
                one.cancel()
            mover.drain()
            both.append(timed(all_lanes.submit(PreparedJob(copy, every)).wait))
    full = high([256 * MIB / one for one in both])
    return {
        "slowdown": low(beside) / low(alone) - 1,
        "share": statistics.median(rate) / full,
        "store_gb_s": statistics.median(rate) / 1e9,
        "full_gb_s": full / 1e9,
    }


def picture(path: Path) -> None:
    """A trace of stores with loads that come between, drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    src, dst = (torch.zeros(48, MIB, dtype=torch.uint8) for _ in range(2))
    small = [torch.zeros(4, MIB, dtype=torch.uint8) for _ in range(2)]
    with Mover(lanes=2, chunk_bytes=4 * MIB) as mover, tempfile.TemporaryDirectory() as folder:
        for _ in range(3):  # the first faults the pages in
            mover.submit(SwapJob(src, dst, MIB, torch.arange(48).repeat(2, 1).T), priority="store")
            for priority in ("load", "expedited", "load"):
                time.sleep(0.001)
                mover.submit(SwapJob(*small, MIB, torch.arange(4).repeat(2, 1).T), priority=priority)
            mover.drain()
        mover.trace(Path(folder) / "trace.json")
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    last = sorted({e["args"]["transfer"] for e in events if e["ph"] == "X"})[-4:]
    copies = [e for e in events if e["ph"] == "X" and e["args"]["transfer"] in last]
    queued = {e["id"]: [e["ts"]] for e in events if e["ph"] == "b" and e["id"] in last}
    for event in events:
        if event["ph"] == "e" and event["id"] in last:
            queued[event["id"]].append(event["ts"])
    start = min(begin for begin, _ in queued.values())
    colours = {"expedited": "#c0392b", "load": "#2471a3", "store": "#7f8c8d"}
    figure, axes = pyplot.subplots(figsize=(9, 2.8))
    names = ["urgent 0", "urgent 1", "stores 0", "stores 1", *(f"queue of {ticket}" for ticket in range(1, 5))]
    for event in copies:
        kind = event["name"].split()[0]
        axes.barh(event["tid"], event["dur"] / 1e3, left=(event["ts"] - start) / 1e3, color=colours[kind],
                  edgecolor="white")  # fmt: skip
    kinds = {e["args"]["transfer"]: e["name"].split()[0] for e in copies}
    for place, ticket in enumerate(last):
        begin, end = queued[ticket]
        axes.barh(4 + place, max(0.01, (end - begin) / 1e3), left=(begin - start) / 1e3,
                  color=colours[kinds[ticket]], alpha=0.5)  # fmt: skip
    names[4:] = [f"{kinds[ticket]} waits" for ticket in last]
    axes.set_yticks(range(8), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# The mover", "",
        f"Measured by `python benchmarks/mover.py` on {found['machine']}; load {found['load']:.1f}, {found['rounds']} "
        "rounds in turns, upper quartiles of rates and lower ones of times.",
        "Where the load is more than this program's own, others had the cores for a part of the time: they come before "
        "the threads of stores, and so a load that waits for a store's chunk waits for them, too.", "",
        f"## GB/s of random pages, {found['payload'] // MIB} MiB, against a loop of `copy_` in a thread", "",
    ]  # fmt: skip
    names = [name for name in found["rates"][0] if name != "page"]
    heads = [*names, "ratio, 1", "ratio, 2", *([f"ratio, {LMCACHE}"] if LMCACHE in names else [])]
    lines += [f"| page | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for row in found["rates"]:
        ratios = [row[f"{n} lanes"] / row[f"copy_, {n} threads"] for n in (1, 2)]
        ratios += [row["1 lanes"] / row[LMCACHE]] if LMCACHE in row else []
        cells = [f"{row[name]:.2f}" for name in names] + [f"{one:.2f}" for one in ratios]
        lines.append(f"| {row['page'] // 1024} KiB | {' | '.join(cells)} |")
    lines += ["", "Goals: a ratio of 2 up to 32 KiB, and of 1.4 from 512 KiB on."]
    lines += ["", f"## Microseconds of a submit, {POOLS} + {POOLS} pools, checks included", ""]
    lines += ["| blocks | in a burst | alone | vLLM's descriptors, unchecked | ratio | ratio alone |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in found["submits"]:
        theirs = row.get("vLLM", float("nan"))
        ratios = " | ".join(f"{theirs / row[name]:.0f}" for name in ("in a burst", "alone"))
        lines.append(f"| {row['blocks']} | {row['in a burst']:.1f} | {row['alone']:.1f} | {theirs:.0f} | {ratios} |")
    lines += ["", "Goal: a ratio of 40."]
    one = found["latencies"]
    lines += ["", "## Microseconds from submit to done, 2 pages of 4 KiB", "",
              "| | one after the other | beyond the op | after 2 ms of sleep |",
              "| --- | ---: | ---: | ---: |"]  # fmt: skip
    for name, label in {
        "op": "the op itself", "done": "`done()` is true", "wait": "`wait()` returns",
        "python": "the op in a thread of Python with a queue",
    }.items():  # fmt: skip
        lines.append(f"| {label} | {one[name]:.1f} | {one[name] - one['op']:.1f} | {one[f'{name}, paused']:.1f} |")
    lines += ["", "Goal: 15 us beyond the op."]
    lines += ["", "## Milliseconds a chunk of 16 MiB, beside an idle and a busy Python thread", "",
              "| | idle | busy |", "| --- | ---: | ---: |"]  # fmt: skip
    for name, label in {"mover": "mover", "thread": "the op in a thread of Python, a call a chunk"}.items():
        lines.append(f"| {label} | {found['chunks'][f'{name}, idle']:.2f} | {found['chunks'][f'{name}, busy']:.2f} |")
    one = found["waits"]
    lines += [
        "", f"## A load behind a store of {found['store'] // MIB} MiB, one lane", "",
        f"{one['loads']} loads, in chunk times ({one['chunk_ms']:.2f} ms): median {one['median']:.2f}, 95 % "
        f"{one['95 %']:.2f}, longest {one['longest']:.2f}. Goal: below 1.5.",
        "", "## A matmul of one thread beside stores of one lane", "",
        f"Slowdown {found['matmul']['slowdown']:.1%}. The stores moved {found['matmul']['store_gb_s']:.2f} GB/s, "
        f"{found['matmul']['share']:.0%} of the {found['matmul']['full_gb_s']:.2f} GB/s that all lanes move alone. "
        "Goal: a slowdown of at most that share and 5 points.", "",
        "![a trace](mover.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256, help="payload of the rates")
    parser.add_argument("--store-mib", type=int, default=1024)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--lmcache", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "machine": machine.in_words(machine.describe(DEVICE, None)),
        "rounds": options.rounds,
        "payload": options.mib * MIB,
        "store": options.store_mib * MIB,
        "rates": rates(options.rounds, options.mib * MIB, options.lmcache),
        "submits": submits(options.rounds, options.vllm),
        "latencies": latencies(options.rounds),
        "chunks": chunk_times(options.rounds),
        "waits": waits(max(1, options.rounds // 3), options.store_mib * MIB),
        "matmul": beside_matmul(options.rounds),
    }

    found["load"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    picture(options.out / "mover.png")
    publish(options.out, "mover", found, markdown(found))


if __name__ == "__main__":
    main()
