"""The scheduler's bridge: plans that say everything before anything changes, and live requests that stay."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kvkernels import memory
from kvkernels.memory import KVPool, PrefixCache, SchedulerBridge


def make(num_blocks: int, cap: int | None = None) -> SchedulerBridge:
    return SchedulerBridge(KVPool(4 * num_blocks, 4), PrefixCache(4, cap, hash="sha256"))


def prompt(bridge: SchedulerBridge, *values: int) -> list[bytes]:
    """The hashes of blocks of four times each value."""
    return bridge.cache.compute_block_hashes([value for value in values for _ in range(4)])


def serve(bridge: SchedulerBridge, request_id: str, *values: int, more: int = 0) -> torch.Tensor:
    return bridge.allocate(bridge.plan(request_id, 4 * len(values) + more, prompt(bridge, *values)))


def state(bridge: SchedulerBridge) -> tuple[object, ...]:
    cache, pool = bridge.cache, bridge.pool
    entries = {key: (one.block, one.users, one.holds) for key, one in cache._chains.entries.items()}
    stats = {key: count for key, count in cache.get_stats().items() if key.endswith("_blocks")}
    return entries, stats, pool.stats(), sorted(bridge._live), sorted(bridge._cached)


def check(bridge: SchedulerBridge) -> None:
    """Every block is free, cached or of one live request."""
    live = [block for one in bridge._live.values() if one.handle for block in one.handle.block_array.tolist()]
    cached = list(bridge._cached)
    assert sorted(cached) == sorted(bridge.cache._chains.by_block)
    assert len(set(live) | set(cached)) == len(live) + len(cached)
    assert bridge.pool.num_free_blocks == bridge.pool.num_blocks - len(live) - len(cached)
    handles = [one.handle for one in bridge._live.values() if one.handle]
    assert bridge.pool.stats()["num_handles"] == len(cached) + len(handles)


# Plan, allocate, free.


def test_plan_allocate_free():
    bridge = make(8)
    plan = bridge.plan("a", 10, prompt(bridge, 1, 2))
    assert (plan.reused, plan.computed_tokens, plan.num_new_blocks, plan.evicted) == ((), 10, 3, ())
    ids = bridge.allocate(plan)
    assert ids.tolist() == [0, 1, 2] and ids.dtype == torch.int64
    bridge.free("a")
    check(bridge)
    plan = bridge.plan("b", 14, prompt(bridge, 1, 2, 3))
    assert (plan.reused, plan.reused_tokens, plan.computed_tokens, plan.num_new_blocks) == ((0, 1), 8, 6, 2)
    assert bridge.allocate(plan).tolist()[:2] == [0, 1]


def test_a_plan_changes_nothing():
    bridge = make(4)
    serve(bridge, "a", 1, 2, 3)
    bridge.free("a")
    before = state(bridge)
    plan = bridge.plan("b", 12, prompt(bridge, 1, 8, 9))
    assert plan.reused == (0,) and [block for _, block in plan.evicted] == [2]
    assert state(bridge) == before


def test_a_duplicate_id_is_an_error():
    bridge = make(8)
    serve(bridge, "a", 1, 2)
    other = bridge.plan("b", 4)
    before = state(bridge)
    with pytest.raises(memory.DuplicateRequestError, match="must not be that of a live request, got 'a'"):
        bridge.plan("a", 4)
    with pytest.raises(memory.DuplicateRequestError):
        bridge.allocate(dataclasses.replace(other, request_id="a"))
    assert state(bridge) == before
    bridge.free("a")
    bridge.plan("a", 4)


def test_live_requests_are_never_evicted():
    bridge = make(6)
    serve(bridge, "a", 1, 2)
    bridge.free("a")
    reused = serve(bridge, "b", 1, 2, 3).tolist()
    before = state(bridge)
    with pytest.raises(memory.OverBudgetError) as error:
        bridge.plan("c", 16)
    assert (error.value.requested, error.value.available) == (16, 12)
    with pytest.raises(memory.NothingEvictable):
        bridge.cache.evict(1)
    assert state(bridge) == before
    assert not set(bridge.allocate(bridge.plan("c", 12)).tolist()) & set(reused)
    check(bridge)


def test_room_is_made_by_what_the_plan_said():
    bridge = make(4)
    serve(bridge, "a", 1, 2)
    serve(bridge, "b", 3, 4)
    bridge.free("a")
    bridge.free("b")
    plan = bridge.plan("c", 12, prompt(bridge, 1, 9))
    assert plan.reused == (0,) and [block for _, block in plan.evicted] == [1, 3]
    assert bridge.allocate(plan).tolist()[0] == 0
    assert bridge.cache.lookup(prompt(bridge, 3, 4)) == ([2], 4)
    check(bridge)


# Plans that do not hold.


@pytest.mark.parametrize("change", ["reused blocks left", "more is cached", "others leave", "the pool filled up"])
def test_a_plan_that_would_come_out_otherwise_is_refused(change):
    bridge = make(6)
    serve(bridge, "a", 1, 2)
    serve(bridge, "b", 5, 6)
    bridge.free("a")
    bridge.free("b")
    plan = bridge.plan("c", 16, prompt(bridge, 1, 2, 3))
    other = bridge.plan("d", 16, prompt(bridge, 7, 8, 9))
    if change == "reused blocks left":
        bridge.reclaim(bridge.cache.drop(prompt(bridge, 1)))
    elif change == "more is cached":
        serve(bridge, "x", 1, 2, 3)
        bridge.free("x")
    elif change == "others leave":
        bridge.cache.lookup(prompt(bridge, 1, 2))
        plan = other
    else:
        elsewhere = bridge.pool.alloc(8)
    before = state(bridge)
    with pytest.raises(memory.StalePlanError, match="plan must hold still"):
        bridge.allocate(plan)
    assert state(bridge) == before
    bridge.allocate(bridge.plan("c", 16, prompt(bridge, 1, 2, 3)))
    if change == "the pool filled up":
        bridge.pool.free(elsewhere)
    check(bridge)


def test_two_plans_for_the_same_room():
    bridge = make(4)
    serve(bridge, "a", 1, 2, 3, 4)
    bridge.free("a")
    plans = [bridge.plan(name, 8) for name in "bc"]
    assert plans[0].evicted == plans[1].evicted
    bridge.allocate(plans[0])
    with pytest.raises(memory.StalePlanError):
        bridge.allocate(plans[1])
    bridge.allocate(bridge.plan("c", 8))
    check(bridge)


def test_a_plan_that_still_holds_is_carried_out():
    bridge = make(12)
    plan = bridge.plan("a", 8, prompt(bridge, 1, 2))
    serve(bridge, "b", 5, 6)
    bridge.free("b")
    assert len(bridge.allocate(plan)) == 2


def test_a_plan_carried_out_twice_is_a_duplicate():
    bridge = make(8)
    plan = bridge.plan("a", 8)
    bridge.allocate(plan)
    with pytest.raises(memory.DuplicateRequestError):
        bridge.allocate(plan)


# Free.


def test_generated_blocks_are_cached_too():
    bridge = make(8)
    serve(bridge, "a", 1, more=9)
    bridge.free("a", prompt(bridge, 1, 2, 3))
    assert bridge.cache.lookup(prompt(bridge, 1, 2, 3)) == ([0, 1, 2], 12)
    assert bridge.pool.num_free_blocks == 5
    check(bridge)


def test_a_request_that_failed_caches_nothing():
    bridge = make(8)
    serve(bridge, "a", 1, 2)
    bridge.free("a")
    serve(bridge, "b", 1, 2, 3, 4)
    bridge.free("b", [])
    assert bridge.cache.lookup(prompt(bridge, 1, 2, 3)) == ([0, 1], 8)
    assert bridge.pool.num_free_blocks == 6 and bridge.cache.num_evictable == 2
    check(bridge)


def test_two_requests_that_computed_the_same_leave_one_copy():
    bridge = make(8)
    for name in "ab":
        serve(bridge, name, 1, 2)
    bridge.free("b")
    bridge.free("a")
    assert bridge.cache.lookup(prompt(bridge, 1, 2))[0] == [2, 3] and bridge.pool.num_free_blocks == 6
    check(bridge)


def test_a_prefix_that_was_dropped_while_a_request_used_it():
    bridge = make(8)
    serve(bridge, "a", 1, 2)
    bridge.free("a")
    serve(bridge, "b", 1, 2, 3)
    bridge.reclaim(bridge.cache.invalidate(0))
    check(bridge)
    bridge.free("b")
    assert len(bridge.cache) == 0 and bridge.pool.num_free_blocks == 8
    check(bridge)


def test_a_reset_is_reclaimed():
    bridge = make(8)
    serve(bridge, "a", 1, 2)
    bridge.free("a")
    pairs = bridge.cache.reset().freed
    bridge.reclaim(pairs)
    assert bridge.pool.num_free_blocks == 8
    with pytest.raises(ValueError, match=r"SchedulerBridge.reclaim: pairs must be what the cache gave back, each once"):
        bridge.reclaim(pairs)
    serve(bridge, "a", 1, 2)
    bridge.free("a")
    for block in [0, *bridge.cache.lookup(prompt(bridge, 1))[0]]:
        with pytest.raises(ValueError, match=r"SchedulerBridge.reclaim"):
            bridge.reclaim([(b"", block)])
    pairs = bridge.cache.drop(prompt(bridge, 1))
    with pytest.raises(ValueError, match=r"SchedulerBridge.reclaim"):
        bridge.reclaim([*pairs, pairs[0]])
    free = bridge.pool.num_free_blocks
    bridge.reclaim(pairs)
    assert bridge.pool.num_free_blocks == free + 2
    check(bridge)


def test_the_cap_of_the_cache_holds():
    bridge = make(16, cap=3)
    serve(bridge, "a", 1, 2, 3, 4, 5)
    bridge.free("a")
    assert len(bridge.cache) == 3 and bridge.pool.num_free_blocks == 13
    serve(bridge, "b", 7, 8)
    bridge.free("b")
    assert len(bridge.cache) == 3
    check(bridge)


@pytest.mark.parametrize("bad", ["unknown", "too many", "not the reused", "cached elsewhere", "pinned", "shared"])
def test_a_bad_free_changes_nothing(bad):
    bridge = make(12)
    serve(bridge, "a", 1, 2)
    bridge.free("a")
    serve(bridge, "b", 1, 3, more=2)
    handle = bridge._live["b"].handle
    errors = {
        "unknown": memory.UnknownRequestError,
        "pinned": memory.PinnedHandleError,
        "shared": memory.SharedHandleError,
    }
    hashes = {
        "too many": prompt(bridge, 1, 3, 4),
        "not the reused": prompt(bridge, 2, 3),
        "cached elsewhere": [prompt(bridge, 1)[0], prompt(bridge, 1)[0]],
    }
    if bad == "pinned":
        bridge.pool.pin(handle)
    if bad == "shared":
        bridge.pool.ref(handle)
    before = state(bridge)
    with pytest.raises(errors.get(bad, ValueError)):
        bridge.free("x" if bad == "unknown" else "b", hashes.get(bad))
    assert state(bridge) == before
    check(bridge)


# Arguments.


def test_a_bridge_that_makes_no_sense():
    with pytest.raises(ValueError, match="cache must have the pool's block_size, 4, got 8"):
        SchedulerBridge(KVPool(64, 4), PrefixCache(8))
    cache = PrefixCache(4)
    cache.insert([b"a"], [0])
    with pytest.raises(ValueError, match="cache must be empty, got one with 1 blocks"):
        SchedulerBridge(KVPool(64, 4), cache)


@pytest.mark.parametrize("num_tokens,blocks", [(0, 0), (-1, 0), (1.5, 0), (7, 2)])
def test_a_plan_that_makes_no_sense(num_tokens, blocks):
    with pytest.raises(ValueError, match=r"SchedulerBridge.plan: num_tokens must be"):
        make(8).plan("a", num_tokens, [bytes([i]) for i in range(blocks)])


# Faults and random requests.


def test_a_fault_at_every_kth_allocation_leaves_nothing_behind(monkeypatch):
    """The pool fails at its k-th alloc: no block is lost, no hold remains, and the request is not live."""
    for k in range(1, 6):
        bridge = make(4)
        real, calls = bridge.pool.alloc, []

        def fail(*args, real=real, calls=calls, k=k, **options):
            calls.append(args)
            if len(calls) == k:
                raise MemoryError("no more")
            return real(*args, **options)

        monkeypatch.setattr(bridge.pool, "alloc", fail)
        failed = []
        for i in range(5):
            try:
                serve(bridge, f"r{i}", 1, i, i + 1)
                bridge.free(f"r{i}")
            except MemoryError:
                failed.append(i)
            check(bridge)
        assert failed == [k - 1]
        assert bridge._live == {} and bridge.cache.get_stats()["locked_blocks"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_requests(seed):
    draw = random.Random(seed)
    bridge = make(24, cap=draw.choice([None, 10]))
    live: dict[str, tuple[list[int], tuple[int, ...]]] = {}
    served = 0
    for step in range(400):
        kind = draw.random()
        if kind < 0.5:
            values = [draw.randrange(3) for _ in range(draw.randint(0, 5))]
            try:
                plan = bridge.plan(f"r{step}", 4 * len(values) + draw.randint(1, 9), prompt(bridge, *values))
            except memory.OverBudgetError as error:
                free = bridge.pool.stats()["available_tokens"]
                assert error.requested > error.available and error.available <= free + 4 * bridge.cache.num_evictable
                continue
            ids = bridge.allocate(plan).tolist()
            assert len(ids) == -(-plan.num_tokens // 4) and ids[: len(plan.reused)] == list(plan.reused)
            live[plan.request_id] = (values, ids)
            served += 1
        elif kind < 0.9 and live:
            name = draw.choice(list(live))
            values, _ = live.pop(name)
            bridge.free(name, draw.choice([None, [], prompt(bridge, *values)]))
        elif kind < 0.95:
            bridge.reclaim(bridge.cache.invalidate(draw.randrange(24)))
        elif kind > 0.99:
            bridge.reclaim(bridge.cache.reset().freed)
        check(bridge)
        # No block of a live request is free, and a block that several have is a cached one or was.
        for _, ids in live.values():
            assert not set(ids) & set(bridge.pool._ids[bridge.pool._head :].tolist())
    assert served > 100
    for name in list(live):
        bridge.free(name)
    bridge.reclaim(bridge.cache.reset().freed)
    assert bridge.pool.num_free_blocks == 24
    check(bridge)
