"""Every CUDA call of csrc/cuda fails in turn on the stand-in: a clean error that names it, and the next call works.

Unless the failure broke the context: then every later call is that error.
"""

from __future__ import annotations

import numpy as np
import pytest
from simgpu.sim import (
    BATCH,
    DEVICE,
    H2D,
    ILLEGAL_ADDRESS,
    OUT_OF_MEMORY,
    PAGE,
    PAGEABLE,
    PINNED,
    CudaError,
    DeviceIds,
    IdColumn,
    Move,
    Side,
    address,
    ids_in_column,
    random_pairs,
)
from simgpu.worker import on_stand_in


def dma_scenario(sim):
    """Two batches, a copy beside them, and one alone."""
    src, pageable, dst = sim.memory(PINNED, 4096 * 64), sim.memory(PAGEABLE, 64), sim.memory(DEVICE, 8192 * 64)
    rows = [(address(src) + 64 * (i % 4096), address(dst) + 64 * i, 64) for i in range(2 * BATCH + 1)]
    rows.append((address(pageable), address(dst) + 64 * 8000, 64))
    stream = sim.stream()
    return lambda: sim.fragments(rows, stream)


def kernel_scenario(sim):
    """Two launches of uploaded tables, from mapped pinned memory."""
    src, dst = sim.memory(PINNED, 16384 * 16), sim.memory(DEVICE, 16384 * 16)
    move, pairs, stream = Move(Side(0, 16), Side(0, 16), 16), random_pairs(16000, 16384), sim.stream()
    return lambda: sim.kernel([move], pairs, src, dst, stream, direction=H2D, maps=True, max_items=8000)


class FirstUse:
    """Everything that happens at a device's first use, and reading its word."""

    last_device = 200

    def __init__(self, sim):
        FirstUse.last_device += 1
        self.sim, self.device = sim, FirstUse.last_device

    def run(self, prepare=lambda: None):
        """What was found; ``prepare`` is called once everything is allocated that is not part of it."""
        self.sim.set_device(self.device)
        src, dst = self.sim.memory(DEVICE, 4096), self.sim.memory(DEVICE, 4096)
        ids = DeviceIds(ids_in_column(self.sim, [99, 1]), IdColumn(), 2, 10, 10)
        stream = self.sim.stream()
        self.sim.clear_log()
        prepare()
        self.sim.kernel([PAGE], [], src, dst, stream, ids=ids)
        return self.sim.take_fault(self.device)


# Calls whose failure a destructor meets: nothing can be done about it, and the next call would say what is wrong.
SETS_MODE_BACK = {("cudaThreadExchangeStreamCaptureMode", k) for k in (2, 4, 6)}
UNREPORTED = {("cudaStreamDestroy", 1), ("cudaStreamDestroy", 2), *SETS_MODE_BACK}


CALLS = {
    "dma": ("cuMemcpyBatchAsync", "cudaMemcpyAsync", "cudaStreamIsCapturing", "cuPointerGetAttributes"),
    "kernel": ("cudaLaunchKernelExC", "cudaGetDevice", "cudaMalloc", "cuPointerGetAttributes"),
}


@pytest.mark.parametrize("scenario", ["dma", "kernel"])
@on_stand_in
def test_every_return_code_is_checked(sim, scenario):
    """Each call of each kind fails in turn: an error that names it, no error left behind, and the next call works."""
    run = {"dma": dma_scenario, "kernel": kernel_scenario}[scenario](sim)
    for call in CALLS[scenario]:
        run()
        before = sim.calls(call)
        run()
        count = sim.calls(call) - before
        assert count > 0, call
        for k in range(1, count + 1):
            sim.fail(call, k, OUT_OF_MEMORY)
            sim.set("failed_index", 5)
            with pytest.raises(CudaError) as caught:
                run()
            batch = " (copy 5 of its batch)" if call == "cuMemcpyBatchAsync" else ""
            assert str(caught.value) == f"{call}{batch} failed: cudaErrorMemoryAllocation (an error of the stand-in)"
            assert sim.cudart.cudaPeekAtLastError() == 0
            run()


