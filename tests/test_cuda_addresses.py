"""Host memory that the device sees at another address, or only reads, or of which the driver knows no end."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from simgpu.sim import (
    D2H,
    DEVICE,
    H2D,
    INVALID_VALUE,
    PAGE,
    PAGEABLE,
    PINNED,
    STREAM_ORDER,
    CudaError,
    Issued,
    Move,
    Refused,
    Side,
    address,
    copy_naively,
    random_pairs,
)
from simgpu.worker import on_stand_in

BYTES = 64 * 64
both_ways = pytest.mark.parametrize("direction", [H2D, D2H], ids=["h2d", "d2h"])


def places(sim, direction):
    host, device = sim.memory(PINNED, BYTES), sim.memory(DEVICE, BYTES)
    return (host, device) if direction == H2D else (device, host)


def check_copies(sim, direction, src, dst):
    pairs = random_pairs(20, 64)
    expected = dst.copy()
    copy_naively([PAGE], pairs, src, expected)
    issued = sim.dma([PAGE], pairs, src, dst, sim.stream(), direction=direction)
    assert np.array_equal(dst, expected)
    return issued


@both_ways
@on_stand_in
def test_the_stand_in_takes_no_host_address_for_a_batch(sim, direction):
    """A batch wants the device's address, as CUDA does; a plain copy knows both."""
    sim.set("device_addresses_differ", 1)
    src, dst = places(sim, direction)
    offset = sim.find([address(src if direction == H2D else dst)])[0]["device_offset"]
    shifts = (offset, 0) if direction == H2D else (0, offset)
    stream = sim.stream()
    assert sim.batch([(address(src), address(dst), BYTES)], stream, STREAM_ORDER) == INVALID_VALUE
    assert not np.array_equal(src, dst)
    row = (address(src) + shifts[0], address(dst) + shifts[1], BYTES)
    assert sim.batch([row], stream, STREAM_ORDER) == 0
    assert np.array_equal(src, dst)
    dst ^= 0xFF
    sim.copy(dst, src, stream)
    assert np.array_equal(src, dst)


@both_ways
@on_stand_in
def test_batches_get_the_devices_addresses(sim, direction):
    sim.set("device_addresses_differ", 1)
    src, dst = places(sim, direction)
    host = src if direction == H2D else dst
    offset = sim.find([address(host)])[0]["device_offset"]
    assert check_copies(sim, direction, src, dst).launches == 1
    (batch,) = sim.log("cuMemcpyBatchAsync")
    at = 1 if direction == H2D else 0
    assert all(0 <= copy[at] - address(host) - offset < BYTES for copy in batch["copies"])


@both_ways
@on_stand_in
def test_what_the_device_does_not_see_is_copied_alone(sim, direction):
    src, dst = places(sim, direction)
    sim.set("unmapped", 1)
    assert check_copies(sim, direction, src, dst) == Issued(20, 20, 20 * 64)
    assert not sim.log("cuMemcpyBatchAsync")


@both_ways
@on_stand_in
def test_a_refused_batch_is_copied_all_the_same(sim, direction):
    sim.set("device_addresses_differ", 1)
    sim.set("batch_refuses", 1)
    src, dst = places(sim, direction)
    assert check_copies(sim, direction, src, dst) == Issued(20, 20, 20 * 64)


# Ranges that the driver does not say.


@on_stand_in
def test_a_range_of_the_devices_addresses_is_the_hosts_too(sim):
    sim.set("device_addresses_differ", 1)
    host = sim.memory(PINNED, 8192)
    for found in sim.find([address(host), address(host) + 8191]):
        assert (found["begin"], found["end"]) == (address(host), address(host) + 8192)


@on_stand_in
def test_memory_of_unknown_range_says_nothing_of_what_lies_above(sim):
    """All of the device's memory, or the next registration, may lie above."""
    block = sim.memory(PAGEABLE, 4 << 12)
    low, middle, high = (block[i << 12 : (i << 12) + 100] for i in range(3))
    sim.adopt(low, PINNED)
    sim.adopt(high, DEVICE)
    sim.set("unknown_ranges", 1)
    kinds = [found["memory"] for found in sim.find([address(b) for b in (low, middle, high, middle)])]
    assert kinds == [PINNED, PAGEABLE, DEVICE, PAGEABLE]
    # Once the next range is known, it is where the unknown one ends at the latest.
    _, found = sim.find([address(high), address(low) + 10])
    assert (found["begin"], found["end"]) == (address(low) + 10, address(high))


@pytest.mark.parametrize("maps", [False, True], ids=["dma", "kernel"])
@on_stand_in
def test_copies_from_memory_of_unknown_range(sim, maps):
    """Into the registration that follows, too, where the copy ends in that."""
    backing = sim.memory(PAGEABLE, 4 * 4096)
    begin = -address(backing) % 4096
    host = backing[begin : begin + 8192]
    sim.adopt(host[:4096], PINNED)
    sim.adopt(host[4096:], DEVICE)
    device = sim.memory(DEVICE, 8192)
    sim.set("unknown_ranges", 1)
    for start, size in ((0, 4096), (5, 4091), (17, 4096), (0, 8192)):
        device[:] = 0
        if maps:
            move = Move(Side(start, 8192), Side(0, 8192), size)
            sim.kernel([move], [(0, 0)], host, device, direction=H2D, maps=True)
        else:
            issued = sim.fragments([(address(host) + start, address(device), size)], sim.stream())
            assert issued.descriptors == 1 + (start + size > 4096)
        assert np.array_equal(device[:size], host[start : start + size])


