"""Pages to another pool: the rows of a KV transfer by name, what a caller sees, and what is refused beforehand."""

from __future__ import annotations

import os
import pickle
import threading

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("xxhash")

from remote_cases import SECRET, WAIT_S, Sharded, pair, random_bytes, until

from kvkernels import KVCache, KVLayout
from kvkernels.transfer.remote import (
    CancelledError,
    ChecksumError,
    DeadlineError,
    KVTransferEngine,
    LengthError,
    Peer,
    PeerLostError,
    PlanError,
    RefusedError,
    RemoteError,
    RemotePool,
)  # fmt: skip
from kvkernels.transfer.remote import sender as sender_module
from kvkernels.transfer.remote.wire import Conversion, ring_of

BLOCKS, PAGE = 64, 96


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("KVKERNELS_REMOTE_SECRET", SECRET.decode())


@pytest.fixture
def pages():
    """A source with gaps between its rows, a destination with other gaps and guard bytes."""
    src = [random_bytes(BLOCKS, PAGE + 32, seed=i)[:, :PAGE] for i in range(3)]
    whole = [random_bytes(BLOCKS + 2, PAGE + 16, seed=10 + i) for i in range(3)]
    return src, [one[1:-1, :PAGE] for one in whole], whole


def settled(*pools: RemotePool) -> None:
    """No transfer has left anything behind."""
    for pool in pools:
        until(lambda pool=pool: pool.stats()["receiving_blocks"] == pool.stats()["sending_blocks"] == 0)


def test_pages_arrive_in_their_blocks_and_nothing_else_changes(pages):
    src, dst, whole = pages
    before, source = [one.clone() for one in whole], [one.clone() for one in src]
    with pair(src, dst, segments=2, segment_bytes=3 * PAGE + 50) as (one, other, peer):
        there = other.receive_blocks("a", torch.tensor([5, 0, 63, 7, 8]))
        here = one.send_blocks(peer, "a", [1, 60, 1, 3, 2], timeout_s=WAIT_S)
        sent, received = here.result(WAIT_S), there.result(WAIT_S)
        assert (sent.outcome, sent.pages, sent.bytes, sent.retries, sent.error) == ("committed", 5, 15 * PAGE, 0, None)
        assert (received.outcome, received.pages, received.bytes, received.error) == ("visible", 5, 15 * PAGE, None)
        assert sent.seconds > 0 and received.seconds > 0
        settled(one, other)
    for now, then, pool, origin in zip(whole, before, dst, source, strict=True):
        expected = then.clone()
        expected[1:-1, :PAGE][[5, 0, 63, 7, 8]] = origin[[1, 60, 1, 3, 2]]
        assert torch.equal(now, expected) and pool.shape == (BLOCKS, PAGE)
    assert all(torch.equal(a, b) for a, b in zip(src, source, strict=True))


@pytest.mark.parametrize("segment_bytes", [1, PAGE, 2 * PAGE + 1, 7 * PAGE, 1 << 20])
def test_blocks_that_are_larger_than_a_segment_go_in_parts(pages, segment_bytes):
    src, dst, _ = pages
    with pair(src, dst, segments=1, segment_bytes=segment_bytes, verify="end") as (one, other, peer):
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3))
        there = other.receive_blocks("a", order, timeout_s=WAIT_S)
        assert one.send_blocks(peer, "a", range(BLOCKS), timeout_s=WAIT_S).result(WAIT_S).outcome == "committed"
        assert there.result(WAIT_S).outcome == "visible"
    assert all(torch.equal(b[order], a) for a, b in zip(src, dst, strict=True))


def test_many_transfers_both_ways_at_a_time(pages):
    src, dst, _ = pages
    first, second = [one.clone() for one in src], [one.clone() for one in dst]
    with pair(src, dst, segments=3, segment_bytes=10 * PAGE) as (one, other, peer):
        back = Peer(*one.address)
        waits = []
        for i in range(16):
            waits.append(other.receive_blocks(f"to {i}", [i, i + 16], timeout_s=WAIT_S))
            waits.append(one.receive_blocks(f"from {i}", [i, i + 16], timeout_s=WAIT_S))
            waits.append(one.send_blocks(peer, f"to {i}", [32 + i, 48 + i], timeout_s=WAIT_S))
            waits.append(other.send_blocks(back, f"from {i}", [32 + i, 48 + i], timeout_s=WAIT_S))
        assert {wait.result(WAIT_S).outcome for wait in waits} == {"committed", "visible"}
        assert one.stats()["sent_transfers"] == one.stats()["received_transfers"] == 16
    for mine, theirs, a, b in zip(src, dst, first, second, strict=True):
        assert torch.equal(theirs[:32], a[32:]) and torch.equal(mine[:32], b[32:])
        assert torch.equal(theirs[32:], b[32:]) and torch.equal(mine[32:], a[32:])


