"""Races that programs which move KV caches are known for, on a stand-in that runs work as late and as mixed as it may.

Each scenario is a small program in two orders. In the wrong one some seed corrupts data, which shows that the scheduler
finds that race; in the right one, in which csrc/cuda does the copying, no seed may.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from simgpu.sim import (
    ANY_ORDER,
    D2D,
    D2H,
    DEVICE,
    H2D,
    LARGE_PARAMETERS,
    LEGACY,
    PAGE,
    PINNED,
    STREAM_ORDER,
    DeviceIds,
    IdColumn,
    Move,
    Side,
    address,
    random_pairs,
)
from simgpu.worker import on_stand_in

BLOCKS, BLOCK_BYTES = 8, 64
BYTES = BLOCKS * BLOCK_BYTES
# Every block, none at its own place.
PAIRS = [(i, (3 * i + 1) % BLOCKS) for i in range(BLOCKS)]
OLD, NEW, NEWER = 1, 7, 9
WRONG_SEEDS, RIGHT_SEEDS = 200, 1000

Mover = Callable[..., object]
Program = Callable[[bool], bool]


def move_by_dma(sim, src, dst, stream, direction, **_):
    sim.dma([PAGE], PAIRS, src, dst, stream, direction=direction)


def move_by_fragments(sim, src, dst, stream, direction, **_):
    """With the caller's promise that the sources are ready, which only loads from the host may use."""
    rows = [(address(src) + BLOCK_BYTES * s, address(dst) + BLOCK_BYTES * d, BLOCK_BYTES) for s, d in PAIRS]
    sim.fragments(rows, stream, any_order=True)


def move_by_kernel(sim, src, dst, stream, direction, capturing=False):
    sim.kernel([PAGE], PAIRS, src, dst, stream, direction=direction, maps=True, capturing=capturing)


def move_by_staged(sim, src, dst, stream, direction):
    """In four chunks, whose copies are on a stream of the ring's own."""
    sim.staged([PAGE], PAIRS, src, dst, stream, direction=direction, ring_bytes=800)


MOVERS = {"dma": move_by_dma, "fragments": move_by_fragments, "kernel": move_by_kernel}


def store_of_what_compute_writes(sim, move: Mover) -> Program:
    """An offload that starts before the attention kernels have written the blocks it stores.

    The connector's transfer stream does not wait for the compute stream, so that stale blocks reach the host cache.
    """
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    compute, transfer, written = sim.stream(), sim.stream(), sim.event()

    def program(right):
        device[:] = OLD
        sim.fill(device, NEW, compute)
        sim.record(written, compute)
        if right:
            sim.wait(transfer, written)
        move(sim, device, host, transfer, D2H)
        sim.finish_stream(transfer)
        return bool((host == NEW).all())

    return program


def load_over_what_compute_reads(sim, move: Mover) -> Program:
    """A load into blocks that were handed out again while the last step's kernels still read them."""
    device, host, result = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES), sim.memory(DEVICE, BYTES)
    compute, transfer, was_read = sim.stream(), sim.stream(), sim.event()

    def program(right):
        device[:], host[:] = OLD, NEW
        sim.copy(result, device, compute)
        sim.record(was_read, compute)
        if right:
            sim.wait(transfer, was_read)
        move(sim, host, device, transfer, H2D)
        sim.finish_stream(transfer)
        sim.finish_stream(compute)
        return bool((result == OLD).all() and (device == NEW).all())

    return program


def compute_on_blocks_being_loaded(sim, move: Mover) -> Program:
    """A prefix hit whose blocks are attended to while their load is still on its way."""
    device, host, result = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES), sim.memory(DEVICE, BYTES)
    compute, transfer, loaded = sim.stream(), sim.stream(), sim.event()

    def program(right):
        device[:], host[:] = OLD, NEW
        move(sim, host, device, transfer, H2D)
        sim.record(loaded, transfer)
        if right:
            sim.wait(compute, loaded)
        sim.copy(result, device, compute)
        sim.finish_stream(compute)
        return bool((result == NEW).all())

    return program


