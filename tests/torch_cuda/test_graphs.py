"""The ops in CUDA graphs that torch captures."""

from __future__ import annotations

import pytest
import torch
from torch_cuda.calls import OPS, make, on, pageable, pinned

import kvkernels

pytestmark = pytest.mark.cuda


def _captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("places", [(pinned, on(0)), (on(0), pinned), (on(0), on(0))], ids=["h2d", "d2h", "d2d"])
def test_a_graph_repeats_the_call(sim, op, places):
    """Capture copies nothing; each replay copies what is in the sources then."""
    call, wanted = make(op, *places), make(op, pageable, pageable)
    before = call.bytes()
    graph = _captured(call.run)
    torch.cuda.synchronize()
    assert call.bytes() == before
    for fill in (None, 7):
        if fill is not None:
            for tensors in (call.tensors, wanted.tensors):
                tensors[0].copy_(torch.full(tensors[0].shape, fill, dtype=torch.uint8))
        graph.replay()
        wanted.run()
        torch.cuda.synchronize()
        assert call.bytes() == wanted.bytes()


def test_ids_on_the_device_are_read_by_each_replay(sim):
    """Those on the host are frozen. A row out of range is recorded by the replay that meets it."""
    host = torch.arange(8 * 64).to(torch.uint8).reshape(8, 64)
    pool, ids, row = host.cuda(), torch.tensor([1, 2]).cuda(), torch.zeros(2, 64, dtype=torch.uint8).cuda()
    frozen_ids, frozen_row = torch.tensor([1, 2]), torch.zeros(2, 64, dtype=torch.uint8).cuda()

    def run():
        kvkernels.gather_blocks([pool], ids, row)
        kvkernels.gather_blocks([pool], frozen_ids, frozen_row)

    graph = _captured(run)
    for now in ([1, 2], [7, 0]):
        ids.copy_(torch.tensor(now))
        frozen_ids.copy_(torch.tensor(now))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(row.cpu(), host[now])
        assert torch.equal(frozen_row.cpu(), host[[1, 2]])
    kvkernels.check_device(0)
    ids.copy_(torch.tensor([3, 8]))
    graph.replay()
    with pytest.raises(IndexError, match="gather_blocks: 1 pairs had ids out of range on cuda:0, the first in row 1"):
        kvkernels.check_device(0)
    assert torch.equal(row.cpu(), host[[3, 0]])


def test_tables_that_are_too_large_to_ride_along_are_many_launches(sim):
    """A replay cannot read tables that the call uploaded from memory of its own."""
    rows = 16384
    host = torch.arange(rows * 16).to(torch.uint8).reshape(rows, 16)
    pool, out = host.cuda(), torch.zeros_like(host).cuda()
    order = torch.randperm(rows)
    mapping = torch.stack((torch.arange(rows), order), 1)
    kvkernels.reset_counters()
    if sim is not None:
        sim.clear_log()
    graph = _captured(lambda: kvkernels.swap_blocks(pool, out, 16, mapping))
    assert kvkernels.counters()["kernel"]["launches"] > 1
    assert sim is None or not sim.log("cudaMemcpyAsync")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.cpu()[order], host)


def test_a_captured_result_is_the_graphs_own_memory(sim):
    shards = [torch.full((2, 3), fill, dtype=torch.float32).cuda() for fill in (1, 2)]
    results = []
    graph = _captured(lambda: results.append(kvkernels.concat_tp_shards(shards, 1)))
    shards[0].copy_(torch.full((2, 3), 5.0))
    graph.replay()
    torch.cuda.synchronize()
    assert results[0].cpu().tolist() == [[5, 5, 5, 2, 2, 2]] * 2
