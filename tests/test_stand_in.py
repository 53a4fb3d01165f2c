"""The stand-in for CUDA itself: what it orders, what it leaves open, and what it refuses."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from simgpu.sim import (
    ANY_ORDER,
    DEVICE,
    DURING_CALL,
    LEGACY,
    NOT_READY,
    PAGE,
    PAGEABLE,
    PER_THREAD,
    PINNED,
    STREAM_ORDER,
    CudaError,
    address,
)
from simgpu.worker import on_stand_in

SEEDS = 300


def seeds(sim):
    for seed in range(1, SEEDS + 1):
        sim.adversarial(seed)
        yield seed


def some_program(sim, streams, event, buffers):
    """Work of every kind; returns the calls' own log and what the scheduler made of it."""
    a, b = streams
    host, first, second = buffers
    sim.fill(first, 3, a)
    sim.record(event, a)
    sim.wait(b, event)
    sim.copy(second, first, b)
    sim.batch([(address(host) + 64 * i, address(first) + 64 * i, 64) for i in range(8)], a, ANY_ORDER)
    sim.call_on_host(lambda: None, b)
    sim.kernel([PAGE], [(0, 1), (3, 2)], first, second, b)
    sim.finish_stream(b)
    sim.finish_device()
    return sim.schedule()


@on_stand_in
def test_the_same_seed_is_the_same_run(sim):
    streams, event = (sim.stream(), sim.stream()), sim.event()
    buffers = [sim.memory(kind, 512) for kind in (PINNED, DEVICE, DEVICE)]
    some_program(sim, streams, event, buffers)  # what the library asks for once a process is no part of the runs
    schedules = []
    for seed in range(1, 31):
        runs = []
        for _ in range(2):
            sim.adversarial(seed)
            runs.append(some_program(sim, streams, event, buffers))
        assert runs[0] == runs[1], seed
        assert {step["operation"] for step in runs[0]} == set(range(1, 8)), "each operation runs"
        assert [e["operation"] for e in sim.log() if "operation" in e] == [1, 4, 5, 7], "and the log says which it is"
        schedules.append(str(runs[0]))
    assert len(set(schedules)) > 25, "other seeds are other runs"


@on_stand_in
def test_without_a_seed_everything_happens_at_once(sim):
    device, stream, event = sim.memory(DEVICE, 64), sim.stream(), sim.event()
    for value in (1, 2):
        sim.fill(device, value, stream)
        assert (device == value).all()
    sim.record(event, stream)
    assert sim.is_done(event) and not sim.schedule()


@on_stand_in
def test_work_may_be_as_late_or_as_early_as_can_be(sim):
    """Over the seeds: nothing runs before it must; all runs in its call; and a copy is seen half done."""
    host, device, stream, event = sim.memory(PINNED, 512), sim.memory(DEVICE, 512), sim.stream(), sim.event()
    seen = set()
    for _ in seeds(sim):
        device[:], host[:] = 1, 2
        sim.copy(device, host, stream)
        sim.record(event, stream)
        for _ in range(3):
            sim.set_device(0)
        copied = int((device == 2).sum())
        seen.add("late" if copied == 0 else "early" if copied == len(device) else "half")
        sim.finish_stream(stream)
        assert (device == 2).all() and sim.is_done(event)
    assert seen == {"late", "early", "half"}


@on_stand_in
def test_copies_of_a_batch_mix_with_each_other_and_with_other_streams(sim):
    host, device = sim.memory(PINNED, 1024), sim.memory(DEVICE, 1024)
    streams = sim.stream(), sim.stream()
    orders, mixed = set(), False
    for _ in seeds(sim):
        for i, stream in enumerate(streams):
            half = 512 * i
            rows = [(address(host) + half + 64 * k, address(device) + half + 64 * k, 64) for k in range(8)]
            assert sim.batch(rows, stream, STREAM_ORDER) == 0
        sim.finish_device()
        assert np.array_equal(host, device)
        schedule = sim.schedule()
        orders.add(tuple(step["copy"] for step in schedule if (step["operation"], step["did"]) == (1, "wrote")))
        operations = [step["operation"] for step in schedule]
        mixed = mixed or operations not in (sorted(operations), sorted(operations, reverse=True))
    assert len({tuple(dict.fromkeys(order)) for order in orders}) > SEEDS / 2, "any order of copies"
    assert any(len(order) != len(dict.fromkeys(order)) for order in orders), "in pieces"
    assert mixed


