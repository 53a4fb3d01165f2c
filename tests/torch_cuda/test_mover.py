"""A mover on a device: its jobs and what it refuses, order of urgency, results, and whom it leaves alone."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch_cuda.transfers import (
    BLOCKS,
    LONG,
    PAGE,
    PAIRS,
    device,
    filled,
    host,
    is_all,
    is_moved,
    on_stream,
    row_of,
    swap,
)

import kvkernels
from kvkernels import policy
from kvkernels.transfer import (
    CopyPagesJob,
    GatherJob,
    GroupsJob,
    Job,
    Mover,
    PreparedJob,
    ScatterJob,
    TransferFailed,
)

pytestmark = pytest.mark.cuda

SIDES = {"h2d": (host, device), "d2h": (device, host), "d2d": (device, device)}


@pytest.fixture
def mover() -> Iterator[Mover]:
    with Mover("cuda:0") as one:
        yield one


@pytest.mark.parametrize("chunk_bytes", [None, 1, PAGE, 3 * PAGE])
@pytest.mark.parametrize(
    ("direction", "executor"),
    [*itertools.product(("h2d", "d2h"), ("auto", "kernel", "dma", "staged")),
     *itertools.product(("d2d",), ("auto", "kernel", "dma"))],
)  # fmt: skip
def test_each_direction_and_executor(direction, executor, chunk_bytes):
    make_src, make_dst = SIDES[direction]
    src, dst = [make_src() for _ in range(3)], [make_dst(255) for _ in range(3)]
    pairs, before = torch.tensor([[3, 0], [4, 1], [5, 2], [0, 6]]), [pool.cpu().clone() for pool in src]
    with Mover("cuda:0", chunk_bytes=chunk_bytes) as mover:
        copy = kvkernels.prepare(src, dst, executor=executor)
        result = mover.submit(PreparedJob(copy, pairs), priority="store").result(LONG)
        assert (result.state, result.error, result.undefined) == ("done", None, ())
        assert result.bytes == 3 * 4 * PAGE and result.executor in (executor, "kernel", "dma", "staged")
        # Layer by layer where a block of all three does not fit in a chunk.
        assert result.chunks == {None: 1, 1: 12, PAGE: 12, 3 * PAGE: 4}[chunk_bytes]
        assert row_of(mover, direction, "store") == {
            "done": 1, "failed": 0, "cancelled": 0, "bytes": result.bytes, "chunks": result.chunks
        }  # fmt: skip
        assert {row["executor"] for row in mover.stats()["transfers"]} == {result.executor}
    for a, b, whole in zip(src, dst, before, strict=True):
        assert is_moved(a, b, pairs) and is_all(b.cpu()[[3, 4, 5, 7]], 255) and torch.equal(a.cpu(), whole)


def test_an_executor_is_what_auto_takes_for_the_whole(mover):
    src, dst = device(blocks=64), host(blocks=64)
    job = swap(src, dst, torch.arange(64).repeat(2, 1).T)
    wanted = kvkernels.explain("swap_blocks", src, dst, PAGE, job.block_mapping).executor
    assert mover.submit(job).result(LONG).executor == wanted


def jobs_of(kind: str) -> tuple[Job, list[torch.Tensor], list[torch.Tensor]]:
    """A job, what it writes, and a copy of that on the host which the op's reference has written."""
    src, dst = [device() for _ in range(2)], [host(255) for _ in range(2)]
    on_host, wanted = [pool.cpu() for pool in src], [pool.clone() for pool in dst]
    pair, ids = torch.tensor([[3, 1], [0, 5]]), torch.tensor([3, 0])
    if kind == "layer":
        kvkernels.swap_blocks(on_host[1], wanted[1], PAGE, pair)
        return PreparedJob(kvkernels.prepare(src, dst), pair, 1), dst, wanted
    if kind == "groups":
        groups = kvkernels.PreparedGroups([kvkernels.prepare([a], [b]) for a, b in zip(src, dst, strict=True)])
        kvkernels.swap_blocks(on_host[0], wanted[0], PAGE, pair)
        return GroupsJob(groups, [pair, None]), dst, wanted
    if kind == "gather":
        out, plain = host(0, 2, 2 * PAGE), torch.zeros(2, 2 * PAGE, dtype=torch.uint8)
        kvkernels.gather_blocks(on_host, ids, plain)
        return GatherJob(src, ids, out), [out], [plain]
    if kind == "scatter":
        rows, pools = host(blocks=2, page=2 * PAGE), [device(255) for _ in range(2)]
        kvkernels.scatter_blocks(rows, ids, wanted)
        return ScatterJob(rows, ids, pools), pools, wanted
    runs = kvkernels.whole_page_runs(src)
    kvkernels.copy_pages(on_host, wanted, pair, runs)
    return CopyPagesJob(src, dst, pair, runs), dst, wanted