def host_reads_a_store_too_early(sim, move: Mover) -> Program:
    """A store reported as finished when it was asked for: the host sends or writes to disk what is not there yet."""
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    transfer, stored = sim.stream(), sim.event()

    def program(right):
        device[:], host[:] = NEW, OLD
        move(sim, device, host, transfer, D2H)
        sim.record(stored, transfer)
        if right:
            sim.poll(stored)
        return bool((host == NEW).all())

    return program


def pinned_staging_reused(sim, move: Mover) -> Program:
    """A pinned staging buffer that the host fills for the next request while the copy out of it has not run."""
    staging, device = sim.memory(PINNED, BYTES), sim.memory(DEVICE, BYTES)
    transfer, loaded = sim.stream(), sim.event()

    def program(right):
        staging[:] = NEW
        move(sim, staging, device, transfer, H2D)
        sim.record(loaded, transfer)
        if right:
            sim.finish_event(loaded)
        staging[:] = NEWER
        sim.finish_stream(transfer)
        return bool((device == NEW).all())

    return program


def block_reused_while_it_is_stored(sim, move: Mover) -> Program:
    """Blocks freed when their store was asked for rather than when it was done: the next request writes over them."""
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    compute, transfer, stored = sim.stream(), sim.stream(), sim.event()

    def program(right):
        device[:] = OLD
        move(sim, device, host, transfer, D2H)
        sim.record(stored, transfer)
        if right:
            sim.poll(stored)
        sim.fill(device, NEW, compute)
        sim.finish_device()
        return bool((host == OLD).all())

    return program


def event_recorded_too_early(sim, move: Mover) -> Program:
    """The event is there and waited for, but it was recorded before the work that it should stand for."""
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    compute, transfer, written = sim.stream(), sim.stream(), sim.event()

    def program(right):
        device[:] = OLD
        if not right:
            sim.record(written, compute)
        sim.fill(device, NEW, compute)
        if right:
            sim.record(written, compute)
        sim.wait(transfer, written)
        move(sim, device, host, transfer, D2H)
        sim.finish_stream(transfer)
        return bool((host == NEW).all())

    return program


def event_recorded_again(sim, move: Mover) -> Program:
    """One event for many steps. A wait is for the recording there is when it is asked for.

    Wrong: recording it again after the work, in the hope that the wait moves along. Right: that another stream records
    it for its own work does not undo the wait.
    """
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    compute, transfer, idle, shared = sim.stream(), sim.stream(), sim.stream(), sim.event()

    def program(right):
        device[:] = OLD
        if right:
            sim.fill(device, NEW, compute)
        sim.record(shared, compute)
        sim.wait(transfer, shared)
        if right:
            sim.record(shared, idle)
        else:
            sim.fill(device, NEW, compute)
            sim.record(shared, compute)
        move(sim, device, host, transfer, D2H)
        sim.finish_stream(transfer)
        return bool((host == NEW).all())

    return program


def legacy_stream_does_not_order(sim, move: Mover) -> Program:
    """Compute on the default stream orders nothing in a stream that was created as non-blocking, as pools' are."""
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    transfer, written = sim.stream(), sim.event()

    def program(right):
        device[:] = OLD
        sim.fill(device, NEW, LEGACY)
        sim.record(written, LEGACY)
        if right:
            sim.wait(transfer, written)
        move(sim, device, host, transfer, D2H)
        sim.finish_stream(transfer)
        return bool((host == NEW).all())

    return program


def copies_that_depend_on_each_other(sim, move: Mover) -> Program:
    """A block that is moved away and overwritten in one list: a batch has no order, two calls on a stream have."""
    first, second, third = (sim.memory(DEVICE, BYTES) for _ in range(3))
    stream = sim.stream()

    def program(right):
        first[:], second[:] = NEW, OLD
        if right:
            move(sim, first, second, stream, D2D)
            move(sim, second, third, stream, D2D)
        else:
            rows = [(address(src), address(dst), BYTES) for src, dst in ((first, second), (second, third))]
            sim.batch(rows, stream, STREAM_ORDER)
        sim.finish_stream(stream)
        return bool((third == NEW).all())

    return program


