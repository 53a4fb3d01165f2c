"""Memory that a call leaves behind while its stream has work to do: tables, and torch's own reuse of memory."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from torch_cuda.calls import issued, make, on, other_device, pageable

import kvkernels

pytestmark = pytest.mark.cuda
ROWS = 8192
SEEDS = range(1, 31)
ANY_KIND = 4


def _upload_of(sim):
    return next(entry for entry in issued(sim) if entry["call"] == "cudaMemcpyAsync")


def _scattered():
    """A call whose table of ids is too large for a kernel's parameters."""
    host = torch.arange(ROWS * 16).to(torch.uint8).reshape(ROWS, 16)
    pool, out, order = host.cuda(), torch.zeros_like(host).cuda(), torch.randperm(ROWS)
    mapping = torch.stack((torch.arange(ROWS), order), 1)
    return lambda: kvkernels.swap_blocks(pool, out, 16, mapping), lambda: torch.equal(out.cpu()[order], host)


def _overwrite_what_is_free(bytes, stream):
    """Takes memory as large from torch, pinned and another stream's, and fills it."""
    rubbish = torch.full((bytes,), 255, dtype=torch.uint8)
    with torch.cuda.stream(stream):
        return [
            torch.empty(bytes, dtype=torch.uint8, pin_memory=True).copy_(rubbish),
            torch.empty(bytes, dtype=torch.uint8, device="cuda").copy_(rubbish),
        ]


def test_tables_live_until_the_stream_has_passed(stand_in):
    """The call's memory is free when it returns, for whoever comes after its kernel. Nobody may come before."""
    other = torch.cuda.Stream()
    reused = 0
    for seed in SEEDS:
        run, is_right = _scattered()
        torch.cuda.synchronize()
        stand_in.adversarial(seed)
        run()
        upload = _upload_of(stand_in)
        taken = _overwrite_what_is_free(upload["bytes"], other)
        torch.cuda.synchronize()
        assert is_right(), f"seed {seed}"
        assert taken[1].data_ptr() != upload["dst"]
        del taken
        torch.cuda.synchronize()
        reused += torch.empty(upload["bytes"], dtype=torch.uint8, pin_memory=True).data_ptr() == upload["src"]
    assert reused, "the tables are not in memory that torch's host allocator hands out"


def test_memory_handed_out_too_early_would_show(stand_in):
    """The same with a copy that torch knows nothing of: some schedule has the rubbish arrive."""
    size = 1 << 16
    other = torch.cuda.Stream()
    device = torch.zeros(size, dtype=torch.uint8).cuda()
    damaged = 0
    for seed in SEEDS:
        torch.cuda.synchronize()
        stand_in.adversarial(seed)
        pinned = torch.ones(size, dtype=torch.uint8).pin_memory()
        addresses = (ctypes.c_void_p(t.data_ptr()) for t in (device, pinned))
        assert stand_in.cudart.cudaMemcpyAsync(*addresses, ctypes.c_size_t(size), ANY_KIND, None) == 0
        del pinned
        _overwrite_what_is_free(size, other)
        torch.cuda.synchronize()
        damaged += not bool((device.cpu() == 1).all())
    assert damaged


def test_each_thread_has_its_own_current_stream(sim):
    """Torch's current stream is the thread's, and so is its current device."""
    seen = {}
    devices = (0, other_device(0))

    def run(thread):
        device = devices[thread]
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call, wanted = make("copy_pages", on(device), on(device)), make("copy_pages", pageable, pageable)
            call.run()
            stream.synchronize()
            wanted.run()
            seen[thread] = (device, stream.cuda_stream, call.bytes() == wanted.bytes())

    if sim is not None:
        sim.clear_log()
    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0][2] and seen[1][2]
    if sim is not None:
        assert {(e["device"], e["stream"]) for e in sim.log("launch")} == {seen[0][:2], seen[1][:2]}
