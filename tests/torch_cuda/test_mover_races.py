"""Races that programs which move KV caches are known for, through a mover, with work as late and as mixed as it may be.

Each is a small program in two orders: in the wrong one some seed corrupts data, in the right one none may.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch_cuda.transfers import LONG, PAIRS, device, filled, host, is_all, is_moved, swap

from kvkernels.transfer import GatherJob, Job, Mover, ScatterJob

pytestmark = pytest.mark.cuda

# The issue of KVKERNELS_MOVER_SEEDS=1000 takes minutes.
RIGHT_SEEDS = int(os.environ.get("KVKERNELS_MOVER_SEEDS", "40"))
WRONG_SEEDS = 300
OLD, NEW, NEWER = 1, 7, 9

Program = Callable[[bool], bool]


@pytest.fixture
def mover() -> Iterator[Mover]:
    with Mover("cuda:0", chunk_bytes=200) as one:
        yield one


class Scene:
    """A pool on the device and one on the host, sources of values, and two streams of an engine."""

    def __init__(self) -> None:
        self.device, self.result = device(OLD), device(OLD)
        self.host = host(OLD)
        self.values = {value: host(value) for value in (OLD, NEW, NEWER)}
        self.compute, self.other = torch.cuda.Stream(), torch.cuda.Stream()

    def reset(self, of_device: int = OLD, of_host: int = OLD) -> None:
        torch.cuda.synchronize()
        self.device.copy_(self.values[of_device])
        self.result.copy_(self.values[OLD])
        self.host.copy_(self.values[of_host])
        torch.cuda.synchronize()

    def writes(self, pool: torch.Tensor, value: int, stream: torch.cuda.Stream | None = None) -> None:
        filled(pool, self.values[value], stream or self.compute)

    def reads(self, pool: torch.Tensor) -> None:
        filled(self.result, pool, self.compute)


def store_of_what_compute_writes(mover: Mover, executor: str) -> Program:
    """An offload that starts before the attention kernels have written the blocks it stores."""
    s = Scene()

    def program(right):
        s.reset()
        s.writes(s.device, NEW)
        with torch.cuda.stream(s.compute if right else s.other):
            stored = mover.submit(swap(s.device, s.host, executor=executor), priority="store")
        assert stored.result(LONG).state == "done"
        return is_all(s.host, NEW)

    return program


def load_over_what_compute_reads(mover: Mover, executor: str) -> Program:
    """A load into blocks that were handed out again while the last step's kernels still read them."""
    s = Scene()

    def program(right):
        s.reset(of_host=NEW)
        s.reads(s.device)
        with torch.cuda.stream(s.compute if right else s.other):
            loaded = mover.submit(swap(s.host, s.device, executor=executor))
        assert loaded.result(LONG).state == "done"
        s.compute.synchronize()
        return is_all(s.result, OLD) and is_all(s.device, NEW)

    return program


def compute_on_blocks_being_loaded(mover: Mover, executor: str) -> Program:
    """A prefix hit whose blocks are attended to while their load is still on its way: no host waits for it."""
    s = Scene()

    def program(right):
        s.reset(of_host=NEW)
        loaded = mover.submit(swap(s.host, s.device, executor=executor))
        if right:
            loaded.block_stream(s.compute)
        s.reads(s.device)
        s.compute.synchronize()
        return is_all(s.result, NEW) and loaded.result(LONG).state == "done"

    return program


def host_reads_a_store_too_early(mover: Mover, executor: str) -> Program:
    """A store reported as finished when it was asked for: the host sends or writes to disk what is not there yet."""
    s = Scene()

    def program(right):
        s.reset(of_device=NEW)
        stored = mover.submit(swap(s.device, s.host, executor=executor), priority="store")
        while right and stored not in mover.poll():
            pass
        read = bool((s.host == NEW).all())
        stored.wait(LONG)
        return read

    return program


def pinned_staging_reused(mover: Mover, executor: str) -> Program:
    """A pinned buffer that the host fills for the next request while the copy out of it has not run."""
    s = Scene()

    def program(right):
        s.reset(of_host=NEW)
        loaded = mover.submit(swap(s.host, s.device, executor=executor))
        if right:
            loaded.wait(LONG)
        s.host.fill_(NEWER)
        loaded.wait(LONG)
        return is_all(s.device, NEW)

    return program


def block_reused_while_it_is_stored(mover: Mover, executor: str) -> Program:
    """Blocks freed when their store was asked for rather than when it was done: the next request writes over them."""
    s = Scene()

    def program(right):
        s.reset()
        stored = mover.submit(swap(s.device, s.host, executor=executor), priority="store")
        if right:
            stored.block_stream(s.compute)
        s.writes(s.device, NEW)
        stored.wait(LONG)
        return is_all(s.host, OLD)

    return program


