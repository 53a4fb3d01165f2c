"""The host side of the CUDA path, executed on a stand-in for CUDA that records, copies and fails on demand."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from simgpu.moves import check_kernel
from simgpu.sim import (
    ANY_ORDER,
    BATCH,
    D2H,
    DEVICE,
    H2D,
    INVALID_VALUE,
    LARGE_PARAMETERS,
    LEGACY,
    LEGACY_BY_NAME,
    MANAGED,
    NOT_SUPPORTED,
    PAGE,
    PAGEABLE,
    PER_THREAD,
    PINNED,
    SMALL_PARAMETERS,
    STREAM_ORDER,
    CudaError,
    DeviceIds,
    IdColumn,
    Issued,
    Move,
    Refused,
    Side,
    address,
    copy_naively,
    ids_in_column,
    random_pairs,
)
from simgpu.worker import on_stand_in

COPY_CALLS = ("cuMemcpyBatchAsync", "cudaMemcpyAsync")


def check_dma(sim, moves, pairs, src, dst, stream, **options):
    """Copies, compares every byte, and the plan with what was issued and recorded."""
    dst ^= 0xFF  # what an earlier call copied must not pass for this one's work
    expected = dst.copy()
    copy_naively(moves, pairs, src, expected)
    plan = sim.dma(moves, pairs, src, dst, stream, plans_only=True)
    assert not any(sim.log(call) for call in COPY_CALLS), "a plan must not copy"
    before = {call: sim.calls(call) for call in COPY_CALLS}
    issued = sim.dma(moves, pairs, src, dst, stream, **options)
    after = {call: sim.calls(call) for call in COPY_CALLS}
    assert np.array_equal(dst, expected)
    assert issued == plan
    assert issued.launches == sum(after[call] - before[call] for call in COPY_CALLS)
    batched = [copy for entry in sim.log("cuMemcpyBatchAsync") for copy in entry["copies"]]
    alone = sim.log("cudaMemcpyAsync")
    assert issued.descriptors == len(batched) + len(alone)
    assert issued.bytes == sum(size for _, _, size in batched) + sum(entry["bytes"] for entry in alone)
    assert issued.bytes == len(pairs) * sum(m.fragment_bytes * len(m.offsets()) for m in moves)
    return issued


@on_stand_in(fresh=True)
def test_only_the_stand_in_is_loaded(sim):
    """Every CUDA library of this process lies in the build directory."""
    sim.find([1])
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "/" in line}
    cuda = {path for path in loaded if "libcuda" in path or "libnvidia" in path or "cuda" in os.path.basename(path)}
    assert {os.path.basename(os.path.realpath(path)).split(".so")[0] for path in cuda} == {"libcuda", "libcudart"}
    build = {os.path.dirname(os.path.realpath(path)) for path in loaded if "kvkernels_drive" in path}
    assert {os.path.dirname(os.path.realpath(path)) for path in cuda} == build
    assert not any("torch" in path for path in loaded)


@on_stand_in(fresh=True)
def test_cuda_in_use_asks_without_initialising(sim):
    assert sim.calls("cuCtxGetCurrent") == 0
    assert sim.drive.drive_cuda_in_use() == 1  # the worker's reset has set a device
    assert sim.calls("cuCtxGetCurrent") == 1
    sim.fail("cuCtxGetCurrent", 1, 3)
    assert sim.drive.drive_cuda_in_use() == 0
    assert sim.calls("cudaSetDevice") == sim.calls("cudaGetDevice") == 0


# Pointers and streams.


@on_stand_in
def test_what_memory_an_address_is_in(sim):
    sim.set_device(1)
    buffers = [sim.memory(kind, 3 * 4096) for kind in (PAGEABLE, PINNED, DEVICE, MANAGED)]
    before = sim.calls("cuPointerGetAttributes")
    asked = [address(buffer) + offset for buffer in buffers for offset in (0, 4097, 3 * 4096 - 1)]
    found = sim.find(asked * 2)
    assert [f["memory"] for f in found[:12]] == [kind for kind in range(4) for _ in range(3)]
    assert found[:12] == found[12:]
    for at, f in zip(asked, found, strict=False):
        pageable = f["memory"] == PAGEABLE
        start = at if pageable else address(buffers[f["memory"]])
        assert (f["begin"], f["end"]) == (start, start + (1 if pageable else 3 * 4096))
        assert (f["device"], f["mapped"], f["device_offset"]) == ((-1, 0, 0) if pageable else (1, 1, 0))
    # Once a range; pageable memory has no known range, so each of its addresses is asked about.
    assert sim.calls("cuPointerGetAttributes") - before == 3 + 6
    # Never across calls: the memory may have been freed.
    sim.find(asked)
    assert sim.calls("cuPointerGetAttributes") - before == 9 + 3 + 3


@on_stand_in
def test_memory_that_the_driver_calls_an_invalid_value_is_pageable(sim):
    """Of memory that is not CUDA's, a driver says nothing, with or without success."""
    host = sim.memory(PAGEABLE, 64)
    sim.fail("cuPointerGetAttributes", 1, INVALID_VALUE)
    assert sim.find([address(host)])[0]["memory"] == PAGEABLE