@on_stand_in
def test_every_return_code_at_first_use(sim):
    """The same for what happens once a device: each try has a device of its own."""
    names = ("cudaDeviceGetAttribute", "cudaMalloc", "cudaStreamCreateWithFlags", "cudaMemsetAsync", "cudaGetDevice",
             "cudaStreamSynchronize", "cudaThreadExchangeStreamCaptureMode", "cudaStreamDestroy",
             "cudaStreamIsCapturing", "cudaEventCreateWithFlags", "cudaStreamWaitEvent", "cudaEventRecord",
             "cudaMemcpyAsync", "cudaLaunchKernelExC", "cudaFuncGetAttributes")  # fmt: skip
    counts = {}
    assert FirstUse(sim).run(lambda: counts.update({name: -sim.calls(name) for name in names})) == (1, 0, 7)
    counts = {name: count + sim.calls(name) for name, count in counts.items()}
    assert min(counts.values()) > 0, counts
    for name, k in [(name, k) for name, count in counts.items() for k in range(1, count + 1)]:
        sim.reset()
        allocations, streams = sim.cuda.fake_allocations(), sim.cuda.fake_streams()
        use = FirstUse(sim)
        try:
            assert use.run(lambda name=name, k=k: sim.fail(name, k, OUT_OF_MEMORY)) == (1, 0, 7)
            assert (name, k) in UNREPORTED, f"call {k} of {name} failed unnoticed"
            lost = 0
        except CudaError as error:
            assert str(error).startswith(f"{name} failed: cudaErrorMemoryAllocation"), error
            # Once cleared, a record is gone with the exception; before that, it is still there for the next call.
            lost = len(sim.log("launch")) - ((name, k) == ("cudaStreamSynchronize", 3))
        assert sim.cudart.cudaPeekAtLastError() == 0, name
        if (name, k) in SETS_MODE_BACK:
            sim.cudart.fake_set_capture_mode(0)
        assert sim.cudart.fake_capture_mode() == 0, name
        sim.reset()
        # The word stays with its device, unless it could not be zeroed.
        assert sim.cuda.fake_streams() == streams, name
        kept = sim.cuda.fake_allocations() - allocations
        assert kept in (0, 1) and (kept == 0 or k > 1 or name not in ("cudaMemsetAsync", "cudaStreamSynchronize")), name
        assert use.run() == (1 + lost, 0, 7), (name, k)


@on_stand_in(fresh=True)
def test_the_entry_points_return_codes(sim):
    """Asked for once a process, and again after a failure."""
    src, dst = sim.memory(PINNED, 4096), sim.memory(DEVICE, 4096)
    stream = sim.stream()
    for k, done in ((1, 0), (2, 1)):
        sim.fail("cudaGetDriverEntryPointByVersion", k, OUT_OF_MEMORY)
        with pytest.raises(CudaError, match=r"^cudaGetDriverEntryPointByVersion failed: cudaErrorMemoryAllocation"):
            sim.dma([PAGE], [(0, 1), (3, 2)], src, dst, stream)
        assert sim.calls("cudaGetDriverEntryPointByVersion") == k + done
    sim.dma([PAGE], [(0, 1), (3, 2)], src, dst, stream)
    sim.dma([PAGE], [(0, 1), (3, 2)], src, dst, stream)
    assert len(sim.log("cudaGetDriverEntryPointByVersion")) == 4
    assert np.array_equal(dst[64:128], src[:64])


@on_stand_in
def test_an_error_of_someone_elses_is_not_ours(sim):
    """What another library left as the runtime's last error fails none of our calls, and stays where it is."""
    src, dst = sim.memory(PINNED, 4096), sim.memory(DEVICE, 4096)
    assert sim.cudart.cudaHostUnregister(None) != 0
    sim.dma([PAGE], [(0, 1), (3, 2)], src, dst, sim.stream())
    sim.kernel([PAGE], [(0, 1), (3, 2)], src, dst, direction=H2D, maps=True)
    assert sim.cudart.cudaGetLastError() != 0


@on_stand_in
def test_a_failed_upload_launches_nothing(sim):
    run = kernel_scenario(sim)
    run()
    sim.clear_log()
    sim.fail("cudaMemcpyAsync", 1, OUT_OF_MEMORY)
    with pytest.raises(CudaError, match="cudaMemcpyAsync failed"):
        run()
    assert not sim.log("launch")


BROKEN = {
    214: "cudaErrorECCUncorrectable",
    700: "cudaErrorIllegalAddress",
    702: "cudaErrorLaunchTimeout",
    710: "cudaErrorAssert",
    716: "cudaErrorMisalignedAddress",
    719: "cudaErrorLaunchFailure",
}


