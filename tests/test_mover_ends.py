"""How a mover's transfers end: failures, cancelling, waiting, polling, closing, and what is kept alive until then."""

from __future__ import annotations

import gc
import logging
import pickle
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from mover_jobs import LONG, ids, pool, swap

import kvkernels
from kvkernels.registration import LIBRARY
from kvkernels.transfer import (
    Mover,
    PreparedJob,
    SwapJob,
    TransferCancelled,
    TransferFailed,
)

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")


@pytest.fixture
def mover():
    with Mover(lanes=1) as one:
        yield one


def test_a_failed_transfer_fails_alone_with_the_ops_error(mover):
    doomed, src, dst = pool(), pool(), pool(fill=0)
    copy = kvkernels.prepare([doomed], [pool()])
    with mover.held():
        one = mover.submit(swap(doomed, dst, (0, 0)))
        other = mover.submit(PreparedJob(copy, ids((0, 0))))
        fine = mover.submit(swap(src, dst, (1, 1)))
        doomed.untyped_storage().resize_(0)
    assert one.result(LONG).state == "failed" and fine.result(LONG).state == "done"
    assert str(one.result().error) == (
        "swap_blocks: src must be in the memory that it had when the transfer was submitted, got a storage that was "
        "resized, freed or moved since"
    )
    assert str(other.result(LONG).error).startswith(
        "PreparedCopy.run: src[0] must be in the memory that it had when the"
    )
    assert isinstance(one.result().error, ValueError) and one.result().undefined == ()
    assert not dst[0].any() and torch.equal(dst[1], src[1])
    assert mover.submit(swap(src, dst, (2, 2))).result(LONG).state == "done"


def test_a_destination_that_moved_is_seen(mover):
    src, dst = pool(), pool()
    with mover.held():
        one = mover.submit(swap(src, dst, (0, 0)))
        dst.untyped_storage().resize_(1 << 20)
    assert "dst must be in the memory" in str(one.result(LONG).error)


def test_no_chunk_is_copied_before_the_whole_transfer_was_checked():
    with Mover(lanes=3, chunk_bytes=64) as mover:
        for _ in range(100):
            src, dst = pool(64, 64), pool(64, 64, fill=0)
            with mover.held():
                one = mover.submit(swap(src, dst, *((i, i) for i in range(64))))
                src.untyped_storage().resize_(0)
            assert one.result(LONG).state == "failed" and one.result().undefined == () and not dst.any()


def test_dependants_fail_naming_it_and_those_that_overwrite_go_on(mover):
    doomed, src, mid, far = pool(), pool(), pool(), pool(fill=0)
    with mover.held():
        one = mover.submit(swap(doomed, mid, (0, 0)))
        reads = mover.submit(swap(mid, far, (0, 0)))
        next_of_it = mover.submit(swap(far, pool(), (0, 0)))
        named = mover.submit(swap(src, far, (1, 1)), after=[one])
        overwrites = mover.submit(swap(src, mid, (3, 0)))
        apart = mover.submit(swap(mid, far, (5, 5)))
        doomed.untyped_storage().resize_(0)
    assert isinstance(reads.result(LONG).error, TransferFailed)
    words = f"Transfer {reads.ticket}: transfer {one.ticket}, which this one needs, failed: swap_blocks: src must be in"
    assert str(reads.result().error).startswith(words)
    assert str(next_of_it.result(LONG).error) == (
        f"Transfer {next_of_it.ticket}: transfer {reads.ticket}, which this one needs, failed"
    )
    assert f"transfer {one.ticket}," in str(named.result(LONG).error)
    assert overwrites.result(LONG).state == "done" and apart.result(LONG).state == "done"
    assert torch.equal(mid[0], src[3]) and not far[:2].any() and torch.equal(far[5], mid[5])
    late = mover.submit(swap(src, far, (1, 1)), after=[one])
    assert isinstance(late.result(LONG).error, TransferFailed)