@on_stand_in
def test_pinned_memory_at_another_device_address(sim):
    sim.set("device_addresses_differ", 1)
    host = sim.memory(PINNED, 8192)
    first, last = sim.find([address(host), address(host) + 8191])
    assert first["device_offset"] == last["device_offset"] != 0
    sim.set("unmapped", 1)
    assert sim.find([address(host)])[0]["mapped"] == 0


@on_stand_in
def test_streams(sim):
    stream, capturing = sim.stream(), sim.stream(capturing=True)
    assert [sim.is_capturing(s) for s in (stream, capturing)] == [False, True]
    assert [sim.drive.drive_is_legacy(s) for s in (LEGACY, LEGACY_BY_NAME, PER_THREAD)] == [1, 1, 0]
    for legacy in (LEGACY, LEGACY_BY_NAME):
        with pytest.raises(CudaError, match=r"cudaStreamIsCapturing failed: cudaErrorStreamCaptureImplicit"):
            sim.is_capturing(legacy)
    sim.capture(capturing, False)
    assert not sim.is_capturing(LEGACY)


# Copies by the copy engines.


@pytest.mark.parametrize("count", [1, 2, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 2 * BATCH + 1, 3 * BATCH + 7])
@on_stand_in
def test_batches_are_bounded(sim, count):
    src, dst = sim.memory(PINNED, 8192 * 64), sim.memory(DEVICE, 8192 * 64)
    stream = sim.stream()
    issued = check_dma(sim, [PAGE], random_pairs(count, 8192), src, dst, stream)
    batches = sim.log("cuMemcpyBatchAsync")
    assert [b["count"] for b in batches] == [BATCH] * (count // BATCH) + ([count % BATCH] if count % BATCH > 1 else [])
    assert len(sim.log("cudaMemcpyAsync")) == int(count % BATCH == 1)
    assert all(
        (b["stream"], b["attributes"], b["first_index"], b["order"]) == (stream, 1, 0, STREAM_ORDER) for b in batches
    )
    assert issued.launches == -(-count // BATCH)


@on_stand_in
def test_the_batch_function_is_asked_for_in_its_12_8_version(sim):
    src, dst = sim.memory(PINNED, 4096), sim.memory(DEVICE, 4096)
    sim.dma([PAGE], [(0, 1), (3, 2)], src, dst, sim.stream())
    asked = {entry["name"]: entry["version"] for entry in sim.log("cudaGetDriverEntryPointByVersion")}
    assert asked.get("cuMemcpyBatchAsync", 12080) == 12080
    assert sim.calls("cuMemcpyBatchAsync") == 1


@on_stand_in
def test_merged_segments_are_one_copy(sim):
    src, dst = sim.memory(DEVICE, 64 * 64), sim.memory(PINNED, 64 * 64)
    move = Move(Side(0, 64), Side(0, 64), 64, merges=True)
    pairs = [(s, s + 3) for s in range(40)] + [(50, 0), (51, 1)]
    issued = check_dma(sim, [move], pairs, src, dst, sim.stream(), direction=D2H)
    assert (issued.launches, issued.descriptors) == (1, 2)


@pytest.mark.parametrize("any_order", [False, True])
@pytest.mark.parametrize("kinds", [(PINNED, DEVICE), (DEVICE, PINNED), (DEVICE, DEVICE), (PINNED, PINNED)])
@on_stand_in
def test_any_source_order_only_from_pinned_memory_to_the_device(sim, kinds, any_order):
    src, dst = (sim.memory(kind, 64 * 64) for kind in kinds)
    check_dma(sim, [PAGE], random_pairs(9, 64), src, dst, sim.stream(), any_order=any_order)
    orders = [entry["order"] for entry in sim.log("cuMemcpyBatchAsync")]
    assert orders == [ANY_ORDER if any_order and kinds == (PINNED, DEVICE) else STREAM_ORDER]


@on_stand_in
def test_any_source_order_holds_for_no_mixed_batch(sim):
    """One copy from the device in a batch, wherever it stands, is enough to order the sources of all."""
    host, device, target = sim.memory(PINNED, 4096), sim.memory(DEVICE, 4096), sim.memory(DEVICE, 1 << 20)
    stream = sim.stream()
    for place in (0, 5, 9):
        rows = [(address(host) + 64 * i, address(target) + 64 * i, 64) for i in range(10)]
        rows[place] = (address(device), rows[place][1], 64)
        sim.clear_log()
        sim.fragments(rows, stream, any_order=True)
        assert [entry["order"] for entry in sim.log("cuMemcpyBatchAsync")] == [STREAM_ORDER]
    # Each batch stands for itself.
    rows = [(address(host), address(target) + 64 * i, 64) for i in range(2 * BATCH)]
    rows[3] = (address(device), rows[3][1], 64)
    sim.clear_log()
    sim.fragments(rows, stream, any_order=True)
    assert [entry["order"] for entry in sim.log("cuMemcpyBatchAsync")] == [STREAM_ORDER, ANY_ORDER]


@pytest.mark.parametrize("where", ["legacy", "legacy by name", "capturing"])
@on_stand_in
def test_never_batched_on_a_legacy_or_capturing_stream(sim, where):
    src, dst = sim.memory(PINNED, 64 * 64), sim.memory(DEVICE, 64 * 64)
    stream = {"legacy": LEGACY, "legacy by name": LEGACY_BY_NAME}.get(where)
    stream = sim.stream(capturing=True) if stream is None else stream
    issued = check_dma(sim, [PAGE], random_pairs(20, 64), src, dst, stream, any_order=True)
    assert sim.calls("cuMemcpyBatchAsync") == 0
    assert issued.launches == 20
    assert all((entry["kind"], entry["stream"]) == (4, stream) for entry in sim.log("cudaMemcpyAsync"))


@pytest.mark.parametrize("kinds", [(PAGEABLE, DEVICE), (DEVICE, PAGEABLE), (MANAGED, DEVICE), (DEVICE, MANAGED)])
@on_stand_in
def test_never_batched_with_pageable_or_managed_memory(sim, kinds):
    src, dst = (sim.memory(kind, 64 * 64) for kind in kinds)
    check_dma(sim, [PAGE], random_pairs(20, 64), src, dst, sim.stream())
    assert sim.calls("cuMemcpyBatchAsync") == 0


@on_stand_in
def test_pageable_copies_stand_beside_a_batch(sim):
    pinned, pageable, target = sim.memory(PINNED, 4096), sim.memory(PAGEABLE, 4096), sim.memory(DEVICE, 4096)
    rows = [(address((pinned, pageable)[i % 2]) + 64 * i, address(target) + 64 * i, 64) for i in range(20)]
    issued = sim.fragments(rows, sim.stream())
    assert issued == Issued(11, 20, 20 * 64)
    assert [entry["count"] for entry in sim.log("cuMemcpyBatchAsync")] == [10]
    expected = np.concatenate([(pinned, pageable)[i % 2][64 * i : 64 * i + 64] for i in range(20)])
    assert np.array_equal(target[: 20 * 64], expected)


@on_stand_in(fresh=True)
def test_a_driver_without_the_batch_function(sim):
    sim.set("batch_missing", 1)
    src, dst = sim.memory(PINNED, 64 * 64), sim.memory(DEVICE, 64 * 64)
    assert check_dma(sim, [PAGE], random_pairs(20, 64), src, dst, sim.stream()).launches == 20
    assert [entry["name"] for entry in sim.log("cudaGetDriverEntryPointByVersion")].count("cuMemcpyBatchAsync") == 1


@on_stand_in
def test_a_driver_that_refuses_batches(sim):
    """Refused once, the rest of the call is copied one by one; the next call may try again."""
    src, dst = sim.memory(PINNED, 8192 * 64), sim.memory(DEVICE, 8192 * 64)
    pairs = random_pairs(BATCH + 100, 8192)
    expected = dst.copy()
    copy_naively([PAGE], pairs, src, expected)
    sim.fail("cuMemcpyBatchAsync", 1, NOT_SUPPORTED)
    stream = sim.stream()
    assert sim.dma([PAGE], pairs, src, dst, stream) == Issued(len(pairs), len(pairs), 64 * len(pairs))
    assert sim.calls("cuMemcpyBatchAsync") == 1
    assert np.array_equal(dst, expected)
    assert sim.dma([PAGE], pairs, src, dst, stream).launches == 2


@on_stand_in
def test_copies_are_cut_where_a_registration_ends(sim):
    """One buffer in registered and pageable parts: a copy that crossed a border would be refused by CUDA."""
    page = 4096
    backing = sim.memory(PAGEABLE, 12 * page)
    begin = -address(backing) % page
    host = backing[begin : begin + 11 * page]
    for first, last in ((1, 3), (3, 4), (4, 6), (7, 9)):
        sim.register(host[first * page : last * page])
    device = sim.memory(DEVICE, 11 * page)
    stream = sim.stream()
    for first, end, pieces in (
        (1.5, 2.5, 1), (1.5, 3.5, 2), (1, 6, 3), (2.5, 4.5, 3), (5, 8, 3), (6, 7.5, 2), (0, 1, 1), (0.5, 1.5, 2),
        (8.5, 10, 2),
    ):  # fmt: skip
        for stores in (False, True):
            start, size = int(first * page), int((end - first) * page)
            sides = [address(host) + start, address(device) + 17]
            rows = [(*(sides[::-1] if stores else sides), size)]
            device[17 : 17 + size] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
            planned = sim.fragments(rows, stream, plans_only=True)
            issued = sim.fragments(rows, stream)
            assert issued == planned
            assert (issued.descriptors, issued.bytes) == (pieces, size), (first, end)
            assert np.array_equal(host[start : start + size], device[17 : 17 + size])


@on_stand_in
def test_empty_lists_and_sizes_copy_nothing(sim):
    src, dst = sim.memory(PINNED, 4096), sim.memory(DEVICE, 4096)
    stream = sim.stream()
    assert sim.fragments([], stream) == Issued(0, 0, 0)
    assert sim.fragments([(address(src), address(dst), 0)] * 3, stream) == Issued(0, 0, 0)
    assert sim.dma([PAGE], [], src, dst, stream) == Issued(0, 0, 0)
    assert sim.kernel([PAGE], [], src, dst, stream).issued == Issued(0, 0, 0)


# Kernels.


def pools(count, page_bytes, blocks, fragment_bytes=None, loops=()):
    size = page_bytes * blocks
    return [
        Move(Side(t * size, page_bytes), Side(t * size, page_bytes), fragment_bytes or page_bytes, loops)
        for t in range(count)
    ]


@pytest.mark.parametrize(
    ("moves", "variant"),
    [
        (pools(20, 4160, 8), "page"),
        (pools(20, 4160, 8, 208, ((4, 1040, 208), (5, 208, 832))), "row"),
        (pools(20, 4160, 8, 52, ((80, 52, 52),)), "bytes"),
    ],
    ids=["page", "row", "bytes"],
)
@on_stand_in
def test_one_launch_for_all_moves_and_pairs(sim, moves, variant):
    src, dst = sim.memory(DEVICE, 20 * 8 * 4160), sim.memory(DEVICE, 20 * 8 * 4160)
    run, (launch,) = check_kernel(sim, moves, random_pairs(7, 8), src, dst, sim.stream())
    assert run.variant == variant
    assert launch["name"] == f"kvkernels_copy_{variant}_small"
    assert launch["parameter_bytes"] == SMALL_PARAMETERS
    assert (run.descriptors, run.bytes, run.uploads) == (20 + 7, 20 * 7 * 4160, False)
    assert not sim.log("cudaMemcpyAsync")


@on_stand_in
def test_tables_ride_in_the_parameters_while_they_fit(sim):
    src, dst = sim.memory(DEVICE, 8192 * 16), sim.memory(DEVICE, 8192 * 16)
    move = Move(Side(0, 16), Side(0, 16), 16)
    stream = sim.stream()
    seen = {}
    for count in (1, 100, 440, 480, 3900, 3960, 3970, 4000, 8000):
        sim.clear_log()
        run, (launch,) = check_kernel(sim, [move], random_pairs(count, 8192), src, dst, stream)
        kind = launch["name"].rsplit("_", 1)[1]
        assert kind == ("small" if run.table_bytes <= 3888 else "large" if run.table_bytes <= 31792 else "table")
        assert run.uploads == (kind == "table")
        assert [entry["bytes"] for entry in sim.log("cudaMemcpyAsync")] == [run.table_bytes] * run.uploads
        seen[kind] = seen.get(kind, 0) + 1
        if kind != "table":
            # The pairs themselves, as 32-bit ids, at the end of the tables.
            bytes_in = sim.parameters(launch["index"])
            assert struct.pack("<ii", *random_pairs(count, 8192)[-1]) in bytes_in
    assert set(seen) == {"small", "large", "table"}
    # Several launches share one upload, each with tables of its own.
    run, _ = check_kernel(sim, [move], random_pairs(8000, 8192), src, dst, stream, max_items=4500)
    assert (run.launches, run.uploads, len(sim.log("cudaMemcpyAsync"))) == (2, True, 1)


@on_stand_in
def test_a_capture_uploads_nothing(sim):
    """Tables that exceed the parameters become several launches, over pairs and, if need be, over moves."""
    src, dst = sim.memory(DEVICE, 1 << 20), sim.memory(DEVICE, 1 << 20)
    stream = sim.stream(capturing=True)
    many_pairs = ([Move(Side(0, 16), Side(0, 16), 16)], random_pairs(9000, 16384))
    many_moves = (
        [Move(Side(16 * i, 16 * 2000), Side(16 * i, 16 * 2000), 16) for i in range(2000)],
        random_pairs(3, 32),
    )
    both = (
        [Move(Side(16 * i, 16 * 900), Side(16 * i, 16 * 900), 16) for i in range(900)],
        [(i % 9, i) for i in range(60)],
    )
    forms = ([Move(Side(64 * i, 4096 + i), Side(64 * i, 4096 + i), i + 1) for i in range(60)] * 1, [(3, 200), (9, 1)])
    for (moves, pairs), least in ((many_pairs, 3), (many_moves, 2), (both, 1), (forms, 1)):
        run, launches = check_kernel(sim, moves, pairs, src, dst, stream, capturing=True)
        assert run.launches >= least
        assert not run.uploads and not sim.log("cudaMemcpyAsync")
        assert all(entry["capturing"] and entry["parameter_bytes"] <= LARGE_PARAMETERS for entry in launches)
    sim.capture(stream, False)
    run, _ = check_kernel(sim, *many_pairs, src, dst, stream)
    assert (run.launches, run.uploads) == (1, True)


@on_stand_in
def test_a_launch_has_fewer_than_2_to_the_31_items(sim):
    """Nothing real is split by the default limit: it is tested lowered, and by plans that do not run."""
    src, dst = sim.memory(DEVICE, 1 << 20), sim.memory(DEVICE, 1 << 20)
    giant = Move(Side(0, 1 << 45), Side(0, 1 << 45), 1 << 45)
    run = sim.kernel([giant], [(0, 1), (1, 0)], src, dst, runs=False)
    assert run.launches == 2 * 8 and run.tiles == 2 << 33
    rows = Move(Side(0, 1 << 40), Side(0, 1 << 40), 16, ((1 << 33, 32, 16),))
    assert sim.kernel([rows], [(0, 1)], src, dst, runs=False).launches == 8
    moves = pools(3, 640, 8, 16, ((40, 16, 16),))
    for max_items in (1, 7, 39, 40, 41, 119, 120, 121, 500):
        run, _ = check_kernel(sim, moves, random_pairs(8, 8), src, dst, max_items=max_items)
        assert run.launches >= 3 * 8 * 40 / max_items / 2


@on_stand_in
def test_no_moves_are_no_launch(sim):
    """A plan may be empty however many ids there are on the device."""
    src, dst = sim.memory(DEVICE, 640), sim.memory(DEVICE, 640)
    ids = DeviceIds(ids_in_column(sim, [1, 2, 3]), IdColumn(), 3, 10, 10)
    run = sim.kernel([], [], src, dst, ids=ids)
    assert (run.launches, run.issued) == (0, Issued(0, 0, 0))
    assert not sim.log("launch")


@on_stand_in
def test_pageable_memory_is_refused_unless_the_device_reads_it(sim):
    host, device = sim.memory(PAGEABLE, 4096), sim.memory(DEVICE, 4096)
    with pytest.raises(Refused, match=r"^src is in pageable host memory, which the device cannot read$"):
        sim.kernel([PAGE], [(0, 1)], host, device, direction=H2D, maps=True)
    with pytest.raises(Refused, match=r"^dst is in pageable host memory"):
        sim.kernel([PAGE], [(0, 1)], device, host, direction=D2H, maps=True)
    assert not sim.log("launch")
    sim.set("pageable_access", 1)
    check_kernel(sim, [PAGE], [(0, 1), (5, 3)], host, device, direction=H2D, maps=True)


@on_stand_in
def test_pinned_memory_must_be_mapped_and_at_one_offset(sim):
    host, device = sim.memory(PAGEABLE, 1 << 16), sim.memory(DEVICE, 1 << 16)
    half = 1 << 15
    sim.adopt(host[:half], PINNED, device_offset=1 << 40)
    sim.adopt(host[half:], PINNED, device_offset=1 << 41)
    span = r"^src is in host memory that the device sees at more than one offset$"
    for move, pairs in (
        (PAGE, [(half // 64 - 1, 0), (half // 64, 1)]),
        (Move(Side(half - 1, 64), Side(0, 64), 2), [(0, 0)]),
        (Move(Side(0, 64), Side(0, 64), 16, ((3, half // 2, 16),)), [(0, 0)]),
        (Move(Side(0, 1024, half // 4, 5), Side(0, 64), 64), [(0, 0)]),
    ):
        with pytest.raises(Refused, match=span):
            sim.kernel([move], pairs, host, device, direction=H2D, maps=True)
    with pytest.raises(Refused, match=span):
        ids = DeviceIds(IdColumn(address(device), 8, 8), IdColumn(), 4, half // 64 + 1, 4)
        sim.kernel([PAGE], [], host, device, direction=H2D, maps=True, ids=ids)
    # To the last byte of the first half.
    for move, pairs in (
        (PAGE, [(half // 64 - 1, 0)]),
        (Move(Side(half - 2, 64), Side(0, 64), 2), [(0, 0)]),
        (Move(Side(0, 64), Side(0, 64), 16, ((3, half // 2 - 8, 16),)), [(0, 0)]),
        (Move(Side(0, 1024, (half - 64) // 4, 5), Side(0, 64), 64), [(0, 0)]),
    ):
        sim.kernel([move], pairs, host, device, direction=H2D, maps=True, runs=False)
    sim.set("unmapped", 1)
    with pytest.raises(Refused, match=r"^src is in host memory that is not mapped for the device$"):
        sim.kernel([PAGE], [(0, 0)], host, device, direction=H2D, maps=True)


# The fault word.


@on_stand_in
def test_the_fault_word_is_allocated_once_and_during_a_capture(sim):
    device = 100
    sim.set_device(device)
    src, dst = sim.memory(DEVICE, 4096), sim.memory(DEVICE, 4096)
    ids = DeviceIds(ids_in_column(sim, [0, 12, 3, -1]), IdColumn(), 4, 10, 10)
    stream = sim.stream(capturing=True)
    assert sim.take_fault(device) is None
    before = [sim.calls("cudaMalloc"), sim.cuda.fake_streams()]
    for _ in range(3):
        sim.kernel([PAGE], [], src, dst, stream, ids=ids, capturing=True)
    assert [sim.calls("cudaMalloc"), sim.cuda.fake_streams()] == [before[0] + 1, before[1]]
    assert sim.cudart.fake_capture_mode() == 0, "the thread's capture mode is restored"
    assert not any(entry["capturing"] for entry in sim.log("cudaMemsetAsync"))
    sim.set_device(3)
    assert sim.take_fault(device) == (6, 1, 7), "while the stream captures"
    assert sim.cudart.fake_capture_mode() == 0
    sim.capture(stream, False)
    assert sim.take_fault(device) is None
    assert sim.take_fault(3) is None


# What calls ask of CUDA.


@on_stand_in
def test_one_launch_and_no_synchronisation(sim):
    src, dst, host = sim.memory(DEVICE, 1 << 18), sim.memory(DEVICE, 1 << 18), sim.memory(PINNED, 1 << 18)
    stream = sim.stream()
    layers = [Move(Side(4096 * i, 64), Side(4096 * i, 64), 64) for i in range(40)]
    small = Move(Side(0, 16), Side(0, 16), 16)
    pairs = [(2 * i, 3 * i) for i in range(20)]
    ids = DeviceIds(ids_in_column(sim, [3, 1]), IdColumn(), 2, 10, 10)
    sim.kernel([PAGE], [], src, dst, stream, ids=ids)
    for seed in (0, 1, 2, 3):
        sim.adversarial(seed)
        start = sim.counters()
        sim.kernel(layers, pairs, src, dst, stream)
        done = sim.counters() - start
        assert (done.launches, done.copy_calls, done.synchronisations, done.staged_copies) == (1, 0, 0, 0)

        # Tables too large for the parameters: all launches share one upload, whose source is read in the call.
        start = sim.counters()
        run = sim.kernel([small], random_pairs(8000, 8192), src, dst, stream, max_items=4500)
        done = sim.counters() - start
        assert (done.launches, done.copy_calls, done.synchronisations, done.staged_copies) == (2, 1, 0, 1)
        assert run.table_bytes <= done.host_to_device_bytes < run.table_bytes + 2 * 16

        for direction, sides in ((H2D, (host, dst)), (D2H, (src, host))):
            start = sim.counters()
            sim.dma(layers, pairs, *sides, stream, direction=direction)
            done = sim.counters() - start
            assert (done.launches, done.copy_calls, done.descriptors) == (0, 1, 40 * 20)
            assert (done.synchronisations, done.staged_copies) == (0, 0)
            moved = 40 * 20 * 64
            assert (done.host_to_device_bytes, done.device_to_host_bytes) == (
                (moved, 0) if direction == H2D else (0, moved)
            )

        # The fault word's first use is behind.
        start = sim.counters()
        sim.kernel([PAGE], [], src, dst, stream, ids=ids)
        done = sim.counters() - start
        assert (done.launches, done.copy_calls, done.synchronisations, done.staged_copies) == (1, 0, 0, 0)
        sim.finish_device()