@pytest.mark.parametrize("patterns", [("NHD", "HND"), ("HND", "NHD"), ("NHD", "blocks first"), ("blocks first", "HND")])
@pytest.mark.parametrize("ranks", [(4, 2), (2, 1), (1, 1), (2, 4)])
def test_shards_become_other_shards(ranks, patterns):
    """Each receiver's ranks get theirs from every sender that has a head of theirs."""
    blocks, (senders, receivers) = 6, ranks
    src, dst = Sharded(patterns[0], senders, blocks), Sharded(patterns[1], receivers, blocks)
    array = torch.randn(2, 2, blocks, 4, 4, 8).to(torch.float16)
    src.set(array)
    sources = [RemotePool(cache, name=f"sender {rank}", segment_bytes=2048) for rank, cache in enumerate(src.caches)]
    targets = [RemotePool(cache, verify="end") for cache in dst.caches]
    waits = []
    for rank, target in enumerate(targets):
        wanted = range(rank * senders // receivers, max(rank * senders // receivers + 1,
                                                        (rank + 1) * senders // receivers))  # fmt: skip
        waits.append(target.receive_blocks("r", [5, 0, 3], writers=len(wanted), timeout_s=WAIT_S))
        waits += [
            sources[one].send_blocks(Peer(*target.address), "r", [1, 2, 4], timeout_s=WAIT_S) for one in wanted
        ]  # fmt: skip
    try:
        results = [wait.result(WAIT_S) for wait in waits]
        assert {one.outcome for one in results} == {"committed", "visible"}, results
        got = dst.get(array)
        assert torch.equal(got[:, :, [5, 0, 3]], array[:, :, [1, 2, 4]])
        assert (got[:, :, [1, 2, 4]] == -7).all()
    finally:
        for pool in (*sources, *targets):
            pool.close()


def test_a_page_is_visible_only_when_every_writer_has_brought_its_part_and_a_lost_writer_drops_it():
    src, dst = Sharded("NHD", 2, 4), Sharded("HND", 1, 4)
    src.set(torch.randn(2, 2, 4, 4, 4, 8).to(torch.float16))
    with (
        RemotePool(src.caches[0], name="a") as a, RemotePool(src.caches[1], name="b") as b,
        RemotePool(dst.caches[0], rejoin_s=0.2) as target,
    ):  # fmt: skip
        peer = Peer(*target.address)
        there = target.receive_blocks("r", [0], writers=2, timeout_s=WAIT_S)
        first = a.send_blocks(peer, "r", [1], timeout_s=WAIT_S)
        until(lambda: a.stats()["links"] and target.stats()["rings"])
        assert not there.wait(0.1) and not first.done()
        second = b.send_blocks(peer, "r", [1], timeout_s=WAIT_S)
        assert [one.result(WAIT_S).outcome for one in (there, first, second)] == ["visible", "committed", "committed"]

        there = target.receive_blocks("s", [0], writers=2, timeout_s=WAIT_S)
        first = a.send_blocks(peer, "s", [1], timeout_s=WAIT_S)
        until(lambda: target._receiver._live)
        a.close()
        assert there.result(WAIT_S).outcome == "dropped" and target.stats()["dropped_pages"] == 1
        assert first.result(WAIT_S).outcome in ("failed", "unknown")


def test_writers_that_lack_a_part_are_refused():
    src, dst = Sharded("NHD", 4, 2), Sharded("NHD", 1, 2)
    with RemotePool(src.caches[2]) as one, RemotePool(dst.caches[0]) as target:
        there = target.receive_blocks("r", [0], writers=1)
        sent = one.send_blocks(Peer(*target.address), "r", [0]).result(WAIT_S)
        assert sent.outcome == "failed" and isinstance(sent.error, PlanError)
        assert isinstance(there.result(WAIT_S).error, PlanError)
        assert all((tensor == -7).all() for tensor in dst.caches[0].tensors)


def test_fetch_the_owner_packs_and_pushes(pages):
    src, dst, _ = pages
    asked = []

    def allow(name, blocks):
        asked.append((name, list(blocks)))
        return 9 not in blocks

    with pair(src, dst, sender={"allow_fetch": allow}, receiver={"name": "decode"}) as (owner, other, _):
        peer = Peer(*owner.address)
        got = other.fetch_blocks(peer, [4, 5, 6], [1, 2, 3], timeout_s=WAIT_S).result(WAIT_S)
        assert (got.outcome, got.pages) == ("visible", 3)
        assert all(torch.equal(b[1:4], a[4:7]) for a, b in zip(src, dst, strict=True))
        refused = other.fetch_blocks(peer, [9], [9], timeout_s=WAIT_S).result(WAIT_S)
        assert refused.outcome == "dropped" and isinstance(refused.error, RefusedError)
        beyond = other.fetch_blocks(peer, [BLOCKS], [9], timeout_s=WAIT_S).result(WAIT_S)
        assert isinstance(beyond.error, RefusedError) and "below 64" in str(beyond.error)
        assert asked == [("decode", [4, 5, 6]), ("decode", [9]), ("decode", [BLOCKS])]
        settled(owner, other)
        assert owner.poll() == []


def test_fetch_from_several_owners():
    src, dst = Sharded("HND", 2, 4), Sharded("NHD", 1, 4)
    array = torch.randn(2, 2, 4, 4, 4, 8).to(torch.float16)
    src.set(array)
    with (
        RemotePool(src.caches[0], allow_fetch=True) as a, RemotePool(src.caches[1], allow_fetch=True) as b,
        RemotePool(dst.caches[0]) as target,
    ):  # fmt: skip
        peers = [Peer(*a.address), Peer(*b.address)]
        assert target.fetch_blocks(peers, [3, 1], [0, 2], timeout_s=WAIT_S).result(WAIT_S).outcome == "visible"
    assert torch.equal(dst.get(array)[:, :, [0, 2]], array[:, :, [3, 1]])


def test_nobody_may_fetch_where_it_was_not_allowed(pages):
    src, dst, _ = pages
    with pair(src, dst) as (owner, other, _):
        got = other.fetch_blocks(Peer(*owner.address), [0], [0], timeout_s=WAIT_S).result(WAIT_S)
        assert isinstance(got.error, RefusedError) and "allow_fetch" in str(got.error)


# The rows of a KV transfer, by name.


def test_row_send_and_receive_pages(pages):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, peer):
        sending, receiving = KVTransferEngine(one), KVTransferEngine(other)
        waits = receiving.receive("r", [2, 3], wait=False)
        assert sending.send(peer, "r", [0, 1]).outcome == "committed"
        assert waits.result(WAIT_S).outcome == "visible"
        assert all(torch.equal(b[2:4], a[:2]) for a, b in zip(src, dst, strict=True))


