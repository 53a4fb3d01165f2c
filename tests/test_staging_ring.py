"""The ring of ``staged``: its two halves beside each other, its way from stream to stream, and how many there are."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
from simgpu.sim import D2H, DEVICE, H2D, OUT_OF_MEMORY, PAGE, PINNED, CudaError, Move, Side, copy_naively
from simgpu.worker import on_stand_in

BLOCKS = 8
BYTES = 64 * BLOCKS
PAIRS = [(i, (3 * i + 1) % BLOCKS) for i in range(BLOCKS)]
CHUNKS = 4
RING_BYTES = 800  # of which a half has room for two blocks
OLD, NEW = 1, 7
WRONG_SEEDS, RIGHT_SEEDS = 200, 1000
both_ways = pytest.mark.parametrize("direction", [H2D, D2H], ids=["h2d", "d2h"])


def transfer(sim, src, dst, stream, direction):
    _, chunks, _ = sim.staged([PAGE], PAIRS, src, dst, stream, direction=direction, ring_bytes=RING_BYTES)
    assert chunks == CHUNKS


def two_transfers(sim, direction):
    """Two streams that share a ring, as where there is no memory for a second, each with work before and after.

    What is before writes the source; what is after reads the destination, and writes over the source.
    """
    kinds = (PINNED, DEVICE) if direction == H2D else (DEVICE, PINNED)
    sides = [[sim.memory(kind, BYTES) for kind in kinds] for _ in range(2)]
    results, streams = [sim.memory(DEVICE, BYTES) for _ in range(2)], [sim.stream(), sim.stream()]
    written, expected = [sim.memory(PINNED, BYTES) for _ in range(2)], [np.zeros(BYTES, np.uint8) for _ in range(2)]
    written[1] ^= 0xFF
    for source, wanted in zip(written, expected, strict=True):
        copy_naively([PAGE], PAIRS, source, wanted)

    def program():
        for (src, dst), source, result, stream in zip(sides, written, results, streams, strict=True):
            src[:] = dst[:] = result[:] = OLD
            sim.copy(src, source, stream)
            sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
            transfer(sim, src, dst, stream, direction)
            sim.copy(result, dst, stream)
            sim.fill(src, NEW, stream)
        found = []
        # The second first: what it does not wait for may be late.
        for (_, dst), wanted, result, stream in [*zip(sides, expected, results, streams, strict=True)][::-1]:
            sim.finish_stream(stream)
            found += [np.array_equal(dst, wanted), np.array_equal(result, wanted)]
        sim.finish_device()
        return all(found)

    spare = sim.stream()
    transfer(sim, *sides[0], spare, direction)  # the ring that both share
    return program


@both_ways
@on_stand_in(fresh=True)
def test_every_wait_is_needed_and_all_together_suffice(sim, direction):
    """Without any one of them some seed corrupts data, but for those that only an earlier call makes useful."""
    program = two_transfers(sim, direction)
    before = sim.calls("cudaStreamWaitEvent")
    assert program()
    waits = sim.calls("cudaStreamWaitEvent") - before
    assert waits == 2 * (2 * CHUNKS + 1)
    superfluous = []
    for k in range(1, waits + 1):
        for seed in range(1, WRONG_SEEDS + 1):
            sim.adversarial(seed)
            sim.set("forgotten_wait", sim.calls("cudaStreamWaitEvent") + k)
            if not program():
                break
        else:
            superfluous.append(k)
    sim.set("forgotten_wait", 0)
    # The first call's, until its halves are free: there was nothing in them.
    first = 2 if direction == H2D else 1
    assert superfluous == [first, first + 2], superfluous
    for seed in range(1, RIGHT_SEEDS + 1):
        sim.adversarial(seed)
        assert program(), seed


@both_ways
@on_stand_in(fresh=True)
def test_a_pair_that_takes_more_than_half_has_the_whole_ring(sim, direction):
    """Also next to calls that use its halves, in streams of their own."""
    kinds = (PINNED, DEVICE) if direction == H2D else (DEVICE, PINNED)
    large = 17 << 20
    page = Move(Side(0, large), Side(0, large), large)
    src, dst = (sim.memory(kind, 2 * large) for kind in kinds)
    small_src, small_dst = (sim.memory(kind, BYTES) for kind in kinds)
    streams = [sim.stream(), sim.stream()]
    expected, small_expected = np.zeros_like(dst), np.zeros_like(small_dst)
    copy_naively([page], [(0, 1), (1, 0)], src, expected)
    copy_naively([PAGE], PAIRS, small_src, small_expected)
    transfer(sim, small_src, small_dst, streams[1], direction)  # the ring that both share
    for seed in range(1, 41):
        sim.adversarial(seed)
        dst[:] = small_dst[:] = 0
        for whole in (seed % 2 == 0, seed % 2 == 1):
            sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
            if whole:
                _, chunks, taken = sim.staged([page], [(0, 1), (1, 0)], src, dst, streams[0], direction=direction)
                assert chunks == 2 and taken > 16 << 20
            else:
                transfer(sim, small_src, small_dst, streams[1], direction)
        for stream in streams[:: 1 if seed % 4 < 2 else -1]:
            sim.finish_stream(stream)
        assert np.array_equal(dst, expected) and np.array_equal(small_dst, small_expected), seed
        sim.finish_device()


@both_ways
@on_stand_in
def test_kernels_and_copies_run_beside_each_other(sim, direction):
    """The filling of a half need not wait for the other's emptying."""
    kinds = (PINNED, DEVICE) if direction == H2D else (DEVICE, PINNED)
    src, dst = (sim.memory(kind, BYTES) for kind in kinds)
    stream = sim.stream()
    ahead = 0
    for seed in range(1, 100):
        sim.adversarial(seed)
        transfer(sim, src, dst, stream, direction)
        sim.finish_device()
        log = [e for e in sim.log() if e["call"] in ("launch", "cudaMemcpyAsync", "cuMemcpyBatchAsync")]
        kernels = [e["operation"] for e in log if e["call"] == "launch"]
        copies = [e["operation"] for e in log if e["call"] != "launch"]
        assert {e["stream"] for e in log if e["call"] == "launch"} == {stream}
        assert not {e["stream"] for e in log if e["call"] != "launch"} & {stream}
        at = {step["operation"]: i for i, step in enumerate(sim.schedule())}  # of its last step
        fills, takes = (copies, kernels) if direction == H2D else (kernels, copies)
        per_chunk = len(copies) // len(kernels)
        assert per_chunk * len(kernels) == len(copies)
        if direction == H2D:
            fills = fills[per_chunk - 1 :: per_chunk]
        else:
            takes = takes[::per_chunk]
        ahead += at[fills[1]] < at[takes[0]]
    assert ahead


