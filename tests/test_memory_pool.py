"""Pools and handles: a budget in whole blocks, and errors that change nothing."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import kvkernels
from kvkernels import KVLayout, memory
from kvkernels.memory import KVHandle, KVPool, num_blocks, pages


def books(pool: KVPool) -> tuple[object, ...]:
    """All that a pool knows."""
    return pool.stats(), pool._head, sorted(pool._ids.tolist()[pool._head :])


# Budgets and handles.


def test_an_exact_fit_succeeds():
    pool = KVPool(max_tokens=64, block_size=16)
    assert pool.alloc(64).block_ids.tolist() == [0, 1, 2, 3]
    assert pool.stats()["available_tokens"] == 0


def test_over_budget_is_an_error_with_requested_and_available():
    pool = KVPool(max_tokens=64, block_size=16)
    pool.alloc(17)
    before = books(pool)
    with pytest.raises(memory.OverBudgetError, match="at most the 32 that are available, got 33") as error:
        pool.alloc(33)
    assert (error.value.requested, error.value.available) == (33, 32)
    assert isinstance(error.value, MemoryError)
    assert books(pool) == before


def test_over_budget_calls_back_once_and_tries_once_more():
    calls = []
    pool = KVPool(64, 16, on_over_budget=lambda requested, available: calls.append((requested, available)))
    pool.alloc(50)
    with pytest.raises(memory.OverBudgetError):
        pool.alloc(16)
    assert calls == [(16, 0)]


def test_the_callback_may_free_and_is_not_under_the_lock():
    import threading

    held = []

    def free_in_another_thread(requested: int, available: int) -> None:
        other = threading.Thread(target=lambda: pool.free(held.pop()))
        other.start()
        other.join(timeout=10)
        assert not other.is_alive()

    pool = KVPool(64, 16, on_over_budget=free_in_another_thread)
    held.append(pool.alloc(64))
    assert pool.alloc(64).num_blocks == 4


def test_what_the_callback_raises_is_the_caller_s():
    pool = KVPool(16, 16, on_over_budget=lambda *_: 1 / 0)
    pool.alloc(16)
    before = books(pool)
    with pytest.raises(ZeroDivisionError):
        pool.alloc(1)
    assert books(pool) == before


@pytest.mark.parametrize("num_tokens", [0, -1, 1.5, "16", None, True])
def test_tokens_that_are_not_positive_are_a_value_error(num_tokens):
    pool = KVPool(64)
    before = books(pool)
    with pytest.raises(ValueError, match=r"KVPool.alloc: num_tokens must be a positive integer, got"):
        pool.alloc(num_tokens)
    assert books(pool) == before


METHODS = ("free", "pin", "unpin", "ref", "unref", "split")


@pytest.mark.parametrize("method", METHODS)
def test_a_double_free_a_foreign_handle_and_a_closed_pool_are_distinct_errors(method):
    pool, other, closed = KVPool(64), KVPool(64), KVPool(64)
    freed, foreign, orphan = pool.alloc(16), other.alloc(16), closed.alloc(16)
    pool.free(freed)
    closed.close()
    before = books(pool)
    for handle in (foreign, KVHandle.from_dict(freed.to_dict()), copy.copy(freed), "no handle"):
        with pytest.raises(memory.ForeignHandleError, match=rf"KVPool\.{method}: "):
            getattr(pool, method)(handle)
    with pytest.raises(memory.FreedHandleError, match=rf"KVPool\.{method}: "):
        getattr(pool, method)(freed)
    with pytest.raises(memory.ClosedPoolError, match=rf"KVPool\.{method}: "):
        getattr(closed, method)(orphan)
    assert books(pool) == before
    assert len({memory.ForeignHandleError, memory.FreedHandleError, memory.ClosedPoolError}) == 3


@pytest.mark.parametrize("method", ["free", "unref", "split"])
def test_pinned_handles_cannot_be_freed(method):
    pool = KVPool(64)
    handle = pool.alloc(20)
    pool.pin(handle)
    pool.pin(handle)
    pool.unpin(handle)
    before = books(pool)
    with pytest.raises(memory.PinnedHandleError):
        getattr(pool, method)(handle)
    assert books(pool) == before and handle.state == "pinned"
    pool.unpin(handle)
    getattr(pool, method)(handle)
    assert handle.state == "freed"


@pytest.mark.parametrize("method", ["free", "split"])
def test_shared_handles_cannot_be_freed(method):
    pool = KVPool(64)
    handle = pool.alloc(20)
    pool.ref(handle)
    before = books(pool)
    with pytest.raises(memory.SharedHandleError):
        getattr(pool, method)(handle)
    assert books(pool) == before
    pool.unref(handle)
    getattr(pool, method)(handle)


def test_the_last_unref_frees():
    pool = KVPool(64)
    handle = pool.alloc(20)
    pool.ref(handle)
    pool.unref(handle)
    assert not handle.is_freed
    pool.unref(handle)
    assert handle.is_freed and pool.stats()["allocated_tokens"] == 0


def test_counts_cannot_underflow():
    pool = KVPool(64)
    handle = pool.alloc(20)
    with pytest.raises(ValueError, match=r"KVPool.unpin: handle must be pinned"):
        pool.unpin(handle)
    pool.unref(handle)
    with pytest.raises(ValueError):
        pool.unref(handle)
    assert (handle.pin_count, handle.ref_count) == (0, 0)


def test_stats():
    pool = KVPool(max_tokens=100, block_size=16)
    first, second = pool.alloc(17), pool.alloc(16)
    pool.pin(first)
    assert pool.stats() == {
        "max_tokens": 96,
        "allocated_tokens": 48,
        "used_tokens": 33,
        "pinned_tokens": 32,
        "available_tokens": 48,
        "num_handles": 2,
        "num_pinned_handles": 1,
    }
    pool.unpin(first)
    pool.free(first)
    pool.free(second)
    assert {name for name, count in pool.stats().items() if count} == {"max_tokens", "available_tokens"}


def test_alloc_with_a_device():
    handle = KVPool(max_tokens=1024, block_size=16).alloc(num_tokens=128, device="cpu")
    assert (handle.num_tokens, handle.device, handle.tier, handle.rank) == (128, "cpu", "host", 0)
    assert handle.state == "allocated"


# KVHandle.


def test_a_handle_s_dict_round_trip_is_exact():
    layout = KVLayout("B L K H N D", L=2, K=2, B=4, N=16, H=2, D=8, dtype=torch.bfloat16)
    pool = KVPool(64, 16, layout=layout, rank=3)
    handle = pool.alloc(40, request_id="a")
    pool.pin(handle)
    pool.ref(handle)
    handle.prefix_hash = b"\x00\xff"
    told = handle.to_dict()
    again = KVHandle.from_dict(json.loads(json.dumps(told)))
    assert again == handle and again.to_dict() == told
    assert told["layout"] == layout.text and again.layout == layout and again.dtype == torch.bfloat16
    assert (again.request_id, again.num_tokens, again.rank, again.prefix_hash) == ("a", 40, 3, b"\x00\xff")
    assert (again.pin_count, again.ref_count, again.state) == (1, 2, "pinned")
    assert again.block_ids.tolist() == [0, 1, 2] and again.block_ids.dtype == torch.int64
    assert (again.created_s, again.last_access_s) == (handle.created_s, handle.last_access_s)
    assert pickle.loads(pickle.dumps(handle)) == handle
    other = KVHandle.from_dict({**told, "num_tokens": 41})
    assert other != handle


def test_access_times():
    pool = KVPool(64)
    handle = pool.alloc(1)
    handle.last_access_s = 0
    handle.touch()
    assert handle.last_access_s >= handle.created_s > 1.6e9
    for method in ("pin", "ref"):
        handle.last_access_s = 0
        getattr(pool, method)(handle)
        assert handle.last_access_s >= handle.created_s


def test_ids_of_a_handle_are_a_copy_and_end_with_it():
    pool = KVPool(64)
    handle = pool.alloc(64)
    handle.block_ids.fill_(99)
    assert handle.block_ids.tolist() == [0, 1, 2, 3]
    pool.free(handle)
    with pytest.raises(memory.FreedHandleError):
        handle.block_ids  # noqa: B018
    assert sorted(pool.alloc(64).block_ids.tolist()) == [0, 1, 2, 3]


# Blocks.


def test_the_budget_rounds_down_and_requests_round_up():
    assert KVPool(1000, 16).num_blocks == num_blocks(1000, 16) == num_blocks(1000) == 62
    assert KVPool(1000, 16).max_tokens == 992
    pool = KVPool(1000, 16)
    assert [pool.alloc(tokens).num_blocks for tokens in (1, 16, 17, 32, 33)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("sizes", [(15, 16), (0, 16), (-16, 16), (16, 0), (16, -1), (1.5, 16), (16, "a")])
def test_a_pool_has_room_for_a_block(sizes):
    for make in (KVPool, num_blocks):
        with pytest.raises(ValueError, match=r"(KVPool|num_blocks): (max_tokens|block_size) must be"):
            make(*sizes)


def test_no_fragmentation():
    pool = KVPool(64, 1)
    handles = [pool.alloc(1) for _ in range(64)]
    for handle in handles[::2]:
        pool.free(handle)
    scattered = pool.alloc(32)
    assert sorted(scattered.block_ids.tolist()) == list(range(0, 64, 2))


def test_split_makes_a_handle_a_block():
    pool = KVPool(64, 16)
    handle = pool.alloc(40, request_id="a")
    before = pool.stats()
    parts = pool.split(handle)
    assert [part.block_ids.tolist() for part in parts] == [[0], [1], [2]]
    assert [part.num_tokens for part in parts] == [16, 16, 8]
    assert {part.request_id for part in parts} == {"a"}
    assert pool.stats() == {**before, "num_handles": 3}
    for part in parts:
        pool.free(part)
    assert pool.stats()["used_tokens"] == 0 and pool.stats()["num_handles"] == 0


# Pages.


def test_ids_are_taken_by_the_ops_as_they_are():
    source, target = (KVPool(256, 16, page_bytes=64) for _ in range(2))
    assert [tuple(pool.shape) for pool in source.pools] == [(16, 64)]
    source.pools[0].random_(0, 255)
    there, here = source.alloc(48), target.alloc(100)
    mapping = torch.stack([there.block_ids, here.block_ids[:3]], dim=1)
    torch.ops.kvkernels.swap_blocks(source.pools[0], target.pools[0], 64, mapping)
    assert torch.equal(source.pools[0][there.block_ids], target.pools[0][here.block_ids[:3]])
    out = torch.empty(3, 64, dtype=torch.uint8)
    kvkernels.gather_blocks(list(source.pools), there.block_ids, out)
    assert torch.equal(out, source.pools[0][there.block_ids])


@pytest.mark.parametrize(
    "pattern,tensors,pools", [("B L K H N D", 1, 1), ("L | K B N H D", 2, 4), ("L K | B N H D", 4, 4)]
)
def test_a_layout_s_tensors_are_owned(pattern, tensors, pools):
    layout = KVLayout(pattern, L=2, K=2, B=4, N=16, H=2, D=8, dtype=torch.float16)
    with KVPool(64, 16, layout=layout) as pool:
        assert (len(pool.cache.tensors), len(pool.pools)) == (tensors, pools)
        assert {tuple(one.shape) for one in pool.pools} == {(4, layout.page_bytes)}
        for i, one in enumerate(pool.pools):
            one.fill_(i + 1)
        assert [int(one.unique()) for one in pool.pools] == list(range(1, pools + 1))


def test_a_layout_with_scales():
    scales = KVLayout("L | B N", L=2, B=4, N=16, dtype=torch.float32)
    layout = KVLayout("L | B K N H D", L=2, K=2, B=4, N=16, H=2, D=8, dtype=torch.uint8, scales=scales)
    pool = KVPool(64, 16, layout=layout)
    assert len(pool.cache.tensors) == layout.num_tensors == 4 and len(pool.pools) == 4


@pytest.mark.parametrize(
    "given,message",
    [
        ({"B": 5}, "layout must have the pool's 4 blocks"),
        ({"N": 8}, "layout must have blocks of 16 tokens"),
        ({}, "page_bytes must be None with a layout"),
    ],
)
def test_a_layout_that_does_not_fit(given, message):
    layout = KVLayout("B N", **{"B": 4, "N": 16, **given}, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        KVPool(64, 16, layout=layout, page_bytes=None if given else 64)


def test_without_pages_there_is_no_memory():
    pool = KVPool(1 << 24)
    assert pool.pools == () and pool.cache is None


def test_a_pool_without_pages_notes_the_device_and_one_with_them_refuses_another():
    assert KVPool(64).alloc(16, device="cuda:1").to_dict()["tier"] == "device"
    pool = KVPool(64, page_bytes=16)
    assert pool.alloc(16, device=torch.device("cpu")).device == "cpu"
    before = books(pool)
    with pytest.raises(ValueError, match=r"KVPool.alloc: device must be that of the pages, cpu, got 'cuda:0'"):
        pool.alloc(16, device="cuda:0")
    assert books(pool) == before


def test_a_closed_pool_refuses_all_and_its_tensors_live_on():
    pool = KVPool(64, page_bytes=16)
    kept = pool.pools[0].fill_(7)
    pool.close()
    pool.close()
    assert pool.pools == () and int(kept.sum()) == 7 * 64
    with pytest.raises(memory.ClosedPoolError):
        pool.alloc(1)


# Faults.


def test_a_fault_at_every_kth_registration_leaves_nothing_behind(monkeypatch):
    """A layout of four tensors: whichever pool fails, those before it are closed."""
    layout = KVLayout("L K | B N H D", L=2, K=2, B=4, N=16, H=2, D=8, dtype=torch.float16)
    made = []

    class Counted(memory.PinnedPool):
        def __init__(self, *args: int) -> None:
            if len(made) == fail_at:
                raise MemoryError("no more")
            super().__init__(*args)
            self.is_open = True
            made.append(self)

        def close(self) -> None:
            self.is_open = False
            super().close()

    monkeypatch.setattr(pages, "PinnedPool", Counted)
    for fail_at in range(4):
        made.clear()
        with pytest.raises(MemoryError, match="no more"):
            KVPool(64, 16, layout=layout)
        assert [one.is_open for one in made] == [False] * fail_at
    fail_at = 4
    made.clear()
    with KVPool(64, 16, layout=layout):
        assert [one.is_open for one in made] == [True] * 4
    assert [one.is_open for one in made] == [False] * 4


@pytest.mark.parametrize("operation", ["alloc", "free", "split"])
def test_a_fault_at_every_kth_allocation_leaves_nothing_behind(operation):
    """Python's allocator fails once, at the k-th request, for all k that the operation has."""
    testcapi = pytest.importorskip("_testcapi")
    failed = 0
    for k in range(1, 200):
        pool = KVPool(1024, 16)
        handle = pool.alloc(100)
        before, blocks = books(pool), handle.block_ids.tolist()
        done = False
        try:
            testcapi.set_nomemory(k, k + 1)
            if operation == "alloc":
                other = pool.alloc(100)
            elif operation == "free":
                pool.free(handle)
            else:
                parts = pool.split(handle)
            done = True
        except MemoryError:
            failed += 1
        finally:
            testcapi.remove_mem_hooks()
        if not done:
            assert books(pool) == before and handle.block_ids.tolist() == blocks and not handle.is_freed
        elif operation == "alloc":
            assert not set(other.block_ids.tolist()) & set(blocks)
        elif operation == "split":
            assert [part.block_ids.tolist() for part in parts] == [[block] for block in blocks]
        assert pool._lock.acquire(blocking=False)
        pool._lock.release()
    assert failed or operation == "free"
