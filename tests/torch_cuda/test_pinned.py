"""PinnedPool with CUDA: what is registered is what torch and the ops take it for, in chunks, all of it or none."""

from __future__ import annotations

import contextlib
import ctypes
import os

import pytest
import torch
from simgpu.sim import OUT_OF_MEMORY
from torch_cuda.calls import BULK, OPS, Call, make, on, pageable

from kvkernels.memory import PinnedPool, RegistrationError, registration

pytest.importorskip("kvkernels._host")
pytestmark = pytest.mark.cuda
PAGE = 4096
INVALID_VALUE = 1
TAKES_EXECUTORS = ("gather_blocks", "scatter_blocks", "copy_pages")


@pytest.fixture
def chunks(monkeypatch):
    """Registrations of two pages of the system each."""
    monkeypatch.setattr(registration, "CHUNK_BYTES", 2 * PAGE)


class Places:
    """Puts tensors into pools, which are kept, and closed at the end of a test."""

    def __init__(self, name: str | None) -> None:
        self.name, self.pools = name, []

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        name = self.name and f"{self.name}-{os.getpid()}-{len(self.pools)}"
        self.pools.append(PinnedPool(*t.shape, pin=True, shared=name))
        return self.pools[-1].pages.copy_(t)


@pytest.fixture(params=[None, "places"], ids=["own", "shared"])
def in_pool(request, chunks):
    place = Places(request.param)
    yield place
    torch.cuda.synchronize()
    for pool in place.pools:
        pool.close()


def registrations(sim, pool: PinnedPool) -> list[int]:
    """The bytes of those that the pool's memory is in, in their order."""
    address = pool.pages.data_ptr()
    found = sim.find(range(address, address + pool.facts.bytes, PAGE))
    assert {row["memory"] for row in found} == {1}
    return [end - begin for begin, end in sorted({(row["begin"], row["end"]) for row in found})]


def test_torch_takes_it_as_pinned(sim, chunks):
    pool = PinnedPool(5, PAGE)
    assert (pool.facts.pinned, pool.facts.why_not_pinned) == (True, "")
    assert pool.pages.is_pinned() and all(page.is_pinned() for page in pool.pages)
    assert sim is None or registrations(sim, pool) == [2 * PAGE, 2 * PAGE, PAGE]
    pool.pages.copy_(torch.arange(5)[:, None])
    # Torch copies page by page as by any pinned memory; a copy of its own must not span two registrations.
    with torch.cuda.stream(torch.cuda.Stream()):
        pages = [page.to("cuda", non_blocking=True) for page in pool.pages]
        torch.cuda.synchronize()
    assert [int(page.cpu().sum()) for page in pages] == [i * PAGE for i in range(5)]
    part = pool.pages[3]
    pool.close()
    assert part.is_pinned()


def test_pageable_where_that_is_asked_for():
    with PinnedPool(5, PAGE, pin=False) as pool:
        assert not pool.pages.is_pinned() and not pool.facts.pinned


def test_all_of_it_is_unregistered_before_it_is_unmapped(stand_in, chunks):
    before = stand_in.calls("cudaHostUnregister")
    pool = PinnedPool(5, PAGE)
    address = pool.pages.data_ptr()
    pool.close()
    assert stand_in.calls("cudaHostUnregister") - before == 3
    assert all(row["memory"] == 0 for row in stand_in.find(range(address, address + 5 * PAGE, PAGE)))
    assert stand_in.cudart.cudaPeekAtLastError() == 0


def test_each_process_registers_what_it_attaches(sim, chunks):
    name = f"attached-{os.getpid()}"
    with PinnedPool(5, PAGE, shared=name) as pool, PinnedPool.attach(name) as other:
        assert pool.pages.is_pinned() and other.pages.is_pinned() and other.facts.pinned
        assert sim is None or registrations(sim, other) == registrations(sim, pool) == [2 * PAGE, 2 * PAGE, PAGE]


