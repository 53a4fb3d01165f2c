"""Prepared copies: what copy_pages does for the same mapping, for as long as the pools are where they were."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref

import cases
import pytest
import torch
from hypothesis import given
from plans import copy_pages_cases, run_row, runs_tensor

import kvkernels
from kvkernels import KVLayout, compile_plan, reference

MOVED = r"must be in the memory that it had when the copy was prepared, got a storage that was resized, freed or moved"


def _pools(fill: int, count: int = 3, blocks: int = 8, page_bytes: int = 48) -> list[torch.Tensor]:
    return [torch.full((blocks, page_bytes), fill + i, dtype=torch.uint8) for i in range(count)]


def _random_pools(seed: int, **sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(0, 256, pool.shape, dtype=torch.uint8) for pool in _pools(0, **sizes)]


PAIRS = torch.tensor([[3, 0], [4, 1], [0, 7]])


@cases.examples(200)
@given(copy_pages_cases())
def test_random_plans(case):
    """Prepared with each executor, and run twice."""
    before = case.random_buffers()
    expected = [b.clone() for b in before]
    src, dst, mapping, runs, *subblocks = case.arguments_on(expected)
    reference.copy_pages(src, dst, mapping, runs, *subblocks, **case.options)
    for executor in ("auto", "cpu", "reference"):
        actual = [b.clone() for b in before]
        src, dst, mapping, runs, *subblocks = case.arguments_on(actual)
        prepared = kvkernels.prepare(src, dst, runs, *subblocks, executor=executor, **case.options)
        cases.assert_same_bytes(actual, before, "prepare moves nothing")
        for _ in range(2):
            prepared.run(mapping)
            cases.assert_same_bytes(actual, expected, f"executor {executor}")


def test_it_issues_what_copy_pages_issues():
    src, dst = _random_pools(1), _pools(100)
    prepared = kvkernels.prepare(src, dst)
    issued = []
    for run in (
        lambda: prepared.run(PAIRS),
        lambda: kvkernels.copy_pages(src, dst, PAIRS, kvkernels.whole_page_runs(src)),
    ):
        kvkernels.reset_counters()
        run()
        issued.append(kvkernels.counters())
    assert issued[0] == issued[1]
    assert issued[0]["cpu"]["bytes"] == 3 * 3 * 48


def test_explain_moves_nothing_and_agrees_with_copy_pages():
    src, dst = _random_pools(14), _pools(100)
    prepared = kvkernels.prepare(src, dst)
    explained = prepared.explain(PAIRS)
    assert [pool.unique().tolist() for pool in dst] == [[100], [101], [102]]
    assert explained.op == "PreparedCopy.run"
    by_copy_pages = kvkernels.explain("copy_pages", src, dst, PAIRS, kvkernels.whole_page_runs(src))
    assert dataclasses.replace(explained, op="copy_pages") == by_copy_pages
    assert prepared.explain(PAIRS, layer=2).bytes == 3 * 48
    with pytest.raises(IndexError, match=r"PreparedCopy.run: mapping\[0, 0\] = 8 is out of range"):
        prepared.explain(torch.tensor([[8, 0]]))


def test_layers_of_whole_pages():
    src, dst = _random_pools(2), _pools(100)
    prepared = kvkernels.prepare(src, dst)
    prepared.run(PAIRS, layer=1)
    assert [bool((pool >= 100).all() and (pool < 103).all()) for pool in (dst[0], dst[2])] == [True, True]
    assert torch.equal(dst[1][[0, 1, 7]], src[1][[3, 4, 0]])
    for layer in range(3):
        prepared.run(PAIRS, layer=layer)
    assert all(torch.equal(b[[0, 1, 7]], a[[3, 4, 0]]) for a, b in zip(src, dst, strict=True))
    with pytest.raises(IndexError, match=r"PreparedCopy.run: layer must be below 3, got 3"):
        prepared.run(PAIRS, layer=3)
    for wrong in (True, -1, 1.5):
        with pytest.raises(ValueError, match=r"PreparedCopy.run: layer must be an integer from 0"):
            prepared.run(PAIRS, layer=wrong)
    by_rows = kvkernels.prepare(src, dst, kvkernels.whole_page_runs(src))
    with pytest.raises(ValueError, match="layer must be None where runs were given row by row"):
        by_rows.run(PAIRS, layer=0)


def test_a_plan_and_its_layers():
    sizes = {"L": 4, "N": 4, "H": 2, "D": 8, "dtype": torch.float16}
    plan = compile_plan(KVLayout("L B N H D", B=8, **sizes), KVLayout("B L H N D", B=8, **sizes))
    src, dst = torch.randn(4, 8, 4, 2, 8).half(), torch.zeros(8, 4, 2, 4, 8).half()
    src_pools = kvkernels.KVCache(KVLayout("L B N H D", B=8, **sizes), src).pools
    dst_pools = kvkernels.KVCache(KVLayout("B L H N D", B=8, **sizes), dst).pools
    prepared = kvkernels.prepare(src_pools, dst_pools, plan)
    prepared.run(PAIRS, layer=2)
    wanted = torch.zeros_like(dst)
    wanted[[0, 1, 7], 2] = src[2][[3, 4, 0]].transpose(1, 2)
    assert torch.equal(dst, wanted)
    prepared.run(PAIRS)
    wanted[[0, 1, 7]] = src[:, [3, 4, 0]].transpose(0, 1).transpose(2, 3)
    assert torch.equal(dst, wanted)
    with pytest.raises(IndexError, match="layer must be"):
        prepared.run(PAIRS, layer=4)


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize("change", ["freed", "resized", "moved", "replaced"])
def test_pools_that_did_not_stay(side, change):
    """Nothing is read through a pointer to what was; bound anew, the copy works."""
    src, dst = _random_pools(3), _pools(100)
    prepared = kvkernels.prepare(src, dst)
    prepared.run(PAIRS)
    pool = (src if side == "src" else dst)[1]
    storage = pool.untyped_storage()
    kept = pool.clone()
    if change == "freed":
        storage.resize_(0)
    elif change == "resized":
        storage.resize_(storage.nbytes() * 1000)
    elif change == "moved":
        pool.data = pool.clone()
    else:
        pool.set_(kept.clone())
    before = [t.clone() for t in (dst[0], dst[2])]
    with pytest.raises(ValueError, match=rf"^PreparedCopy.run: {side}\[1\] {MOVED} since; bind the pools again$"):
        prepared.run(torch.tensor([[1, 2]]))
    assert all(torch.equal(a, b) for a, b in zip(before, (dst[0], dst[2]), strict=True))
    if change == "freed":
        storage.resize_(kept.nbytes)
    again = kvkernels.prepare(src, dst)
    again.run(torch.tensor([[1, 2]]))
    assert torch.equal(dst[1][2], src[1][1])


def test_a_destination_that_was_shared_since():
    """A lazy clone shares its memory until one of the two is written, which moves that one."""
    src, dst = _random_pools(4, count=1), _pools(100, count=1)
    prepared = kvkernels.prepare(src, dst)
    clone = torch._lazy_clone(dst[0])
    with pytest.raises(ValueError, match=rf"dst\[0\] {MOVED}"):
        prepared.run(PAIRS)
    assert torch.equal(clone, _pools(100, count=1)[0])


def test_metadata_may_change_where_memory_does_not():
    src, dst = _random_pools(5, count=1), _pools(100, count=1)
    prepared = kvkernels.prepare(src, dst)
    src[0].resize_(2, 48)
    prepared.run(PAIRS)
    assert torch.equal(dst[0][7], src[0][0])


def test_unbind_lets_go_of_everything():
    bound = kvkernels.bind(_random_pools(6))
    host = kvkernels.bind(_pools(100))
    prepared, other = kvkernels.prepare(bound, host), kvkernels.prepare(host, host.tensors[::-1], executor="cpu")
    prepared.run(PAIRS, layer=0)
    alive = [weakref.ref(t) for t in bound.tensors]
    assert (len(bound), repr(bound)) == (3, "BoundPools(3 pools)")
    bound.unbind()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert (bound.is_bound, repr(bound)) == (False, "BoundPools(unbound)")
    for layer in (None, 0, 1):
        with pytest.raises(ValueError, match=r"PreparedCopy.run: the pools must be bound, got ones that were unbound"):
            prepared.run(PAIRS, layer=layer)
    with pytest.raises(ValueError, match=r"prepare: pools must be bound, got ones that were unbound"):
        kvkernels.prepare(bound, host)
    other.run(torch.tensor([[0, 1]]), layer=0)
    bound.unbind()


def test_a_copy_that_nobody_has_is_freed():
    src, dst = _random_pools(7), _pools(100)
    prepared = kvkernels.prepare(src, dst)
    prepared.run(PAIRS)
    alive = [weakref.ref(t) for t in (*src, *dst)]
    del src, dst
    gc.collect()
    assert all(ref() is not None for ref in alive), "the pools are kept alive"
    del prepared
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6


def test_memory_that_meets_is_compared_at_each_run():
    pool = _random_pools(8, count=1)[0]
    before = pool.clone()
    prepared = kvkernels.prepare([pool], [pool])
    prepared.run(torch.tensor([[0, 1], [2, 3]]))
    before[[1, 3]] = before[[0, 2]]
    assert torch.equal(pool, before)
    with pytest.raises(
        ValueError, match=r"PreparedCopy.run: mapping must not write what it reads, got destination 1 overlapping"
    ):
        prepared.run(torch.tensor([[0, 1], [1, 2]]))
    assert torch.equal(pool, before)
    halves = [pool[:, :24], pool[:, 20:44]]
    with pytest.raises(ValueError, match=r"dst must not overlap where they are written, got dst\[0\] and dst\[1\]"):
        kvkernels.prepare(_random_pools(9, count=2, page_bytes=24), halves).run(PAIRS)


def test_what_a_run_refuses():
    prepared = kvkernels.prepare(_random_pools(10), _pools(100))
    with pytest.raises(IndexError, match=r"PreparedCopy.run: mapping\[1, 0\] = 8 is out of range for src\[0\]"):
        prepared.run(torch.tensor([[0, 0], [8, 1]]))
    with pytest.raises(ValueError, match=r"PreparedCopy.run: mapping must name each destination once"):
        prepared.run(torch.tensor([[0, 0], [1, 0]]))
    with pytest.raises(ValueError, match=r"PreparedCopy.run: mapping must have shape \[n, 2\]"):
        prepared.run(torch.tensor([0, 0]))
    skipping = kvkernels.prepare(_random_pools(10), _pools(100), skip_negative=True)
    skipping.run(torch.tensor([[0, -1], [-5, 0]]))


def test_what_prepare_refuses():
    src, dst = _pools(0), _pools(100)
    with pytest.raises(ValueError, match=r"^prepare: runs\[0\] must stay inside src\[0\]'s page of 48 bytes"):
        kvkernels.prepare(src, dst, runs_tensor(run_row((0, 0), (0, 0), 49, (0, 0))))
    with pytest.raises(ValueError, match=r"^prepare: executor must be one of 'auto'"):
        kvkernels.prepare(src, dst, executor="gpu")
    with pytest.raises(ValueError, match=r"^prepare: sm_budget must not be negative"):
        kvkernels.prepare(src, dst, sm_budget=-1)
    with pytest.raises(ValueError, match=r"^PreparedCopy.run: executor 'dma' cannot serve this call"):
        kvkernels.prepare(src, dst, executor="dma").run(PAIRS)
    for wrong in ([], src[0], [1], None):
        with pytest.raises(ValueError, match=r"^bind: pools must be a list of at least one Tensor"):
            kvkernels.bind(wrong)
    with pytest.raises(ValueError, match=r"bind: pools must be tensors with memory"):
        kvkernels.bind([torch.zeros(2, 2, device="meta")])


def test_gradients():
    src, dst = _random_pools(11, count=1), [torch.zeros(8, 12)]
    prepared = kvkernels.prepare([src[0].view(torch.float32)], dst)
    version = dst[0]._version
    prepared.run(PAIRS)
    assert dst[0]._version == version + 1
    dst[0].requires_grad_()
    with pytest.raises(ValueError, match=r"PreparedCopy.run: dst\[0\] must not require a gradient"):
        prepared.run(PAIRS)
    with torch.no_grad():
        prepared.run(PAIRS)
    assert dst[0]._version == version + 2


def test_threads():
    """One prepared copy, run by many at once."""
    src, dst = _random_pools(12, blocks=64), _pools(100, blocks=64)
    prepared = kvkernels.prepare(src, dst)
    errors = []

    def run(first: int) -> None:
        try:
            for _ in range(200):
                prepared.run(torch.tensor([[first + 8, first]]), layer=first % 3)
                prepared.run(torch.tensor([[first, first + 32]]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(torch.equal(b[32:40], a[:8]) for a, b in zip(src, dst, strict=True))


@pytest.mark.parametrize("call", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_stands_for_this_process_memory(call):
    for thing in (kvkernels.bind(_pools(0)), kvkernels.prepare(_pools(0), _pools(1))):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied: it stands for this process's memory"):
            call(thing)


def test_in_a_compiled_graph():
    src, dst = _random_pools(13), _pools(100)
    prepared = kvkernels.prepare(src, dst)

    def call(mapping: torch.Tensor, layer: int | None) -> torch.Tensor:
        prepared.run(mapping, layer=layer)
        return mapping + 1

    compiled = torch.compile(call)
    assert torch.equal(compiled(PAIRS, 1), PAIRS + 1)
    assert [torch.equal(b[[0, 1, 7]], a[[3, 4, 0]]) for a, b in zip(src, dst, strict=True)] == [False, True, False]
    assert torch.equal(compiled(PAIRS, None), PAIRS + 1)
    assert all(torch.equal(b[[0, 1, 7]], a[[3, 4, 0]]) for a, b in zip(src, dst, strict=True))