def event_recorded_too_early(mover: Mover, executor: str) -> Program:
    """The event is there and waited for, but it was recorded before the work that it should stand for."""
    s = Scene()

    def program(right):
        s.reset()
        written = torch.cuda.Event()
        if not right:
            written.record(s.compute)
        s.writes(s.device, NEW)
        if right:
            written.record(s.compute)
        with torch.cuda.stream(s.other):
            stored = mover.submit(swap(s.device, s.host, executor=executor), priority="store", after=[written])
        stored.wait(LONG)
        return is_all(s.host, NEW)

    return program


def event_recorded_again(mover: Mover, executor: str) -> Program:
    """One event for many steps: what counts is what was recorded when the transfer was submitted."""
    s, shared = Scene(), torch.cuda.Event()

    def program(right):
        s.reset()
        if right:
            s.writes(s.device, NEW)
        shared.record(s.compute)
        with mover.held(), torch.cuda.stream(s.other):
            stored = mover.submit(swap(s.device, s.host, executor=executor), priority="store", after=[shared])
            if not right:
                s.writes(s.device, NEW)
            shared.record(torch.cuda.Stream() if right else s.compute)
        stored.wait(LONG)
        return is_all(s.host, NEW)

    return program


def legacy_stream_does_not_order(mover: Mover, executor: str) -> Program:
    """Compute on the default stream orders nothing in a stream that was created as non-blocking, as the mover's are."""
    s = Scene()

    def program(right):
        s.reset()
        s.writes(s.device, NEW, torch.cuda.default_stream())
        with torch.cuda.stream(torch.cuda.default_stream() if right else s.other):
            stored = mover.submit(swap(s.device, s.host, executor=executor), priority="store")
        stored.wait(LONG)
        return is_all(s.host, NEW)

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
]


def holds(stand_in, program: Callable[[], bool]) -> None:
    """For every seed."""
    for seed in range(1, RIGHT_SEEDS + 1):
        stand_in.adversarial(seed)
        assert program(), seed


@pytest.mark.parametrize("executor", ["dma", "kernel"])
@pytest.mark.parametrize("scenario", [s.__name__ for s in SCENARIOS])
def test_race(stand_in, mover, scenario, executor):
    program = globals()[scenario](mover, executor)
    for seed in range(1, WRONG_SEEDS + 1):
        stand_in.adversarial(seed)
        if not program(False):
            break
    else:
        raise AssertionError("no seed finds the race")
    holds(stand_in, lambda: program(True))


def test_transfers_that_depend_on_each_other(stand_in, mover):
    """In, about, out and in again, as loads, stores and expedited: each reads what the one before it wrote."""
    first, second, third, back = host(NEW), device(OLD), device(OLD), host(OLD)
    clean = {pool: host(OLD) for pool in (second, third, back)}

    def program():
        for pool, source in clean.items():
            pool.copy_(source)
        torch.cuda.synchronize()
        with mover.held():
            mover.submit(swap(first, second), priority="store")
            mover.submit(swap(second, third), priority="load")
            last = mover.submit(swap(third, back), priority="store")
            again = mover.submit(swap(back, second), priority="expedited")
        return again.result(LONG).state == "done" and last.done() and is_all(back, NEW) and is_all(second, NEW)

    holds(stand_in, program)


def test_transfers_that_write_what_another_reads(stand_in, mover):
    """A block is stored and loaded over at once, by a load that is more urgent."""
    pool, kept, source = device(OLD), host(OLD), host(NEW)
    old = host(OLD)

    def program():
        pool.copy_(old), kept.copy_(source)
        torch.cuda.synchronize()
        with mover.held():
            mover.submit(swap(pool, kept), priority="store")
            loaded = mover.submit(swap(source, pool), priority="expedited")
        return loaded.result(LONG).state == "done" and is_all(kept, OLD) and is_all(pool, NEW)

    holds(stand_in, program)


def test_a_transfer_that_is_submitted_when_the_one_before_it_is_on_its_way(stand_in, mover):
    """Handed over whole, but not ended: it is ordered behind it on the device, in another stream."""
    source, mid, dst, old = host(NEW), device(OLD), host(OLD), host(OLD)

    def program():
        mid.copy_(old), dst.copy_(old)
        torch.cuda.synchronize()
        stand_in.set("time_stands_still", 1)
        loaded = mover.submit(swap(source, mid, executor="dma"))
        loaded.block_stream(torch.cuda.Stream())  # so all of it is with the device
        stored = mover.submit(swap(mid, dst), priority="store")
        assert not loaded.done()
        stand_in.set("time_stands_still", 0)
        return stored.result(LONG).state == "done" and is_all(dst, NEW)

    holds(stand_in, program)


