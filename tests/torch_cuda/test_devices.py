"""Which device and stream the ops use, what they ask of CUDA, and what they raise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch_cuda import calls
from torch_cuda.calls import (
    DEVICES,
    OPS,
    PAGE_BYTES,
    issued,
    make,
    on,
    other_device,
    pageable,
    pinned,
    places,
    reads_pageable,
)

import kvkernels

pytestmark = pytest.mark.cuda
DIRECTIONS = ("h2d", "d2h", "d2d")
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, NOT_PERMITTED = 1, 2, 700, 800


def test_import_and_host_copies_leave_cuda_alone(tmp_path):
    """A process that forks later, or has no GPU to spare, must be able to import and to copy on the host."""
    script = """
import ctypes, torch, kvkernels
page, other = torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1, 16, dtype=torch.uint8)
pair = torch.tensor([[0, 0]])
kvkernels.swap_blocks(page, other, 16, pair)
kvkernels.swap_blocks_batch(*(torch.tensor([n]) for n in (page.data_ptr(), other.data_ptr(), 16)))
kvkernels.copy_pages([page], [other], pair, torch.tensor([[0, 0, 0, 0, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]]))
assert not torch.cuda.is_initialized() and not other.any()
NOT_INITIALIZED = 3
driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
assert driver.cuCtxGetCurrent(ctypes.byref(context)) == NOT_INITIALIZED
torch.cuda.init()
assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_the_tensors_device_and_its_current_stream(sim, op, direction, device):
    """Whatever device is current: the tensors' device is, for the call, and its stream is the one that torch says."""
    call, wanted = make(op, *places(direction, device)), make(op, pageable, pageable)
    wanted.run()
    stream = torch.cuda.Stream(device)
    torch.cuda.set_stream(stream)
    torch.cuda.set_device(other_device(device))
    if sim is not None:
        sim.clear_log()
    call.run()
    assert torch.cuda.current_device() == other_device(device)
    if sim is not None:
        found = {(entry["stream"], entry["device"]) for entry in issued(sim)}
        assert found == {(stream.cuda_stream, device)}
    torch.cuda.synchronize(device)
    assert call.bytes() == wanted.bytes()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_calls_wait_for_nothing(stand_in, op, direction):
    call = make(op, *places(direction, 0))
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    call.run()
    before = [stand_in.calls(wait) for wait in waits]
    call.run()
    assert [stand_in.calls(wait) for wait in waits] == before


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_batches_need_a_stream_of_their_own(sim, direction):
    """The driver refuses batches on the legacy stream, which is torch's default one."""
    src_place, dst_place = places(direction, 0)
    src, dst = (place(torch.arange(64).to(torch.uint8).reshape(8, 8)) for place in (src_place, dst_place))
    mapping = torch.tensor([[7, 0], [5, 2], [3, 4]])
    for stream, calls_made in (
        (torch.cuda.default_stream(), ["cudaMemcpyAsync"] * 3),
        (torch.cuda.Stream(), ["cuMemcpyBatchAsync"]),
    ):
        with torch.cuda.stream(stream):
            kvkernels.reset_counters()
            if sim is not None:
                sim.clear_log()
            kvkernels.swap_blocks(src, dst, 8, mapping)
            assert kvkernels.counters()["dma"]["launches"] == len(calls_made)
            assert sim is None or [entry["call"] for entry in issued(sim)] == calls_made


def _many_pages(place):
    return place(torch.zeros(64, PAGE_BYTES, dtype=torch.uint8))


def _registered(t):
    t = t.clone()
    code = torch.cuda.cudart().cudaHostRegister(t.data_ptr(), t.nbytes, 0)
    assert int(code) == 0
    return t


@pytest.mark.parametrize(("place", "executor"), [(pinned, "kernel"), (_registered, "kernel"), (pageable, "dma")])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_pinned_memory_decides_the_executor(sim, direction, place, executor):
    """Many small pages are a kernel's work where it can reach the host's memory, however that was pinned."""
    host, device = _many_pages(place), _many_pages(on(0))
    pools, out = ([host], device) if direction == "h2d" else ([device], host)
    ids = torch.arange(63, -1, -1)
    explanation = kvkernels.explain("gather_blocks", pools, ids, out)
    assert explanation.executor == executor
    assert host.is_pinned() == (executor == "kernel")
    kvkernels.reset_counters()
    kvkernels.gather_blocks(pools, ids, out)
    assert {name for name, counted in kvkernels.counters().items() if counted["calls"]} == {executor}
    if place is pageable and not reads_pageable():
        with pytest.raises(ValueError, match=r"gather_blocks: executor 'kernel' cannot serve this call: .*pageable"):
            kvkernels.gather_blocks(pools, ids, out, executor="kernel")
    if place is _registered:
        assert int(torch.cuda.cudart().cudaHostUnregister(host.data_ptr())) == 0


@pytest.mark.cuda(devices=2)
def test_ids_must_be_on_the_tensors_device(sim):
    pool, out = _many_pages(on(0)), _many_pages(on(0))
    with pytest.raises(ValueError, match=r"gather_blocks: block_ids must be .*cuda:1"):
        kvkernels.gather_blocks([pool], torch.arange(64).to("cuda:1"), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["gather_blocks", "scatter_blocks", "copy_pages"])
