"""The books of a host pool: against a slow model, and what failures, resets and small budgets do to them."""

from __future__ import annotations

import random

import pytest

from kvkernels.connectors.books import HostBooks
from kvkernels.memory import NotCachedError, NotHeldError


def stored(books, keys, parents=None):
    reserved = books.reserve(keys, parents or [None] * len(keys))
    assert reserved is not None
    books.commit(reserved.keys)
    return reserved


def test_a_chunk_is_found_once_its_copy_has_ended():
    books = HostBooks(4)
    reserved = books.reserve([b"a", b"b"], [None, b"a"])
    assert reserved.keys == [b"a", b"b"] and reserved.chunks == [0, 1] and reserved.evicted == []
    assert books.state(b"a") == "pending"
    with pytest.raises(NotCachedError):
        books.hold([b"a"])
    # Out of order, as a set of vLLM's is.
    assert books.commit({b"b", b"a"}) == [b"a", b"b"]
    assert books.state(b"a") == "cached" and books.state(b"c") == "missing"
    assert books.hold([b"b", b"a"]) == [1, 0]
    books.release([b"a", b"b"])
    with pytest.raises(NotHeldError):
        books.release([b"a"])


def test_what_is_cached_or_being_stored_is_not_stored_again():
    books = HostBooks(8)
    stored(books, [b"a"])
    first = books.reserve([b"b"], [b"a"])
    assert books.reserve([b"a", b"b", b"c", b"c"], [None, b"a", b"b", b"b"]).keys == [b"c"]
    assert books.reserve([b"a"], [None]).keys == []
    books.commit(first.keys)
    assert books.stats() == {"chunks": 8, "cached": 2, "pending": 1, "free": 5, "evicted": 0}


def test_s3_an_oversize_entry_is_refused_cleanly():
    books = HostBooks(3)
    stored(books, [b"a", b"b"], [None, b"a"])
    before = books.stats()
    assert books.reserve([b"%d" % i for i in range(4)], [None] * 4) is None
    assert books.stats() == before and books.state(b"a") == books.state(b"b") == "cached"


def test_s3_the_cache_is_bounded_and_the_least_recently_used_leaves_first():
    books = HostBooks(3)
    for key in (b"a", b"b", b"c"):
        stored(books, [key])
    books.release([b"a"]) if books.hold([b"a"]) else None
    assert stored(books, [b"d"]).evicted == [b"b"]
    assert books.stats()["cached"] == 3


def test_neither_what_is_asked_for_nor_what_is_before_it_makes_room():
    books = HostBooks(3)
    stored(books, [b"a", b"b"], [None, b"a"])
    stored(books, [b"x"])
    books.reserve([b"a"], [None])
    # b is the least recently used leaf, and asked for; x must go.
    assert books.reserve([b"a", b"b", b"c"], [None, b"a", b"b"]).evicted == [b"x"]
    # Now a and b stand before what is being stored; nothing may go.
    assert books.reserve([b"c", b"d"], [b"b", b"b"]) is None


def test_what_a_copy_reads_is_never_evicted():
    books = HostBooks(2)
    stored(books, [b"a", b"b"])
    books.hold([b"a"])
    assert stored(books, [b"c"]).evicted == [b"b"]
    books.hold([b"c"])
    assert books.reserve([b"d"], [None]) is None
    books.release([b"c"])
    assert stored(books, [b"d"]).evicted == [b"c"]
    assert books.state(b"a") == "cached"


def test_a_store_that_failed_is_forgotten_and_its_chunk_free():
    books = HostBooks(2)
    reserved = books.reserve([b"a", b"b"], [None, b"a"])
    assert books.fail([b"a", b"b"]) == []
    assert books.state(b"a") == "missing" and books.stats()["free"] == 0 and books.is_draining
    assert books.commit(reserved.keys) == []
    assert books.stats()["free"] == 2 and not books.is_draining
    assert stored(books, [b"a"]).keys == [b"a"]


def test_a_load_that_failed_drops_its_keys_and_all_behind_them_once_nobody_reads_them():
    books = HostBooks(4)
    stored(books, [b"a", b"b", b"c"], [None, b"a", b"b"])
    books.hold([b"a", b"b"])
    books.hold([b"b"])
    assert set(books.fail([b"b"])) == {b"b", b"c"}
    assert [books.state(key) for key in (b"a", b"b", b"c")] == ["cached", "missing", "missing"]
    assert books.stats()["free"] == 2
    books.release([b"a", b"b"])
    assert books.stats()["free"] == 2
    books.release([b"b"])
    assert books.stats()["free"] == 3


