"""Random operations on pools and prefix caches, compared with a slow model after each."""

from __future__ import annotations

import os
import random

import pytest
from memory_model import Model, TooFew

from kvkernels import memory
from kvkernels.memory import KVPool, PrefixCache
from kvkernels.memory.eviction import POLICIES

# 100,000 take half a minute.
OPERATIONS = int(os.environ.get("KVKERNELS_MEMORY_OPERATIONS", "6000"))


def check_same(cache: PrefixCache, model: Model) -> None:
    """What the cache says of itself, what is in it, and that all of it holds together."""
    chains = cache._chains
    assert {
        key: (one.block, one.parent.key if one.parent else None, one.users) for key, one in chains.entries.items()
    } == {key: (block, parent, users) for key, block, parent, users in model.blocks}
    assert {key: (one.block, one.users) for key, one in chains.draining.items()} == {
        key: (block, users) for key, block, _, users in model.draining
    }
    stats = cache.get_stats()
    assert (stats["cached_blocks"], stats["reserved_blocks"]) == (len(model.blocks), model.reserved)
    assert cache.num_evictable == model.num_evictable()
    assert set(chains.by_block) == {row[1] for row in model.blocks + model.draining}
    if model.cap is not None:
        assert model.in_custody() <= model.cap
    leaves = [one for one in chains.entries.values() if not one.children and not one.users]
    assert chains.policy.num_evictable == len(leaves)
    for one in chains.entries.values():
        assert one.parent is None or (chains.entries[one.parent.key] is one.parent and one in one.parent.children)


