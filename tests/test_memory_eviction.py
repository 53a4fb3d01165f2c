"""Eviction policies, victim by victim beside slow models of their papers, and what all of them refuse."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from eviction_models import MODELS

from kvkernels.memory import BlockContext, NotEnoughEvictable, NothingEvictable, make_policy
from kvkernels.memory.eviction import POLICIES
from kvkernels.memory.replay import Simulation, read_trace

TRACE = Path(__file__).parent / "data" / "synthetic_trace.jsonl.gz"
# KVKERNELS_EVICTION_RUNS makes the random test longer.
RUNS = int(os.environ.get("KVKERNELS_EVICTION_RUNS", "8"))


class Pair:
    """A policy and its model, which are told the same."""

    def __init__(self, name, capacity):
        self.now_s = 0.0
        self.policy = make_policy(name, capacity, clock=lambda: self.now_s)
        self.model = MODELS[name](capacity, lambda: self.now_s)

    def tell(self, method, *args, **more):
        getattr(self.policy, method)(*args, **more)
        getattr(self.model, method)(*args, **more)

    def victims(self, n, protected=()):
        """What both say, None for too few."""
        expected = self.model.victims(n, protected)
        if expected is None:
            with pytest.raises((NothingEvictable, NotEnoughEvictable)):
                self.policy.victims(n, protected)
        else:
            assert self.policy.victims(n, protected) == expected
        return expected


def use(pair, rng, key, capacity, context):
    """What an owner with so much room does with a key that is asked for."""
    if key in pair.model.keys:
        return pair.tell("touch", key, context)
    pair.tell("missed", key)
    if len(pair.model.keys) >= capacity:
        protected = set(rng.sample(pair.model.keys, min(capacity, rng.choice((0, 0, 0, 2)))))
        n = rng.choice((1, 1, 1, 2, 4))
        victims = pair.victims(n, protected)
        if victims is None:
            return None
        gone = rng.randint(1, n)  # some of them may have been all that was needed
        assert pair.model.evict(gone, protected) == victims[:gone]
        pair.policy.evicted(victims[:gone])
    pair.tell("insert", key, priority=rng.randint(-2, 2), ttl=rng.choice((None, 1, 3, 3)), context=context)
    return None


def disturb(pair, rng):
    """What an owner does beside."""
    keys = pair.model.keys
    action = rng.choice(("ask", "ask", "hold", "hold", "release", "release", "remove", "evict"))
    if action == "ask":
        pair.victims(rng.randint(0, 5), set(rng.sample(keys, min(len(keys), rng.randint(0, 3)))))
    elif action == "release" and pair.model.blocked:
        pair.tell("set_evictable", rng.choice(sorted(pair.model.blocked)), True)
    elif keys and action == "hold":
        pair.tell("set_evictable", rng.choice(keys), False)
    elif keys and action == "remove":
        pair.tell("remove", rng.choice(keys))
    elif keys and action == "evict":  # not what victims said
        # S3-FIFO and SIEVE, asked for a victim, see that it is another one, and so does the model.
        some = rng.sample(keys, min(len(keys), 2))
        if pair.model.victims(len(some)) != some and pair.model.victims(1) != some[:1]:
            pair.model.leave(some)
            pair.policy.evicted(some)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("is_chain", [False, True])
def test_victims_are_the_models_on_random_operations(name, is_chain):
    for seed in range(RUNS):
        rng = random.Random(seed)
        # Of each size with few hits and with many, and long enough for chain to learn.
        capacity = (20, 1, 2, 10, 40)[seed % 5]
        num_keys = (capacity + 1 + capacity // 4) if seed % 2 else 3 * capacity
        pair = Pair(name, capacity)
        for _ in range(200):
            begin, length = rng.randrange(num_keys), rng.randint(1, 8)
            for depth in range(length):
                key = (begin + depth) % num_keys if rng.random() < 0.7 else rng.randrange(num_keys)
                use(pair, rng, key, capacity, BlockContext(depth) if is_chain else None)
                if rng.random() < 0.3:
                    disturb(pair, rng)
                assert len(pair.policy) == len(pair.model.keys)
            pair.now_s += rng.choice((0, 0.5))
            pair.victims(min(5, len(pair.model.keys)))
        for key in sorted(pair.model.blocked):
            pair.tell("set_evictable", key, True)
        pair.victims(len(pair.model.keys))


@pytest.mark.parametrize("name", POLICIES)
def test_victims_are_the_models_on_a_trace(name):
    capacity = 150
    pair = Pair(name, capacity)
    evictions = 0
    for number, request in enumerate(read_trace(TRACE)):
        if number == 150:
            break
        pair.now_s = request.timestamp_ms / 1000
        for depth, key in enumerate(request.hash_ids):
            context = BlockContext(depth)
            if key in pair.policy:
                pair.tell("touch", key, context)
                continue
            pair.tell("missed", key)
            if len(pair.policy) == capacity:
                victims = pair.model.evict(1)
                assert pair.policy.victims(1) == victims
                pair.policy.evicted(victims)
                evictions += 1
            pair.tell("insert", key, ttl=10.0 * (depth % 3), priority=depth % 3, context=context)
    assert evictions > 3000


@pytest.mark.parametrize("name", POLICIES)
def test_victims_change_nothing(name):
    rng = random.Random(1)
    asked, silent = make_policy(name, 20, clock=lambda: 0.0), make_policy(name, 20, clock=lambda: 0.0)
    held = set()
    for _ in range(3000):
        key = rng.randrange(60)
        if key in held:
            asked.touch(key)
            silent.touch(key)
        else:
            asked.missed(key)
            silent.missed(key)
            if len(held) == 20:
                victims = silent.victims(1)
                for n in (3, 20, 1):
                    assert asked.victims(n)[0] == victims[0]
                asked.evicted(victims)
                silent.evicted(victims)
                held.discard(victims[0])
            asked.insert(key)
            silent.insert(key)
            held.add(key)
        asked.victims(rng.randint(0, len(held) - 1), [key])


@pytest.mark.parametrize("name", POLICIES)
def test_what_may_not_leave_stays(name):
    policy = make_policy(name, 4)
    for key in "abcd":
        policy.insert(key)
    policy.set_evictable("b", False)
    policy.set_evictable("b", False)
    assert sorted(policy.victims(2, {"a", "not held"})) == ["c", "d"]
    assert policy.num_evictable == 3
    with pytest.raises(
        NotEnoughEvictable, match=r"victims: n must be at most the 2 keys that may be evicted, got 3"
    ) as e:
        policy.victims(3, ["a"])
    assert (e.value.requested, e.value.available) == (3, 2)
    with pytest.raises(NothingEvictable):
        policy.victims(1, "acd")
    assert policy.victims(0, "acd") == []
    policy.set_evictable("b", True)
    assert sorted(policy.victims(4)) == list("abcd")
    policy.clear()
    assert len(policy) == 0 and "a" not in policy
    with pytest.raises(NothingEvictable):
        policy.victims(1)
    policy.insert(b"bytes")
    assert policy.victims(1) == [b"bytes"]


@pytest.mark.parametrize("name", POLICIES)
def test_refusals_change_nothing(name):
    policy = make_policy(name, 4)
    for key in "abc":
        policy.insert(key)
    order = policy.victims(3)
    with pytest.raises(ValueError, match=r"insert: key must not be held, got 'a'"):
        policy.insert("a")
    for call in (policy.touch, policy.remove, lambda key: policy.set_evictable(key, False)):
        with pytest.raises(KeyError, match=r"key must be held, got 'x'"):
            call("x")
    with pytest.raises(KeyError, match=r"evicted: key must be held, got 'x'"):
        policy.evicted(["a", "x"])
    with pytest.raises(KeyError, match=r"evicted: keys must be different"):
        policy.evicted(["a", "a"])
    for n in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"victims: n must be an integer from 0"):
            policy.victims(n)
    assert policy.victims(3) == order and len(policy) == 3


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"make_policy: name must be one of 'lru', .*, got 'mru'"):
        make_policy("mru", 3)
    with pytest.raises(ValueError, match=r"LRU: capacity must be an integer from 1, got 0"):
        make_policy("lru", 0)
    with pytest.raises(ValueError, match=r"TTL.insert: ttl must be seconds from 0, got -1"):
        make_policy("ttl", 3).insert(1, ttl=-1)
    with pytest.raises(ValueError, match=r"Priority.insert: priority must be an integer, got 'high'"):
        make_policy("priority", 3).insert(1, priority="high")


def test_lifetimes_end():
    now_s = [0.0]
    policy = make_policy("ttl", 10, clock=lambda: now_s[0])
    for key, ttl in (("a", 5), ("b", 1), ("c", None), ("d", 5), ("e", 5)):
        policy.insert(key, ttl=ttl)
    assert policy.expired() == []
    policy.set_evictable("d", False)
    now_s[0] = 2.0
    policy.touch("e")
    now_s[0] = 6.0
    assert policy.expired() == ["b", "a"]
    assert policy.victims(4) == ["b", "a", "e", "c"]


class CountedKey:
    """A key that counts how often any of its kind is looked at."""

    looks = 0

    def __hash__(self):
        CountedKey.looks += 1
        return id(self)


@pytest.mark.parametrize("name", POLICIES)
def test_held_keys_do_not_slow_the_search(name):
    """Ten times as many keys that may not leave: what they cost is paid once, so an eviction looks at as many keys."""

    def looks_an_eviction(num_blocked):
        policy = make_policy(name, num_blocked + 100)
        for depth in range(num_blocked):
            key = CountedKey()
            policy.insert(key, context=BlockContext(depth))
            policy.set_evictable(key, False)
        for depth in range(100):
            policy.insert(CountedKey(), context=BlockContext(depth))
        policy.evicted(policy.victims(1))
        looks = []
        for depth in range(200):
            more = CountedKey()
            policy.insert(more, context=BlockContext(100 + depth))
            CountedKey.looks = 0
            policy.evicted(policy.victims(1, [more]))
            looks.append(CountedKey.looks)
        return sorted(looks)[100]

    assert looks_an_eviction(5_000) <= looks_an_eviction(500) + 5


@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_is_cut_from_its_end(name):
    simulation = Simulation(name, 50, chains=True)
    rng = random.Random(2)
    for _ in range(300):
        chat = rng.randrange(12)
        simulation.run([chat * 100 + depth for depth in range(rng.randint(1, 30))])
        held = simulation._held
        assert len(held) <= 50
        assert all(block % 100 == 0 or block - 1 in held for block in held)
        evictable = {block for block in held if block not in simulation._policy._blocked}
        assert evictable == {block for block in held if block + 1 not in held}