@pytest.mark.parametrize("kind", ["layer", "groups", "gather", "scatter", "pages"])
def test_each_job(mover, kind):
    job, written, wanted = jobs_of(kind)
    assert mover.submit(job).result(LONG).state == "done"
    assert all(torch.equal(a.cpu(), b) for a, b in zip(written, wanted, strict=True))


def test_a_job_of_several_calls_is_one_transfer(mover):
    a, b, c, d = host(), device(255), device(), host(255)

    class Both(Job):
        def call(self):
            swap(a, b).call()
            swap(c, d).call()

        def written(self):
            return (b, d)

    result = mover.submit(Both()).result(LONG)
    assert (result.state, result.bytes, result.chunks) == ("done", 2 * BLOCKS * PAGE, 2)
    assert is_moved(a, b) and is_moved(c, d) and row_of(mover, "h2d", "load")["done"] == 1


def test_a_transfer_of_nothing_comes_after_what_it_names(mover):
    src, dst = host(), device(255)
    nothing = PreparedJob(kvkernels.prepare([src], [dst]), PAIRS[:0])

    class Nothing(Job):
        def call(self):
            pass

        def written(self):
            return ()

    with mover.held():
        first = mover.submit(swap(src, dst))
        others = [mover.submit(job, after=[first]) for job in (nothing, Nothing())]
        last = mover.submit(nothing, priority="expedited", after=others)
    assert last.result(LONG).state == "done" and all(one.done() for one in (first, *others))
    assert [one.ticket for one in mover.poll()] == [1, 2, 3] and others[0].result().bytes == 0


def test_what_is_refused_raises_at_submit_and_nothing_is_queued(mover):
    pinned, pool, pageable = host(), device(), torch.zeros(BLOCKS, PAGE, dtype=torch.uint8)
    copy = kvkernels.prepare([pinned], [pool])
    wrong = [
        (swap(pinned, host()), "tensors must be on cuda:0 for this mover, got the cpu alone"),
        (swap(pageable, pool), "host memory must be pinned for a mover, .* got src"),
        (swap(pool, pageable), "host memory must be pinned for a mover, .* got dst"),
        (PreparedJob(copy, PAIRS.cuda()), "ids must be on the cpu for a mover, .* got cuda:0"),
        (swap(pinned, pool, torch.tensor([[0, BLOCKS]])), "is out of range"),
        *((swap(pinned, pool, executor=e), f"executor '{e}' cannot serve this call: a mover's threads never run Python")
          for e in ("triton", "reference")),
        (swap(pinned, pool, executor="cpu"), "executor 'cpu' cannot serve this call: a tensor is on a cuda device"),
    ]  # fmt: skip
    before = torch.cuda.memory_allocated()
    for job, words in wrong:
        with pytest.raises((ValueError, IndexError), match=words):
            mover.submit(job)
    assert mover.stats()["queued"] == 0 and mover.drain(timeout=LONG) and mover.poll() == []
    assert torch.cuda.memory_allocated() <= before
    assert mover.submit(swap(pinned, pool)).result(LONG).state == "done"


def test_a_row_of_the_policy_for_triton_is_passed_over(mover, tmp_path):
    """Which an op would take."""
    src, dst, path = host(), device(255), tmp_path / "policy.json"
    path.write_text('{"rows": [{"executor": "triton"}, {"executor": "kernel"}]}')
    policy.use(path)
    try:
        assert kvkernels.explain("swap_blocks", src, dst, PAGE, PAIRS).executor == "triton"
        result = mover.submit(swap(src, dst)).result(LONG)
    finally:
        policy.use(None)
    assert (result.state, result.executor) == ("done", "kernel") and is_moved(src, dst)