def test_ids_on_a_device_are_checked_there(sim, op, device):
    """Rows out of range are skipped, counted on the ids' device alone, and reported once."""
    call = make(op, on(device), on(device))
    at = {"gather_blocks": 1, "scatter_blocks": 1, "copy_pages": 2}[op]
    arguments = list(call.arguments)
    ids = arguments[at].clone()
    ids[1] = 4
    arguments[at] = ids.to(f"cuda:{device}")
    wanted = make(op, pageable, pageable)
    good = list(wanted.arguments)
    good[at] = good[at][:1]
    if op != "copy_pages":
        rows = 2 if op == "gather_blocks" else 0
        good[rows] = good[rows][:1]
    getattr(torch.ops.kvkernels, wanted.op)(*good)
    getattr(torch.ops.kvkernels, call.op)(*arguments)
    if other_device(device) != device:
        kvkernels.check_device(other_device(device))
    with pytest.raises(IndexError, match=rf"{op}: 1 pairs had ids out of range on cuda:{device}, the first in row 1"):
        kvkernels.check_device(device)
    kvkernels.check_device(device)
    assert torch.cuda.current_device() == 0
    assert call.bytes() == wanted.bytes()


@pytest.mark.cuda(devices=2)
@pytest.mark.parametrize(
    ("op", "direction", "function", "code", "name"),
    [
        ("swap_blocks", "h2d", "cudaMemcpyAsync", INVALID_VALUE, "cudaErrorInvalidValue"),
        ("swap_blocks", "d2d", "cudaLaunchKernelExC", OUT_OF_MEMORY, "cudaErrorMemoryAllocation"),
        ("swap_blocks_batch", "d2h", "cudaMemcpyAsync", INVALID_VALUE, "cudaErrorInvalidValue"),
        ("gather_blocks", "d2d", "cudaStreamIsCapturing", NOT_PERMITTED, "cudaErrorNotPermitted"),
        ("scatter_blocks", "d2h", "cuPointerGetAttributes", NOT_PERMITTED, "cudaErrorNotPermitted"),
        ("copy_pages", "d2d", "cudaLaunchKernelExC", INVALID_VALUE, "cudaErrorInvalidValue"),
        ("concat", "d2d", "cudaLaunchKernelExC", INVALID_VALUE, "cudaErrorInvalidValue"),
        ("split", "h2d", "cudaMemcpyAsync", INVALID_VALUE, "cudaErrorInvalidValue"),
    ],
)
def test_an_error_of_cuda_has_the_ops_and_cudas_names(stand_in, op, direction, function, code, name):
    """And is over with the call: torch, which looks at the last error after its own launches, must not find it."""
    call, wanted = make(op, *places(direction, 1)), make(op, pageable, pageable)
    stand_in.fail(function, 1, code)
    with pytest.raises(RuntimeError, match=rf"^{call.op}: {function} failed: {name} "):
        call.run()
    assert stand_in.cudart.cudaPeekAtLastError() == 0
    assert torch.cuda.current_device() == 0
    call.run()
    wanted.run()
    torch.cuda.synchronize(1)
    assert call.bytes() == wanted.bytes()


def test_a_broken_context_is_every_calls_error(stand_in):
    """After an illegal access nothing works until the process ends, which each call says, and torch too."""
    call = make("copy_pages", on(0), on(0))
    stand_in.fail("cudaLaunchKernelExC", 1, ILLEGAL_ADDRESS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^copy_pages: \w+ failed: cudaErrorIllegalAddress "):
            call.run()
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        torch.cuda.synchronize()


def test_errors_of_the_caller_keep_their_types(sim):
    call = make("swap_blocks", *places("h2d", 0))
    pool, out, page_bytes, mapping = call.arguments
    kvkernels.reset_counters()
    with pytest.raises(IndexError, match="swap_blocks: "):
        kvkernels.swap_blocks(pool, out, page_bytes, mapping + 4)
    with pytest.raises(ValueError, match="swap_blocks: "):
        kvkernels.swap_blocks(pool, out, 0, mapping)
    assert not any(counted["calls"] for counted in kvkernels.counters().values())


def _scattered_call(device):
    """Copies within a device that need large tables of ids."""
    rows = 16384
    pool, out = (torch.zeros(rows, 16, dtype=torch.uint8).to(f"cuda:{device}") for _ in range(2))
    mapping = torch.stack((torch.arange(rows), torch.randperm(rows)), 1)
    return lambda: kvkernels.swap_blocks(pool, out, 16, mapping)


@pytest.mark.parametrize("device", DEVICES)
def test_large_tables_are_uploaded_once_from_pinned_memory(stand_in, device):
    run = _scattered_call(device)
    stream = torch.cuda.Stream(device)
    torch.cuda.set_stream(stream)
    torch.cuda.set_device(other_device(device))
    stand_in.clear_log()
    run()
    upload, launch = issued(stand_in)
    assert (upload["call"], launch["call"]) == ("cudaMemcpyAsync", "launch")
    assert (upload["stream"], launch["stream"]) == (stream.cuda_stream, stream.cuda_stream)
    assert upload["bytes"] > calls.PAGE_BYTES * 1024
    memory = [(found["memory"], found["device"]) for found in stand_in.find([upload["src"], upload["dst"]])]
    pinned_kind, device_kind = (
        stand_in.find([t.data_ptr()])[0]["memory"] for t in (pinned(torch.ones(1)), on(0)(torch.ones(1)))
    )
    assert memory[0][0] == pinned_kind
    assert memory[1] == (device_kind, device)