def test_a_cancelled_transfer_never_runs_and_later_cancel_says_so(mover):
    src, dst = pool(), pool(fill=0)
    with mover.held():
        one = mover.submit(swap(src, dst, (0, 0)))
        reads = mover.submit(swap(dst, pool(), (0, 0)))
        assert one.cancel() and not one.cancel() and one.state == "cancelled"
    assert isinstance(one.result(LONG).error, TransferCancelled) and one.result().undefined == ()
    assert "which this one needs, was cancelled" in str(reads.result(LONG).error)
    assert not dst.any()
    done = mover.submit(swap(src, dst, (0, 0)))
    assert done.result(LONG).state == "done" and not done.cancel() and done.result().state == "done"


def test_a_transfer_that_runs_is_not_cancelled():
    src, dst = pool(64, 1 << 20), pool(64, 1 << 20, fill=0)
    with Mover(lanes=1, chunk_bytes=1 << 20) as mover:
        one = mover.submit(swap(src, dst, *((i, i) for i in range(64))))
        while one.state == "queued":
            pass
        assert not one.cancel() and one.result(LONG).state == "done" and torch.equal(src, dst)


def test_after_is_an_order(mover):
    with mover.held():
        store = mover.submit(swap(pool(), pool(), (0, 0)), priority="store")
        other = mover.submit(swap(pool(), pool(), (0, 0)), priority="store")
        load = mover.submit(swap(pool(), pool(), (0, 0)), priority="expedited", after=[other])
    assert mover.drain(timeout=LONG)
    ends = sorted((one._owner and one.result().queue_seconds, one.ticket) for one in (store, other, load))
    assert [c[0] for c in mover._owner.trace()] == [other.ticket, load.ticket, store.ticket], ends


def test_poll_gives_what_ended_since_but_not_what_was_waited_for(mover):
    first, second, third = (mover.submit(swap(pool(), pool(), (0, 0))) for _ in range(3))
    second.wait(LONG)
    while not third.done():
        pass
    assert mover.poll() == [first, third] and mover.poll() == []


def test_poll_gives_hundreds_in_order(mover):
    sent = [mover.submit(swap(pool(), pool(), (0, 0))) for _ in range(700)]
    while not sent[-1].done():
        pass
    assert mover.poll() == sent


def test_wait_takes_a_timeout(mover):
    with mover.held():
        one = mover.submit(swap(pool(), pool(), (0, 0)))
        began = time.monotonic()
        assert not one.wait(0) and not one.wait(0.12) and time.monotonic() - began >= 0.12
        with pytest.raises(TimeoutError, match=r"it must end within 0\.01 s, got one that is queued"):
            one.result(0.01)
        assert not one.done() and not mover.drain(timeout=0.01)
    assert one.wait(LONG) and one.done() and one.wait(0) and one.wait(float("inf")) and one.wait(-1)


def test_a_wait_is_woken_by_the_end(mover, monkeypatch):
    """It does not find out by looking now and then."""
    monkeypatch.setattr("kvkernels.transfer.transfer._SLICE_NS", 10**18)
    for _ in range(9):
        with mover.held():
            one = mover.submit(swap(pool(), pool(), (0, 0)))
            waits = threading.Thread(target=one.wait, daemon=True)
            waits.start()
            time.sleep(0.005)
        waits.join(LONG)
        assert not waits.is_alive()


def test_callbacks_come_once_from_poll_or_wait(mover, caplog):
    seen: list[object] = []
    with mover.held():
        one, other = (mover.submit(swap(pool(), pool(), (0, 0))) for _ in range(2))
        one.add_callback(lambda transfer: 1 / 0)
        one.add_callback(seen.append)
        other.add_callback(seen.append)
    with caplog.at_level(logging.ERROR, logger="kvkernels"):
        one.wait(LONG)
    assert seen == [one] and "ZeroDivisionError" in caplog.text
    while not other.done():
        pass
    assert seen == [one]
    assert mover.poll() == [other] and seen == [one, other]
    other.add_callback(seen.append)
    assert seen == [one, other, other]
    one.wait(LONG), mover.poll()
    assert len(seen) == 3