@pytest.mark.cuda(devices=2)
def test_a_mover_is_of_a_device_or_of_any(mover):
    src, dst = host(), device(255, 1)
    with pytest.raises(ValueError, match="tensors must be on cuda:0 for this mover, got cuda:1"):
        mover.submit(swap(src, dst))
    with Mover("cuda") as any_device:
        near, far = any_device.submit(swap(src, device(255))), any_device.submit(swap(src, dst))
        assert near.result(LONG).state == far.result(LONG).state == "done" and is_moved(src, dst)
    with pytest.raises(ValueError, match=f"device must be one of the {torch.cuda.device_count()} there are"):
        Mover(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.cuda(devices=2)
def test_from_one_device_to_another(mover):
    """Behind what both devices' current streams were asked for."""
    src, dst, fresh, kept = device(1), device(2, 1), device(), device(255, 1)
    old = dst.cpu()
    for _ in range(5):
        with on_stream() as source, on_stream(1) as target:
            filled(src, fresh, source)
            filled(kept, dst, target)
            moved = mover.submit(swap(src, dst))
        moved.block_stream(target)
        filled(kept[:1], dst[1:2], target)
        assert moved.result(LONG).state == "done" and is_moved(fresh, dst)
        target.synchronize()
        assert torch.equal(kept.cpu()[0], fresh.cpu()[0]) and torch.equal(kept.cpu()[1:], old[1:])
        dst.copy_(old), src.copy_(old)
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)


def test_arguments_of_a_mover_on_a_device(mover):
    assert mover.device == torch.device("cuda:0") and mover.chunk_bytes == 8 << 20
    with pytest.raises(ValueError, match=r"lanes must be left out on a device, .* got 2"):
        Mover("cuda", lanes=2)
    for wrong in (object(), torch.cuda.Stream()):
        with pytest.raises(ValueError, match="after must be transfers of this mover or events, got"):
            mover.submit(swap(host(), device()), after=[wrong])
    with pytest.raises(ValueError, match="after must be events that were recorded, got one that was not"):
        mover.submit(swap(host(), device()), after=[torch.cuda.Event()])
    with pytest.raises(ValueError, match=r"stream must be a torch\.cuda\.Stream, got 3"):
        mover.submit(swap(host(), device())).block_stream(3)


def test_a_mover_on_the_host_takes_pinned_memory_and_no_events():
    src, dst = host(), host(0)
    with Mover(lanes=1) as mover:
        one = mover.submit(swap(src, dst))
        assert one.result(LONG).state == "done" and is_moved(src, dst)
        with pytest.raises(ValueError, match="the transfer must be on a device, got one on the host"):
            one.block_stream()
        event = torch.cuda.Event()
        event.record()
        with pytest.raises(ValueError, match="after must be transfers of this mover, got"):
            mover.submit(swap(src, dst), after=[event])
        with pytest.raises(ValueError, match="tensors must be on the cpu for this mover, got cuda:0"):
            mover.submit(swap(src, device()))