def test_a_transfer_that_becomes_urgent_stays_behind_what_it_waits_for(stand_in, mover):
    """Its first chunks are in the stream of stores, the others in another: both behind the engine and those before."""
    src, mid, dst, old = device(OLD), device(OLD), host(OLD), host(OLD)
    new, compute = host(NEW), torch.cuda.Stream()

    def copies():
        return stand_in.calls("cuMemcpyBatchAsync") + stand_in.calls("cudaMemcpyAsync")

    def program():
        for pool in (src, mid, dst):
            pool.copy_(old)
        torch.cuda.synchronize()
        stand_in.set("time_stands_still", 1)
        filled(src, new, compute)
        before = copies()
        with torch.cuda.stream(compute):
            mover.submit(swap(src, mid, executor="dma"), priority="store")
            stored = mover.submit(swap(mid, dst, executor="dma"), priority="store")
        while copies() < before + 2:
            time.sleep(0.001)
        stored.block_stream()
        stand_in.set("time_stands_still", 0)
        return stored.result(LONG).state == "done" and is_all(dst, NEW)

    holds(stand_in, program)


def test_memory_that_was_let_go_of_is_not_used_again_too_early(stand_in, mover):
    """The engine drops its tensors at once, and torch's allocator hands their memory out to the next who asks."""
    values = [host(value) for value in (OLD, NEW)]

    def program():
        with torch.cuda.stream(torch.cuda.Stream()):
            source, kept = device(OLD), host(OLD + 4)
            stored = mover.submit(swap(source, kept), priority="store")
            target = device(OLD)
            loaded = mover.submit(swap(values[1], target))
            addresses = {source.data_ptr(), target.data_ptr()}
            read = target
            del source, target
            others = [device(NEW) for _ in range(4)]
            for other in others:
                other.copy_(values[1], non_blocking=True)
            assert loaded.result(LONG).state == stored.result(LONG).state == "done"
            torch.cuda.current_stream().synchronize()
        return is_all(kept, OLD) and is_moved(values[1], read) and bool(addresses)

    holds(stand_in, program)


def test_pinned_memory_that_was_let_go_of_is_not_used_again_too_early(stand_in, mover):
    """Torch's host allocator knows nothing of copies that are not its own."""
    pool = device(OLD)

    def program():
        source = host(NEW)
        loaded = mover.submit(swap(source, pool))
        del source
        junk = [host(NEWER) for _ in range(4)]
        return loaded.result(LONG).state == "done" and is_all(pool, NEW) and len(junk) == 4

    holds(stand_in, program)


def test_ids_are_read_when_they_are_submitted(stand_in, mover):
    src, dst, ids = host(), device(), PAIRS.clone()

    def program():
        ids.copy_(PAIRS)
        with mover.held():
            one = mover.submit(swap(src, dst, ids))
            ids.fill_(0)
        return one.result(LONG).state == "done" and is_moved(src, dst)

    holds(stand_in, program)


@pytest.mark.parametrize("count", [40, 3000])
def test_nothing_of_the_librarys_is_read_after_it_is_handed_over(stand_in, count):
    """Tables of a launch, also where they are too large for its parameters, and lists of a batch."""
    blocks = count + 24
    src, dst = device(blocks=blocks, page=16), [device(blocks=blocks, page=16) for _ in range(2)]
    seeds = RIGHT_SEEDS if count < 1000 else max(1, RIGHT_SEEDS // 20)
    with Mover("cuda:0") as mover:
        for seed in range(1, seeds + 1):
            stand_in.adversarial(seed)
            pairs = [torch.stack([torch.randperm(blocks)[:count] for _ in range(2)], 1) for _ in dst]
            sent = [mover.submit(swap(src, d, p, executor="kernel")) for d, p in zip(dst, pairs, strict=True)]
            assert [one.result(LONG).state for one in sent] == ["done", "done"]
            assert all(is_moved(src, d, p) for d, p in zip(dst, pairs, strict=True)), seed


def test_an_engine_beside_it(stand_in, mover):
    """Two streams that compute, load and store step by step, with no wait of the host's but the last."""
    steps = 6
    pools = [device(OLD) for _ in range(2)]
    buffers = [[host() for _ in range(steps)] for _ in range(2)]
    stored = [[host(OLD) for _ in range(steps)] for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    ids = torch.arange(8)

    def program():
        sent = []
        for step in range(steps):
            for pool, source, kept, stream in zip(pools, buffers, stored, streams, strict=True):
                with torch.cuda.stream(stream):
                    jobs: list[Job] = [ScatterJob(source[step], ids, [pool]), GatherJob([pool], ids, kept[step])]
                    load = mover.submit(jobs[0], priority="load")
                    store = mover.submit(jobs[1], priority="store")
                    store.block_stream()
                    pool.copy_(source[(step + 1) % steps], non_blocking=True)
                    sent += [load, store]
        assert all(one.result(LONG).state == "done" for one in sent)
        torch.cuda.synchronize()
        return all(torch.equal(a, b) for of in zip(buffers, stored, strict=True) for a, b in zip(*of, strict=True))

    holds(stand_in, program)
