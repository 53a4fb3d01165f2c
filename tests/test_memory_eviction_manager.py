"""EvictionManager: what goes, what is kept, and how too little room is told from none."""

from __future__ import annotations

import random
import threading

import pytest

from kvkernels.memory import EvictionManager, NotEnoughEvictable, NothingEvictable
from kvkernels.memory.eviction import POLICIES


def filled(policy, clock=lambda: 0.0):
    manager = EvictionManager(policy, 10, clock=clock)
    for key, priority, ttl in (("a", 3, 9), ("b", 1, 5), ("c", 2, None), ("d", 2, 1)):
        manager.add(key, 10, priority=priority, ttl=ttl)
    for key in "aabdab":
        manager.access(key)
    return manager


@pytest.mark.parametrize(
    "policy,order",
    [("lru", "cdab"), ("fifo", "abcd"), ("lfu", "cdba"), ("ttl", "dbac"), ("priority", "bcda")],
)
def test_lru_lfu_fifo_ttl_and_priority_are_real(policy, order):
    assert filled(policy).evict(40) == list(order)
    manager = filled(policy)
    assert [manager.evict(1)[0] for _ in range(4)] == list(order)


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_keys_stay(policy):
    manager = filled(policy)
    manager.pin("b")
    manager.pin("b")
    manager.unpin("b")
    assert sorted(manager.evict(30)) == list("acd") and len(manager) == 1 and "b" in manager
    with pytest.raises(NothingEvictable, match=r"num_tokens must be at most the 0 that may be evicted, got 1"):
        manager.evict(1)
    manager.unpin("b")
    assert manager.evict(1) == ["b"] and len(manager) == 0


def test_nothing_and_not_enough_are_distinct_and_change_nothing():
    manager = filled("lru")
    manager.pin("c")
    with pytest.raises(NotEnoughEvictable, match=r"at most the 30 that may be evicted, got 31") as raised:
        manager.evict(31)
    assert (raised.value.requested, raised.value.available) == (31, 30)
    assert not issubclass(NotEnoughEvictable, NothingEvictable)
    assert not issubclass(NothingEvictable, NotEnoughEvictable)
    assert len(manager) == 4 and manager.evict(30) == list("dab")
    with pytest.raises(NothingEvictable):
        EvictionManager().evict(1)


def test_no_need_evicts_nothing():
    manager = filled("lru")
    assert manager.evict(0) == [] and len(manager) == 4
    assert EvictionManager().evict(0) == []


def test_no_more_than_needed_goes():
    manager = EvictionManager("fifo")
    for key, num_tokens in enumerate((5, 100, 1, 7)):
        manager.add(key, num_tokens)
    assert manager.evict(6) == [0, 1]
    assert manager.evict(2) == [2, 3]


def test_refusals():
    manager = filled("lru")
    for call in (manager.access, manager.pin, manager.unpin, manager.remove):
        with pytest.raises(KeyError, match=r"key must be held, got 'x'"):
            call("x")
    with pytest.raises(ValueError, match=r"unpin: key must be pinned, got 'a'"):
        manager.unpin("a")
    with pytest.raises(ValueError, match=r"insert: key must not be held, got 'a'"):
        manager.add("a")
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"add: num_tokens must be an integer from 1"):
            manager.add("e", number)
    for number in (-1, "1"):
        with pytest.raises(ValueError, match=r"evict: num_tokens must be an integer from 0"):
            manager.evict(number)
    manager.pin("a")
    manager.remove("a")
    manager.add("a", 10)
    assert manager.evict(40) == list("cdba")


def test_threads():
    manager = EvictionManager("arc", 500)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        for number in range(2_000):
            key = (seed, number)
            try:
                manager.add(key, rng.randint(1, 5))
                if rng.random() < 0.5:
                    manager.pin(key)
                    manager.access(key)
                    manager.unpin(key)
                else:
                    manager.evict(2)
            except KeyError:
                pass  # another thread has evicted the key before it was pinned
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert manager._total_tokens == sum(manager._tokens.values()) and len(manager._policy) == len(manager)
    assert manager._pinned_tokens == sum(manager._tokens[key] for key in manager._pins)
