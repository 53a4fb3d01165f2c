"""The prefix cache: what is found and what leaves, who owns which block when, and errors that change nothing."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import threading
from pathlib import Path

import pytest

from kvkernels import memory
from kvkernels.memory import BlockContext, PrefixCache, make_policy
from kvkernels.memory.eviction import POLICIES

KEYS = [f"a{i}".encode() for i in range(8)]
OTHERS = [f"b{i}".encode() for i in range(8)]


def filled(cap: int | None = None, count: int = 4) -> PrefixCache:
    """A chain of blocks 0, 1, …"""
    cache = PrefixCache(16, cap)
    assert cache.insert(KEYS[:count], range(count)) == []
    return cache


def state(cache: PrefixCache) -> tuple[object, ...]:
    chains = cache._chains
    entries = {key: (one.block, one.parent, one.users, one.holds, one.locks) for key, one in chains.entries.items()}
    draining = {key: (one.block, one.users) for key, one in chains.draining.items()}
    return entries, draining, set(chains.by_block), cache.get_stats(), chains.policy.num_evictable


# Prefixes, the cap and rates.


def test_hashes_are_chained_so_that_no_other_prefix_s_blocks_are_found():
    cache = PrefixCache(4, hash="sha256")
    tail = [7, 7, 7, 7]
    cache.insert(cache.compute_block_hashes([1, 2, 3, 4, *tail]), [0, 1])
    assert cache.lookup(cache.compute_block_hashes([5, 6, 7, 8, *tail])) == ([], 0)
    assert cache.lookup(cache.compute_block_hashes(tail)) == ([], 0)
    assert cache.lookup(cache.compute_block_hashes([1, 2, 3, 4, *tail])) == ([0, 1], 8)


def test_a_partial_tail_is_ignored():
    cache = PrefixCache(4, hash="sha256")
    cache.insert(cache.compute_block_hashes(range(7)), [0])
    assert cache.lookup(cache.compute_block_hashes(range(6))) == ([0], 4)


def test_lookup_stops_at_the_first_miss():
    cache = filled()
    assert cache.lookup([*KEYS[:2], b"other", KEYS[2]]) == ([0, 1], 32)
    assert cache.lookup([b"other", *KEYS]) == ([], 0)
    assert cache.lookup([]) == ([], 0)


def test_hit_rates_per_block_and_per_call():
    cache = filled(cap=4)
    assert cache.get_stats()["hit_rate"] == 0
    cache.lookup([*KEYS[:3], b"other"])
    cache.lookup([b"other"])
    cache.lookup([])
    cache.insert(OTHERS[:2], [8, 9])
    assert cache.get_stats() == {
        "calls": 2,
        "call_hits": 1,
        "blocks": 5,
        "block_hits": 3,
        "hit_rate": 0.6,
        "call_hit_rate": 0.5,
        "inserted": 6,
        "evicted": 2,
        "cached_blocks": 4,
        "locked_blocks": 0,
        "draining_blocks": 0,
        "reserved_blocks": 0,
        "max_cached_blocks": 4,
    }


@pytest.mark.parametrize("cap", range(6))
def test_eviction_never_ignores_the_cap(cap, monkeypatch):
    """Not even for a moment: looked at whenever the policy is asked."""
    cache = PrefixCache(16, cap)
    most = 0

    def watched(real):
        def call(*args, **options):
            nonlocal most
            result = real(*args, **options)
            most = max(most, cache._chains.num_blocks + cache._reserved, len(cache._chains.policy))
            return result

        return call

    for name in ("insert", "victims", "evicted", "touch_all", "set_evictable"):
        monkeypatch.setattr(cache._chains.policy, name, watched(getattr(cache._chains.policy, name)))
    back = cache.insert(KEYS, range(8))
    assert [block for _, block in back] == list(range(cap, 8))
    back = cache.insert(OTHERS[:3], [10, 11, 12])
    assert len(back) == 3 and most == len(cache) == cap
    if cap >= 2:
        cache.reserve([b"c", b"d"])
        cache.insert(OTHERS[3:6], [13, 14, 15], parent=None)
        assert most == cap


def test_a_salt_keeps_tenants_apart():
    caches = [PrefixCache(4, salt=salt, hash="sha256") for salt in (b"", b"one", b"two")]
    assert len({cache.compute_block_hashes(range(4))[0] for cache in caches}) == 3


def test_held_and_pinned_blocks_stay():
    cache = filled(cap=4)
    cache.lookup(KEYS[:2], hold=True)
    assert cache.insert(OTHERS[:3], [8, 9, 10]) == [(KEYS[3], 3), (KEYS[2], 2), (OTHERS[2], 10)]
    cache.release(KEYS[:2])
    cache.hold(OTHERS[:1])
    assert cache.evict(3) == [(KEYS[1], 1), (KEYS[0], 0), (OTHERS[1], 9)]
    with pytest.raises(memory.NothingEvictable):
        cache.evict(1)


def test_nothing_evictable_and_not_enough_are_distinct():
    cache = filled()
    cache.hold(KEYS[:2])
    before = state(cache)
    with pytest.raises(memory.NotEnoughEvictable) as error:
        cache.evict(3)
    assert (error.value.requested, error.value.available) == (3, 2)
    assert state(cache) == before
    cache.hold(KEYS[2:4])
    with pytest.raises(memory.NothingEvictable):
        cache.evict(1)
    assert cache.evict(0) == []


# Order.


def test_leaves_go_before_their_parents_and_the_oldest_chain_first():
    cache = filled(count=3)
    cache.insert(OTHERS[:2], [8, 9])
    assert [block for _, block in cache.evict(4)] == [2, 1, 0, 9]


def test_a_lookup_refreshes_a_chain():
    cache = filled(count=2)
    cache.insert(OTHERS[:2], [8, 9])
    cache.lookup(KEYS[:2])
    assert [block for _, block in cache.evict(3)] == [9, 8, 1]


def test_a_shared_parent_stays_for_its_other_child():
    cache = filled(count=2)
    cache.insert([b"sibling"], [7], parent=KEYS[0])
    assert cache.evict(1) == [(KEYS[1], 1)]
    assert cache.lookup([KEYS[0], b"sibling"]) == ([0, 7], 32)
    assert cache.evict(2) == [(b"sibling", 7), (KEYS[0], 0)]


def test_the_preview_changes_nothing_and_comes_true():
    cache = filled()
    cache.insert(OTHERS[:3], [8, 9, 10])
    before = state(cache)
    blocks, chosen = cache.preview(KEYS[:2], 5)
    assert blocks == [0, 1] and state(cache) == before
    assert [block for _, block in chosen] == [3, 2, 10, 9, 8]
    with pytest.raises(memory.NotEnoughEvictable):
        cache.preview(KEYS[:2], 6)
    assert state(cache) == before
    cache.hold(KEYS[:2])
    assert cache.evict(5) == chosen


def test_the_policy_hears_of_misses_and_is_cleared(monkeypatch):
    policy = make_policy("lru", 2)
    heard, inside = [], []

    def spy(name, real):
        def call(*args, **options):
            if not inside:
                heard.append((name, *[list(arg) if isinstance(arg, (list, tuple)) else arg for arg in args]))
            inside.append(name)
            real(*args, **options)
            inside.pop()

        return call

    for name in ("missed", "insert", "evicted", "clear", "remove"):
        monkeypatch.setattr(policy, name, spy(name, getattr(policy, name)))
    cache = PrefixCache(16, 2, policy=policy)
    cache.insert(KEYS[:1], [0])
    with cache.reserve(OTHERS[:2]) as reservation:
        reservation.commit([1, 2])
    cache.reset()
    assert heard == [
        ("missed", KEYS[0]), ("insert", KEYS[0]),
        ("missed", OTHERS[0]), ("missed", OTHERS[1]), ("evicted", [KEYS[0]]),
        ("insert", OTHERS[0]), ("insert", OTHERS[1]),
        ("remove", OTHERS[0]), ("remove", OTHERS[1]), ("clear",),
    ]  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_told_where_a_block_is(name, monkeypatch):
    policy = make_policy(name, 8)
    told = []
    insert, touch_all = policy.insert, policy.touch_all

    def hear(keys, contexts):
        contexts = list(contexts)
        told.extend((key, *context) for key, context in zip(keys, contexts, strict=True))
        touch_all(keys, contexts)

    monkeypatch.setattr(
        policy, "insert", lambda key, *, context, **rest: (told.append((key, *context)), insert(key, context=context))
    )
    monkeypatch.setattr(policy, "touch_all", hear)
    cache = PrefixCache(16, policy=policy)
    cache.insert(KEYS[:2], [0, 1])
    cache.lookup(KEYS)
    assert told == [(KEYS[0], 0, None), (KEYS[1], 1, KEYS[0])] * 2


@pytest.mark.parametrize("name", POLICIES)
def test_touches_of_several_are_touches_of_each(name):
    draw = random.Random(name)
    together, alone = (make_policy(name, 8, clock=lambda: 0.0) for _ in range(2))
    contexts = [BlockContext(i, None) for i in range(8)]
    for policy in (together, alone):
        for key in range(8):
            policy.insert(key, context=contexts[key])
    for _ in range(200):
        keys = draw.sample(range(8), draw.randint(0, 4))
        together.touch_all(keys, [contexts[key] for key in keys])
        for key in keys:
            alone.touch(key, contexts[key])
        key, evictable = draw.randrange(8), draw.random() < 0.7
        for policy in (together, alone):
            policy.set_evictable(key, evictable)
        count = draw.randint(0, alone.num_evictable)
        assert together.victims(count) == alone.victims(count)
    with pytest.raises(KeyError):
        together.touch_all([99], [None])


def test_priorities_and_lifetimes_reach_their_policies():
    cache = PrefixCache(16, policy="priority")
    cache.insert(KEYS[:1], [0], priority=2)
    with cache.reserve(OTHERS[:1], priority=1) as reservation:
        reservation.commit([1])
    cache.insert([b"c"], [2], priority=3)
    assert [block for _, block in cache.evict(3)] == [1, 0, 2]
    cache = PrefixCache(16, policy="ttl")
    cache.insert(KEYS[:1], [0], ttl_s=20)
    with cache.reserve(OTHERS[:1], ttl_s=10) as reservation:
        reservation.commit([1])
    cache.insert([b"c"], [2])
    assert [block for _, block in cache.evict(3)] == [1, 0, 2]
    for options in ({"ttl_s": -1}, {"ttl_s": float("nan")}, {"priority": 1.5}):
        before = state(cache)
        for call in (lambda options=options: cache.insert(KEYS[:1], [0], **options),
                     lambda options=options: cache.reserve(KEYS[:1], **options)):  # fmt: skip
            with pytest.raises(ValueError, match=r"PrefixCache\.(insert|reserve): (ttl_s|priority) must be"):
                call()
            assert state(cache) == before


@pytest.mark.parametrize("cap,hits", [(5860, 37_703), (None, 77_953)])
def test_lru_s_hits_on_the_synthetic_trace(cap, hits):
    """As many as the bare policy's: a prompt's blocks are used in order, so that its leaves are due first anyway."""
    cache, blocks = PrefixCache(512, cap), itertools.count()
    with gzip.open(Path(__file__).parent / "data" / "synthetic_trace.jsonl.gz") as lines:
        for line in lines:
            hashes = [one.to_bytes(4, "little") for one in dict.fromkeys(json.loads(line)["hash_ids"])]
            cached, _ = cache.lookup(hashes)
            cache.insert(hashes, [*cached, *itertools.islice(blocks, len(hashes) - len(cached))])
    assert cache.get_stats()["block_hits"] == hits


# Whose block it is.


def test_an_insert_of_what_is_cached_hands_the_other_block_back():
    cache = filled(count=2)
    assert cache.insert(KEYS[:3], [0, 11, 12]) == [(KEYS[1], 11)]
    assert cache.lookup(KEYS[:3]) == ([0, 1, 12], 48)


def test_what_has_no_room_is_handed_back():
    cache = PrefixCache(16, 2)
    assert cache.insert(KEYS[:4], range(4)) == [(KEYS[2], 2), (KEYS[3], 3)]
    cache.hold(KEYS[:2])
    assert cache.insert(OTHERS[:2], [8, 9]) == [(OTHERS[0], 8), (OTHERS[1], 9)]
    assert PrefixCache(16, 0).insert(KEYS[:1], [0]) == [(KEYS[0], 0)]


def test_drop_takes_all_that_is_behind():
    cache = filled(count=3)
    cache.insert([b"sibling"], [7], parent=KEYS[0])
    assert sorted(cache.drop([b"unknown", KEYS[1], KEYS[2]])) == [(KEYS[1], 1), (KEYS[2], 2)]
    assert cache.lookup([KEYS[0], b"sibling"]) == ([0, 7], 32)
    assert sorted(block for _, block in cache.drop(KEYS)) == [0, 7] and len(cache) == 0


def test_invalidate_takes_a_block_and_all_behind_it():
    cache = filled(count=3)
    assert cache.invalidate(99) == []
    assert sorted(cache.invalidate(1)) == [(KEYS[1], 1), (KEYS[2], 2)]
    assert cache.lookup(KEYS) == ([0], 16)


def test_what_is_dropped_while_held_is_unreadable_and_comes_from_the_last_release():
    cache = filled(cap=3, count=2)
    cache.hold(KEYS[:2])
    cache.hold(KEYS[1:2])
    assert cache.drop(KEYS[1:2]) == []
    assert KEYS[1] not in cache and cache.lookup(KEYS) == ([0], 16)
    # It cannot come back meanwhile, under this block or another, and counts as long as it is there.
    assert cache.insert(KEYS[1:2], [9], parent=KEYS[0]) == [(KEYS[1], 9)]
    assert cache.insert(OTHERS[:2], [7, 8]) == [(OTHERS[1], 8)]
    with pytest.raises(ValueError, match="must not be cached, got 1"):
        cache.insert([b"c"], [1])
    assert cache.release(KEYS[:2]) == []
    assert cache.release(KEYS[1:2]) == [(KEYS[1], 1)]
    assert cache.insert([KEYS[1], b"c"], [1, 2], parent=KEYS[0]) == [(OTHERS[0], 7)]


def test_a_release_of_what_is_not_held_changes_nothing():
    cache = filled()
    cache.hold(KEYS[:2])
    before = state(cache)
    for hashes in (KEYS[:3], [KEYS[0], KEYS[0]], [b"unknown"], [KEYS[1], b"unknown"]):
        with pytest.raises(memory.NotHeldError):
            cache.release(hashes)
        assert state(cache) == before
    with pytest.raises(memory.NotCachedError, match=r"PrefixCache.hold: hashes must be cached, got b'unknown'"):
        cache.hold([KEYS[0], b"unknown"])
    assert state(cache) == before
    assert cache.release(KEYS[:2]) == []


def test_vllm_s_hashes_are_taken_as_they_are():
    """A key a group: the block's hash and the group's number, and a call for each group."""
    cache = PrefixCache(16)
    hashes = [bytes([i]) * 32 for i in range(3)]
    groups = [[one + group.to_bytes(4, "big") for one in hashes] for group in range(2)]
    assert cache.insert(groups[0], [0, 1, 2]) == [] and cache.insert(groups[1][:2], [3, 4]) == []
    assert [cache.lookup(group)[0] for group in groups] == [[0, 1, 2], [3, 4]]


# Reservations.


def test_nothing_is_readable_before_commit():
    cache = filled(cap=4)
    reservation = cache.reserve([KEYS[0], *OTHERS[:2]])
    assert reservation.missing == OTHERS[:2] and reservation.evicted == [(KEYS[3], 3), (KEYS[2], 2)]
    assert cache.lookup([KEYS[0], *OTHERS]) == ([0], 16)
    assert reservation.commit([3, 2]) == []
    assert cache.lookup([KEYS[0], *OTHERS]) == ([0, 3, 2], 48)


def test_a_reservation_keeps_what_is_before_it_and_its_room():
    cache = filled(cap=4)
    reservation = cache.reserve([*KEYS[:2], OTHERS[0]])
    assert [block for _, block in cache.evict(1)] == [2]
    with pytest.raises(memory.NothingEvictable):
        cache.evict(1)
    assert cache.insert([b"x", b"y"], [7, 8]) == [(b"y", 8)]
    assert reservation.abort() == []
    assert cache.insert([b"y"], [8], parent=b"x") == []


def test_an_aborted_reservation_leaves_nothing():
    cache = filled(cap=8)
    before = state(cache)
    with pytest.raises(ZeroDivisionError), cache.reserve(OTHERS[:3]):
        raise ZeroDivisionError
    with cache.reserve([*KEYS[:4], OTHERS[0]]):
        pass
    assert state(cache) == before


def test_a_reservation_ends_once():
    cache = filled()
    for end in (lambda one: one.commit([9]), lambda one: one.abort()):
        reservation = cache.reserve(OTHERS[:1])
        end(reservation)
        before = state(cache)
        for call in (reservation.abort, lambda one=reservation: one.commit([10])):
            with pytest.raises(memory.ReservationEndedError):
                call()
        assert state(cache) == before
        cache.drop(OTHERS)


def test_there_must_be_room_for_all_of_a_reservation():
    cache = filled(cap=4)
    cache.hold(KEYS[:2])
    before = state(cache)
    with pytest.raises(memory.NotEnoughEvictable):
        cache.reserve([*KEYS[:3], *OTHERS[:2]])
    assert state(cache) == before
    with pytest.raises(memory.NotEnoughEvictable):
        cache.reserve(OTHERS[:3])
    assert state(cache) == before


def test_two_reservations_of_one_hash_and_the_second_block_is_handed_back():
    cache = PrefixCache(16, 4)
    first, second = cache.reserve(KEYS[:2]), cache.reserve(KEYS[:2])
    assert first.missing == second.missing == KEYS[:2]
    assert first.commit([0, 1]) == []
    assert second.commit([2, 3]) == [(KEYS[0], 2), (KEYS[1], 3)]
    assert cache.lookup(KEYS) == ([0, 1], 32)


def test_a_commit_behind_what_was_dropped_hands_all_back():
    cache = filled(count=2)
    reservation = cache.reserve([*KEYS[:2], *OTHERS[:2]])
    assert cache.drop(KEYS[1:2]) == []
    assert reservation.commit([8, 9]) == [(OTHERS[0], 8), (OTHERS[1], 9), (KEYS[1], 1)]
    assert cache.lookup([*KEYS[:2], *OTHERS]) == ([0], 16)


def test_a_bad_commit_may_be_made_again():
    cache = filled()
    reservation = cache.reserve(OTHERS[:2])
    before = state(cache)
    for blocks in ([8], [8, 8], [8, -1], [8, "9"], [8, 0]):
        with pytest.raises(ValueError, match=r"PrefixCache.commit: blocks"):
            reservation.commit(blocks)
        assert state(cache) == before
    assert reservation.commit([8, 9]) == []


# Resets.


def test_a_reset_is_at_once_for_readers_and_waits_for_copies():
    cache = filled(cap=8)
    cache.lookup(KEYS[:2], hold=True)
    reservation = cache.reserve(OTHERS[:1])
    fence = cache.reset()
    assert len(cache) == 0 and cache.lookup(KEYS) == ([], 0)
    assert sorted(fence.freed) == [(KEYS[2], 2), (KEYS[3], 3)]
    assert not fence.wait(0.01)
    assert cache.release(KEYS[:2]) == [(KEYS[0], 0), (KEYS[1], 1)]
    assert not fence.is_passed
    assert reservation.commit([8]) == [(OTHERS[0], 8)] and OTHERS[0] not in cache
    assert fence.is_passed and fence.wait(0)
    assert cache.reset().is_passed


def test_a_second_reset_waits_for_the_first_s_copies_too():
    cache = filled()
    cache.hold(KEYS[:1])
    first, second = cache.reset(), cache.reset()
    assert not first.is_passed and not second.is_passed
    cache.release(KEYS[:1])
    assert first.is_passed and second.is_passed


def test_a_fence_wakes_another_thread():
    cache = filled()
    cache.hold(KEYS[:1])
    fence = cache.reset()
    passed = []
    waiting = threading.Thread(target=lambda: passed.append(fence.wait(30)))
    waiting.start()
    cache.release(KEYS[:1])
    waiting.join(30)
    assert passed == [True]


# Errors.


@pytest.mark.parametrize(
    "hashes,blocks,parent,error,message",
    [
        (OTHERS[:2], [8], None, ValueError, "blocks must be one a hash, 2, got 1"),
        (OTHERS[:2], [8, 8], None, ValueError, "blocks must differ"),
        ([b"x", b"x"], [8, 9], None, ValueError, "hashes must differ"),
        (OTHERS[:2], [8, 1], None, ValueError, r"blocks\[1\] must not be cached, got 1"),
        (KEYS[:2], [0, 2], None, ValueError, r"blocks\[1\] must not be cached, got 2"),
        (OTHERS[:2], [8, -1], None, ValueError, r"blocks\[1\] must be an integer from 0, got -1"),
        (OTHERS[:2], [8, 1.5], None, ValueError, r"blocks\[1\] must be an integer from 0, got 1.5"),
        ([b"x", "y"], [8, 9], None, ValueError, r"hashes\[1\] must be bytes, got 'y'"),
        (KEYS[1:2], [1], None, ValueError, r"hashes\[0\] must be cached behind its parent, got b'a1'"),
        ([b"x", KEYS[0]], [8, 9], None, ValueError, r"hashes\[1\] must be cached behind its parent"),
        ([KEYS[0], b"x", KEYS[1]], [0, 8, 9], None, ValueError, r"hashes\[2\] must be cached behind its parent"),
        (OTHERS[:1], [8], b"unknown", memory.NotCachedError, "parent must be cached, got b'unknown'"),
    ],
)
def test_a_bad_insert_changes_nothing(hashes, blocks, parent, error, message):
    cache = filled()
    before = state(cache)
    with pytest.raises(error, match="PrefixCache.insert: " + message):
        cache.insert(hashes, blocks, parent=parent)
    assert state(cache) == before
    if not message.startswith("blocks"):
        with pytest.raises(error, match="PrefixCache.reserve: " + message.replace(r"blocks\[", r"hashes\[")):
            cache.reserve(hashes, parent=parent)
        assert state(cache) == before


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"block_size": 0}, "PrefixCache: block_size must be a positive integer, got 0"),
        ({"max_cached_blocks": -1}, "PrefixCache: max_cached_blocks must be an integer from 0, got -1"),
        ({"policy": "best"}, "make_policy: name must be one of 'lru'"),
        ({"hash": "md5"}, "BlockHasher: algorithm must be one of"),
        ({"salt": "a"}, "BlockHasher: salt must be bytes"),
    ],
)
def test_a_cache_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixCache(**arguments)


@pytest.mark.parametrize("count", [-1, 1.5, None])
def test_evict_takes_a_count(count):
    with pytest.raises(ValueError, match=r"PrefixCache.evict: count must be an integer from 0, got"):
        filled().evict(count)
