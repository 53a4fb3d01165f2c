"""Copies inside the device: whole pages, other layouts, shards joined and split, at a budget of 12 SMs and at all.

The layouts are those of Llama-3.1-8B. 512 MiB of payload are copied, so that L2 holds little of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvkernels
from geometry import GUARD_BYTES
from gpu_bench import Bench, Step
from gpu_log import Record
from gpu_memory import Case
from gpu_transfer import Transfer, pools_of
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks
from plot import bytes_in_words

BLOCK_TOKENS = 16
LLAMA = {"L": 32, "K": 2, "H": 8, "D": 128, "dtype": torch.bfloat16}  # Llama-3.1-8B
NHD, HND = "L | K B N H D", "L | K B H N D"
PAYLOAD_BYTES = 512 << 20
PAGE_FRAGMENTS = (4 << 10, 32 << 10, 256 << 10)
BUDGETS = (0, 12)
PAGE_EXECUTORS = ("kernel", "bulk", "triton", "dma")
ROW_EXECUTORS = ("kernel", "triton")
TP_SIZES = (2, 8)
WORDS = torch.int64


@dataclass(frozen=True)
class Conversion:
    """Blocks of one layout, in ``src_ranks`` shards, into another."""

    kind: str
    src: str
    dst: str
    src_ranks: int


CONVERSIONS = (
    Conversion("rows 256 B, NHD to HND", NHD, HND, 1),
    Conversion("reshard TP 8 to 1", NHD, NHD, 8),
)


def steps(bench: Bench) -> Iterator[Step]:
    payload_bytes = bench.scaled(PAYLOAD_BYTES)
    # As long as the device's own stretch at most: what is larger does not fit, and its cell says so.
    far = torch.empty_like(bench.near[: min(len(bench.near), payload_bytes + payload_bytes // 4 + (16 << 20))])
    executors = bench.options.executors
    for fragment in PAGE_FRAGMENTS:
        for executor in PAGE_EXECUTORS:
            for budget in BUDGETS if executor != "dma" else (0,):
                if executor in executors:
                    yield _pages(bench, far, fragment, executor, budget, payload_bytes)
    for conversion in CONVERSIONS:
        for executor in ROW_EXECUTORS:
            for budget in BUDGETS:
                if executor in executors:
                    yield _conversion(bench, far, conversion, executor, budget, payload_bytes)
    for ranks in TP_SIZES:
        yield _shards(bench, far, "concat", ranks, payload_bytes)
        yield _shards(bench, far, "split", ranks, payload_bytes)


def _key(kind: str, executor: str, sm_budget: int) -> Record:
    return {"direction": "d2d", "kind": kind, "executor": executor, "sm_budget": sm_budget}


def _pages(bench: Bench, far: torch.Tensor, fragment: int, executor: str, budget: int, payload_bytes: int) -> Step:
    def run(key: Record) -> None:
        fragments = max(2, payload_bytes // fragment)
        moved = Transfer("d2d", fragment, fragments, pools_of(fragments), spread_bytes=0)
        bench.require(moved.geometry.flat_bytes, far)
        case = moved.case(bench.near, far, executor, budget)
        case.facts = {"fragment_bytes": fragment, "pools": moved.pools}
        bench.measure(key, case)

    return Step(_key(f"pages {bytes_in_words(fragment)}", executor, budget), run)


class Cutter:
    """Cuts tensors off a stretch of memory, with guard bytes before each and after the last."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat
        self.end = GUARD_BYTES

    def cut(self, nbytes: int) -> torch.Tensor:
        start = self.end
        self.end = start + nbytes + GUARD_BYTES
        return self._flat[start : start + nbytes]


def _caches(flat: torch.Tensor, pattern: str, ranks: int, blocks: int) -> tuple[list[KVCache], int]:
    """One cache a rank in ``flat``, and the bytes that they and their guards take."""
    whole = KVLayout(pattern, B=blocks, N=BLOCK_TOKENS, **LLAMA)
    cutter = Cutter(flat)
    caches = []
    for rank in range(ranks):
        layout = whole if ranks == 1 else whole.shard(rank, ranks)
        tensor_bytes = layout.block_bytes * blocks // layout.num_tensors
        caches.append(KVCache(layout, [cutter.cut(tensor_bytes) for _ in range(layout.num_tensors)]))
    return caches, cutter.end


def _logical(cache: KVCache, pattern: str, layer: int) -> torch.Tensor:
    """A layer's words as [K, block, token, head, word]."""
    layout = cache.layout
    flat = cache.tensors[layer].view(WORDS)
    if pattern == HND:
        return flat.view(layout.K, layout.B, layout.H, BLOCK_TOKENS, -1).transpose(2, 3)
    return flat.view(layout.K, layout.B, BLOCK_TOKENS, layout.H, -1)