@on_stand_in
def test_an_unknown_range_hides_no_pageable_end(sim):
    """A kernel is refused what it could not read, where the last byte shows it."""
    host, device = sim.memory(PAGEABLE, 8192), sim.memory(DEVICE, 8192)
    sim.adopt(host[:4096], PINNED)
    sim.set("unknown_ranges", 1)
    with pytest.raises(Refused, match="src is in pageable host memory"):
        sim.kernel([Move(Side(0, 8192), Side(0, 8192), 8192)], [(0, 0)], host, device, direction=H2D, maps=True)
    assert not sim.log("launch")


# Pageable memory that a kernel can read.

WOULD_MOVE = r"^src is in pageable host memory, of which each page that a kernel touches moves to the device$"


@on_stand_in
def test_pageable_memory_that_would_move_is_for_who_asks(sim):
    """A kernel's touch of pageable memory moves its pages, unless the device follows the host's page tables."""
    host, device = sim.memory(PAGEABLE, 4096), sim.memory(DEVICE, 4096)
    run = lambda maps: sim.kernel([PAGE], [(0, 1), (5, 3)], host, device, direction=H2D, maps=maps)  # noqa: E731
    sim.set("pageable_access", 1)
    with pytest.raises(Refused, match=WOULD_MOVE):
        run(2)
    assert not sim.log("launch")
    run(1)
    sim.set("host_page_tables", 1)
    run(2)
    assert len(sim.log("launch")) == 2
    assert sim.limits(320)[4:] == [1, 1]
    sim.set("host_page_tables", 0)
    assert sim.limits(321)[4:] == [1, 0]


# Memory that is registered as read-only.

READ_ONLY = 8


@both_ways
@on_stand_in
def test_read_only_memory_is_no_destination(sim, direction):
    backing, device = sim.memory(PAGEABLE, 3 * 4096), sim.memory(DEVICE, 4096)
    host = backing[-address(backing) % 4096 :][:4096]
    sim.register(host, READ_ONLY)
    src, dst = (host, device) if direction == H2D else (device, host)
    run = lambda: sim.kernel([PAGE], [(0, 1)], src, dst, direction=direction, maps=True)  # noqa: E731
    if direction == H2D:
        run()
        assert np.array_equal(device[64:128], host[:64])
        return
    with pytest.raises(Refused, match="dst is read-only for the device"):
        run()
    # A driver that does not know says so, and that is no reason to refuse.
    sim.fail("cuPointerGetAttribute", 1, INVALID_VALUE)
    run()


# Contexts.


def on_another_thread(function):
    """Whose result, or exception, is passed on: a thread starts without a context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@on_stand_in
def test_the_stand_in_counts_contexts(sim):
    """A thread's first runtime call that needs one makes it on the device that the runtime has for it, GPU 0."""
    before = sim.contexts()

    def run():
        assert sim.current_context() is None
        sim.set_device(330)
        assert sim.contexts() == before + 1
        context = sim.current_context()
        sim.set_device(331)
        assert sim.contexts() == before + 2
        assert sim.cuda.cuCtxSetCurrent(ctypes.c_void_p(context)) == 0
        stream = sim.stream()
        # The runtime follows the context, whatever its own device is.
        sim.kernel([PAGE], [(0, 1)], sim.memory(DEVICE, 256), sim.memory(DEVICE, 256), stream)
        assert sim.log("launch")[-1]["device"] == 330
        assert sim.cuda.cuCtxSetCurrent(None) == 0
        sim.set_device(331)

    on_another_thread(run)
    assert sim.contexts() == before + 2


@on_stand_in(fresh=True)
def test_a_guard_gives_back_the_context_there_was(sim):
    """Also where there was none: on GPU 0, which such a thread has no business on, none may appear."""
    sim.set_device(5)
    device, host = sim.memory(DEVICE, 4096), sim.memory(PINNED, 4096)
    sim.limits(5)
    before = sim.contexts()

    def run():
        for _ in range(2):
            assert sim.limits(5)[0] > 0
            assert sim.take_fault(5) is None
            kinds = [found["memory"] for found in sim.find([address(device), address(host)], has_context=False)]
            assert kinds == [DEVICE, PINNED]
            with pytest.raises(CudaError, match="cuPointerGetAttributes failed"):
                sim.find([address(host)])  # where the device sees it is a context's answer
            assert sim.current_context() is None
        assert sim.contexts() == before
        # With a context of its own, of any device.
        sim.set_device(6)
        own = sim.current_context()
        sim.limits(5)
        assert sim.current_context() == own
        sim.limits(6)
        assert sim.current_context() == own

    on_another_thread(run)
    assert sim.contexts() == before + 1


@on_stand_in(fresh=True)
def test_what_a_guard_asks_is_checked(sim):
    for call in ("cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"):
        sim.fail(call, 1, INVALID_VALUE)
        with pytest.raises(CudaError, match=rf"^{call} failed: cudaErrorInvalidValue"):
            sim.limits(7)
    sim.limits(7)