def test_row_retries(pages, monkeypatch):
    """Links that are lost are made again, and the same transfer goes on."""
    src, dst, _ = pages
    with pair(src, dst, sender={"most_retries": 40}) as (one, other, peer):
        there = other.receive_blocks("r", range(BLOCKS), timeout_s=WAIT_S)
        other_address = other.address
        assert other_address == (peer.host, peer.port)
        cuts = iter(range(3))

        written = one._hub.heard

        def heard(link, message):
            if type(message).__name__ == "Accept" and next(cuts, None) is not None:
                raise PeerLostError("cut by the test")
            written(link, message)

        monkeypatch.setattr(one._hub, "heard", heard)
        sent = one.send_blocks(peer, "r", range(BLOCKS), timeout_s=WAIT_S).result(WAIT_S)
        assert (sent.outcome, sent.retries) == ("committed", 3) and one.stats()["retried"] == 3
        assert there.result(WAIT_S).outcome == "visible" and other.stats()["received_transfers"] == 1
    assert all(torch.equal(a, b) for a, b in zip(src, dst, strict=True))


def test_row_checksum_is_sent_and_checked(pages, monkeypatch):
    """One flipped bit in a segment: the page is not taken, and is sent again."""
    src, dst, _ = pages
    pack, flips = sender_module.pack, iter(range(2))

    def flipped(pools, part, ids, packed):
        sums = pack(pools, part, ids, packed)
        if next(flips, None) is not None:
            packed[len(packed) // 2, 5] ^= 4
        return sums

    monkeypatch.setattr(sender_module, "pack", flipped)
    with pair(src, dst) as (one, other, peer):
        there = other.receive_blocks("r", range(8), timeout_s=WAIT_S)
        sent = one.send_blocks(peer, "r", range(8), timeout_s=WAIT_S).result(WAIT_S)
        assert (sent.outcome, sent.retries) == ("committed", 2)
        assert there.result(WAIT_S).outcome == "visible" and other.stats()["refused_segments"] == 2
    assert all(torch.equal(b[:8], a[:8]) for a, b in zip(src, dst, strict=True))


def test_row_checksum_that_never_fits_fails_and_writes_nothing(pages, monkeypatch):
    src, dst, whole = pages
    before = [one.clone() for one in whole]
    pack = sender_module.pack
    monkeypatch.setattr(sender_module, "pack", lambda *given: pack(*given)[:-1] + b"\0")
    with pair(src, dst, sender={"most_retries": 2}) as (one, other, peer):
        there = other.receive_blocks("r", [0, 1], timeout_s=WAIT_S)
        sent = one.send_blocks(peer, "r", [0, 1], timeout_s=WAIT_S).result(WAIT_S)
        assert sent.outcome == "failed" and isinstance(sent.error, ChecksumError)
        assert there.result(WAIT_S).outcome == "dropped"
    assert all(torch.equal(a, b) for a, b in zip(whole, before, strict=True))


@pytest.mark.parametrize("verify", ["ring", "end"])
def test_pages_are_read_back_where_that_is_asked_for(pages, monkeypatch, verify):
    """A byte that goes wrong on its way from the ring into the block, the first time."""
    src, dst, _ = pages
    unpack, flips = Conversion.unpack, iter(range(1))

    def flipped(self, part, packed, ids, pools):
        unpack(self, part, packed, ids, pools)
        if next(flips, None) is not None:
            pools[1][ids[0], 7] ^= 1

    monkeypatch.setattr(Conversion, "unpack", flipped)
    with pair(src, dst, verify=verify) as (one, other, peer):
        there = other.receive_blocks("r", range(8), timeout_s=WAIT_S)
        sent = one.send_blocks(peer, "r", range(8), timeout_s=WAIT_S).result(WAIT_S)
        assert sent.outcome == "committed" and there.result(WAIT_S).outcome == "visible"
        assert sent.retries == other.stats()["refused_segments"] == (verify == "end")
    assert torch.equal(dst[1][:8], src[1][:8]) == (verify == "end")


def test_a_ring_has_fewer_segments_where_pages_are_large():
    layout = KVLayout("B", opaque=True, B=2, page_bytes=(1 << 26) + 1)
    assert ring_of(layout, 8, 1 << 20) == (3, (1 << 26) + 1)
    assert ring_of(layout, 2, 1 << 27) == (2, 1 << 27)
    with pytest.raises(PlanError, match="at most 268435456 bytes"):
        ring_of(KVLayout("B", opaque=True, B=2, page_bytes=(1 << 28) + 1), 8, 1 << 20)


def test_row_a_length_mismatch_is_an_error_and_never_a_resize(pages):
    src, dst, whole = pages
    before = [one.clone() for one in whole]
    with pair(src, dst) as (one, other, peer):
        there = other.receive_blocks("r", [0, 1, 2])
        sent = one.send_blocks(peer, "r", [0, 1]).result(WAIT_S)
        assert sent.outcome == "failed" and isinstance(sent.error, LengthError) and "of 3 pages" in str(sent.error)
        assert isinstance(there.result(WAIT_S).error, LengthError)
        assert one.stats()["failed"] == other.stats()["failed"] == {"length": 1}
    with pair(src, [one[:, : PAGE // 2] for one in dst]) as (one, other, peer):
        other.receive_blocks("r", [0, 1])
        sent = one.send_blocks(peer, "r", [0, 1]).result(WAIT_S)
        assert sent.outcome == "failed" and isinstance(sent.error, PlanError)
    assert all(torch.equal(a, b) for a, b in zip(whole, before, strict=True))


def test_row_no_pickle(pages, monkeypatch):
    """Neither side pickles or unpickles, and what it holds cannot be."""
    src, dst, _ = pages

    def never(*_, **__):
        raise AssertionError("something was pickled")

    for name in ("dumps", "loads", "Pickler", "Unpickler", "dump", "load"):
        monkeypatch.setattr(pickle, name, never)
    with pair(src, dst) as (one, other, peer):
        there = other.receive_blocks("r", [0, 1])
        handle = one.send_blocks(peer, "r", [0, 1])
        assert handle.result(WAIT_S).outcome == "committed" and there.result(WAIT_S).outcome == "visible"
        for what in (one, handle):
            with pytest.raises(TypeError, match="cannot be pickled"):
                what.__reduce__()


def test_row_a_failure_raises_and_is_counted(pages):
    src, dst, _ = pages
    with pair(src, dst, sender={"most_retries": 1}) as (one, other, peer):
        engine = KVTransferEngine(one)
        with pytest.raises(DeadlineError, match="not sent in time"):
            engine.send(peer, "nobody expects it", [0], timeout_s=0.1)
        with pytest.raises(DeadlineError, match="was not there in time"):
            KVTransferEngine(other).receive("nobody sends it", [0], timeout_s=0.1)
        until(lambda: not other.stats()["receiving_blocks"])
        other.close()
        with pytest.raises(PeerLostError):
            engine.send(peer, "r", [0], timeout_s=WAIT_S)
        assert one.stats()["failed"] == {"deadline": 1, "peer_lost": 1} and one.stats()["sent_transfers"] == 0
        assert engine.stats() == one.stats()


# What a caller sees.


def test_the_sender_may_come_first(pages):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, peer):
        here = one.send_blocks(peer, "r", [3], timeout_s=WAIT_S)
        until(lambda: other.stats()["rings"])
        assert not here.wait(0.05)
        assert other.receive_blocks("r", [1], timeout_s=WAIT_S).result(WAIT_S).outcome == "visible"
        assert here.result(WAIT_S).outcome == "committed"


def test_poll_tells_of_an_end_once_and_calls_back(pages):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, peer):
        called = []
        there = other.receive_blocks("r", [1], timeout_s=WAIT_S)
        there.add_callback(lambda transfer: called.append((transfer, threading.current_thread())))
        one.send_blocks(peer, "r", [3], timeout_s=WAIT_S).result(WAIT_S)
        until(there.done)
        assert called == []
        assert other.poll() == [there] and other.poll() == []
        assert called == [(there, threading.current_thread())]
        assert one.poll() == []  # it was waited for
        there.add_callback(lambda transfer: called.append(None))
        assert len(called) == 2
        assert repr(there) == "RemoteTransfer('r', visible)"


def test_a_callback_that_raises_is_logged(pages, caplog):
    src, dst, _ = pages
    with pair(src, dst) as (_, other, _peer):
        there = other.receive_blocks("r", [1], timeout_s=0.05)
        there.add_callback(lambda transfer: 1 // 0)
        assert there.result(WAIT_S).outcome == "dropped"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_cancel(pages, side):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, peer):
        if side == "receiver":
            there = other.receive_blocks("r", [1], writers=1, timeout_s=WAIT_S)
            there.cancel()
            assert isinstance(there.result(WAIT_S).error, CancelledError)
        here = one.send_blocks(peer, "r", [1], timeout_s=WAIT_S)
        until(lambda: other.stats()["rings"])
        here.cancel()
        assert here.result(WAIT_S).outcome == "failed" and isinstance(here.result().error, CancelledError)
        here.cancel()
        settled(one, other)
        # The blocks are free again.
        there = other.receive_blocks("s", [1], timeout_s=WAIT_S)
        assert one.send_blocks(peer, "s", [1], timeout_s=WAIT_S).result(WAIT_S).outcome == "committed"
        assert there.result(WAIT_S).outcome == "visible"


def test_a_block_that_is_being_received_is_no_other_transfers(pages):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, _peer):
        there = other.receive_blocks("r", [1, 2], timeout_s=WAIT_S)
        back = Peer(*one.address)
        with pytest.raises(ValueError, match="send_blocks: blocks must be whole, got block 2"):
            other.send_blocks(back, "s", [5, 2])
        with pytest.raises(ValueError, match="receive_blocks: blocks must be in no other transfer, got block 1"):
            other.receive_blocks("t", [0, 1])
        with pytest.raises(ValueError, match="request must be a new one"):
            other.receive_blocks("r", [9])
        with pytest.raises(ValueError, match="different ones"):
            other.receive_blocks("u", [9, 9])
        assert other.stats()["receiving_blocks"] == 2
        sending = other.send_blocks(back, "s", [9], timeout_s=WAIT_S)
        with pytest.raises(ValueError, match="in no other transfer, got block 9"):
            other.receive_blocks("u", [9])
        sending.cancel()
        there.cancel()
        settled(other)
        other.receive_blocks("t", [0, 1, 9]).cancel()


def test_close_ends_what_is_live(pages):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, peer):
        here = one.send_blocks(peer, "r", [1], timeout_s=WAIT_S)
        there = other.receive_blocks("s", [1], timeout_s=WAIT_S)
        until(lambda: other.stats()["rings"])
        one.close()
        other.close()
        other.close()
        assert here.result(WAIT_S).outcome == "failed" and isinstance(here.result().error, RefusedError)
        assert there.result(WAIT_S).outcome == "dropped"
        for call in (lambda: one.send_blocks(peer, "x", [1]), lambda: other.receive_blocks("x", [1])):
            with pytest.raises(RuntimeError, match="must be open"):
                call()
        assert one.stats()["sending_blocks"] == other.stats()["receiving_blocks"] == 0
        assert one.stats()["links"] == other.stats()["links"] == other.stats()["rings"] == 0


