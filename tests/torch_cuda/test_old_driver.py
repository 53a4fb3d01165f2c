"""A driver that is too old for the runtime that the library holds: torch's CUDA works, and the library's cannot."""

from __future__ import annotations

import pytest
import torch
from torch_cuda.calls import OPS, make, on, pageable, places

import kvkernels
from kvkernels.info import info_text

pytestmark = pytest.mark.cuda
WHY = "this library's code for CUDA 13 needs driver 580 or later, and the driver found is for CUDA 12.4"


@pytest.fixture
def old(stand_in):
    # Pinned memory of an earlier test, which torch keeps, may be where the device sees it at another address.
    torch._C._host_emptyCache()
    stand_in.set("driver_version", 12040)
    return stand_in


@pytest.mark.parametrize("op", [op for op in OPS if op != "swap_blocks_batch"])
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_auto_takes_triton_and_says_why(old, op, direction):
    call = make(op, *places(direction, 0))
    asked = ("cuPointerGetAttributes", "cuCtxSetCurrent", "cudaDeviceGetAttribute", "cudaFuncGetAttributes")
    before = [old.calls(function) for function in asked]
    explained = kvkernels.explain(call.op, *call.arguments)
    assert (explained.executor, explained.reason) == ("triton", WHY)
    assert [old.calls(function) for function in asked] == before, "the library's runtime would fail"


@pytest.mark.parametrize("op", [op for op in OPS if op != "swap_blocks_batch"])
def test_what_needs_the_librarys_code_is_an_error_that_names_both_drivers(old, op):
    for executor in ("kernel", "bulk", "dma", "staged"):
        call = make(op, *places("d2h", 0))
        with pytest.raises(ValueError, match=rf"^{call.op}: executor '{executor}' cannot serve this call: {WHY}$"):
            call.run(executor=executor)
    call = make(op, pageable, on(0))
    with pytest.raises(
        RuntimeError, match=rf"^{call.op}: tensors on a cuda device need CUDA code .*: {WHY}, and .*pinned"
    ):
        call.run()
    assert kvkernels.explain(call.op, *call.arguments, executor="reference").executor == "reference"
    kvkernels.check_device(0)


def test_raw_addresses(old):
    for sides in (places("h2d", 0), places("d2h", 0), places("d2d", 0)):
        call = make("swap_blocks_batch", *sides)
        with pytest.raises(RuntimeError, match=rf"^swap_blocks_batch: addresses on a cuda device need .*: {WHY}$"):
            call.run()
    call, wanted = make("swap_blocks_batch", *places("h2h", 0)), make("swap_blocks_batch", pageable, pageable)
    call.run()
    wanted.run()
    assert call.bytes() == wanted.bytes()


def test_info_says_so(old):
    found = kvkernels.info()
    assert found["cuda"]["driver_refusal"] == WHY
    assert found["ops"]["gather_blocks"]["cuda to cuda"] == {
        "executors": ["triton", "reference"],
        "auto": "triton",
        "why": WHY,
    }
    assert found["ops"]["swap_blocks_batch"]["cpu to cuda"]["auto"] is None
    assert f"driver:   {WHY}" in info_text(found).splitlines()
    old.set("driver_version", 13000)
    assert kvkernels.info()["cuda"]["driver_refusal"] is None
    assert torch.cuda.is_available()
