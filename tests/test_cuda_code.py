"""Which code a device gets, and when it is loaded."""

from __future__ import annotations

import pytest
from simgpu.sim import DEVICE, OUT_OF_MEMORY, CudaError, Move, Side
from simgpu.worker import on_stand_in

WAYS = ("small", "large", "table")


@on_stand_in
def test_what_a_device_has_code_for(sim):
    """Each device here is new, since the answers are kept."""
    assert sim.limits(300) == [132, 90, 90, 227 << 10, 0, 0]
    sim.set("code_capability", 80)
    sim.set("shared_bytes", 99 << 10)
    sim.set("pageable_access", 1)
    assert sim.limits(301) == [132, 90, 80, 99 << 10, 1, 0]
    sim.set("no_image", 1)
    assert sim.limits(302) == [132, 90, 0, 99 << 10, 1, 0]
    assert sim.cudart.cudaPeekAtLastError() == 0
    for call in ("cudaFuncGetAttributes", "cudaThreadExchangeStreamCaptureMode"):
        sim.fail(call, 1, OUT_OF_MEMORY)
        with pytest.raises(CudaError, match=f"^{call} failed: cudaErrorMemoryAllocation"):
            sim.limits(303)
    assert sim.limits(300) == [132, 90, 90, 227 << 10, 0, 0]


@on_stand_in
def test_all_kernels_are_loaded_at_a_devices_first_use(sim):
    """None in the middle of a capture or of serving: a launch finds its kernel there."""
    device = 310
    sim.set_device(device)
    sim.limits(device)
    loads = sim.log("load")
    variants = [f"kvkernels_copy_{kind}_{way}" for kind in ("page", "row", "bytes", "bulk") for way in WAYS]
    assert sorted(entry["name"] for entry in loads) == sorted(variants)
    assert all((entry["device"], entry["by_question"]) == (device, 1) for entry in loads)
    src, dst = sim.memory(DEVICE, 1 << 18), sim.memory(DEVICE, 1 << 18)
    sim.clear_log()
    for fragment_bytes, bulk in ((4096, False), (16, False), (7, False), (4096, True)):
        for count in (3, 1000, 4000):
            move = Move(Side(0, 16), Side(0, 4096), fragment_bytes)
            sim.kernel([move], [(0, i % 60) for i in range(count)], src, dst, bulk=bulk)
    launched = {entry["name"] for entry in sim.log("launch")}
    assert len(launched) == len(variants) and not sim.log("load")