def fork_in_a_graph(sim, move: Mover) -> Program:
    """A captured store on a side stream that forked before the work was captured: replays race like the streams."""
    device, host = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES)
    compute, transfer, forked, joined = sim.stream(), sim.stream(), sim.event(), sim.event()

    def program(right):
        device[:], host[:] = OLD, OLD
        sim.begin_capture(compute)
        if not right:
            sim.record(forked, compute)
        sim.fill(device, NEW, compute)
        if right:
            sim.record(forked, compute)
        sim.wait(transfer, forked)
        move(sim, device, host, transfer, D2H, capturing=True)
        sim.record(joined, transfer)
        sim.wait(compute, joined)
        graph = sim.end_capture(compute)
        assert (device == OLD).all() and (host == OLD).all(), "a capture does nothing"
        sim.launch(graph, compute)
        sim.free_graph(graph)
        sim.finish_stream(compute)
        return bool((host == NEW).all())

    return program


SCENARIOS = [
    store_of_what_compute_writes,
    load_over_what_compute_reads,
    compute_on_blocks_being_loaded,
    host_reads_a_store_too_early,
    pinned_staging_reused,
    block_reused_while_it_is_stored,
    event_recorded_too_early,
    event_recorded_again,
    legacy_stream_does_not_order,
    copies_that_depend_on_each_other,
    fork_in_a_graph,
]


def check(sim, program: Program) -> None:
    corrupted = 0
    for seed in range(1, WRONG_SEEDS + 1):
        sim.adversarial(seed)
        corrupted += not program(False)
    assert corrupted > 0, "no seed finds the race"
    for seed in range(1, RIGHT_SEEDS + 1):
        sim.adversarial(seed)
        assert program(True), seed


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("scenario", [s.__name__ for s in SCENARIOS])
@on_stand_in
def test_race(sim, scenario, mover):
    check(sim, globals()[scenario](sim, MOVERS[mover]))


@pytest.mark.parametrize(
    "scenario", [s.__name__ for s in SCENARIOS if s not in (copies_that_depend_on_each_other, fork_in_a_graph)]
)
@on_stand_in
def test_race_by_way_of_a_ring(sim, scenario):
    """All but what is inside the device or captured: the caller's stream orders what the ring's own does."""
    check(sim, globals()[scenario](sim, move_by_staged))


@pytest.mark.parametrize("mover", ["dma", "fragments"])
@on_stand_in
def test_store_whose_source_is_read_in_any_order(sim, mover):
    """A store told that its source may be read at any time reads what earlier work in its stream has not yet written.

    The library keeps a store in stream order whatever its caller promises.
    """
    device, host, stream = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES), sim.stream()
    rows = [(address(device) + BLOCK_BYTES * s, address(host) + BLOCK_BYTES * d, BLOCK_BYTES) for s, d in PAIRS]

    def program(right):
        device[:] = OLD
        sim.fill(device, NEW, stream)
        if not right:
            assert sim.batch(rows, stream, ANY_ORDER) == 0
        elif mover == "dma":
            sim.dma([PAGE], PAIRS, device, host, stream, direction=D2H, any_order=True)
        else:
            sim.fragments(rows, stream, any_order=True)
        sim.finish_stream(stream)
        return bool((host == NEW).all())

    check(sim, program)


@on_stand_in
def test_load_of_what_was_stored_just_before(sim):
    """A prefix evicted and loaded again on one stream: to promise that its source is ready would be wrong."""
    device, host, stream = sim.memory(DEVICE, BYTES), sim.memory(PINNED, BYTES), sim.stream()
    again = sim.memory(DEVICE, BYTES)

    def program(right):
        device[:], host[:] = NEW, OLD
        sim.dma([PAGE], PAIRS, device, host, stream, direction=D2H)
        sim.dma([PAGE], PAIRS, host, again, stream, direction=H2D, any_order=not right)
        sim.finish_stream(stream)
        return bool((again == NEW).all())

    check(sim, program)


