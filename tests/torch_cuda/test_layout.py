"""Conversions between layouts on a device: every executor puts each element where the oracle does."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
from layout_cases import Side, expected, random_mapping, random_sides
from torch_cuda.calls import BULK, on, pageable, pinned, places

import kvkernels
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks, copy_slots
from kvkernels.layout import parts

pytestmark = pytest.mark.cuda

#: Pairs of layouts; KVKERNELS_EXAMPLES=5 makes them 5,000.
PAIRS = max(12, round(1000 * float(os.environ.get("KVKERNELS_EXAMPLES", "1"))))

# What serves fragments of any size.
SERVED = {
    "h2d": ["kernel", "dma", "staged", "auto"],
    "d2h": ["kernel", "dma", "staged", "auto"],
    "d2d": ["kernel", "auto"],
}


def _placed(side: Side, place, rng) -> list[list[torch.Tensor]]:
    """The side's tensors elsewhere, at any alignment."""
    result = []
    for tensors in side.tensors:
        rank = []
        for tensor in tensors:
            offset = int(rng.integers(0, 17))
            rank.append(place(torch.cat((torch.zeros(offset, dtype=torch.uint8), tensor)))[offset:])
        result.append(rank)
    return result


def _caches(side: Side, tensors) -> list[KVCache]:
    return [KVCache(layout, rank) for layout, rank in zip(side.layouts, tensors, strict=True)]


def _read(tensors) -> list[list[bytes]]:
    torch.cuda.synchronize()
    return [[bytes(tensor.cpu().tolist()) for tensor in rank] for rank in tensors]


