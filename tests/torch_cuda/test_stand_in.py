"""What the stand-in cannot do must fail, and by name: a test on it must not pass for having done nothing."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("stand_in")]
NOT_SUPPORTED = 801


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda: torch.zeros(4, device="cuda"), "FillFunctor"),
        (lambda: torch.arange(4, device="cuda"), "RangeFactories"),
        (lambda: torch.arange(8).cuda()[::2].contiguous(), "direct_copy_kernel"),
    ],
)
def test_torchs_kernels_are_refused(make, kernel):
    with pytest.raises(RuntimeError, match=rf"the stand-in for CUDA lacks kernel \w*{kernel}"):
        make()
    assert torch.ones(4).cuda().cpu().tolist() == [1, 1, 1, 1]


def test_the_fill_that_begins_a_capture_in_older_torch():
    """Of int64 alone, and in the order of its stream."""
    host, filled = torch.zeros(5, dtype=torch.int64).pin_memory(), torch.empty(5, dtype=torch.int64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        filled.fill_(-3)
        host.copy_(filled, non_blocking=True)
        torch.cuda.synchronize()
    assert host.tolist() == [-3] * 5


@pytest.mark.parametrize(("library", "function"), [("cudart", "cudaMallocAsync"), ("cuda", "cuModuleLoadData")])
def test_what_cuda_has_and_the_stand_in_has_not_is_refused(stand_in, library, function):
    stand_in.clear_log()
    assert getattr(getattr(stand_in, library), function)(None, None) == NOT_SUPPORTED
    assert stand_in.log(function) == [{"call": function, "refused": 1}]
    stand_in.cudart.cudaGetLastError()