def test_a_reset_gives_out_nothing_that_a_copy_uses():
    books = HostBooks(4)
    stored(books, [b"a", b"b"])
    held = books.hold([b"a"])
    writing = books.reserve([b"c"], [None]).chunks
    books.reset()
    assert [books.state(key) for key in (b"a", b"b", b"c")] == ["missing"] * 3 and books.is_draining
    # The same keys again, while the old chunks are in use: c is not stored twice.
    again = books.reserve([b"a", b"c"], [None, None])
    assert again.keys == [b"a"] and not {*held, *writing} & set(again.chunks)
    assert books.reserve([b"x", b"y"], [None, None]) is None
    books.release([b"a"])
    assert books.commit([b"c"]) == []
    assert not books.is_draining
    assert set(books.reserve([b"x", b"y"], [None, None]).chunks) <= {*held, *writing, 0, 1, 2, 3}


def test_a_chunk_whose_predecessor_left_meanwhile_is_a_beginning():
    books = HostBooks(4)
    stored(books, [b"a"])
    reserved = books.reserve([b"b"], [b"a"])
    books.fail([b"a"])
    assert books.commit(reserved.keys) == [b"b"] and books.state(b"b") == "cached"


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "arc", "s3fifo", "sieve", "chain"])
def test_random_operations_agree_with_a_slow_model(policy):
    """The model has no policy: it takes over what was evicted, and says what may not have been."""
    draw = random.Random(3)
    books, chunks = HostBooks(12, policy), 12
    cached: dict[bytes, int] = {}
    pending: dict[bytes, tuple[int, bool]] = {}  # chunk, is lost
    reading: list[list[tuple[bytes, int]]] = []
    draining: list[int] = []  # chunks of dropped keys that somebody reads
    for _ in range(3000):
        step = draw.random()
        keys = [b"%d" % number for number in draw.sample(range(30), draw.randrange(1, 5))]
        held = {key for group in reading for key, _ in group}
        if step < 0.3:
            missing = [key for key in keys if key not in cached and key not in pending]
            reserved = books.reserve(keys, [None] * len(keys))
            free = chunks - len(cached) - len(pending) - len(set(draining))
            may_go = [key for key in cached if key not in held and key not in keys]
            if reserved is None:
                assert len(missing) - free > len(may_go)
                continue
            assert reserved.keys == missing and len(reserved.evicted) == max(0, len(missing) - free)
            assert set(reserved.evicted) <= set(may_go)
            for key in reserved.evicted:
                del cached[key]
            in_use = {*cached.values(), *draining, *(chunk for chunk, _ in pending.values())}
            assert not in_use & set(reserved.chunks) and len(set(reserved.chunks)) == len(missing)
            pending.update({key: (chunk, False) for key, chunk in zip(missing, reserved.chunks, strict=True)})
        elif step < 0.55 and pending:
            ended = draw.sample(sorted(pending), draw.randrange(1, len(pending) + 1))
            draining_keys = {key for group in reading for key, chunk in group if cached.get(key) != chunk}
            expected = {key for key in ended if not pending[key][1] and key not in draining_keys}
            assert set(books.commit(ended)) == expected
            for key in ended:
                chunk, _ = pending.pop(key)
                if key in expected:
                    cached[key] = chunk
        elif step < 0.7:
            keys = [key for key in keys if key in cached]
            assert books.hold(keys) == [cached[key] for key in keys]
            if keys:
                reading.append([(key, cached[key]) for key in keys])
        elif step < 0.85 and reading:
            group = reading.pop(draw.randrange(len(reading)))
            books.release([key for key, _ in group])
        elif step < 0.98:
            assert set(books.fail(keys)) == {key for key in keys if key in cached and key not in pending}
            for key in keys:
                if key in pending:
                    pending[key] = (pending[key][0], True)
                else:
                    cached.pop(key, None)
        else:
            books.reset()
            cached.clear()
            pending = {key: (chunk, True) for key, (chunk, _) in pending.items()}
        draining = [chunk for group in reading for key, chunk in group if cached.get(key) != chunk]
        stats = books.stats()
        assert (stats["cached"], stats["pending"]) == (len(cached), len(pending))
        assert stats["free"] == chunks - len(cached) - len(pending) - len(set(draining))
        for number in range(30):
            key = b"%d" % number
            is_pending = key in pending and not pending[key][1]
            assert books.state(key) == ("cached" if key in cached else "pending" if is_pending else "missing")
    assert stats["evicted"] > 20


@pytest.mark.parametrize("chunks,policy", [(0, "lru"), (4, "mru")])
def test_books_that_make_no_sense_are_refused(chunks, policy):
    with pytest.raises(ValueError, match=r"must be|at least"):
        HostBooks(chunks, policy)
