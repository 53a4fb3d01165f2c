"""Host memory that the device sees at another address, or only reads, or of which the driver knows no end."""

from __future__ import annotations

import numpy as np
import pytest
from simgpu.sim import (
    D2H,
    DEVICE,
    H2D,
    INVALID_VALUE,
    PAGE,
    PINNED,
    STREAM_ORDER,
    Issued,
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