@on_stand_in
def test_a_source_in_any_order_is_read_at_any_time(sim):
    """At the call, between the call and its turn, or in its turn, which no other order allows."""
    source, device, stream = sim.memory(PINNED, 64), sim.memory(DEVICE, 64), sim.stream()
    seen = set()
    for _ in seeds(sim):
        source[:] = 1
        sim.fill(source, 2, stream)
        sim.batch([(address(source), address(device), 64)], stream, ANY_ORDER)
        sim.set_device(0)
        is_waiting = (source == 1).all()
        if is_waiting:
            source[:] = 3
            sim.set_device(0)
        sim.finish_stream(stream)
        seen |= set(np.unique(device).tolist()) if is_waiting else set()
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("order", [STREAM_ORDER, DURING_CALL, ANY_ORDER])
@on_stand_in
def test_when_a_batch_reads_its_source(sim, order):
    """In stream order: after earlier work, before later. During the call: as of then. In any order: either or mixed."""
    source, device, stream = sim.memory(PINNED, 64), sim.memory(DEVICE, 64), sim.stream()
    seen = set()
    for _ in seeds(sim):
        source[:] = 1
        sim.fill(source, 2, stream)
        before = set(np.unique(source).tolist())
        assert sim.batch([(address(source), address(device), 64)], stream, order) == 0
        sim.fill(source, 3, stream)
        sim.finish_stream(stream)
        seen |= set(np.unique(device).tolist())
        assert order != DURING_CALL or set(np.unique(device).tolist()) <= before | {2}
    assert seen == ({2} if order == STREAM_ORDER else {1, 2}), seen


@on_stand_in
def test_pageable_copies_are_staged_or_complete(sim):
    host, device, stream = sim.memory(PAGEABLE, 512), sim.memory(DEVICE, 512), sim.stream()
    late = False
    for seed in seeds(sim):
        host[:], device[:] = 1, 0
        sim.copy(device, host, stream)
        host[:] = 2
        late = late or not device.any()
        sim.copy(host, device, stream)
        assert (host == 1).all(), seed
    assert late, "staged, and still on its way"


@pytest.mark.parametrize(
    "force", ["stream", "event", "device", "cudaMemcpy", "cudaFree", "cudaFreeHost", "cudaHostUnregister"]
)
@on_stand_in
def test_what_forces_work_to_be_done(sim, force):
    host, device, stream, event = (
        sim.memory(PINNED, 512),
        sim.memory(DEVICE, 512),
        sim.stream(blocking=True),
        sim.event(),
    )
    spare = np.zeros(8192, np.uint8)
    out = ctypes.c_void_p()
    for seed in seeds(sim):
        device[:], host[:] = 1, 2
        sim.copy(device, host, stream)
        sim.record(event, stream)
        before = sim.counters()
        if force == "stream":
            sim.finish_stream(stream)
        elif force == "event":
            sim.finish_event(event)
        elif force == "device":
            sim.finish_device()
        elif force == "cudaMemcpy":
            # On the legacy stream, which waits for blocking ones.
            sim._runtime("cudaMemcpy", host.ctypes, ctypes.c_void_p(address(device)), ctypes.c_size_t(8), 4)
        elif force == "cudaHostUnregister":
            sim._runtime("cudaHostRegister", spare.ctypes, ctypes.c_size_t(4096), 0)
            sim._runtime("cudaHostUnregister", spare.ctypes)
        else:
            sim._runtime({"cudaFree": "cudaMalloc", "cudaFreeHost": "cudaHostAlloc"}[force], ctypes.byref(out),
                         ctypes.c_size_t(64), 0)  # fmt: skip
            sim._runtime(force, out)
        assert (device == 2).all(), seed
        assert sim.cudart.cudaEventQuery(ctypes.c_void_p(event)) == 0
        assert (sim.counters() - before).synchronisations == 1


@on_stand_in
def test_asking_lets_work_happen_and_leaves_no_error(sim):
    device, stream, event = sim.memory(DEVICE, 512), sim.stream(), sim.event()
    waited = 0
    for _ in seeds(sim):
        sim.fill(device, 1, stream)
        sim.record(event, stream)
        waited += sim.poll(event)
        assert sim.cudart.cudaPeekAtLastError() == 0
        sim.fill(device, 2, stream)
        for _ in range(1000):
            if sim.cudart.cudaStreamQuery(ctypes.c_void_p(stream)) != NOT_READY:
                break
            waited += 1
        assert (device == 2).all()
    assert waited > SEEDS / 4


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("first", ["legacy", "stream"])
@on_stand_in
def test_the_legacy_stream_and_the_others(sim, first, blocking):
    """It waits for blocking streams and they for it; with the others there is no order."""
    device, stream = sim.memory(DEVICE, 64), sim.stream(blocking=blocking)
    order = (LEGACY, stream) if first == "legacy" else (stream, LEGACY)
    seen = set()
    for _ in seeds(sim):
        for value, on in enumerate(order):
            sim.fill(device, value, on)
        sim.finish_device()
        seen.add(int(device[0]))
    assert seen == ({1} if blocking else {0, 1})