@on_stand_in
def test_index_buffer_reused(sim):
    """Block ids staged in pinned memory for a kernel, and overwritten with the next step's before they are uploaded."""
    src, dst = sim.memory(DEVICE, BYTES), sim.memory(DEVICE, BYTES)
    staging, ids = sim.memory(PINNED, 8 * BLOCKS), sim.memory(DEVICE, 8 * BLOCKS)
    stream, uploaded = sim.stream(), sim.event()
    numbers = staging.view(np.int64)
    blocks = src.reshape(BLOCKS, BLOCK_BYTES)

    def program(right):
        numbers[:] = [s for s, _ in PAIRS][::-1]
        sim.copy(ids, staging, stream)
        sim.record(uploaded, stream)
        if right:
            sim.finish_event(uploaded)
        column = DeviceIds(IdColumn(address(ids), 8, 8), IdColumn(), BLOCKS, BLOCKS, BLOCKS)
        sim.kernel([PAGE], [], src, dst, stream, ids=column)
        numbers[:] = 0
        sim.finish_stream(stream)
        return bool(np.array_equal(dst.reshape(BLOCKS, BLOCK_BYTES), blocks[::-1]))

    check(sim, program)


@on_stand_in
def test_block_ids_in_a_graph(sim):
    """Block ids of the host are frozen into a graph; a replay for other blocks needs its ids on the device."""
    src, dst, ids = sim.memory(DEVICE, BYTES), sim.memory(DEVICE, BYTES), sim.memory(DEVICE, 8 * BLOCKS)
    stream = sim.stream()
    blocks = src.reshape(BLOCKS, BLOCK_BYTES)
    column = DeviceIds(IdColumn(address(ids), 8, 8), IdColumn(), BLOCKS, BLOCKS, BLOCKS)

    def program(right):
        table = list(range(BLOCKS))
        sim.begin_capture(stream)
        if right:
            sim.kernel([PAGE], [], src, dst, stream, ids=column, capturing=True)
        else:
            sim.kernel([PAGE], list(zip(table, range(BLOCKS), strict=True)), src, dst, stream, capturing=True)
        graph = sim.end_capture(stream)
        table.reverse()
        sim.copy(ids, np.array(table).view(np.uint8), stream)
        sim.launch(graph, stream)
        sim.finish_stream(stream)
        sim.free_graph(graph)
        return bool(np.array_equal(dst.reshape(BLOCKS, BLOCK_BYTES), blocks[::-1]))

    check(sim, program)


@pytest.mark.parametrize("mover", MOVERS)
@on_stand_in
def test_a_graph_freezes_parameters_and_has_no_batch(sim, mover):
    """Replays copy the same addresses, with what is there by then; the copies of a capture are never batched."""
    host, device = sim.memory(PINNED, BYTES), sim.memory(DEVICE, BYTES)
    other = sim.memory(PINNED, BYTES)
    stream = sim.stream()
    for seed in range(1, RIGHT_SEEDS + 1):
        sim.adversarial(seed)
        batches = sim.calls("cuMemcpyBatchAsync")
        host[:], device[:], other[:] = OLD, OLD, NEWER
        sim.begin_capture(stream)
        MOVERS[mover](sim, host, device, stream, H2D, capturing=True)
        graph = sim.end_capture(stream)
        MOVERS[mover](sim, other, device, stream, H2D)
        for value in (NEW, OLD):
            sim.finish_stream(stream)
            host[:] = value
            sim.launch(graph, stream)
            sim.finish_stream(stream)
            assert (device == value).all(), seed
        sim.free_graph(graph)
        assert sim.calls("cuMemcpyBatchAsync") - batches == (mover != "kernel")


PERTURB_FREED = -6  # M_PERTURB of mallopt: freed memory is overwritten