def test_a_transfers_result_may_time_out(pages):
    src, dst, _ = pages
    with pair(src, dst) as (_, other, _peer):
        there = other.receive_blocks("r", [1], timeout_s=WAIT_S)
        with pytest.raises(TimeoutError, match=r"must end within 0.01 s"):
            there.result(0.01)
        assert repr(there) == "RemoteTransfer('r', live)"


SENDS = {
    "no peer": (lambda pool: pool.send_blocks("host", "r", [0]), ValueError, "send_blocks: peer must be a Peer"),
    "no blocks": (lambda pool: pool.send_blocks(Peer("127.0.0.1", 1), "r", []), ValueError, "block_ids must be 1 to"),
    "block": (lambda pool: pool.send_blocks(Peer("127.0.0.1", 1), "r", [64]), IndexError, "below 64, got 64"),
    "negative": (lambda pool: pool.receive_blocks("r", [-1]), IndexError, "below 64, got -1"),
    "float": (lambda pool: pool.receive_blocks("r", [0.5]), ValueError, "must be integers"),
    "request": (lambda pool: pool.receive_blocks("", [0]), ValueError, "request must be 1 to 256"),
    "long": (
        lambda pool: pool.send_blocks(Peer("127.0.0.1", 1), "r" * 257, [0]),
        ValueError,
        "request must be 1 to 256",
    ),
    "writers": (lambda pool: pool.receive_blocks("r", [0], writers=0), ValueError, "writers must be a positive"),
    "time": (lambda pool: pool.receive_blocks("r", [0], timeout_s=0), ValueError, "timeout_s must be seconds"),
    "nan": (lambda pool: pool.receive_blocks("r", [0], timeout_s=float("nan")), ValueError, "seconds above 0"),
    "lengths": (lambda pool: pool.fetch_blocks(Peer("127.0.0.1", 1), [0, 1], [0]), ValueError, "must be 1 ids"),
    "peers": (lambda pool: pool.fetch_blocks([], [0], [0]), ValueError, "peers must be"),
}