def entries(sim):
    """Every way into csrc/cuda that asks CUDA for something."""
    host, device, stream = sim.memory(PINNED, 4096), sim.memory(DEVICE, 4096), sim.stream()
    pageable, other = sim.memory(PAGEABLE, 4096), sim.memory(DEVICE, 4096)
    rows = [(address(host) + 64 * i, address(device) + 64 * i, 64) for i in range(4)]
    ids = DeviceIds(ids_in_column(sim, [3, 1]), IdColumn(), 2, 10, 10)
    pairs = [(0, 1), (3, 2)]
    sim.kernel([PAGE], [], device, other, stream, ids=ids)
    return {
        "dma": lambda: sim.dma([PAGE], pairs, host, device, stream),
        "dma of one block": lambda: sim.dma([PAGE], pairs[:1], host, device, stream),
        "dma of pageable memory": lambda: sim.dma([PAGE], pairs, pageable, device, stream),
        "plan": lambda: sim.dma([PAGE], pairs, host, device, stream, plans_only=True),
        "fragments": lambda: sim.fragments(rows, stream),
        "kernel": lambda: sim.kernel([PAGE], pairs, device, other, stream),
        "kernel, mapped": lambda: sim.kernel([PAGE], pairs, host, device, stream, direction=H2D, maps=True),
        "kernel, device ids": lambda: sim.kernel([PAGE], [], device, other, stream, ids=ids),
        "fault": lambda: sim.take_fault(),
        "capture": lambda: sim.is_capturing(stream),
        "pointers": lambda: sim.find([address(host), address(device)]),
    }


@pytest.mark.parametrize("code", BROKEN)
@on_stand_in
def test_a_broken_context_breaks_every_call(sim, code):
    """As if an earlier kernel, anyone's, had failed: the next call says so, and the next, of whatever kind."""
    runs = entries(sim)
    launches = len(sim.log("launch"))
    sim.fail("cudaSetDevice", 1, code)
    with pytest.raises(CudaError):
        sim.set_device(0)
    for name in [*runs, *runs]:
        with pytest.raises(CudaError, match=f" failed: {BROKEN[code]} ") as caught:
            runs[name]()
        assert str(caught.value).count("failed") == 1, name
    assert len(sim.log("launch")) == launches
    sim.cuda.fake_reset()
    for name in runs:
        runs[name]()


@pytest.mark.parametrize("scenario", ["dma", "kernel"])
@on_stand_in
def test_a_context_that_breaks_within_a_call(sim, scenario):
    """At each call of each kind: an error that names it, and the same error from then on."""
    run = {"dma": dma_scenario, "kernel": kernel_scenario}[scenario](sim)
    for call in set(CALLS[scenario]) - {"cudaGetDevice"}:  # which needs no context
        run()
        before = sim.calls(call)
        run()
        count = sim.calls(call) - before
        for k in range(1, count + 1):
            sim.fail(call, k, ILLEGAL_ADDRESS)
            with pytest.raises(CudaError, match=f"^{call}.* failed: cudaErrorIllegalAddress"):
                run()
            for _ in range(2):
                with pytest.raises(CudaError, match="failed: cudaErrorIllegalAddress"):
                    run()
            sim.cuda.fake_reset()
            run()


@on_stand_in
def test_a_context_that_breaks_at_first_use(sim):
    """Everything made for the fault word is given back, though CUDA refuses to hear of it."""
    names = ("cudaMalloc", "cudaStreamCreateWithFlags", "cudaMemsetAsync", "cudaStreamSynchronize",
             "cudaStreamDestroy", "cudaLaunchKernelExC", "cudaEventRecord", "cudaStreamWaitEvent",
             "cudaMemcpyAsync")  # fmt: skip
    for name in names:
        sim.reset()
        allocations, streams = sim.cuda.fake_allocations(), sim.cuda.fake_streams()
        use = FirstUse(sim)
        with pytest.raises(CudaError, match="failed: cudaErrorIllegalAddress"):
            use.run(lambda name=name: sim.fail(name, 1, ILLEGAL_ADDRESS))
        assert sim.cudart.fake_capture_mode() == 0, name
        sim.reset()
        assert sim.cuda.fake_streams() == streams, name
        keeps_word = name in ("cudaLaunchKernelExC", "cudaEventRecord", "cudaStreamWaitEvent", "cudaMemcpyAsync",
                              "cudaStreamDestroy")  # fmt: skip
        assert sim.cuda.fake_allocations() - allocations == keeps_word, name