class Run:
    """A cache and its model, and operations that draw their arguments."""

    def __init__(self, seed: int, cap: int | None) -> None:
        self.draw = random.Random(seed)
        self.cache = PrefixCache(4, cap, hash="sha256")
        self.model = Model(cap)
        self.free = list(range(60))
        # Chains of up to 6 blocks that share prefixes: a hash is the path to it.
        self.held: list[bytes] = []
        self.open: list[tuple] = []
        self.fences: list[tuple[object, set]] = []
        self.seen: tuple[int, list] = (0, [])

    def chain(self) -> list[bytes]:
        path, found = b"", []
        for _ in range(self.draw.randint(1, 6)):
            path += bytes([self.draw.choice(b"abc")])
            found.append(path)
        return found

    def take(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        self.draw.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give(self, pairs: list[tuple[bytes, int]]) -> None:
        self.free += [block for _, block in pairs]

    def cut(self, hashes: list[bytes]) -> tuple[list[bytes], bytes | None]:
        """Sometimes a chain's end alone, with its parent."""
        at = self.draw.randrange(len(hashes))
        is_cut = at > 0 and self.draw.random() < 0.3
        return (hashes[at:], hashes[at - 1]) if is_cut else (hashes, None)

    def lookup(self) -> None:
        hashes, hold = self.chain(), self.draw.random() < 0.4
        blocks, tokens = self.cache.lookup(hashes, hold=hold)
        assert blocks == self.model.lookup(hashes, hold) and tokens == 4 * len(blocks)
        if hold:
            self.held += hashes[: len(blocks)]

    def hold(self) -> None:
        hashes = self.model.chain(self.chain())
        self.cache.hold(hashes)
        for key in hashes:
            self.model.row(key)[3] += 1
        self.held += hashes

    def release(self) -> None:
        if not self.held:
            return
        self.draw.shuffle(self.held)
        count = self.draw.randint(1, len(self.held))
        hashes, self.held = self.held[:count], self.held[count:]
        pairs = self.cache.release(hashes)
        assert pairs == [pair for key in hashes for pair in self.model.unuse(key)]
        self.give(pairs)

    def insert(self) -> None:
        hashes, parent = self.cut(self.chain())
        blocks = self.take(len(hashes))
        if blocks is None:
            return
        for i, key in enumerate(hashes):  # sometimes what is cached already
            row = self.model.row(key)
            if row is not None and self.draw.random() < 0.5:
                self.free.append(blocks[i])
                blocks[i] = row[1]
        if parent is not None and self.model.row(parent) is None:
            with pytest.raises(memory.NotCachedError):
                self.cache.insert(hashes, blocks, parent=parent)
            self.free += [block for block in blocks if block not in self.cache._chains.by_block]
            return
        pairs = self.cache.insert(hashes, blocks, parent=parent)
        assert pairs == self.model.insert(hashes, blocks, parent)
        self.give(pairs)

    def reserve(self) -> None:
        hashes, parent = self.cut(self.chain())
        if parent is not None and self.model.row(parent) is None:
            with pytest.raises(memory.NotCachedError):
                self.cache.reserve(hashes, parent=parent)
            return
        try:
            missing, gone, tail = self.model.reserve(hashes, parent)
        except TooFew:
            with pytest.raises(memory.EvictionError):
                self.cache.reserve(hashes, parent=parent)
            return
        reservation = self.cache.reserve(hashes, parent=parent)
        assert (reservation.missing, reservation.evicted) == (missing, gone)
        self.give(gone)
        self.open.append((reservation, tail))

    def end(self) -> None:
        if not self.open:
            return
        reservation, tail = self.open.pop(self.draw.randrange(len(self.open)))
        blocks = self.take(len(reservation.missing)) if self.draw.random() < 0.7 else None
        expected = self.model.end(reservation.missing, tail, blocks, reservation.is_stale)
        pairs = reservation.abort() if blocks is None else reservation.commit(blocks)
        assert pairs == expected
        self.give(pairs)
        with pytest.raises(memory.ReservationEndedError):
            reservation.commit([])

    def evict(self) -> None:
        count = self.draw.randint(0, 5)
        blocks = [row[1] for row in self.model.blocks if row[3]]
        try:
            gone = self.model.evict(count)
        except TooFew:
            for call in (self.cache.evict, lambda n: self.cache.preview([], n)):
                with pytest.raises(memory.EvictionError) as error:
                    call(count)
                assert (error.value.requested, error.value.available) == (count, self.model.num_evictable())
            return
        assert self.cache.preview([], count) == ([], gone)
        assert self.cache.evict(count) == gone
        assert not {block for _, block in gone} & set(blocks)
        self.give(gone)

    def drop(self) -> None:
        hashes = self.chain()[-1:]
        pairs = self.cache.drop(hashes)
        assert sorted(pairs) == sorted(self.model.drop(hashes))
        self.give(pairs)

    def invalidate(self) -> None:
        block = self.draw.randrange(60)
        row = next((row for row in self.model.blocks if row[1] == block), None)
        pairs = self.cache.invalidate(block)
        assert sorted(pairs) == sorted(self.model.drop([row[0]] if row else []))
        self.give(pairs)

    def reset(self) -> None:
        fence = self.cache.reset()
        assert sorted(fence.freed) == sorted(self.model.reset())
        self.give(fence.freed)
        self.fences.append((fence, {row[0] for row in self.model.draining}, [one for one, _ in self.open]))

    def check(self) -> None:
        check_same(self.cache, self.model)
        # Plans are made on a version.
        version, rows = self.cache._version, [tuple(row) for row in self.model.blocks]
        assert version > self.seen[0] or rows == self.seen[1]
        self.seen = version, rows
        # Every block is somewhere, once.
        cached = list(self.cache._chains.by_block)
        assert sorted(self.free + cached) == list(range(60))
        draining = {row[0] for row in self.model.draining}
        for fence, keys, reservations in self.fences:
            keys &= draining
            assert fence.is_passed == (not keys and all(one.is_ended for one in reservations))
        self.fences = [one for one in self.fences if not one[0].is_passed]


WEIGHTS = {
    "lookup": 30,
    "insert": 30,
    "release": 12,
    "end": 11,
    "reserve": 10,
    "evict": 5,
    "hold": 2,
    "drop": 2,
    "invalidate": 2,
    "reset": 0.3,
}


@pytest.mark.parametrize("cap", [None, 0, 1, 7, 20])
def test_a_prefix_cache_is_its_model(cap):
    run = Run(seed=cap or 99, cap=cap)
    for _ in range(OPERATIONS // 5):
        getattr(run, run.draw.choices(list(WEIGHTS), WEIGHTS.values())[0])()
        run.check()


@pytest.mark.parametrize("name", POLICIES)
def test_the_books_add_up_by_every_policy(name):
    """The order is the policy's affair; the cap, leaves first, and the plan's victims are not."""
    draw = random.Random(name)
    pool, cache = KVPool(4 * 60, 4), PrefixCache(4, 40, policy=name)
    bridge = memory.SchedulerBridge(pool, cache)
    live: list[str] = []
    evicted = 0
    for step in range(OPERATIONS // 20):
        path, hashes = b"", []
        for _ in range(draw.randint(1, 7)):
            path += bytes([draw.choice(b"abc")])
            hashes.append(path)
        if draw.random() < 0.5 and live:
            bridge.free(live.pop(draw.randrange(len(live))))
        try:
            plan = bridge.plan(f"r{step}", 4 * len(hashes) + draw.randint(0, 20) + 1, hashes)
        except memory.OverBudgetError:
            bridge.free(live.pop())
            continue
        before = dict(cache._chains.entries)
        bridge.allocate(plan)
        live.append(plan.request_id)
        evicted += len(plan.evicted)
        assert before.keys() - cache._chains.entries.keys() == {key for key, _ in plan.evicted}
        chains = cache._chains
        for key, one in chains.entries.items():
            assert len(key) == 1 or chains.entries[key[:-1]] is one.parent
        leaves = [one for one in chains.entries.values() if not one.children and not one.users]
        assert chains.policy.num_evictable == len(leaves) and len(chains.policy) == len(cache) <= 40
        used = sum(one.num_blocks for one in (bridge._live[name].handle for name in live) if one)
        assert pool.num_free_blocks == 60 - len(cache) - used
    assert evicted > 10


def test_a_pool_is_its_model():
    """Ids as a set, handles as lists of them."""
    draw = random.Random(0)
    pool = KVPool(40 * 4, 4)
    free, live, freed = set(range(40)), {}, []
    for step in range(OPERATIONS):
        kind = draw.choice(["alloc", "alloc", "free", "pin", "unpin", "ref", "unref", "split", "again"])
        handle = draw.choice(list(live.values())) if live else None
        if kind == "alloc":
            tokens = draw.randint(1, 60)
            if -(-tokens // 4) > len(free):
                with pytest.raises(memory.OverBudgetError) as error:
                    pool.alloc(tokens)
                assert error.value.available == 4 * len(free)
            else:
                handle = pool.alloc(tokens)
                ids = set(handle.block_ids.tolist())
                assert len(ids) == -(-tokens // 4) and ids <= free
                free -= ids
                live[handle.handle_id] = handle
        elif kind == "again" and freed:
            with pytest.raises(memory.FreedHandleError):
                pool.free(draw.choice(freed))
        elif handle is not None and kind in ("pin", "ref"):
            getattr(pool, kind)(handle)
        elif handle is not None and kind == "unpin":
            if handle.pin_count:
                pool.unpin(handle)
            else:
                with pytest.raises(ValueError):
                    pool.unpin(handle)
        elif handle is not None and kind in ("free", "unref", "split"):
            if kind == "unref" and handle.ref_count > 1:
                pool.unref(handle)
            elif handle.pin_count or handle.ref_count > 1:
                with pytest.raises((memory.PinnedHandleError, memory.SharedHandleError)):
                    getattr(pool, kind)(handle)
            else:
                ids = handle.block_ids.tolist()
                parts = getattr(pool, kind)(handle) or []
                del live[handle.handle_id]
                freed = [handle, *freed[:9]]
                live.update({part.handle_id: part for part in parts})
                assert not parts or [part.block_ids.tolist() for part in parts] == [[one] for one in ids]
                free |= set() if parts else set(ids)
        handles = list(live.values())
        held = [block for one in handles for block in one.block_array.tolist()]
        assert sorted([*free, *held]) == list(range(40)), step
        pinned = [one for one in handles if one.pin_count]
        assert pool.stats() == {
            "max_tokens": 160,
            "allocated_tokens": 4 * len(held),
            "used_tokens": sum(one.num_tokens for one in handles),
            "pinned_tokens": sum(4 * one.num_blocks for one in pinned),
            "available_tokens": 4 * len(free),
            "num_handles": len(handles),
            "num_pinned_handles": len(pinned),
        }
