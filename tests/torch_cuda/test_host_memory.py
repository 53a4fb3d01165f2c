"""Host memory that a device sees at another address, reads only, or would move: what the ops make of it."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch_cuda.calls import OPS, issued, make, on, pageable, places

pytestmark = pytest.mark.cuda
READ_ONLY, NOT_SUPPORTED = 8, 801
NOT_INITIALIZED = 3
both_ways = pytest.mark.parametrize("direction", ["h2d", "d2h"])


@both_ways
@pytest.mark.parametrize("op", OPS)
def test_pinned_memory_at_another_address(stand_in, op, direction):
    """In batches too, which the default stream has none of."""
    stand_in.set("device_addresses_differ", 1)
    torch._C._host_emptyCache()
    call, wanted = make(op, *places(direction, 0)), make(op, pageable, pageable)
    host = call.tensors[0 if direction == "h2d" else 1]
    assert stand_in.find([host.data_ptr()])[0]["device_offset"] != 0
    wanted.run()
    with torch.cuda.stream(torch.cuda.Stream()):
        call.run()
        torch.cuda.synchronize()
        assert call.bytes() == wanted.bytes()
    del call, host
    torch._C._host_emptyCache()


def _read_only(t):
    """The same bytes in memory of its own that is registered as read-only for the device."""
    copy = torch.frombuffer(mmap.mmap(-1, t.nbytes), dtype=torch.uint8).view(t.shape).copy_(t)
    code = int(torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, READ_ONLY))
    if code == NOT_SUPPORTED:
        pytest.skip("the device has no read-only registrations")
    assert code == 0
    return copy


@pytest.fixture
def read_only():
    made = []

    def place(t):
        made.append(_read_only(t))
        return made[-1]

    yield place
    for t in made:
        assert int(torch.cuda.cudart().cudaHostUnregister(t.data_ptr())) == 0


@pytest.mark.parametrize("op", OPS)
def test_read_only_memory_is_read_and_never_written(sim, op, read_only):
    call, wanted = make(op, read_only, on(0)), make(op, pageable, pageable)
    wanted.run()
    with torch.cuda.stream(torch.cuda.Stream()):
        call.run()
        torch.cuda.synchronize()
        assert call.bytes() == wanted.bytes()
        call = make(op, on(0), read_only)
        before = call.bytes()
        if sim is not None:
            sim.clear_log()
        for executor in ("auto", "kernel", "dma", "staged"):
            if executor != "auto" and op not in ("gather_blocks", "scatter_blocks", "copy_pages"):
                continue
            with pytest.raises(ValueError, match=rf"^{call.op}: .* must be writable for the device, got host memory"):
                call.run(**({} if executor == "auto" else {"executor": executor}))
        assert sim is None or not issued(sim)
        assert call.bytes() == before


@pytest.mark.parametrize("op", ["gather_blocks", "scatter_blocks", "copy_pages"])
def test_without_code_triton_gets_no_address_that_is_not_the_devices(stand_in, op, read_only):
    def message_of(*sides):
        call = make(op, *sides)
        before = call.bytes()
        stand_in.fail("cuCtxGetCurrent", 1, NOT_INITIALIZED)
        with pytest.raises(ValueError, match=rf"^{op}: executor 'triton' cannot serve this call: ") as caught:
            call.run(executor="triton")
        assert call.bytes() == before
        return str(caught.value)

    assert message_of(on(0), read_only).endswith("got it is registered as read-only for the device")
    stand_in.set("device_addresses_differ", 1)
    torch._C._host_emptyCache()
    for direction in ("h2d", "d2h"):
        assert message_of(*places(direction, 0)).endswith("the device sees it at another address")
    torch._C._host_emptyCache()


SCRIPT = """
import json, os, sys
sys.path.append({tests!r})
import torch, kvkernels
from simgpu.sim import Sim
sim = Sim.of(os.environ["KVKERNELS_STAND_IN"])
sim.set("pageable_access", 1)
sim.set("host_page_tables", {by_page_tables})
pools, out = [torch.zeros(64, 80, dtype=torch.uint8) for _ in range(2)], torch.zeros(64, 160, dtype=torch.uint8)
on_device = [pool.cuda() for pool in pools]
ids = torch.arange(64)
found = []
for arguments, options in (((on_device, ids, out), dict()), ((on_device, ids, out), dict(executor="kernel")),
                           ((on_device, ids.cuda(), out), dict())):
    with torch.cuda.stream(torch.cuda.Stream()):
        explained = kvkernels.explain("gather_blocks", *arguments, **options)
        kvkernels.gather_blocks(*arguments, **options)
        torch.cuda.synchronize()
        found.append([explained.executor, explained.reason])
sizes = torch.full((32,), 80)
addresses = [pool.data_ptr() + 160 * torch.arange(32) for pool in (pools[0], on_device[0])]
for options in (dict(), dict(executor="kernel")):
    with torch.cuda.stream(torch.cuda.Stream()):
        explained = kvkernels.explain("swap_blocks_batch", *addresses, sizes, **options)
        found.append([explained.executor, explained.reason])
print(json.dumps(found))
"""


@pytest.mark.parametrize("by_page_tables", [0, 1])
def test_auto_moves_no_pageable_memory_about(stand_in, by_page_tables):
    """What a device can do with pageable memory is asked once a process."""
    script = SCRIPT.format(tests=str(Path(__file__).resolve().parents[1]), by_page_tables=by_page_tables)
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    auto, named, device_ids, addresses, named_addresses = json.loads(done.stdout.splitlines()[-1])
    for executor, reason in (auto, addresses):
        assert executor == ("kernel" if by_page_tables else "dma")
        assert by_page_tables or "each page that a kernel touches moves to the device" in reason
    # Who asks for it, or has no other choice, gets it.
    assert named[0] == device_ids[0] == named_addresses[0] == "kernel"


@pytest.mark.cuda(devices=2)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_a_thread_without_a_context_is_left_without_one(stand_in, op, direction):
    """A connector's thread that has set no device, and copies for device 1: nothing may appear on device 0."""
    call, wanted = make(op, *places(direction, 1)), make(op, pageable, pageable)
    wanted.run()
    seen = []

    def run():
        call.run()
        seen.append(stand_in.current_context())

    contexts = stand_in.contexts()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
    torch.cuda.synchronize(1)
    assert call.bytes() == wanted.bytes()
    assert stand_in.contexts() == contexts
