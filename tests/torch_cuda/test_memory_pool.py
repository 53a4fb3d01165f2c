"""KVPool with CUDA: its pages on a device, or pinned, and its handles' ids in copies between the two."""

from __future__ import annotations

import pytest
import torch

import kvkernels
from kvkernels import KVLayout
from kvkernels.memory import KVPool

pytest.importorskip("kvkernels._host")
pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_pages_on_a_device(sim, device):
    pool = KVPool(64, 16, page_bytes=64, device=device)
    assert [(one.is_cuda, tuple(one.shape)) for one in pool.pools] == [(True, (4, 64))]
    for same in (None, "cuda", "cuda:0", torch.device("cuda", 0)):
        handle = pool.alloc(16, device=same)
        assert (handle.device, handle.tier) == ("cuda:0", "device") and handle.block_ids.device.type == "cpu"
    with pytest.raises(ValueError, match=r"KVPool.alloc: device must be that of the pages, cuda:0, got 'cpu'"):
        pool.alloc(16, device="cpu")


def test_a_layout_on_a_device(sim):
    layout = KVLayout("L | K B N H D", L=2, K=2, B=4, N=16, H=2, D=8, dtype=torch.float16)
    pool = KVPool(64, 16, layout=layout, device="cuda")
    assert (len(pool.cache.tensors), len(pool.pools)) == (2, 4) and all(one.is_cuda for one in pool.pools)


def test_there_and_back(sim):
    """Pages on the host are pinned, so that every executor reaches them."""
    host, device = KVPool(256, 16, page_bytes=1024), KVPool(256, 16, page_bytes=1024, device="cuda")
    assert host.pools[0].is_pinned()
    there, here = host.alloc(100), device.alloc(100)
    torch.manual_seed(3)
    given = torch.randint(0, 256, (7, 1024), dtype=torch.uint8)
    host.pools[0].zero_()
    host.pools[0][there.block_ids] = given
    mapping = torch.stack([there.block_ids, here.block_ids], dim=1)
    kvkernels.copy_pages(list(host.pools), list(device.pools), mapping, kvkernels.whole_page_runs(host.pools))
    torch.cuda.synchronize()
    host.pools[0].zero_()
    kvkernels.copy_pages(list(device.pools), list(host.pools), mapping.flip(1), kvkernels.whole_page_runs(host.pools))
    torch.cuda.synchronize()
    assert torch.equal(host.pools[0][there.block_ids], given)
    host.close()