def test_under_capture_it_is_refused_and_one_elsewhere_is_left_alone(mover):
    src, dst, other = host(), device(255), device(255)
    graph = torch.cuda.CUDAGraph()
    with mover.held():
        before = mover.submit(swap(src, dst))
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="swap_blocks: the current stream must not be captured, got one that is"):
            mover.submit(swap(src, other))
        with pytest.raises(RuntimeError, match="stream must not be captured, got one that is"):
            before.block_stream()
        # In a capture that forbids other threads what may break it.
        threads = [threading.Thread(target=submit_on_a_stream, args=(mover, src, dst)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert before.wait(LONG)
        other.copy_(dst, non_blocking=True)
    graph.replay()
    torch.cuda.synchronize()
    assert is_moved(src, other) and is_moved(src, dst)


def submit_on_a_stream(mover: Mover, src: torch.Tensor, dst: torch.Tensor) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        mover.submit(swap(src, dst)).result(LONG)


def test_memory_that_moved_fails_that_transfer_alone(mover):
    doomed, src, dst, far = device(), device(), host(255), device(255)
    with mover.held():
        one = mover.submit(swap(doomed, dst))
        reads = mover.submit(swap(dst, far))
        overwrites = mover.submit(swap(src, dst))
        doomed.untyped_storage().resize_(0)
    assert isinstance(one.result(LONG).error, ValueError) and one.result().undefined == ()
    assert str(one.result().error).startswith("swap_blocks: src must be in the memory that it had when the transfer")
    assert isinstance(reads.result(LONG).error, TransferFailed)
    assert overwrites.result(LONG).state == "done" and is_moved(src, dst) and is_all(far, 255)


def test_drain_and_poll_and_callbacks(mover):
    pools = [(host(), device()) for _ in range(3)]
    seen: list[object] = []
    sent = [mover.submit(swap(*pair)) for pair in pools]
    sent[0].add_callback(seen.append)
    assert mover.drain([pools[0][1]], timeout=LONG) and sent[0].done()
    mover.poll()  # tells of it, unless it was waited for
    assert seen == [sent[0]]
    assert mover.drain(kvkernels.bind([pools[1][0]]), timeout=LONG) and sent[1].done()
    with mover.held():
        stuck = mover.submit(swap(*pools[0]))
        assert not mover.drain([pools[0][1]], timeout=0.01) and mover.drain([pools[1][1]], timeout=LONG)
    assert mover.drain(timeout=LONG) and stuck.done() and set(mover.poll()) <= {*sent, stuck}


@pytest.mark.parametrize("finish", [True, False])
def test_close(finish):
    pairs = torch.arange(64).repeat(2, 1).T
    src, dst = host(blocks=64), device(255, blocks=64)
    mover = Mover("cuda:0", chunk_bytes=PAGE)
    first = mover.submit(swap(src, dst, pairs), priority="store")
    last = mover.submit(swap(dst, host(), PAIRS), priority="store")
    while first.state == "queued":
        pass
    mover.close(finish=finish)
    states = {first.result().state, last.result().state}
    if finish:
        assert states == {"done"} and is_moved(src, dst, pairs)
    elif first.result().state == "cancelled":
        assert states == {"cancelled"} and [t.data_ptr() for t in first.result().undefined] == [dst.data_ptr()]
        assert "the mover was closed" in str(first.result().error)
    with pytest.raises(RuntimeError, match="the mover must be open, got a closed one"):
        mover.submit(swap(src, dst, pairs))
    mover.close()


def test_close_while_it_is_held_in_the_middle():
    src, dst = host(blocks=64), device(255, blocks=64)
    mover = Mover("cuda:0", chunk_bytes=PAGE)
    one = mover.submit(swap(src, dst, torch.arange(64).repeat(2, 1).T))
    while one.state == "queued":
        pass
    with mover.held():
        mover.close(finish=False)
    assert one.result().state in ("cancelled", "done")


def test_a_trace_is_of_streams_by_the_devices_time(mover, tmp_path):
    sent = [
        mover.submit(swap(*sides), priority=priority)
        for sides, priority in itertools.product([(host(), device()), (device(), host())], ("load", "store"))
    ]
    assert mover.drain(timeout=LONG)
    assert mover.trace(tmp_path / "trace.json") == 4
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["cuda:0 d2h load", "cuda:0 d2h store", "cuda:0 h2d load", "cuda:0 h2d store"]
    for event in (e for e in events if e["ph"] == "X"):
        assert names[event["tid"]].endswith(event["name"].split()[0])
        result = next(one for one in sent if one.ticket == event["args"]["transfer"]).result()
        assert event["dur"] / 1e6 == pytest.approx(result.seconds, abs=1e-3) and result.queue_seconds > -1e-3


def test_works_under_inference_mode_and_counts_versions(mover):
    src, dst = host(), device()
    before = dst._version
    mover.submit(swap(src, dst)).wait(LONG)
    assert dst._version == before + 1
    with torch.inference_mode():
        mine, other = host(), device(255)
        assert mover.submit(swap(mine, other)).result(LONG).state == "done" and is_moved(mine, other)


def test_several_threads_with_streams_of_their_own(mover):
    failures: list[BaseException] = []

    def engine() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                pool, kept = device(), [host(255) for _ in range(10)]
                values = [host() for _ in range(10)]
                for value, out in zip(values, kept, strict=True):
                    mover.submit(swap(value, pool)).block_stream()
                    mover.submit(swap(pool, out), priority="store")
                    mover.poll()
                assert mover.drain([pool], timeout=LONG)
                for value, out in zip(values, kept, strict=True):
                    wanted = value[PAIRS[:, 0]][torch.argsort(PAIRS[:, 1])]
                    assert torch.equal(out[PAIRS[:, 1]], wanted[PAIRS[:, 0]])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=engine) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


ENDS = {
    "held": "mover._owner.hold(True)",
    "on its way": "sent[20].block_stream(); threading.Thread(target=sent[-1].wait, daemon=True).start()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_exits_with_transfers_in_flight_neither_hangs_nor_crashes(end):
    program = f"""
import sys, threading
sys.path.append({str(Path(__file__).resolve().parents[1])!r})
from torch_cuda.transfers import device, host, swap
from kvkernels.transfer import Mover
mover, src, dst = Mover("cuda:0", chunk_bytes=64), host(), device()
sent = [mover.submit(swap(src, dst), priority="store") for _ in range(30)]
{ENDS[end]}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_current_device_and_stream_of_nobody_is_changed(mover):
    with on_stream() as stream:
        mover.submit(swap(host(), device())).wait(LONG)
        assert torch.cuda.current_stream() == stream and torch.cuda.current_device() == 0
