#!/usr/bin/env python3
"""The table of conversions in benchmarks/results: layouts and tensor-parallel shards on the CPU, against torch.

Writes layouts.json, layouts.md and layouts.png. The geometries are those of real models (models.py says whence);
torch's side is its best spelling on paged tensors with preallocated buffers. GB/s is 1e9 bytes of payload a second;
harness.py says how sides are timed.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import harness
import machine
import plot
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks
from pages import Row, against, min_rounds, table
from publish import publish
from verify import POISON, WrongBytes

ALIGNMENT = 4096
BLOCK_TOKENS = 16
GOAL_RATIO = 3.0

LLAMA = {"L": 32, "K": 2, "H": 8, "D": 128, "dtype": torch.bfloat16}  # Llama-3.1-8B
GPT_OSS = {"L": 24, "K": 2, "H": 8, "D": 64, "dtype": torch.bfloat16}  # gpt-oss-20b
DEEPSEEK = {"L": 61, "D": 576, "dtype": torch.bfloat16}  # DeepSeek-V3
NHD, HND, PAGED = "L | K B N H D", "L | K B H N D", "B L K N H D"


@dataclass(frozen=True)
class Case:
    """Two layouts of one model, each whole or in shards; the goals are shares of the ceiling at 1 and 2 threads."""

    name: str
    sizes: dict[str, Any]
    src: str
    dst: str
    src_ranks: int = 1
    dst_ranks: int = 1
    dst_tokens: int = BLOCK_TOKENS
    goals: tuple[float, float] | None = None


CASES = (
    Case("Llama NHD to HND", LLAMA, NHD, HND, goals=(0.62, 0.75)),
    Case("Llama HND to NHD", LLAMA, HND, NHD),
    Case("Llama concat TP2", LLAMA, NHD, NHD, src_ranks=2, goals=(0.72, 0.85)),
    Case("Llama concat TP8", LLAMA, NHD, NHD, src_ranks=8),
    Case("Llama split TP2", LLAMA, NHD, NHD, dst_ranks=2, goals=(0.70, 0.80)),
    Case("Llama split TP8", LLAMA, NHD, NHD, dst_ranks=8, goals=(0.58, 0.75)),
    Case("Llama to page first", LLAMA, NHD, PAGED),
    Case("Llama blocks 16 to 64", LLAMA, NHD, HND, dst_tokens=64),
    Case("gpt-oss NHD to HND", GPT_OSS, NHD, HND),
    Case("DeepSeek to page first", DEEPSEEK, "L | B N D", "B L N D"),
)


class Conversion:
    """A case on two stretches of memory, all of whose blocks are moved, each to another place."""

    def __init__(
        self, case: Case, side_bytes: int, src: torch.Tensor, dst: torch.Tensor, staging: torch.Tensor
    ) -> None:
        whole = KVLayout(case.src, B=1, N=BLOCK_TOKENS, **case.sizes)
        tensors = (case.src_ranks + case.dst_ranks) * max(whole.num_tensors, 1)
        ratio = case.dst_tokens // BLOCK_TOKENS
        blocks = (side_bytes - ALIGNMENT * tensors) // whole.block_bytes // ratio * ratio
        if blocks < 1:
            raise SystemExit(f"--total-mib is too small for one block of {case.name}: {whole.block_bytes} bytes")
        self.case, self.ratio, self.blocks, self.payload_bytes = case, ratio, blocks, blocks * whole.block_bytes
        src_layout = replace(whole, B=blocks, page_bytes=0)
        dst_layout = KVLayout(case.dst, B=blocks // ratio, N=case.dst_tokens, **case.sizes)
        self.src = _caches(src_layout, case.src_ranks, src)
        self.dst = _caches(dst_layout, case.dst_ranks, dst)
        self.flat, self.staging = dst, staging
        generator = torch.Generator().manual_seed(0)
        self.src_ids, self.dst_ids = (torch.randperm(blocks, generator=generator) for _ in range(2))
        self.mapping = torch.stack((self.src_ids, self.dst_ids), dim=1)
        self.plan = compile_plan([cache.layout for cache in self.src], [cache.layout for cache in self.dst])

    def ours(self) -> None:
        convert_blocks(self.src, self.dst, self.mapping)

    def torch_rivals(self) -> dict[str, Callable[[], None]]:
        """index_copy_ straight from what was gathered, seen in the other order; and by way of one more buffer."""
        return {
            "torch: gathered, then scattered": self._torch(False),
            "torch: and put in order between": self._torch(True),
        }

    def _torch(self, in_order: bool) -> Callable[[], None]:
        pairs = list(self._views())
        staged = _staging(self.staging, pairs, self.blocks, in_order)
        src_ids, dst_ids = self.src_ids, self.dst_ids
        cut = (dst_ids // self.ratio, dst_ids % self.ratio) if self.ratio > 1 else None

        def run() -> None:
            for (sources, targets), (gathered, joined, ordered) in zip(pairs, staged, strict=True):
                for source, buffer in zip(sources, gathered, strict=True):
                    torch.index_select(source, 0, src_ids, out=buffer)
                whole = gathered[0]
                if len(gathered) > 1:
                    whole = torch.cat(gathered, 2, out=joined)
                first = 0
                for target, buffer in zip(targets, ordered, strict=True):
                    part = whole
                    if len(targets) > 1:
                        part = whole.narrow(2, first, target.shape[2])
                        first += target.shape[2]
                    if buffer is not None:
                        part = buffer.copy_(part)
                    if cut is None:
                        target.index_copy_(0, dst_ids, part)
                    else:
                        target.index_put_(cut, part)

        return run

    def _views(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """By layer, K and V: the ranks' tensors as int64 [blocks of 16 tokens, tokens, heads, elements]."""
        for layer in range(self.case.sizes["L"]):
            for k in range(self.case.sizes.get("K", 1)):
                yield (
                    [_logical(cache, layer, k, 1) for cache in self.src],
                    [_logical(cache, layer, k, self.ratio) for cache in self.dst],
                )

    def check(self, name: str, run: Callable[[], None], expected: torch.Tensor | None) -> torch.Tensor:
        """What a contestant writes, guard bytes and all, which must be what the first one wrote."""
        self.flat.fill_(POISON)
        run()
        if expected is not None and not torch.equal(self.flat, expected):
            raise WrongBytes(f"{name} wrote other bytes than torch for {self.case.name}")
        return self.flat.clone() if expected is None else expected


