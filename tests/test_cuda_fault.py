"""The word for ids that were out of range, taken while streams run and while they capture."""

from __future__ import annotations

import ctypes
import threading

import pytest
from simgpu.sim import DEVICE, LEGACY, PAGE, PER_THREAD, CudaError, DeviceIds, IdColumn, ids_in_column
from simgpu.worker import on_stand_in

GLOBAL = 0
SEEDS = 300


def bad_call(sim, count=1):
    """Ids of which ``count`` are out of range, the first in row 1."""
    src, dst = sim.memory(DEVICE, 4096), sim.memory(DEVICE, 4096)
    ids = DeviceIds(ids_in_column(sim, [1, *[99] * count]), IdColumn(), 1 + count, 10, 10)
    return lambda stream, **options: sim.kernel([PAGE], [], src, dst, stream, ids=ids, **options)


@on_stand_in
def test_taken_while_another_thread_captures(sim):
    """Whose capture goes on: to synchronise the device would have broken it."""
    run, stream, capturing = bad_call(sim), sim.stream(), sim.stream()
    for seed in range(1, SEEDS):
        sim.adversarial(seed)
        sim.begin_capture(capturing, GLOBAL)
        run(stream)
        found = []
        thread = threading.Thread(target=lambda found=found: found.append(sim.take_fault()))
        thread.start()
        thread.join()
        assert found == [(1, 1, 7)], seed
        sim.free_graph(sim.end_capture(capturing))
        assert sim.take_fault() is None


@on_stand_in
def test_taken_while_this_call_is_captured(sim):
    run, stream = bad_call(sim), sim.stream()
    run(stream)
    sim.begin_capture(stream)
    run(stream, capturing=True)
    assert sim.take_fault() == (1, 1, 7)
    sim.free_graph(sim.end_capture(stream))
    assert sim.take_fault() is None


@on_stand_in
def test_all_streams_are_waited_for(sim):
    """Each that was launched on, legacy ones and those that are gone too; nothing else is."""
    run, streams, idle = bad_call(sim, 2), [sim.stream(), sim.stream(), LEGACY, PER_THREAD], sim.stream()
    spare = sim.memory(DEVICE, 64)
    late = False
    for seed in range(1, SEEDS):
        sim.adversarial(seed)
        for stream in streams:
            run(stream)
        gone = sim._create("cudaStreamCreateWithFlags", 1)
        run(gone)
        sim._runtime("cudaStreamDestroy", ctypes.c_void_p(gone))
        # By one name each thread has a stream of its own.
        thread = threading.Thread(target=run, args=(PER_THREAD,))
        thread.start()
        thread.join()
        spare[:] = 1
        sim.fill(spare, 2, idle)
        assert sim.take_fault() == (12, 1, 7), seed
        late = late or spare[0] == 1
        assert sim.take_fault() is None
        sim.finish_device()
    assert late, "what has nothing to do with the word is not waited for"


@on_stand_in
def test_replays_are_waited_for_on_whatever_stream(sim):
    run, stream, others = bad_call(sim), sim.stream(), [sim.stream(), sim.stream()]
    for seed in range(1, SEEDS):
        sim.adversarial(seed)
        sim.begin_capture(stream)
        run(stream, capturing=True)
        graph = sim.end_capture(stream)
        assert sim.take_fault() is None
        for count in (1, 2):
            for other in others[:count]:
                sim.launch(graph, other)
            assert sim.take_fault() == (count, 1, 7), seed
        sim.finish_device()
        sim.free_graph(graph)


@on_stand_in
def test_an_external_event_is_for_captures_alone(sim):
    """And is recorded by each launch of the graph, for streams outside it."""
    stream, other, event = sim.stream(), sim.stream(), sim.event()
    first, second = sim.memory(DEVICE, 64), sim.memory(DEVICE, 64)
    record = lambda: sim._runtime(  # noqa: E731
        "cudaEventRecordWithFlags", ctypes.c_void_p(event), ctypes.c_void_p(stream), 1
    )
    with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
        record()
    sim.begin_capture(stream)
    sim.fill(first, 7, stream)
    record()
    graph = sim.end_capture(stream)
    stale = 0
    for waits in (False, True):
        for seed in range(1, SEEDS):
            sim.adversarial(seed)
            first[:] = second[:] = 1
            sim.launch(graph, stream)
            if waits:
                sim.wait(other, event)
            sim.copy(second, first, other)
            sim.finish_stream(other)
            assert not waits or (second == 7).all(), seed
            stale += (second != 7).any()
            sim.finish_device()
    assert stale
    sim.free_graph(graph)
