"""Four threads on one pool, one cache and one bridge; at barriers everything must add up."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading

import pytest

from kvkernels import memory
from kvkernels.memory import KVPool, PrefixCache, SchedulerBridge

THREADS = 4
ROUNDS = 8
# In all, of all threads. A million take some minutes.
OPERATIONS = int(os.environ.get("KVKERNELS_MEMORY_THREAD_OPERATIONS", "20000"))


@pytest.fixture(autouse=True)
def _switch_often():
    """Threads take turns every 10 us, so that what is not under the lock is met half done."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_threads(work, check) -> None:
    """``work(draw, round)`` in each thread, and ``check()`` in one while all wait."""
    errors = []
    barrier = threading.Barrier(THREADS, action=lambda: errors or check())

    def run(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(ROUNDS):
                work(draw, OPERATIONS // THREADS // ROUNDS)
                barrier.wait(timeout=600)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]


def test_a_pool():
    pool = KVPool(4 * 64, 4)
    live: dict[int, list] = {}

    def work(draw: random.Random, count: int) -> None:
        handles = live.setdefault(threading.get_ident(), [])
        for _ in range(count):
            kind = draw.random()
            try:
                if kind < 0.45 or not handles:
                    handles.append(pool.alloc(draw.randint(1, 40)))
                elif kind < 0.8:
                    pool.free(handles.pop(draw.randrange(len(handles))))
                elif kind < 0.9:
                    pool.pin(handles[0])
                    pool.ref(handles[0])
                    pool.unref(handles[0])
                    pool.unpin(handles[0])
                else:
                    handles += pool.split(handles.pop())
            except memory.OverBudgetError:
                while len(handles) > 2:
                    pool.free(handles.pop())

    def check() -> None:
        handles = [handle for one in live.values() for handle in one]
        held = [block for handle in handles for block in handle.block_array.tolist()]
        assert sorted([*held, *pool._ids[pool._head :].tolist()]) == list(range(64))
        stats = pool.stats()
        assert stats["num_handles"] == len(handles) and stats["num_pinned_handles"] == 0 == stats["pinned_tokens"]
        assert stats["used_tokens"] == sum(handle.num_tokens for handle in handles)

    run_threads(work, check)


def chain(draw: random.Random) -> list[bytes]:
    path, found = b"", []
    for _ in range(draw.randint(1, 6)):
        path += bytes([draw.choice(b"abc")])
        found.append(path)
    return found


def test_a_cache():
    cache = PrefixCache(4, 40)
    free, lock = list(range(100)), threading.Lock()
    most = 0

    def give(pairs) -> None:
        with lock:
            free.extend(block for _, block in pairs)

    def take(count: int) -> list[int] | None:
        with lock:
            taken = [free.pop() for _ in range(count)] if len(free) >= count else None
        return taken

    def work(draw: random.Random, count: int) -> None:
        nonlocal most
        for _ in range(count):
            hashes, kind = chain(draw), draw.random()
            if kind < 0.35:
                blocks, _ = cache.lookup(hashes, hold=True)
                give(cache.release(hashes[: len(blocks)]))
            elif kind < 0.7:
                blocks = take(len(hashes))
                if blocks:
                    give(cache.insert(hashes, blocks))
            elif kind < 0.85:
                try:
                    reservation = cache.reserve(hashes)
                except memory.EvictionError:
                    continue
                give(reservation.evicted)
                blocks = take(len(reservation.missing))
                give(reservation.abort() if blocks is None else reservation.commit(blocks))
            elif kind < 0.95:
                with contextlib.suppress(memory.EvictionError):
                    give(cache.evict(draw.randint(0, 3)))
            elif kind < 0.98:
                give(cache.drop(hashes[-1:]))
            elif kind < 0.99:
                give(cache.invalidate(draw.randrange(100)))
            else:
                give(cache.reset().freed)
            stats = cache.get_stats()
            most = max(most, stats["cached_blocks"] + stats["draining_blocks"] + stats["reserved_blocks"])

    def check() -> None:
        chains = cache._chains
        assert sorted(free + list(chains.by_block)) == list(range(100))
        assert not chains.draining and cache._reserved == 0 and not cache._reservations and not cache._fences
        assert chains.num_locked == 0 and all(one.users == one.holds == 0 for one in chains.entries.values())
        assert chains.policy.num_evictable == sum(not one.children for one in chains.entries.values())
        for key, one in chains.entries.items():
            assert one.key == key and (one.parent is None) == (len(key) == 1)
            assert one.parent is None or chains.entries[key[:-1]] is one.parent
        assert most <= 40

    run_threads(work, check)


def test_a_bridge():
    bridge = SchedulerBridge(KVPool(4 * 64, 4), PrefixCache(4, 40))

    def work(draw: random.Random, count: int) -> None:
        name = str(threading.get_ident())
        for _ in range(count // 4):  # each is a plan, an allocation, a free, and mostly an eviction
            hashes = chain(draw)
            try:
                bridge.allocate(bridge.plan(name, 4 * len(hashes) + draw.randint(0, 9) + 1, hashes))
            except (memory.StalePlanError, memory.OverBudgetError):
                continue
            bridge.free(name)

    def check() -> None:
        assert not bridge._live and sorted(bridge._cached) == sorted(bridge.cache._chains.by_block)
        assert bridge.pool.num_free_blocks == 64 - len(bridge.cache)
        assert bridge.cache.get_stats()["locked_blocks"] == 0 and len(bridge.cache) <= 40

    run_threads(work, check)