@pytest.mark.parametrize("direction", SERVED)
@pytest.mark.parametrize("seed", range(4))
def test_random_pairs(sim, direction, seed):
    """Pairs of layouts over directions and seeds, each by every executor."""
    rng = np.random.default_rng([seed, list(SERVED).index(direction)])
    used = Counter()
    for _ in range(PAIRS // (4 * len(SERVED)) + 1):
        src, dst = random_sides(rng)
        mapping = random_mapping(rng, src, dst)
        (wanted, complete), source = expected(src, dst, mapping), [[bytes(t.tolist()) for t in r] for r in src.tensors]
        options = {"allow_partial": not complete}
        moves = len(mapping) and compile_plan(src.layouts, dst.layouts, **options).bytes
        ids = torch.tensor(mapping, dtype=torch.int64).reshape(-1, 2)
        src_place, dst_place = places(direction, 0)
        for executor in SERVED[direction]:
            kvkernels.reset_counters()
            from_tensors, to_tensors = _placed(src, src_place, rng), _placed(dst, dst_place, rng)
            with torch.cuda.stream(torch.cuda.Stream()):
                convert_blocks(_caches(src, from_tensors), _caches(dst, to_tensors), ids, executor=executor, **options)
            text = f"{executor}, {direction}: {src.layouts} to {dst.layouts} with {mapping}"
            assert _read(to_tensors) == wanted, text
            assert _read(from_tensors) == source, text
            if moves:
                (name,) = [name for name, counted in kvkernels.counters().items() if counted["calls"]]
                assert executor in ("auto", name), text
                used[name] += 1
        if sim is not None:
            sim.reset()  # what it keeps of every launch
    assert set(used) >= set(SERVED[direction]) - {"auto"}


def test_parts_and_scales_are_one_launch(sim):
    """Values and scales of two ranks, apart and token-first, become one rank's cells of both, head-first."""
    sizes, f8 = {"B": 4, "N": 16, "H": 8}, torch.float8_e4m3fn
    whole = KVLayout("B N H D", D=128, dtype=f8, scales=KVLayout("B N H", dtype=torch.float32, **sizes), **sizes)
    cells = parts(
        kv=KVLayout("B H N D", D=128, dtype=f8, steps={"N": 132}, **sizes),
        scales=KVLayout("B H N", dtype=torch.float32, offset_bytes=128, steps={"N": 132}, **sizes),
    )
    values, scales = (torch.randint(256, (4, 16, 8, n), dtype=torch.uint8) for n in (128, 4))
    src = [
        KVCache(whole.shard(rank, 2), [on(0)(t[:, :, 4 * rank : 4 * rank + 4].flatten()) for t in (values, scales)])
        for rank in range(2)
    ]
    out = on(0)(torch.zeros(4, 8, 16, 132, dtype=torch.uint8))
    kvkernels.reset_counters()
    convert_blocks(src, KVCache(cells, out), torch.tensor([[3, 1], [0, 2]]))
    torch.cuda.synchronize()
    assert kvkernels.counters()["kernel"]["launches"] == 1
    wanted = torch.cat((values, scales), -1).transpose(1, 2)
    assert torch.equal(out.cpu()[[1, 2]], wanted[[3, 0]]) and not out.cpu()[[0, 3]].any()


def _engine_and_host(host):
    """Four layers of token-first pages on the device, head-first and page first on the host."""
    sizes = {"L": 4, "K": 2, "N": 16, "H": 8, "D": 128, "dtype": torch.bfloat16}
    engine = KVLayout("L | K B N H D", B=6, **sizes)
    layers = [torch.randint(256, (2, 6, 16, 8, 256), dtype=torch.uint8).view(torch.bfloat16) for _ in range(4)]
    paged = KVLayout("B L K H N D", B=5, **sizes)
    return KVCache(engine, [on(0)(t) for t in layers]), KVCache(
        paged, host(torch.zeros(paged.needed_bytes(0), dtype=torch.uint8))
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("src_ranks", "dst_ranks"), [(1, 1), (4, 2), (1, 8), (8, 1)])
def test_a_conversion_is_one_launch_of_full_sectors(stand_in, architecture, src_ranks, dst_ranks):
    """All layers, K and V, ranks and blocks; each byte is read once and written once, in 16 bytes a thread."""
    sizes = {"L": 2, "K": 2, "N": 16, "H": 8, "D": 128, "dtype": torch.bfloat16}
    sides = []
    for pattern, ranks, blocks in (("L | K B N H D", src_ranks, 4), ("B L K H N D", dst_ranks, 3)):
        whole = KVLayout(pattern, B=blocks, **sizes)
        layouts = [whole.shard(rank, ranks) for rank in range(ranks)]
        memory = [
            torch.randint(256, (s.needed_bytes(0),), dtype=torch.uint8) for s in layouts for _ in range(s.num_tensors)
        ]
        tensors = iter([on(0)(flat) for flat in memory])
        sides.append([KVCache(s, [next(tensors) for _ in range(s.num_tensors)]) for s in layouts])
    device = stand_in.use_ptx(architecture)
    device.counts_sectors = True
    kvkernels.reset_counters()
    convert_blocks(*sides, torch.tensor([[3, 0], [1, 2]]), executor="kernel")
    torch.cuda.synchronize()
    payload = 2 * KVLayout("B L K H N D", B=1, **sizes).block_bytes
    assert kvkernels.counters()["kernel"]["launches"] == 1
    assert kvkernels.counters()["kernel"]["bytes"] == payload
    (report,) = device.reports
    assert device.failure is None and not report.findings
    for accesses in (report.loads, report.stores):
        texts = device.module[report.kernel].kernel.lines()
        data = [a for line, a in accesses.items() if ".v4.u32" in texts[line] and "global" in texts[line]]
        assert sum(a.bytes for a in data) == payload
        assert sum(a.sectors for a in data) == sum(a.least_sectors for a in data) == payload // 32


@pytest.mark.parametrize("executor", [BULK, "kernel", "dma", "staged"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_large_fragments(sim, direction, ranks, executor):
    """Whole tokens of shards, 512 bytes and more, to pages that hold all layers: what the CPU makes of them."""
    sizes = {"L": 2, "K": 2, "N": 4, "H": 4, "D": 128, "dtype": torch.float16}
    whole, paged = KVLayout("L | K B N H D", B=5, **sizes), KVLayout("B L K N H D", B=6, **sizes)
    generator = torch.Generator().manual_seed(3)
    data = [
        [torch.randint(256, (2 * 5 * 4 * 4 // ranks * 256,), dtype=torch.uint8, generator=generator) for _ in range(2)]
        for _ in range(ranks)
    ]
    layouts = [whole.shard(rank, ranks) for rank in range(ranks)]
    mapping = torch.tensor([[4, 5], [0, 2], [1, 3], [2, 4]])

    def convert(src_place, dst_place, **options):
        shards = [KVCache(layout, [src_place(t) for t in rank]) for layout, rank in zip(layouts, data, strict=True)]
        out = dst_place(torch.full((paged.needed_bytes(0),), 0xA5, dtype=torch.uint8))
        convert_blocks(shards, KVCache(paged, out), mapping, **options)
        return out

    with torch.cuda.stream(torch.cuda.Stream()):
        if (direction, executor) == ("d2d", "staged"):
            with pytest.raises(ValueError, match="executor 'staged' cannot serve this call: no side is in host memory"):
                convert(*places(direction, 0), executor=executor)
            return
        out = convert(*places(direction, 0), executor=executor)
        torch.cuda.synchronize()
    assert torch.equal(out.cpu(), convert(pageable, pageable, executor="reference"))


def test_slots(sim):
    """Token slots to a pinned chunk."""
    sizes = {"L": 2, "K": 2, "N": 4, "H": 2, "D": 8, "dtype": torch.float16}
    values = [torch.randint(256, (2, 3, 4, 2, 16), dtype=torch.uint8).view(torch.float16) for _ in range(2)]
    cache = KVCache(KVLayout("L | K B N H D", B=3, **sizes), [on(0)(value) for value in values])
    slots = torch.tensor([7, 0, -1, 11])
    chunk = pinned(torch.zeros(2, 2, 4, 16, dtype=torch.float16))
    copy_slots(cache, slots, chunk, direction="to_buffer")
    torch.cuda.synchronize()
    logical = torch.stack(values).transpose(0, 1).reshape(2, 2, 12, 16)
    taken = torch.tensor([0, 1, 3])
    got, wanted = chunk[:, :, taken].contiguous(), logical[:, :, slots[taken]].contiguous()
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert not chunk[:, :, 2].view(torch.int16).any()


def test_pageable_memory_takes_a_path_that_may(sim, refuses_pageable):
    engine, host = _engine_and_host(pageable)
    convert_blocks(engine, host, torch.tensor([[5, 0]]))
    with pytest.raises(ValueError, match="executor 'kernel' cannot serve this call"):
        convert_blocks(engine, host, torch.tensor([[5, 0]]), executor="kernel")


@pytest.mark.parametrize("direction", ["to_buffer", "to_cache"])
def test_a_later_chunk_that_is_refused_stops_the_first(sim, refuses_pageable, direction):
    """Its memory is what the kernel cannot reach."""
    cache = KVCache(
        KVLayout("L | B N H D", L=1, B=4, N=2, H=1, D=16, dtype=torch.uint8),
        [on(0)(torch.ones(128, dtype=torch.uint8))],
    )
    chunks = [place(torch.zeros(1, 2, 16, dtype=torch.uint8)) for place in (pinned, pageable)]
    with pytest.raises(ValueError, match="executor 'kernel' cannot serve this call"):
        copy_slots(cache, torch.tensor([7, 1, 0, 4]), chunks, direction=direction, executor="kernel")
    torch.cuda.synchronize()
    assert not any(chunk.any() for chunk in chunks)
    assert bool((cache.tensors[0].cpu() == 1).all())


@pytest.mark.cuda(devices=2)
def test_shards_on_two_devices_are_refused(sim):
    whole = KVLayout("B N H D", B=4, N=2, H=2, D=8, dtype=torch.uint8)
    shards = [KVCache(whole.shard(r, 2), on(r)(torch.zeros(4, 2, 1, 8, dtype=torch.uint8))) for r in range(2)]
    host = KVCache(whole, pinned(torch.zeros(4, 2, 2, 8, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="cuda:1"):
        convert_blocks(shards, host, torch.tensor([[0, 0]]))
