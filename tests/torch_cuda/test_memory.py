"""Memory that a call leaves behind while its stream has work to do: tables, and torch's own reuse of memory."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from torch_cuda.calls import issued, make, on, pageable

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


def test_tables_live_until_the_stream_has_passed(sim):
    """The call's memory is free when it returns, for whoever comes after its kernel. Nobody may come before."""
    other = torch.cuda.Stream()
    reused = 0
    for seed in SEEDS:
        run, is_right = _scattered()
        torch.cuda.synchronize()
        sim.adversarial(seed)
        run()
        upload = _upload_of(sim)
        taken = _overwrite_what_is_free(upload["bytes"], other)
        torch.cuda.synchronize()
        assert is_right(), f"seed {seed}"
        assert taken[1].data_ptr() != upload["dst"]
        del taken
        torch.cuda.synchronize()
        reused += torch.empty(upload["bytes"], dtype=torch.uint8, pin_memory=True).data_ptr() == upload["src"]
    assert reused, "the tables are not in memory that torch's host allocator hands out"


def test_memory_handed_out_too_early_would_show(sim):
    """The same with a copy that torch knows nothing of: some schedule has the rubbish arrive."""
    size = 1 << 16
    other = torch.cuda.Stream()
    device = torch.zeros(size, dtype=torch.uint8).cuda()
    damaged = 0
    for seed in SEEDS:
        torch.cuda.synchronize()
        sim.adversarial(seed)
        pinned = torch.ones(size, dtype=torch.uint8).pin_memory()
        addresses = (ctypes.c_void_p(t.data_ptr()) for t in (device, pinned))
        assert sim.cudart.cudaMemcpyAsync(*addresses, ctypes.c_size_t(size), ANY_KIND, None) == 0
        del pinned
        _overwrite_what_is_free(size, other)
        torch.cuda.synchronize()
        damaged += not bool((device.cpu() == 1).all())
    assert damaged


def test_each_thread_has_its_own_current_stream(sim):
    """Torch's current stream is the thread's, and so is its current device."""
    seen = {}

    def run(device):
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call, wanted = make("copy_pages", on(device), on(device)), make("copy_pages", pageable, pageable)
            call.run()
            stream.synchronize()
            wanted.run()
            seen[device] = (stream.cuda_stream, call.bytes() == wanted.bytes())

    sim.clear_log()
    threads = [threading.Thread(target=run, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(e["device"], e["stream"]) for e in sim.log("launch")} == {(d, seen[d][0]) for d in (0, 1)}
    assert seen[0][1] and seen[1][1]