@on_stand_in
def test_finishing_a_blocking_stream_leaves_the_legacy_one(sim):
    """Only what the stream was asked for is finished, and what that comes after."""
    first, second, stream = sim.memory(DEVICE, 64), sim.memory(DEVICE, 64), sim.stream(blocking=True)
    left = 0
    for _ in seeds(sim):
        first[:], second[:] = 0, 0
        sim.fill(first, 1, stream)
        sim.fill(second, 1, LEGACY)
        sim.finish_stream(stream)
        assert first.all()
        left += not second.any()
        sim.finish_stream(LEGACY)
        assert second.all()
    assert left > 0


@on_stand_in
def test_the_per_thread_stream_blocks(sim):
    device = sim.memory(DEVICE, 64)
    for seed in seeds(sim):
        for value, on in ((1, LEGACY), (2, PER_THREAD), (3, LEGACY)):
            sim.fill(device, value, on)
        sim.finish_stream(LEGACY)
        assert (device == 3).all(), seed


@on_stand_in
def test_host_functions_run_in_their_turn(sim):
    device, stream = sim.memory(DEVICE, 64), sim.stream()
    for seed in seeds(sim):
        seen = []
        device[:] = 0
        sim.fill(device, 1, stream)
        sim.call_on_host(lambda seen=seen: seen.append(int(device[0])), stream)
        sim.fill(device, 2, stream)
        sim.finish_stream(stream)
        assert seen == [1], seed
        sim.host_functions.clear()


@on_stand_in
def test_a_destroyed_stream_still_does_its_work(sim):
    device, event = sim.memory(DEVICE, 64), sim.event()
    for seed in seeds(sim):
        stream = sim.stream()
        device[:] = 0
        sim.fill(device, 1, stream)
        sim.record(event, stream)
        sim._runtime("cudaStreamDestroy", ctypes.c_void_p(sim.streams.pop()))
        sim.finish_event(event)
        assert (device == 1).all(), seed


# Errors.


@on_stand_in
def test_a_kernel_that_fails_is_found_out_by_a_later_call(sim):
    """The launch itself may succeed; from the failure on, every call returns it, and nothing more runs."""
    src, dst, stream = sim.memory(DEVICE, 512), sim.memory(DEVICE, 512), sim.stream()
    later = 0
    for seed in range(1, 101):
        sim.adversarial(seed)
        before = dst.copy()
        try:
            sim.kernel([PAGE], [(0, 1 << 30)], src, dst, stream)
            sim.fill(dst, 1, stream)
        except CudaError:
            pass
        else:
            later += 1
        for _ in range(2):
            with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
                sim.finish_stream(stream)
        assert np.array_equal(dst, before), "what came after in the stream must not run"
        assert sim.cudart.cudaGetLastError() == sim.cudart.cudaPeekAtLastError() == 700
        # Only a new process would help.
        sim.cuda.fake_reset()
    assert 50 < later < 100


@on_stand_in
def test_every_code_has_its_name(sim):
    name = lambda code: sim.cudart.cudaGetErrorName(code).decode()  # noqa: E731
    assert [name(code) for code in (0, 2, 214, 600, 700, 702, 710, 716, 719, 801, 907, 999)] == [
        "cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorECCUncorrectable", "cudaErrorNotReady",
        "cudaErrorIllegalAddress", "cudaErrorLaunchTimeout", "cudaErrorAssert", "cudaErrorMisalignedAddress",
        "cudaErrorLaunchFailure", "cudaErrorNotSupported", "cudaErrorCapturedEvent", "cudaErrorUnknown",
    ]  # fmt: skip
    assert name(12345) == "unrecognized error code"


@on_stand_in
def test_handles_that_are_none(sim):
    for call in ("cudaEventRecord", "cudaStreamWaitEvent", "cudaEventSynchronize", "cudaEventQuery", "cudaStreamQuery"):
        arguments = [ctypes.c_void_p(12345), ctypes.c_void_p(0), 0][: 3 if call == "cudaStreamWaitEvent" else 2]
        assert getattr(sim.cudart, call)(*arguments) == 400, call
    assert sim.cudart.cudaGetLastError() == 400