@pytest.mark.parametrize("case", SENDS)
def test_what_a_transfer_refuses(pages, case):
    call, kind, text = SENDS[case]
    with RemotePool(pages[0]) as pool:
        with pytest.raises(kind, match=text):
            call(pool)
        assert pool.stats()["receiving_blocks"] == pool.stats()["sending_blocks"] == 0


POOLS = {
    "pools": (dict(pools=[]), "pools must be a KVCache or a list"),
    "sizes": (dict(pools=[torch.zeros(4, 8), torch.zeros(4, 9)]), "as many bytes each"),
    "segments": (dict(segments=0), "segments must be from 1 to 64"),
    "many": (dict(segments=65), "segments must be from 1 to 64"),
    "large": (dict(segment_bytes=(1 << 28) + 1), "segment_bytes must be from 1 to 268435456"),
    "verify": (dict(verify="no"), "verify must be 'ring' or 'end'"),
    "transport": (dict(transport="pigeon"), "transport must be 'tcp' or 'nixl'"),
    "name": (dict(name=""), "name must be 1 to 64"),
    "port": (dict(port=65536), "port must be from 0"),
    "silence": (dict(silence_s=0), "silence_s must be seconds"),
}


@pytest.mark.parametrize("case", POOLS)
def test_what_a_pool_refuses(pages, case):
    given, text = POOLS[case]
    with pytest.raises(ValueError, match=text):
        RemotePool(**{"pools": pages[0], **given})


