"""What a mover promises: jobs, order of urgency, threads; how transfers end has a file of its own."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mover_jobs import LONG, ids, pool, swap

import kvkernels
from kvkernels.registration import LIBRARY
from kvkernels.transfer import (
    ConvertJob,
    CopyPagesJob,
    GatherJob,
    GroupsJob,
    Job,
    Mover,
    PreparedJob,
    ScatterJob,
    SwapJob,
)

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")


@pytest.fixture
def mover():
    with Mover(lanes=1) as one:
        yield one


def caches() -> tuple[kvkernels.KVCache, kvkernels.KVCache]:
    sizes = {"B": 4, "N": 2, "H": 2, "D": 8, "dtype": torch.uint8}
    src = kvkernels.KVCache(kvkernels.KVLayout("B N H D", **sizes), torch.randint(1, 255, (128,), dtype=torch.uint8))
    return src, kvkernels.KVCache(kvkernels.KVLayout("B H N D", **sizes), torch.zeros(128, dtype=torch.uint8))


def job_of(kind: str) -> tuple[Job, list[torch.Tensor]]:
    src, dst = [pool(), pool()], [pool(fill=0), pool(fill=0)]
    pair = ids((3, 1), (0, 5))
    if kind == "prepared":
        return PreparedJob(kvkernels.prepare(src, dst), pair), dst
    if kind == "layer":
        return PreparedJob(kvkernels.prepare(src, dst), pair, 1), dst
    if kind == "slabs":
        copy = kvkernels.prepare([[src[0], src[1]]], [dst[0]])
        return PreparedJob(copy, ids((3, 1), (12, 5))), dst[:1]
    if kind == "groups":
        groups = kvkernels.PreparedGroups([kvkernels.prepare([s], [d]) for s, d in zip(src, dst, strict=True)])
        return GroupsJob(groups, [pair, ids((1, 1))]), dst
    if kind == "swap":
        return SwapJob(src[0], dst[0], 64, pair), dst[:1]
    if kind == "gather":
        out = torch.zeros(2, 128, dtype=torch.uint8)
        return GatherJob(src, torch.tensor([3, 0]), out), [out]
    if kind == "scatter":
        return ScatterJob(torch.randint(1, 255, (2, 128), dtype=torch.uint8), torch.tensor([3, 0]), dst), dst
    if kind == "pages":
        return CopyPagesJob(src, dst, pair, kvkernels.whole_page_runs(src)), dst
    one, other = caches()
    return ConvertJob(one, other, pair[:1]), list(other.tensors)


KINDS = ["prepared", "layer", "slabs", "groups", "swap", "gather", "scatter", "pages", "convert"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_job_does_what_its_op_does(mover, kind):
    job, written = job_of(kind)
    result = mover.submit(job).result(LONG)
    moved = [t.clone() for t in written]
    for t in written:
        t.zero_()
    before = kvkernels.counters()["cpu"]["bytes"]
    job.call()
    assert result.bytes == kvkernels.counters()["cpu"]["bytes"] - before
    assert result.state == "done" and result.error is None and result.undefined == ()
    assert any(t.any() for t in written)
    assert all(torch.equal(a, b) for a, b in zip(moved, written, strict=True))
    assert [t.data_ptr() for t in job.written()] == [t.data_ptr() for t in written]


def test_a_result_says_bytes_time_and_executor(mover):
    result = mover.submit(swap(pool(), pool(), (3, 1), (0, 5))).result(LONG)
    assert (result.bytes, result.executor, result.chunks) == (128, "cpu", 1)
    assert 0 < result.seconds < LONG and 0 <= result.queue_seconds < LONG


def test_a_bad_job_raises_at_submit_and_nothing_is_queued(mover):
    src, dst = pool(), pool(fill=0)
    with pytest.raises(IndexError, match=r"block_mapping\[0, 0\] = 9 is out of range"):
        mover.submit(swap(src, dst, (9, 1)))
    groups = kvkernels.PreparedGroups([kvkernels.prepare([src], [dst]), kvkernels.prepare([src], [pool()])])
    with pytest.raises(IndexError, match=r"PreparedCopy.run: mapping"):
        mover.submit(GroupsJob(groups, [ids((1, 1)), ids((1, 99))]))

    class Two(Job):
        def call(self):
            kvkernels.swap_blocks(src, dst, 64, ids((0, 0)))
            kvkernels.swap_blocks(src, dst, 64, ids((0, 99)))

        def written(self):
            return (dst,)

    with pytest.raises(IndexError):
        mover.submit(Two())
    assert mover.drain(timeout=LONG) and not dst.any()
    assert mover.stats()["queued"] == 0 and mover.poll() == []
    kvkernels.swap_blocks(src, dst, 64, ids((2, 2)))  # the ops of this thread run again
    assert torch.equal(dst[2], src[2])


@pytest.mark.parametrize("executor", ["reference", "kernel", "dma", "triton"])
def test_only_the_cpu_executor_can_be_named(mover, executor):
    job = swap(pool(), pool(), (0, 0))
    job.executor = executor
    with pytest.raises(ValueError, match=f"executor '{executor}' cannot serve this call"):
        mover.submit(job)
    job.executor = "cpu"
    assert mover.submit(job).result(LONG).state == "done"


def test_raw_addresses_are_refused(mover):
    a, b = pool(), pool()

    class Raw(Job):
        def call(self):
            one, other, size = (torch.tensor([n]) for n in (a.data_ptr(), b.data_ptr(), 64))
            kvkernels.swap_blocks_batch(one, other, size)

        def written(self):
            return ()

    with pytest.raises(ValueError, match="must be of tensors, which it keeps alive, got addresses"):
        mover.submit(Raw())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda:99"}, "device must be one of"),
        ({"device": "meta"}, "device must be the cpu or a cuda device, got meta"),
        ({"lanes": 0}, "lanes must be positive"),
        ({"lanes": 1000}, "lanes must be at most"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
    ],
)
def test_bad_arguments_of_a_mover(arguments, words):
    with pytest.raises(ValueError, match=words):
        Mover(**arguments)


def test_without_the_compiled_library_there_is_no_mover(monkeypatch):
    from kvkernels.registration.library import Library
    from kvkernels.transfer import native

    monkeypatch.setattr(native, "LIBRARY", Library(None, "it was not built", LIBRARY.registrations))
    native.native.cache_clear()
    with pytest.raises(RuntimeError, match="the compiled library must be there, got the reference: it was not built"):
        Mover()
    native.native.cache_clear()


def test_bad_arguments_of_submit(mover):
    job = swap(pool(), pool(), (0, 0))
    with pytest.raises(ValueError, match="priority must be one of expedited, load, store, got 'urgent'"):
        mover.submit(job, priority="urgent")
    with pytest.raises(ValueError, match="job must be a Job, got function"):
        mover.submit(lambda: None)
    with Mover(lanes=1) as other:
        foreign = other.submit(job)
        with pytest.raises(ValueError, match="after must be transfers of this mover"):
            mover.submit(job, after=[foreign])
        with pytest.raises(ValueError, match="after must be transfers of this mover"):
            mover.submit(job, after=[object()])


def test_a_mode_that_only_traces_is_refused(mover):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="must be of tensors with values"):
        mover.submit(swap(pool(), pool(), (0, 0)))


def test_a_job_must_not_submit_another(mover):
    src, dst = pool(), pool(fill=0)

    class Nested(Job):
        def call(self):
            kvkernels.swap_blocks(src, dst, 64, ids((0, 0)))
            mover.submit(swap(src, dst, (1, 1)))

        def written(self):
            return (dst,)

    with pytest.raises(RuntimeError, match="a job must not submit another"):
        mover.submit(Nested())
    assert mover.drain(timeout=LONG) and not dst.any()
    assert mover.submit(swap(src, dst, (2, 2))).result(LONG).state == "done"


def test_an_empty_mapping_is_a_transfer_of_nothing(mover):
    src, dst = pool(), pool(fill=0)
    result = mover.submit(PreparedJob(kvkernels.prepare([src], [dst]), ids((0, 0))[:0])).result(LONG)
    assert (result.state, result.bytes) == ("done", 0) and not dst.any()


def test_expedited_come_before_loads_before_stores_and_else_in_order_of_submission(mover):
    with mover.held():
        sent = [
            mover.submit(swap(pool(), pool(), (0, 0)), priority=priority)
            for priority in ("store", "load", "expedited", "store", "load", "expedited")
        ]
    for one in sent:
        while not one.done():
            pass
    assert [one.ticket for one in mover.poll()] == [sent[i].ticket for i in (2, 5, 1, 4, 0, 3)]


def test_a_load_waits_for_at_most_one_chunk_of_a_store(tmp_path):
    import json

    with Mover(lanes=1, chunk_bytes=1 << 20) as mover:
        src, dst = pool(64, 1 << 20), pool(64, 1 << 20, fill=0)
        store = mover.submit(swap(src, dst, *((i, i) for i in range(64))), priority="store")
        while store.state == "queued":
            pass
        load = mover.submit(swap(pool(), pool(), (0, 0)), priority="load")
        assert load.result(LONG).state == "done" and store.result(LONG).chunks == 64
        mover.trace(tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        queued = next(e["ts"] for e in events if e["ph"] == "b" and e["id"] == load.ticket)
        begun = next(e["ts"] for e in events if e["ph"] == "e" and e["id"] == load.ticket)
        chunks = [e for e in events if e["ph"] == "X" and e["args"]["transfer"] == store.ticket]
        assert len(chunks) == 64
        assert [e for e in chunks if queued < e["ts"] < begun] == []
        assert torch.equal(src, dst)


def test_at_most_lanes_chunks_are_copied_at_a_time():
    with Mover(lanes=2, chunk_bytes=1 << 18) as mover:
        for priority in ("load", "store", "load", "store"):
            src, dst = pool(16, 1 << 19), pool(16, 1 << 19)
            mover.submit(swap(src, dst, *((i, i) for i in range(16))), priority=priority)
        assert mover.drain(timeout=LONG)
        events = sorted((t, step) for c in mover._owner.trace() for t, step in ((c[6], 1), (c[7], -1)))
        at_once = [sum(step for _, step in events[: i + 1]) for i in range(len(events))]
        assert max(at_once) <= 2 and len({c[5] for c in mover._owner.trace()}) > 1


def test_the_threads_of_stores_have_a_lower_priority():
    with Mover(lanes=2):
        nices: dict[str, set[int]] = {}
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline and nices != {"kvk-urgent": {0}, "kvk-store": {10}}:
            nices = {}
            for task in Path("/proc/self/task").iterdir():
                name = (task / "comm").read_text().strip()
                if name.startswith("kvk-"):
                    nices.setdefault(name, set()).add(int((task / "stat").read_text().rpartition(")")[2].split()[16]))
        assert nices == {"kvk-urgent": {0}, "kvk-store": {10}}


def test_copies_never_need_the_gil():
    """Transfers end while this thread keeps the GIL for good: what it calls does not let go of it."""
    interval = sys.getswitchinterval()
    src, dst = pool(8, 1 << 20), pool(8, 1 << 20, fill=0)
    copy, mapping = kvkernels.prepare([src], [dst]), ids(*((i, i) for i in range(8)))
    with Mover(lanes=1, chunk_bytes=1 << 18) as mover:
        ticks = []
        other = threading.Thread(target=lambda: ticks.append(time.monotonic()))
        transfer = mover.submit(PreparedJob(copy, mapping), priority="store")
        transfer.wait(LONG)
        with mover.held():
            transfer = mover.submit(PreparedJob(copy, mapping), priority="store")
        sys.setswitchinterval(1000)
        try:
            other.start()
            deadline = time.monotonic() + LONG
            while not transfer.done() and time.monotonic() < deadline:
                pass
            ended = transfer.done()
        finally:
            sys.setswitchinterval(interval)
        other.join()
        assert ended and torch.equal(src, dst)
