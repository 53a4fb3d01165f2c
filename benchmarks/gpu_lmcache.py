"""Token slots of a paged cache to and from LMCache's chunks: by copy_slots, and by LMCache 0.5.3 (--lmcache DIR).

Llama-3.1-8B's cache as vLLM has it for FlashAttention, a tensor [2, blocks, 16, heads, size] a layer; a chunk is
[2, layers, tokens, heads * size] in pinned memory. LMCache copies token by token, or by blocks into at most four chunks
a call.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from gpu_bench import Bench, CannotRun, Step
from gpu_d2d import BLOCK_TOKENS, LLAMA, NHD, WORDS, Cutter
from gpu_log import Record
from gpu_memory import Case
from kvkernels import KVCache, KVLayout, copy_slots

TOKENS = 1024
CHUNKS = 4  # as many as LMCache's block form takes a call
FORMAT = "NL_X_TWO_NB_BS_NH_HS"
TOKEN_WORDS = LLAMA["H"] * LLAMA["D"] // 4
TOKEN_BYTES = TOKEN_WORDS * 8


@dataclass(frozen=True)
class Slots:
    """``tokens`` slots of a cache, in ``chunks`` chunks; blocks are in random order, and half of them is not named."""

    direction: str
    chunks: int
    tokens: int

    @property
    def blocks(self) -> int:
        return 2 * self.tokens // BLOCK_TOKENS

    @cached_property
    def block_ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(self.blocks, generator=generator)[: self.tokens // BLOCK_TOKENS]

    @property
    def slots(self) -> torch.Tensor:
        return (self.block_ids[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()

    @property
    def payload_bytes(self) -> int:
        return int(2 * LLAMA["L"] * self.tokens * TOKEN_BYTES)

    @property
    def span_bytes(self) -> int:
        cutter = Cutter(torch.empty(0))
        for _ in range(LLAMA["L"]):
            cutter.cut(2 * self.blocks * BLOCK_TOKENS * TOKEN_BYTES)
        return cutter.end

    def pools(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A tensor a layer, as words [2, slots, words]."""
        cutter, slots = Cutter(flat), self.blocks * BLOCK_TOKENS
        return [cutter.cut(2 * slots * TOKEN_BYTES).view(WORDS).view(2, slots, -1) for _ in range(LLAMA["L"])]

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The chunks, as words [2, layers, tokens, words]."""
        cutter, each = Cutter(flat), self.tokens // self.chunks
        nbytes = self.payload_bytes // self.chunks
        return [cutter.cut(nbytes).view(WORDS).view(2, LLAMA["L"], each, -1) for _ in range(self.chunks)]

    def expect(self, truth: torch.Tensor, expected: torch.Tensor) -> None:
        pools_of, parts_of = (truth, expected) if self.direction == "d2h" else (expected, truth)
        slots = self.slots.to(truth.device).chunk(self.chunks)
        for part, mine in zip(self.parts(parts_of), slots, strict=True):
            for layer, pool in enumerate(self.pools(pools_of)):
                if self.direction == "d2h":
                    part[:, layer] = pool[:, mine]
                else:
                    pool[:, mine] = part[:, layer]

    def case(self, src: torch.Tensor, dst: torch.Tensor, call: Callable[[], Any]) -> Case:
        return Case(src, dst, self.span_bytes, [call], self.payload_bytes, self.expect)


Call = Callable[[], Any]


def steps(bench: Bench) -> Iterator[Step]:
    tokens = max(CHUNKS * BLOCK_TOKENS, bench.scaled(TOKENS) // (CHUNKS * BLOCK_TOKENS) * CHUNKS * BLOCK_TOKENS)
    for direction in bench.options.directions:
        for chunks in (1, CHUNKS):
            slots = Slots(direction, chunks, tokens)
            yield _step(bench, slots, "kvkernels", _ours)
            yield _step(bench, slots, "LMCache", _slot_by_slot if chunks == 1 else _by_blocks)


def _step(
    bench: Bench, slots: Slots, rival: str, build: Callable[[Bench, Slots, torch.Tensor, torch.Tensor], Call]
) -> Step:
    def run(key: Record) -> None:
        bench.require(slots.span_bytes)
        src, dst = bench.sides(slots.direction)
        pools, parts = (src, dst) if slots.direction == "d2h" else (dst, src)
        bench.measure(key, slots.case(src, dst, build(bench, slots, pools, parts)))

    kind = f"{TOKENS} slots, {slots.chunks} chunk{'s' if slots.chunks > 1 else ''}"
    return Step({"direction": slots.direction, "kind": kind, "rival": rival}, run)


def _ours(bench: Bench, slots: Slots, pools: torch.Tensor, parts: torch.Tensor) -> Call:
    layout = KVLayout(NHD, B=slots.blocks, N=BLOCK_TOKENS, **LLAMA)
    cache = KVCache(layout, [pool.view(torch.uint8).flatten() for pool in slots.pools(pools)])
    chunks = [part.view(torch.uint8) for part in slots.parts(parts)]
    where = "to_buffer" if slots.direction == "d2h" else "to_cache"
    ids = slots.slots
    return lambda: copy_slots(cache, ids, chunks, direction=where)


def _slot_by_slot(bench: Bench, slots: Slots, pools: torch.Tensor, parts: torch.Tensor) -> Call:
    library = _library(bench.options.lmcache)
    (chunk,) = (part.view(LLAMA["dtype"]) for part in slots.parts(parts))
    table, ids = _table(bench, slots, pools), slots.slots.to(bench.device)
    way, order = _ways(library, slots)
    rest = (slots.blocks * BLOCK_TOKENS, way, order, BLOCK_TOKENS, LLAMA["D"], 0)
    return lambda: library.multi_layer_kv_transfer(chunk, table, ids, bench.device, *rest)


def _by_blocks(bench: Bench, slots: Slots, pools: torch.Tensor, parts: torch.Tensor) -> Call:
    library = _library(bench.options.lmcache)
    table, ids = _table(bench, slots, pools), slots.block_ids.to(bench.device)
    addresses = [part.data_ptr() for part in slots.parts(parts)]
    way, order = _ways(library, slots)
    shape = library.PageBufferShapeDesc()
    sizes = {
        "kv_size": 2, "nl": LLAMA["L"], "nb": slots.blocks, "bs": BLOCK_TOKENS, "nh": LLAMA["H"], "hs": LLAMA["D"],
        "element_size": 2, "block_stride_elems": 0,
    }  # fmt: skip
    for name, value in sizes.items():
        setattr(shape, name, value)
    each = slots.tokens // slots.chunks
    return lambda: library.multi_layer_block_kv_transfer(
        table, addresses, ids, bench.device, way, shape, each, order, 0
    )


def _table(bench: Bench, slots: Slots, pools: torch.Tensor) -> torch.Tensor:
    return torch.tensor([pool.data_ptr() for pool in slots.pools(pools)]).to(bench.device)


def _ways(library: Any, slots: Slots) -> tuple[Any, Any]:
    return getattr(library.TransferDirection, slots.direction.upper()), getattr(library.EngineKVFormat, FORMAT)


@lru_cache(maxsize=1)
def _library(folder: Path | None) -> Any:
    """The compiled ops alone: the package round them would want what it depends on."""
    if folder is None:
        raise CannotRun("no --lmcache DIR was given")
    files = sorted([*folder.glob("c_ops*.so"), *folder.glob("lmcache/c_ops*.so")])
    if not files:
        raise CannotRun(f"{folder} has no c_ops*.so, and no lmcache/c_ops*.so")
    spec = importlib.util.spec_from_file_location("c_ops", files[0])
    if spec is None or spec.loader is None:
        raise CannotRun(f"{files[0]} is no module that Python {sys.version.split()[0]} loads")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise CannotRun(f"{files[0]} does not load: {error}") from error
    return module