def test_a_callback_may_submit(mover):
    src, dst = pool(), pool(fill=0)
    sent: list[object] = []
    one = mover.submit(swap(src, dst, (0, 0)))
    one.add_callback(lambda transfer: sent.append(mover.submit(swap(dst, dst, (0, 1)), after=[transfer])))
    one.wait(LONG)
    assert sent[0].result(LONG).state == "done" and torch.equal(dst[1], src[0])


def test_drain_waits_for_what_touches_the_pools(mover):
    src, dst, other = pool(), pool(), pool()
    blocked = [pool(), pool()]
    with mover.held():
        stuck = mover.submit(swap(*blocked, (0, 0)))
        assert mover.drain([src, dst], timeout=LONG) and mover.drain(kvkernels.bind([other]), timeout=LONG)
        assert not mover.drain([blocked[0]], timeout=0.01) and not mover.drain([blocked[1][3:]], timeout=0.01)
        assert not mover.drain(kvkernels.bind([blocked[1]]), timeout=0.01)
    assert mover.drain([blocked[0]], timeout=LONG) and stuck.done()


def test_close_finishes():
    mover = Mover(lanes=1)
    src, dst = pool(), pool(fill=0)
    with mover.held():
        one = mover.submit(swap(src, dst, (0, 0)))
        mover.close()
    assert one.result().state == "done" and torch.equal(dst[0], src[0])
    with pytest.raises(RuntimeError, match="the mover must be open, got a closed one"):
        mover.submit(swap(src, dst, (0, 0)))
    mover.close()
    assert mover.poll() == [] and mover.stats()["transfers"][1]["done"] == 1


def test_close_cancels_and_says_what_is_undefined():
    mover = Mover(lanes=1, chunk_bytes=1 << 20)
    src, dst = pool(64, 1 << 20), pool(64, 1 << 20, fill=0)
    running = mover.submit(swap(src, dst, *((i, i) for i in range(64))), priority="store")
    queued = mover.submit(swap(pool(), pool(), (0, 0)), priority="store", after=[running])
    while running.state == "queued":
        pass
    mover.close(finish=False)
    assert running.result().state == queued.result().state == "cancelled"
    assert [t.data_ptr() for t in running.result().undefined] == [dst.data_ptr()] and queued.result().undefined == ()
    assert isinstance(running.result().error, TransferCancelled) and "the mover was closed" in str(
        running.result().error
    )
    assert dst.any() and not torch.equal(src, dst)


def test_close_while_what_runs_is_held():
    """No chunk of it is being copied then that would end it."""
    src, dst = pool(64, 1 << 20), pool(64, 1 << 20, fill=0)
    for _ in range(5):
        mover = Mover(lanes=1, chunk_bytes=1 << 20)
        one = mover.submit(swap(src, dst, *((i, i) for i in range(64))), priority="store")
        while one.state == "queued":
            pass
        with mover.held():
            while len(mover._owner.trace()) < 1:
                pass
            time.sleep(0.005)  # for the chunk at hand
            mover.close(finish=False)
        assert one.result().state == "cancelled" and one.result().undefined[0] is dst


def test_a_with_block_that_raises_cancels():
    with pytest.raises(KeyError), Mover(lanes=1) as mover:
        mover._owner.hold(True)
        one = mover.submit(swap(pool(), pool(), (0, 0)))
        raise KeyError
    assert one.result().state == "cancelled"


def test_tensors_are_kept_alive_until_the_end_and_no_longer(mover):
    src, dst, mapping = pool(), pool(fill=0), ids((3, 1))
    expected, watched = src[3].clone(), weakref.ref(src.untyped_storage())
    src_watch = weakref.ref(src)
    with mover.held():
        one = mover.submit(SwapJob(src, dst, 64, mapping))
        mapping.fill_(0)  # was read
        del src
        gc.collect()
        junk = [pool() for _ in range(100)]
    assert one.result(LONG).state == "done" and torch.equal(dst[1], expected) and junk
    del one
    gc.collect()
    mover.poll()
    assert src_watch() is None or watched() is None