@on_stand_in
def test_ring_kernels_leave_most_of_the_device_alone(sim):
    page, blocks = 4096, 2048
    src, dst = sim.memory(DEVICE, page * blocks), sim.memory(PINNED, page * blocks)
    move, pairs = Move(Side(0, page), Side(0, page), page), [(i, blocks - 1 - i) for i in range(blocks)]
    for sm_budget, ctas in ((0, 16), (3, 3), (40, 40)):
        sim.clear_log()
        sim.staged([move], pairs, src, dst, sim.stream(), sm_budget=sm_budget)
        assert {entry["ctas"] for entry in sim.log("launch")} == {ctas}


@on_stand_in(fresh=True)
def test_rings_are_found_again_and_bounded(sim):
    """One for each of four streams a device; the fifth stream gets the one that was idle longest."""
    for device in (0, 1):
        sim.set_device(device)
        src, dst = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
        streams = [sim.stream() for _ in range(8)]
        before, allocations = sim.calls("cudaMalloc"), sim.cuda.fake_allocations()

        def run(*numbers, src=src, dst=dst, streams=streams):
            own = []
            for number in numbers:
                sim.clear_log()
                transfer(sim, src, dst, streams[number], D2H)
                (copies,) = {e["stream"] for e in sim.log() if e["call"] in ("cudaMemcpyAsync", "cuMemcpyBatchAsync")}
                own.append(copies)
            return own

        first = run(0, 1, 2, 3)
        assert len(set(first)) == 4 and run(3, 2, 1, 0) == first[::-1]
        assert run(5) == [first[3]]
        assert run(1, 2, 3) == [first[1], first[2], first[0]]
        run(*range(8), *range(8))
        assert sim.calls("cudaMalloc") - before == sim.cuda.fake_allocations() - allocations == 4
        assert np.array_equal(dst.reshape(BLOCKS, 64)[[d for _, d in PAIRS]], src.reshape(BLOCKS, 64))