@pytest.mark.parametrize(("mover", "count"), [("dma", 40), ("fragments", 40), ("kernel", 40), ("kernel", 4000)])
@on_stand_in
def test_nothing_of_the_librarys_is_read_after_a_call(sim, mover, count):
    """Tables, parameters and arrays of a call are gone when it returns: the next call and the heap write over them."""
    blocks, seeds = max(64, count), RIGHT_SEEDS if count < 1000 else 100
    src, targets = sim.memory(DEVICE, 16 * blocks), [sim.memory(DEVICE, 16 * blocks) for _ in range(2)]
    move, pairs = Move(Side(0, 16), Side(0, 16), 16), random_pairs(count, blocks)
    lists = [pairs, [(s, d) for (s, _), (_, d) in zip(pairs, reversed(pairs), strict=True)]]
    expected = []
    for chosen in lists:
        expected.append(np.zeros((blocks, 16), np.uint8))
        expected[-1][[d for _, d in chosen]] = src.reshape(blocks, 16)[[s for s, _ in chosen]]
    stream = sim.stream()
    libc = ctypes.CDLL(None)
    libc.mallopt(PERTURB_FREED, 0x5A)
    for seed in range(1, seeds + 1):
        sim.adversarial(seed)
        for target, chosen in zip(targets, lists, strict=True):
            target[:] = 0
            if mover == "dma":
                sim.dma([move], chosen, src, target, stream, direction=D2D)
            elif mover == "kernel":
                run = sim.kernel([move], chosen, src, target, stream)
                assert run.uploads == (run.table_bytes > LARGE_PARAMETERS)
            else:
                sim.fragments([(address(src) + 16 * s, address(target) + 16 * d, 16) for s, d in chosen], stream)
        sim.finish_stream(stream)
        for target, wanted in zip(targets, expected, strict=True):
            assert np.array_equal(target.reshape(blocks, 16), wanted), seed
    libc.mallopt(PERTURB_FREED, 0)


def random_program(rng, streams: int, buffers: int) -> list[tuple[str, int, int, int]]:
    """What is done, in which stream, from which buffer to which other."""
    program = []
    for _ in range(12):
        src, dst = rng.choice(buffers, 2, replace=False).tolist()
        program.append((str(rng.choice(["fill", "copy", *MOVERS])), int(rng.integers(streams)), src, dst))
    return program


def run_random_program(sim, program, streams, buffers, events, forgets: int = -1) -> np.ndarray:
    """Every operation waits for those before it in other streams that touch what it writes or write what it reads.

    But for one: ``forgets`` is the number of a wait that is left out.
    """
    for i, buffer in enumerate(buffers):
        buffer[:] = i
    waits = 0
    for i, (kind, stream, src, dst) in enumerate(program):
        reads = set() if kind == "fill" else {src}
        for j, (other_kind, other, other_src, other_dst) in enumerate(program[:i]):
            other_reads = set() if other_kind == "fill" else {other_src}
            if other != stream and (other_dst in reads | {dst} or dst in other_reads):
                if waits != forgets:
                    sim.wait(streams[stream], events[j])
                waits += 1
        if kind == "fill":
            sim.fill(buffers[dst], 10 + i, streams[stream])
        elif kind == "copy":
            sim.copy(buffers[dst], buffers[src], streams[stream])
        else:
            MOVERS[kind](sim, buffers[src], buffers[dst], streams[stream], D2D)
        sim.record(events[i], streams[stream])
    sim.finish_device()
    return np.concatenate(buffers)


@on_stand_in
def test_random_programs(sim):
    """Whatever is ordered by events ends as if everything happened at once; without one of them, some do not."""
    streams = [sim.stream(), sim.stream(), sim.stream(blocking=True), LEGACY]
    buffers, events = [sim.memory(DEVICE, BYTES) for _ in range(4)], [sim.event() for _ in range(12)]
    rng = np.random.default_rng(0)
    corrupted = 0
    for seed in range(1, RIGHT_SEEDS + 1):
        program = random_program(rng, len(streams), len(buffers))
        sim.adversarial(0)
        expected = run_random_program(sim, program, streams, buffers, events)
        sim.adversarial(seed)
        assert np.array_equal(run_random_program(sim, program, streams, buffers, events), expected), (seed, program)
        sim.adversarial(seed)
        found = run_random_program(sim, program, streams, buffers, events, forgets=int(rng.integers(10)))
        corrupted += not np.array_equal(found, expected)
    assert corrupted > 0