def _conversion(
    bench: Bench, far: torch.Tensor, conversion: Conversion, executor: str, budget: int, payload_bytes: int
) -> Step:
    def run(key: Record) -> None:
        block_bytes = KVLayout(NHD, B=1, N=BLOCK_TOKENS, **LLAMA).block_bytes
        moved = max(2, payload_bytes // block_bytes)
        blocks = moved + moved // 16 + 1
        generator = torch.Generator().manual_seed(0)
        src_ids, dst_ids = (torch.randperm(blocks, generator=generator)[:moved] for _ in range(2))
        mapping = torch.stack((src_ids, dst_ids), dim=1)
        bench.require(block_bytes * blocks + GUARD_BYTES * (LLAMA["L"] * conversion.src_ranks + 2), far)
        sources, src_end = _caches(bench.near, conversion.src, conversion.src_ranks, blocks)
        targets, dst_end = _caches(far, conversion.dst, 1, blocks)

        def expect(truth: torch.Tensor, expected: torch.Tensor) -> None:
            trues, _ = _caches(truth, conversion.src, conversion.src_ranks, blocks)
            (wanted,), _ = _caches(expected, conversion.dst, 1, blocks)
            there, here = src_ids.to(truth.device), dst_ids.to(truth.device)
            for layer in range(LLAMA["L"]):
                target = _logical(wanted, conversion.dst, layer)
                for rank, true in enumerate(trues):
                    heads = true.layout.H
                    part = target[:, :, :, rank * heads : (rank + 1) * heads]
                    part[:, here] = _logical(true, conversion.src, layer)[:, there]

        chosen: dict[str, Any] = {"executor": executor, "sm_budget": budget}
        case = Case(
            bench.near, far, max(src_end, dst_end),
            [lambda: convert_blocks(sources, targets, mapping, **chosen)], moved * block_bytes, expect,
            explain=lambda: _explain(sources, targets, mapping, chosen),
        )  # fmt: skip
        bench.measure(key, case)

    return Step(_key(conversion.kind, executor, budget), run)


def _explain(
    sources: Sequence[KVCache], targets: Sequence[KVCache], mapping: torch.Tensor, chosen: dict[str, Any]
) -> Any:
    plan = compile_plan([cache.layout for cache in sources], [cache.layout for cache in targets])
    pools = [[pool for cache in side for pool in cache.pools] for side in (sources, targets)]
    return kvkernels.explain(
        "copy_pages", *pools, mapping, plan.runs.of(None), plan.src_subblocks, plan.dst_subblocks, **chosen
    )


@dataclass(frozen=True)
class Shards:
    """A tensor [tokens, heads, words], whole and in ``ranks`` shards of heads."""

    ranks: int
    tokens: int

    def whole(self, flat: torch.Tensor) -> torch.Tensor:
        heads, words = LLAMA["H"], LLAMA["D"] // 4
        return Cutter(flat).cut(self.payload_bytes).view(WORDS).view(self.tokens, heads, words)

    def cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        cutter, heads = Cutter(flat), LLAMA["H"] // self.ranks
        parts = [cutter.cut(self.payload_bytes // self.ranks) for _ in range(self.ranks)]
        return [part.view(WORDS).view(self.tokens, heads, -1) for part in parts]

    @property
    def payload_bytes(self) -> int:
        return int(self.tokens * LLAMA["H"] * LLAMA["D"] * 2)

    @property
    def span_bytes(self) -> int:
        return self.payload_bytes + GUARD_BYTES * (self.ranks + 1)

    def expect_whole(self, truth: torch.Tensor, expected: torch.Tensor) -> None:
        whole = self.whole(expected)
        for part, shard in zip(whole.chunk(self.ranks, dim=1), self.cut(truth), strict=True):
            part.copy_(shard)

    def expect_shards(self, truth: torch.Tensor, expected: torch.Tensor) -> None:
        for shard, part in zip(self.cut(expected), self.whole(truth).chunk(self.ranks, dim=1), strict=True):
            shard.copy_(part)


def shards_of(payload_bytes: int, ranks: int) -> Shards:
    return Shards(ranks, max(16, payload_bytes // (LLAMA["H"] * LLAMA["D"] * 2)))


def _shards(bench: Bench, far: torch.Tensor, op: str, ranks: int, payload_bytes: int) -> Step:
    """These ops choose for themselves: they take neither an executor nor a budget."""

    def run(key: Record) -> None:
        shards = shards_of(payload_bytes, ranks)
        bench.require(shards.span_bytes, far)
        if op == "concat":
            name, arguments = "concat_tp_shards_out", (shards.cut(bench.near), 1, shards.whole(far))
            expect: Callable[..., None] = shards.expect_whole
        else:
            name, arguments = "split_tp_shards", (shards.whole(bench.near), 1, shards.cut(far))
            expect = shards.expect_shards
        function = getattr(kvkernels, name)
        case = Case(
            bench.near, far, shards.span_bytes, [lambda: function(*arguments)], shards.payload_bytes, expect,
            explain=lambda: kvkernels.explain(name, *arguments),
        )  # fmt: skip
        bench.measure(key, case)

    return Step(_key(f"{op} TP{ranks}", "auto", 0), run)
