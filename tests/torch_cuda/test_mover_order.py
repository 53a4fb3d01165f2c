"""Which chunks a mover hands to a device, in which order, and what a stream that is blocked costs the host."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from simgpu.sim import Sim
from torch_cuda.transfers import LONG, PAGE, device, filled, host, swap

from kvkernels.transfer import Mover, SwapJob, TransferCancelled, TransferFailed

pytestmark = pytest.mark.cuda


class Frozen:
    """Time stands still: what is handed to the device stays on its way, and the log says what it was.

    Each name is a pool on the device and one on the host, made before, since that waits for the device.
    """

    def __init__(self, sim: Sim, names: list[str], chunks: int = 8) -> None:
        self.sim, self.chunks = sim, chunks
        self.every = torch.arange(chunks).repeat(2, 1).T
        self.sides = {name: (host(blocks=chunks), device(255, blocks=chunks)) for name in names}
        self.targets: dict[int, str] = {}

    def job(self, name: str, src: torch.Tensor | None = None) -> SwapJob:
        """From the host to the device; with another source, from there to the host."""
        dst = self.sides[name][1 if src is None else 0]
        self.targets[dst.data_ptr()] = name
        return swap(self.sides[name][0] if src is None else src, dst, self.every, "dma")

    def handed_over(self) -> list[str]:
        """Whose chunk each copy is of."""
        copies = [entry["dst"] for entry in self.sim.log("cudaMemcpyAsync") if entry["bytes"] == PAGE]
        return [name for at in copies for start, name in self.targets.items() if 0 <= at - start < self.chunks * PAGE]

    def wait_for(self, count: int) -> list[str]:
        until = time.monotonic() + LONG
        while len(found := self.handed_over()) < count and time.monotonic() < until:
            time.sleep(0.001)
        return found

    def __enter__(self) -> Frozen:
        self.sim.set("time_stands_still", 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.sim.set("time_stands_still", 0)


@pytest.fixture
def by_page() -> Iterator[Mover]:
    with Mover("cuda:0", chunk_bytes=PAGE) as one:
        yield one


def test_at_most_two_chunks_of_a_store_are_in_front_of_a_load(stand_in, by_page):
    """And of a load in front of what is expedited. Other directions do not count."""
    frozen = Frozen(stand_in, ["store", "load", "expedited", "other way"])
    pool = device()
    with frozen:
        sent = []
        for priority in ("store", "load", "expedited"):
            sent.append(by_page.submit(frozen.job(priority), priority=priority))
            assert frozen.wait_for(2 * len(sent))[-2:] == [priority] * 2
        sent.append(by_page.submit(frozen.job("other way", pool), priority="store"))
        assert frozen.wait_for(8)[6:] == ["other way"] * 2
        assert by_page.stats()["running"] == 4 and len(frozen.handed_over()) == 8
    assert all(one.result(LONG).state == "done" for one in sent)
    begun = [name for name in frozen.handed_over() if name != "other way"]
    assert begun[6:] == ["expedited"] * 6 + ["load"] * 6 + ["store"] * 6


def test_expedited_come_before_loads_before_stores_and_else_in_order_of_submission(stand_in, by_page):
    names = ["store", "load", "expedited", "store 2", "load 2", "expedited 2"]
    frozen = Frozen(stand_in, names, 3)
    with by_page.held():
        sent = [by_page.submit(frozen.job(name), priority=name.split()[0]) for name in names]
    assert all(one.result(LONG).state == "done" for one in sent)
    assert frozen.handed_over() == [names[i] for i in (2, 5, 1, 4, 0, 3) for _ in range(3)]


def test_each_priority_has_a_stream_of_it_that_blocks_nobody(stand_in, by_page):
    """The least is that of torch's own streams."""
    nonblocking, seen = 1, {}
    for priority in ("expedited", "load", "store"):
        stand_in.clear_log()
        by_page.submit(swap(host(), device()), priority=priority).wait(LONG)
        (made,) = stand_in.log("cudaStreamCreateWithPriority")
        assert made["flags"] == nonblocking
        seen[priority] = made["priority"]
    assert seen == {"expedited": -5, "load": -1, "store": 0}


def test_a_blocked_stream_costs_the_host_no_wait_for_bytes(stand_in, by_page):
    """The transfer is handed over whole, behind one that it needs, while nothing at all happens on the device."""
    frozen = Frozen(stand_in, ["expedited", "needed", "stored"])
    compute, result = torch.cuda.Stream(), device(255)
    with frozen:
        by_page.submit(frozen.job("expedited"), priority="expedited")
        assert frozen.wait_for(2) == ["expedited"] * 2
        with by_page.held():
            needed = by_page.submit(frozen.job("needed"), priority="store")
            stored = by_page.submit(frozen.job("stored", frozen.sides["needed"][1]), priority="store")
        stored.block_stream(compute)
        assert frozen.handed_over() == ["expedited"] * 2 + ["needed"] * 8 + ["stored"] * 8
        assert not stored.done() and not needed.done()
        filled(result, frozen.sides["stored"][0], compute)
    compute.synchronize()
    assert torch.equal(result.cpu(), frozen.sides["needed"][0])
    assert stored.result(LONG).state == needed.result(LONG).state == "done"


def test_what_waits_is_released_when_the_one_before_it_was_handed_over(stand_in, by_page):
    """Not when that one has ended; and it ends after it."""
    frozen = Frozen(stand_in, ["first", "second", "late"], 2)
    pool = frozen.sides["first"][1]
    with frozen:
        with by_page.held():
            first = by_page.submit(frozen.job("first"))
            second = by_page.submit(frozen.job("second", pool))
        assert frozen.wait_for(4) == ["first"] * 2 + ["second"] * 2
        late = by_page.submit(frozen.job("late", pool))
        assert not first.cancel() and by_page.stats()["running"] >= 2
    while not late.done():
        pass
    assert by_page.poll() == [first, second, late]
    assert all(torch.equal(frozen.sides[name][0], pool.cpu()) for name in frozen.sides)


def test_blocking_a_stream_for_what_has_ended(by_page):
    src, dst = host(), device()
    mover = by_page
    done = mover.submit(swap(src, dst))
    done.wait(LONG)
    done.block_stream(), done.block_stream(torch.cuda.Stream())
    with mover.held():
        one = mover.submit(swap(src, dst))
        reads = mover.submit(swap(dst, host()))
        assert one.cancel()
    with pytest.raises(TransferCancelled, match="it was cancelled before it began"):
        one.block_stream()
    with pytest.raises(TransferFailed, match=f"transfer {one.ticket}, which this one needs, was cancelled"):
        reads.block_stream()