@on_stand_in
def test_elapsed_time(sim):
    stream, start, end = sim.stream(), sim.event(), sim.event()
    ms = ctypes.c_float(-1)
    elapsed = lambda: sim.cudart.cudaEventElapsedTime(ctypes.byref(ms), *map(ctypes.c_void_p, (start, end)))  # noqa: E731
    assert elapsed() == 400, "never recorded"
    pending = 0
    for _ in seeds(sim):
        sim.record(start, stream)
        sim.record(end, stream)
        pending += elapsed() == NOT_READY
        sim.finish_stream(stream)
        assert elapsed() == 0 and ms.value >= 0
    assert pending > 0


# Capture.


@on_stand_in
def test_a_capture_refuses_what_cuda_refuses(sim):
    stream, other, event, outside = sim.stream(blocking=True), sim.stream(), sim.event(), sim.event()
    host, device = sim.memory(PINNED, 64), sim.memory(DEVICE, 64)
    graph = ctypes.c_void_p()
    end = lambda on=stream: sim.cudart.cudaStreamEndCapture(ctypes.c_void_p(on), ctypes.byref(graph))  # noqa: E731
    pointer = ctypes.c_void_p
    sim.record(outside, stream)
    with pytest.raises(CudaError, match="StreamCaptureUnsupported"):
        sim.begin_capture(LEGACY)
    assert end() == 1

    def void(call, code):
        """The call fails so, and the capture with it."""
        sim.begin_capture(stream)
        sim.record(event, stream)
        assert call() == code
        assert end() == 901 and not graph.value

    void(lambda: sim.cudart.cudaStreamSynchronize(pointer(stream)), 900)
    void(lambda: sim.cudart.cudaStreamQuery(pointer(stream)), 900)
    void(lambda: sim.cudart.cudaDeviceSynchronize(), 900)
    for call, handle in (("cudaStreamSynchronize", other), ("cudaStreamQuery", other), ("cudaEventQuery", outside)):
        void(lambda call=call, handle=handle: getattr(sim.cudart, call)(pointer(handle)), 900)
    void(lambda: sim.cudart.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(64)), 900)
    void(lambda: sim.batch([(address(host), address(device), 64)], stream, STREAM_ORDER), 900)

    sim.begin_capture(stream)
    sim.record(event, stream)
    assert sim.cudart.cudaEventQuery(pointer(event)) == sim.cudart.cudaEventSynchronize(pointer(event)) == 907
    assert sim.cudart.cudaStreamWaitEvent(pointer(stream), pointer(outside), 0) == 905
    with pytest.raises(CudaError, match="StreamCaptureImplicit"):
        sim.fill(device, 1, LEGACY)
    sim.wait(other, event)
    assert sim.is_capturing(other)
    sim.fill(device, 1, other)
    assert end(other) == 903
    assert end() == 904 and not graph.value, "the fork was not joined"
    assert not sim.is_capturing(other) and not sim.is_capturing(stream)
    sim.begin_capture(stream)
    sim.begin_capture(other)
    sim.record(event, stream)
    assert sim.cudart.cudaStreamWaitEvent(pointer(other), pointer(event), 0) == 902
    assert end() == end(other) == 0


@on_stand_in
def test_capture_info(sim):
    stream = sim.stream()
    status, first, second = ctypes.c_int(), ctypes.c_ulonglong(), ctypes.c_ulonglong()
    ids = []
    for id_ in (first, second):
        sim.begin_capture(stream)
        sim._runtime("cudaStreamGetCaptureInfo", ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(id_),
                     None, None, None, None)  # fmt: skip
        ids.append(id_.value)
        assert status.value == 1
        sim.free_graph(sim.end_capture(stream))
    assert ids[0] != ids[1]


@on_stand_in
def test_launches_of_a_graph_are_ordered(sim):
    """After the stream's earlier work, before its later, and one launch of the same graph after the other."""
    device, out = sim.memory(DEVICE, 64), sim.memory(DEVICE, 128)
    streams = sim.stream(), sim.stream()
    for seed in seeds(sim):
        device[:] = 0
        sim.begin_capture(streams[0])
        sim.copy(out[:64], out[64:], streams[0])
        sim.copy(out[64:], device, streams[0])
        graph = sim.end_capture(streams[0])
        out[:] = 0
        sim.fill(device, 1, streams[0])
        sim.launch(graph, streams[0])
        sim.launch(graph, streams[1])
        sim.fill(out[64:], 9, streams[1])
        sim.finish_stream(streams[1])
        sim.free_graph(graph)
        assert (out[:64] == 1).all() and (out[64:] == 9).all(), seed