@pytest.mark.parametrize("port", [0, 65536, "x", True])
def test_what_a_peer_refuses(port):
    with pytest.raises(ValueError, match="Peer: port"):
        Peer("host", port)
    with pytest.raises(ValueError, match="Peer: host"):
        Peer("", 1)


def test_the_secret_is_long_enough_and_said_nowhere(pages, monkeypatch, tmp_path):
    monkeypatch.setenv("KVKERNELS_REMOTE_SECRET", "fifteen letters")
    with pytest.raises(ValueError, match="at least 16 bytes, got 15 from the variable") as raised:
        RemotePool(pages[0])
    assert "fifteen" not in str(raised.value)
    monkeypatch.delenv("KVKERNELS_REMOTE_SECRET")
    with pytest.raises(ValueError, match="got 0 from the variable"):
        RemotePool(pages[0])
    file = tmp_path / "secret"
    file.write_bytes(b"sixteen letters!\n")
    with RemotePool(pages[0], secret_file=file) as pool:
        assert pool.address[0] == "127.0.0.1" and "sixteen" not in repr(pool) + repr(vars(pool))
    file.write_bytes(b"fifteen letters\n")
    with pytest.raises(ValueError, match="got 15 from the file"):
        RemotePool(pages[0], secret_file=file)


def test_caches_with_scales_go_whole():
    scales = KVLayout("L K | B N H", L=2, K=2, B=8, N=4, H=2, dtype=torch.float32)
    layout = KVLayout("L K | B N H D", L=2, K=2, B=8, N=4, H=2, D=16, dtype=torch.uint8, scales=scales)
    sizes = [layout.needed_bytes(i) for i in range(4)] + [scales.needed_bytes(i) for i in range(4)]
    src, dst = ([random_bytes(size, seed=seed + i) for i, size in enumerate(sizes)] for seed in (0, 50))
    caches = [
        KVCache(layout, [one if i < 4 else one.view(torch.float32) for i, one in enumerate(side)])
        for side in (src, dst)
    ]
    with pair(*caches, segment_bytes=1000) as (one, other, peer):
        there = other.receive_blocks("r", range(8), timeout_s=WAIT_S)
        assert one.send_blocks(peer, "r", range(8), timeout_s=WAIT_S).result(WAIT_S).outcome == "committed"
        assert there.result(WAIT_S).outcome == "visible"
    assert all(torch.equal(a, b) for a, b in zip(src, dst, strict=True))


def test_a_child_of_a_fork_has_none_of_it(pages):
    src, dst, _ = pages
    with pair(src, dst) as (one, other, peer):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                one.send_blocks(peer, "r", [0])
            except RuntimeError as error:
                code = 0 if "of its parent's" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        there = other.receive_blocks("r", [1], timeout_s=WAIT_S)
        assert one.send_blocks(peer, "r", [1], timeout_s=WAIT_S).result(WAIT_S).outcome == "committed"
        assert there.result(WAIT_S).outcome == "visible"


def test_errors_have_a_sensible_base_and_a_cause():
    for error, base in ((LengthError, ValueError), (PeerLostError, ConnectionError), (DeadlineError, TimeoutError)):
        assert issubclass(error, RemoteError) and issubclass(error, base) and error.cause != RemoteError.cause