@on_stand_in(fresh=True)
def test_a_stream_that_is_gone_leaves_its_ring_in_order(sim):
    """Whose work may not have begun when its handle is another stream's."""
    src, dst = [sim.memory(DEVICE, BYTES) for _ in range(2)], [sim.memory(PINNED, BYTES) for _ in range(2)]
    expected = [copy.copy() for copy in dst]
    for one_src, one_expected in zip(src, expected, strict=True):
        copy_naively([PAGE], PAIRS, one_src, one_expected)
    for seed in range(1, 200):
        sim.adversarial(seed)
        for one_src, one_dst in zip(src, dst, strict=True):
            one_dst[:] = 0
            stream = sim._create("cudaStreamCreateWithFlags", 1)
            transfer(sim, one_src, one_dst, stream, D2H)
            sim._runtime("cudaStreamDestroy", ctypes.c_void_p(stream))
        sim.finish_device()
        assert all(np.array_equal(a, b) for a, b in zip(dst, expected, strict=True)), seed


@on_stand_in(fresh=True)
def test_without_memory_a_ring_is_shared_or_missed(sim):
    src, dst = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
    with pytest.raises(CudaError, match=r"^cudaMalloc failed: cudaErrorMemoryAllocation"):
        transfer(sim, src, dst, sim.stream(), D2H)
    assert sim.cudart.cudaPeekAtLastError() == 0
    transfer(sim, src, dst, sim.stream(), D2H)
    sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
    transfer(sim, src, dst, sim.stream(), D2H)
    assert sim.cudart.cudaPeekAtLastError() == 0


@on_stand_in(fresh=True)
def test_a_ring_that_cannot_be_finished_leaves_nothing(sim):
    src, dst, stream = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES), sim.stream()
    held = sim.cuda.fake_allocations(), sim.cuda.fake_streams(), sim.cudart.fake_events()
    for call, count in (("cudaMalloc", 1), ("cudaStreamCreateWithFlags", 1), ("cudaEventCreateWithFlags", 5),
                        ("cudaThreadExchangeStreamCaptureMode", 1)):  # fmt: skip
        for k in range(1, count + 1):
            sim.fail(call, k, OUT_OF_MEMORY)
            with pytest.raises(CudaError, match=rf"^{call} failed: cudaErrorMemoryAllocation"):
                transfer(sim, src, dst, stream, D2H)
            assert (sim.cuda.fake_allocations(), sim.cuda.fake_streams(), sim.cudart.fake_events()) == held
            assert sim.cudart.fake_capture_mode() == 0
    transfer(sim, src, dst, stream, D2H)


@on_stand_in(fresh=True)
def test_a_ring_is_made_while_another_stream_captures(sim):
    src, dst, stream = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES), sim.stream()
    capturing = sim.stream()
    sim.begin_capture(capturing)
    transfer(sim, src, dst, stream, D2H)
    sim.free_graph(sim.end_capture(capturing))
    assert np.array_equal(dst.reshape(BLOCKS, 64)[[d for _, d in PAIRS]], src.reshape(BLOCKS, 64))


@on_stand_in(fresh=True)
def test_threads_that_share_rings(sim):
    """More streams than rings, one of them every thread's: a ring is one call's while that is issued."""
    shared = sim.stream()
    jobs = []
    for number in range(6):
        src, dst = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
        jobs.append((src, dst, shared if number % 2 else sim.stream()))
    sim.adversarial(3)

    def run(src, dst, stream):
        for _ in range(30):
            transfer(sim, src, dst, stream, D2H)

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sim.finish_device()
    for src, dst, _ in jobs:
        assert np.array_equal(dst.reshape(BLOCKS, 64)[[d for _, d in PAIRS]], src.reshape(BLOCKS, 64))
