"""A mover beside a device: it is for the host's memory, pinned or not, and says so of any other."""

from __future__ import annotations

import pytest
import torch

import kvkernels
from kvkernels.transfer import GatherJob, Mover, PreparedJob, SwapJob

pytestmark = pytest.mark.cuda


def pool(device: str = "cpu") -> torch.Tensor:
    return torch.empty(8, 64, dtype=torch.uint8, device=device)


def test_tensors_on_a_device_are_refused_and_nothing_is_queued():
    pair, host = torch.tensor([[0, 0]]), pool()
    jobs = [
        SwapJob(host, pool("cuda"), 64, pair),
        SwapJob(pool("cuda"), host, 64, pair),
        SwapJob(pool("cuda"), pool("cuda"), 64, pair),
        GatherJob([pool("cuda")], torch.tensor([1]), torch.empty(1, 64, dtype=torch.uint8)),
        PreparedJob(kvkernels.prepare([host], [pool("cuda")]), pair),
        PreparedJob(kvkernels.prepare([pool("cuda")], [host]), pair.to("cuda")),
    ]
    with Mover(lanes=1) as mover:
        for job in jobs:
            with pytest.raises(ValueError, match="tensors must be on the cpu for this mover, got cuda:0"):
                mover.submit(job)
        assert mover.stats()["queued"] == 0 and mover.drain(timeout=10)


def test_pinned_memory_is_the_hosts():
    src, dst = pool().pin_memory(), pool().pin_memory()
    src.random_(), dst.zero_()
    with Mover(lanes=1) as mover:
        assert mover.submit(SwapJob(src, dst, 64, torch.tensor([[3, 5]]))).result(10).state == "done"
    assert torch.equal(dst[5], src[3]) and dst.sum() == src[3].sum()


def test_a_mover_on_a_device_is_refused():
    with pytest.raises(ValueError, match="device must be the cpu, got cuda"):
        Mover("cuda")
