"""The executors bulk and staged: who is chosen, what is refused and why, and that what was predicted is issued."""

from __future__ import annotations

import pytest
import torch
from cases import assert_issued
from torch_cuda.calls import BULK, issued, on, pageable, pinned, reads_pageable

import kvkernels

pytestmark = pytest.mark.cuda

LAYERS, BLOCKS, ROWS = 8, 32, 24


def _call(direction, host, page_bytes=4096):
    """A pool a layer on the device, rows of all layers on the host: op, arguments, the destination, what it must be."""
    generator = torch.Generator().manual_seed(page_bytes)
    pools = [torch.randint(256, (BLOCKS, page_bytes), dtype=torch.uint8, generator=generator) for _ in range(LAYERS)]
    rows = torch.randint(256, (ROWS, LAYERS * page_bytes), dtype=torch.uint8, generator=generator)
    ids = torch.randperm(BLOCKS, generator=generator)[:ROWS]
    on_device, on_host = [pool.to("cuda:0") for pool in pools], host(rows)
    if direction == "d2h":
        return "gather_blocks", (on_device, ids, on_host), [on_host], [torch.cat([pool[ids] for pool in pools], 1)]
    for layer, pool in enumerate(pools):
        pool[ids] = rows[:, layer * page_bytes : (layer + 1) * page_bytes]
    return "scatter_blocks", (on_host, ids, on_device), on_device, pools


def _check(op, arguments, destinations, expected, **options):
    explanation = kvkernels.explain(op, *arguments, **options)
    kvkernels.reset_counters()
    getattr(kvkernels, op)(*arguments, **options)
    torch.cuda.synchronize()
    assert_issued(explanation)
    for destination, wanted in zip(destinations, expected, strict=True):
        assert torch.equal(destination.cpu(), wanted)
    return explanation


@pytest.mark.parametrize(
    ("direction", "host", "page_bytes", "executor"),
    [
        ("h2d", pinned, 4096, "kernel"),
        ("h2d", pageable, 4096, "staged"),
        ("d2h", pinned, 4096, "staged"),
        ("d2h", pinned, 80, "kernel"),
        ("d2h", pageable, 4096, "staged"),
        ("d2h", pageable, 80, "dma"),
        ("h2d", pinned, 32768, "kernel"),
        ("d2h", pinned, 32768, "dma"),
        ("h2d", pinned, 131072, "dma"),
    ],
)
def test_small_fragments_find_their_executor(sim, direction, host, page_bytes, executor):
    """By where the host's memory is, how much of it lies together, and which way the bytes go."""
    with torch.cuda.stream(torch.cuda.Stream()):
        explanation = _check(*_call(direction, host, page_bytes))
    assert explanation.executor == executor, explanation.reason
    if executor == "staged":
        assert explanation.device["ring_bytes"] <= 32 << 20 and explanation.device["chunks"] == 1


@pytest.mark.parametrize("executor", [BULK, "staged"])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("page_bytes", [600, 4097, 40000])
def test_by_name(sim, direction, executor, page_bytes):
    """On the default stream too, where copies go one by one."""
    assert _check(*_call(direction, pinned, page_bytes), executor=executor).executor == executor


def test_staged_waits_for_nothing(stand_in):
    op, arguments, _, _ = _call("d2h", pinned)
    with torch.cuda.stream(torch.cuda.Stream()):
        getattr(kvkernels, op)(*arguments, executor="staged")  # the ring is kept from now on
        torch.cuda.synchronize()
        before = stand_in.counters()
        stand_in.clear_log()
        getattr(kvkernels, op)(*arguments, executor="staged")
        assert (stand_in.counters() - before).synchronisations == 0
    assert [entry["call"] for entry in issued(stand_in)] == ["launch", "cudaMemcpyAsync"]


@pytest.mark.cuda(bulk=True)
def test_bulk_takes_ids_on_the_device_and_is_captured(sim):
    _, (buffer, ids, pools), destinations, expected = _call("h2d", pinned)
    before = [pool.clone() for pool in pools]
    graph = torch.cuda.CUDAGraph()
    on_device = ids.cuda()
    with torch.cuda.graph(graph):
        kvkernels.scatter_blocks(buffer, on_device, pools, executor="bulk")
    assert all(torch.equal(pool.cpu(), old.cpu()) for pool, old in zip(pools, before, strict=True))
    graph.replay()
    torch.cuda.synchronize()
    for destination, wanted in zip(destinations, expected, strict=True):
        assert torch.equal(destination.cpu(), wanted)
    on_device.copy_(torch.full_like(ids, BLOCKS))
    graph.replay()
    with pytest.raises(IndexError, match=rf"^scatter_blocks: {ROWS} pairs had ids out of range on cuda:0"):
        kvkernels.check_device(0)


@pytest.mark.cuda(bulk=True)
def test_what_they_refuse(sim):
    _, arguments, _, _ = _call("d2h", pinned, 80)
    pools, ids, out = arguments
    refused = r"^gather_blocks: executor '{}' cannot serve this call: {}$"
    least = "its fragments must have at least 512 bytes, and one has 80"
    with pytest.raises(ValueError, match=refused.format("bulk", least)):
        kvkernels.gather_blocks(pools, ids, out, executor="bulk")
    with pytest.raises(ValueError, match=refused.format("bulk", least)):
        kvkernels.gather_blocks(pools, ids.cuda(), out, executor="bulk")
    with pytest.raises(ValueError, match=refused.format("staged", "the ids are on the device")):
        kvkernels.gather_blocks(pools, ids.cuda(), out, executor="staged")
    with pytest.raises(ValueError, match=refused.format("staged", "no side is in host memory")):
        kvkernels.gather_blocks(pools, ids, on(0)(out), executor="staged")
    if not reads_pageable():
        with pytest.raises(ValueError, match=refused.format("bulk", ".*pageable.*")):
            kvkernels.gather_blocks(pools, ids, pageable(out), executor="bulk")
    captured = "its stream is captured, and its ring on the device serves other calls before a replay"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(ValueError, match=refused.format("staged", captured)):
            kvkernels.gather_blocks(pools, ids, out, executor="staged")
        kvkernels.gather_blocks(pools, ids, out)