def test_unbind_and_release_leave_what_was_submitted(mover):
    src, dst = pool(), pool(fill=0)
    bound = kvkernels.bind([src])
    with mover.held():
        one = mover.submit(PreparedJob(kvkernels.prepare(bound, [dst]), ids((3, 1))))
        bound.unbind()
        expected = src[3].clone()
        del src, bound
        gc.collect()
    assert one.result(LONG).state == "done" and torch.equal(dst[1], expected)


def test_works_under_inference_mode_and_counts_versions(mover):
    src, dst = pool(), pool(fill=0)
    before = dst._version
    mover.submit(swap(src, dst, (0, 0))).wait(LONG)
    assert dst._version == before + 1
    with torch.inference_mode():
        mine, other = pool(), pool(fill=0)
        assert mover.submit(swap(mine, other, (0, 0))).result(LONG).state == "done"
        assert torch.equal(mine[0], other[0])
    learns = torch.zeros(8, 16, requires_grad=True)
    with pytest.raises(ValueError, match="must not require a gradient where gradients are recorded"):
        mover.submit(swap(torch.ones(8, 16), learns, (0, 0)))
    with torch.no_grad():
        assert mover.submit(swap(torch.ones(8, 16), learns, (0, 0))).result(LONG).state == "done"
    assert learns[0].eq(1).all()


def test_explain_inside_a_submit_and_a_submit_beside_ops(mover):
    src, dst = pool(), pool(fill=0)
    with mover.held():
        one = mover.submit(swap(src, dst, (0, 0)))
        kvkernels.swap_blocks(src, dst, 64, ids((1, 1)))  # at once, as ever
        assert torch.equal(dst[1], src[1]) and not dst[0].any()
        assert kvkernels.explain("swap_blocks", src, dst, 64, ids((2, 2))).executor == "cpu"
    assert one.result(LONG).state == "done"


def test_copies_are_counted_with_the_ops():
    before = kvkernels.counters()["cpu"]
    with Mover(lanes=2, chunk_bytes=1 << 16) as mover:
        mover.submit(swap(pool(4, 1 << 18), pool(4, 1 << 18), (0, 0), (2, 1))).wait(LONG)
    after = kvkernels.counters()["cpu"]
    assert {key: after[key] - before[key] for key in ("calls", "descriptors", "bytes")} == {
        "calls": 1, "descriptors": 2, "bytes": 1 << 19,
    }  # fmt: skip


def test_several_threads_submit_and_wait(mover):
    pools = [(pool(), pool(fill=0)) for _ in range(4)]

    def send(src: torch.Tensor, dst: torch.Tensor) -> None:
        for i in range(200):
            mover.submit(swap(src, dst, (i % 8, (i * 3) % 8))).wait(LONG)

    threads = [threading.Thread(target=send, args=one) for one in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for src, dst in pools:
        assert torch.equal(dst[[(i * 3) % 8 for i in range(8)]], src)


def test_a_mover_that_is_dropped_ends():
    mover = Mover(lanes=1)
    owner = weakref.ref(mover._owner)
    one = mover.submit(swap(pool(), pool(), (0, 0)))
    del mover
    assert one.result(LONG).state == "done"  # the transfer keeps it
    del one
    gc.collect()
    assert owner() is None
    assert not any("kvk-" in (t / "comm").read_text() for t in Path("/proc/self/task").iterdir())


def test_movers_and_transfers_are_not_copied(mover):
    one = mover.submit(swap(pool(), pool(), (0, 0)))
    for what in (mover, one):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(what)
    one.wait(LONG)
    assert repr(one) == f"Transfer({one.ticket}, load, done)"