def _caches(layout: KVLayout, ranks: int, flat: torch.Tensor) -> list[KVCache]:
    caches, start = [], ALIGNMENT
    for shard in [layout.shard(rank, ranks) for rank in range(ranks)] if ranks > 1 else [layout]:
        tensors = []
        for i in range(shard.num_tensors):
            nbytes = shard.needed_bytes(i)
            tensors.append(flat[start : start + nbytes])
            start += -(-nbytes // ALIGNMENT) * ALIGNMENT
        caches.append(KVCache(shard, tensors))
    return caches


def _logical(cache: KVCache, layer: int, k: int, ratio: int) -> torch.Tensor:
    """One layer's K or V as int64 [blocks, tokens, heads, elements]; [blocks, ratio, tokens ...] where they are cut."""
    layout = cache.layout
    order = [c for c in "LKBNHD" if c in layout.outside + layout.inside]
    letters = [c for c in layout.inside]
    index, rest = 0, {"L": layer, "K": k}
    for c in layout.outside:
        index = index * layout.size(c) + rest[c]
    sizes = [layout.size(c) // 4 if c == "D" else layout.size(c) for c in letters]
    tensor = cache.tensors[index].view(torch.int64).view(sizes)
    tensor = tensor.permute([letters.index(c) for c in order if c in letters])
    for c in [c for c in order if c in letters and c in "LK"]:
        tensor = tensor.select(0, rest[c])
    if "H" not in letters:
        tensor = tensor.unsqueeze(2)
    return tensor.unflatten(1, (ratio, -1)) if ratio > 1 else tensor


def _staging(flat: torch.Tensor, pairs: Sequence[Any], blocks: int, in_order: bool) -> list[Any]:
    """Buffers for one layer's K or V, the same for all: gathered shards, all of them joined, and each in its order."""
    start = 0

    def take(shape: Sequence[int]) -> torch.Tensor:
        nonlocal start
        count = 8
        for n in shape:
            count *= n
        start += count
        return flat[start - count : start].view(torch.int64).view(list(shape))

    sources, targets = pairs[0]
    gathered = [take((blocks, *source.shape[1:])) for source in sources]
    heads = sum(source.shape[2] for source in sources)
    joined = take((blocks, sources[0].shape[1], heads, sources[0].shape[3])) if len(sources) > 1 else None
    ordered = [_like(take, target, blocks) if in_order else None for target in targets]
    return [(gathered, joined, ordered)] * len(pairs)


def _like(take: Callable[[Sequence[int]], torch.Tensor], target: torch.Tensor, blocks: int) -> torch.Tensor:
    """A buffer in the target's order of dimensions."""
    inside = range(target.dim() - 3, target.dim())
    by_stride = sorted(inside, key=lambda i: -target.stride(i))
    buffer = take([blocks, *(target.shape[i] for i in by_stride)])
    return buffer.permute(0, *(1 + by_stride.index(i) for i in inside))


def measure_case(case: Case, threads: int, seconds: float, memory: Sequence[harness.HostMemory]) -> Row:
    src, dst, staging = memory
    conversion = Conversion(case, src.flat.numel(), src.flat, dst.flat, staging.flat)
    runs = {**conversion.torch_rivals(), "convert_blocks": conversion.ours}
    expected = None
    for name, run in runs.items():
        expected = conversion.check(name, run, expected)
    del expected
    sides = [harness.Side(name, run, conversion.payload_bytes) for name, run in runs.items()]
    sides += harness.ceiling_sides(dst.flat, src.flat, conversion.payload_bytes, threads)
    times = harness.measure(sides, harness.Budget(seconds))
    rival = max((name for name in runs if name.startswith("torch")), key=lambda name: times[name].gb_per_s)
    loop, ceiling = harness.fastest_ceiling(times)
    mine = times["convert_blocks"]
    return Row(
        op=case.name,
        pages=plot.bytes_in_words(conversion.plan.smallest_fragment_bytes),
        threads=threads,
        gb_per_s=mine.gb_per_s,
        ceiling_gb_per_s=ceiling.gb_per_s,
        ceiling_loop=loop.removeprefix("ceiling: "),
        share_of_ceiling=mine.gb_per_s / ceiling.gb_per_s,
        goal_share=case.goals[min(threads, 2) - 1] if case.goals else None,
        torch_gb_per_s=times[rival].gb_per_s,
        ratio_to_torch=times[rival].median_s / mine.median_s,
        goal_ratio=GOAL_RATIO,
        times={name: times[name].as_json() for name in ("convert_blocks", rival, loop)},
    )  # fmt: skip


@dataclass
class Cost:
    """What compiling a plan costs."""

    what: str
    cold_ms: float
    cached_ms: float


def costs() -> list[Cost]:
    """Plans for 80 layers, from token-first to head-first: of layouts never seen, then of the same again."""
    found = []
    for ranks in (1, 8):
        cold, cached = [], []
        for blocks in range(1000, 1021):
            sizes = {**LLAMA, "L": 80, "B": blocks, "N": BLOCK_TOKENS}
            src, dst = KVLayout(NHD, **sizes), KVLayout(HND, **sizes)
            shards = [dst.shard(rank, ranks) for rank in range(ranks)] if ranks > 1 else [dst]
            for times in (cold, cached):
                times.append(harness.host_seconds(lambda src=src, shards=shards: compile_plan(src, shards)))
        what = "80 layers" + (f" into {ranks} shards" if ranks > 1 else "")
        found.append(Cost(what, statistics.median(cold) * 1e3, statistics.median(cached) * 1e3))
    return found


def markdown(result: dict[str, Any]) -> str:
    rows, machine_line = result["rows"], machine.in_words(result["machine"])
    lines = [
        "# Conversions on the CPU",
        "",
        f"Measured by `python benchmarks/layouts.py` on {machine_line}.",
        f"{result['settings']['total_mib']} MiB in all (half source, half destination), warm, every block moved to"
        f" another place in random order, medians of {min_rounds(rows)} rounds or more in which all sides take turns in"
        " one process. Every byte and the guard bytes were compared with torch's before. GB/s is 1e9 bytes of payload a"
        " second.",
        "",
        "The *ceiling* is the fastest of three in-repo loops of streaming stores that copy as many contiguous bytes on"
        " as many threads. *torch* is the faster of two paged spellings with preallocated buffers: `index_select(out=)`"
        " of each layer's K or V (and `torch.cat(out=)` of shards), then `index_copy_` from it in the other order, or"
        " `copy_` into that order between; all on int64 views. *fragment* is the smallest contiguous piece. Where two"
        " figures stand in a cell, the second is the goal.",
        "",
        *table(rows, "conversion", "fragment"),
    ]
    lines += ["", "| compiling a plan | cold / goal | cached / goal |", "| --- | ---: | ---: |"]
    for cost in result["costs"]:
        cells = (against(cost[key], goal, at_least=False) for key, goal in (("cold_ms", 50.0), ("cached_ms", 1.0)))
        lines.append(f"| {cost['what']} | {' ms | '.join(cells)} ms |")
    return "\n".join([*lines, "", "![share of the ceiling and ratio to torch](layouts.png)", ""])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mib", type=int, default=512, help="source and destination together (512)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=12.0, help="measuring time for each case and thread count")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    plot.require_matplotlib()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        raise SystemExit(f"--only must be part of a case's name, got {options.only!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    memory = [harness.HostMemory(options.total_mib << 19) for _ in range(3)]
    harness.fill_random(memory[0].flat, seed=1)
    memory[2].flat.zero_()
    rows = []
    before = torch.get_num_threads()
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(options.threads))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in cases:
                rows.append(measure_case(case, threads, options.seconds, memory))
                progress.advance(task)
        torch.set_num_threads(before)
    result = {
        "machine": machine.describe(torch.device("cpu"), memory[1].huge_page_share()),
        "settings": {"total_mib": options.total_mib, "seconds": options.seconds},
        "checked": True,
        "rows": [asdict(row) for row in rows],
        "costs": [asdict(cost) for cost in costs()],
    }
    plot.draw_pages(options.out / "layouts.png", result["rows"])
    publish(options.out, "layouts", result, markdown(result))


if __name__ == "__main__":
    main()