@pytest.mark.parametrize("shared", [None, "failing"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_registration_that_fails_leaves_none(stand_in, chunks, k, shared):
    """And no later call meets its error, which torch's next check of a launch would."""
    name = shared and f"{shared}-{os.getpid()}"
    for options in ({}, {"pin": True}):
        stand_in.fail("cudaHostRegister", k, OUT_OF_MEMORY)
        before = stand_in.calls("cudaHostUnregister")
        with contextlib.ExitStack() as stack:
            if options:
                with pytest.raises(RegistrationError, match=r"got cudaHostRegister of bytes .* failed: "):
                    PinnedPool(5, PAGE, shared=name, **options)
            else:
                pool = stack.enter_context(PinnedPool(5, PAGE, shared=name))
                assert not pool.pages.is_pinned() and not pool.facts.pinned
                assert pool.facts.why_not_pinned.endswith(f"({OUT_OF_MEMORY})")
                pool.pages.fill_(1)
        assert stand_in.calls("cudaHostUnregister") - before == k - 1
        assert stand_in.cudart.cudaPeekAtLastError() == 0
    with PinnedPool(5, PAGE, shared=name) as pool:
        assert pool.pages.is_pinned()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_cannot_be_unregistered_leaves_no_error(stand_in, chunks, k):
    pool = PinnedPool(5, PAGE, pin=True)
    address = pool.pages.data_ptr()
    before = stand_in.calls("cudaHostUnregister")
    stand_in.fail("cudaHostUnregister", k, INVALID_VALUE)
    pool.close()
    assert stand_in.calls("cudaHostUnregister") - before == 3
    assert stand_in.cudart.cudaPeekAtLastError() == 0
    for begin in (0, 2, 4):  # the one that failed is registered still
        stand_in.cudart.cudaHostUnregister(ctypes.c_void_p(address + begin * PAGE))
    stand_in.cudart.cudaGetLastError()


def test_memory_that_is_registered_already(chunks):
    """By someone else, such as a library that pins what it is given."""
    with PinnedPool(5, PAGE, pin=False) as pool:
        cudart, page = torch.cuda.cudart(), pool.pages[2].data_ptr()
        assert int(cudart.cudaHostRegister(page, PAGE, 0)) == 0
        with pytest.raises(RegistrationError, match=r"^cudaHostRegister of bytes 8192 to 16384 of 20480 failed: "):
            registration.Registration(pool.pages.data_ptr(), 5 * PAGE, PAGE)
        assert not pool.pages.is_pinned()  # which torch asks of the memory's first byte
        assert int(cudart.cudaHostUnregister(page)) == 0


# Pages that cross from one registration into the next, and ones that lie end to end on both of its sides.
PAGE_BYTES = [1536, 3 * PAGE, PAGE]


def sides(direction: str, host) -> tuple:
    return (host, on(0)) if direction == "h2d" else (on(0), host)


def compare(call: Call, wanted: Call, **options) -> None:
    wanted.run()
    with torch.cuda.stream(torch.cuda.Stream()):
        call.run(**options)
        torch.cuda.synchronize()
    assert call.bytes() == wanted.bytes()


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("op", OPS)
def test_copies_across_registrations(in_pool, op, direction, page_bytes):
    call = make(op, *sides(direction, in_pool), page_bytes)
    compare(call, make(op, pageable, pageable, page_bytes))


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("executor", ["kernel", "dma", "staged", BULK])
@pytest.mark.parametrize("op", TAKES_EXECUTORS)
def test_copies_across_registrations_by_each_executor(in_pool, op, executor, direction, page_bytes):
    call = make(op, *sides(direction, in_pool), page_bytes)
    compare(call, make(op, pageable, pageable, page_bytes), executor=executor)


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("op", TAKES_EXECUTORS)
def test_ids_on_the_device(in_pool, op, direction):
    call = make(op, *sides(direction, in_pool), 1536)
    at = {"gather_blocks": 1, "scatter_blocks": 1, "copy_pages": 2}[op]
    call.arguments = tuple(a.cuda() if i == at else a for i, a in enumerate(call.arguments))
    compare(call, make(op, pageable, pageable, 1536))


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_neighbours_on_both_sides_of_an_edge_are_one_copy_and_are_cut_there(stand_in, in_pool, direction):
    """A copy engine takes no copy that spans two registrations."""
    call = make("swap_blocks", *sides(direction, in_pool), PAGE)
    pool, out, page_bytes, _ = call.arguments
    ids = torch.arange(4)
    stand_in.clear_log()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.ops.kvkernels.swap_blocks(pool, out, page_bytes, torch.stack((ids, ids), 1), executor="dma")
        torch.cuda.synchronize()
    assert torch.equal(pool.cpu(), out.cpu())
    assert stand_in.counters().descriptors >= 2


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("op", OPS)
def test_chunks_that_the_device_sees_at_addresses_of_their_own(stand_in, chunks, op, direction):
    """No executor takes one chunk's address for the next one's; which a kernel refuses, and auto knows."""
    stand_in.set("device_addresses_differ", 1)
    place = Places("apart")
    call = make(op, *sides(direction, place), PAGE)
    compare(call, make(op, pageable, pageable, PAGE))
    address = place.pools[0].pages.data_ptr()
    assert len({row["device_offset"] for row in stand_in.find([address, address + 2 * PAGE])}) == 2
    place.pools[0].close()
