"""The worker's half of a connector, driven without an engine: bytes there and back, failures, ranks, sleep."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from kvkernels.connectors.worker import HostWorker, PageCheckError
from kvkernels.layout.canonical import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor
from kvkernels.registration import LIBRARY

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")

BLOCKS, PAGE = 24, 192


def caches_of(groups, tensors=3, page=PAGE, seed=0, blocks=BLOCKS):
    """Random pages, NaNs of every dtype among them; ``groups`` has for each group (tensor, page bytes)."""
    draw = torch.Generator().manual_seed(seed)
    pages = [torch.randint(-128, 128, (blocks, page), dtype=torch.int8, generator=draw) for _ in range(tensors)]
    refs = [[CanonicalKVCacheRef(tensor, size) for tensor, size in group] for group in groups]
    return CanonicalKVCaches([CanonicalKVCacheTensor(one, page) for one in pages], refs)


ONE = [[(0, PAGE), (1, PAGE), (2, PAGE)]]
#: A hybrid model's: two groups of states with padding, one of attention, in the same tensors.
HYBRID = [[(0, 160), (1, 160)], [(2, 160)], [(0, PAGE), (1, PAGE), (2, PAGE)]]


def worker_of(caches, chunks=8, per_chunk=2, **keywords):
    return HostWorker(caches, chunks, per_chunk, lanes=1, **keywords)


def store(worker, job, device, chunks, sizes, firsts):
    worker.submit_store(job, np.array(device, np.int32), np.array(chunks, np.int32), sizes, firsts)


def load(worker, job, chunks, device, sizes, firsts, **keywords):
    worker.submit_load(job, np.array(chunks, np.int32), np.array(device, np.int32), sizes, firsts, **keywords)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("groups,sizes,firsts", [(ONE, [3], [1]), (HYBRID, [1, 0, 4], [3, 0, 0])])
def test_what_was_stored_comes_back_and_nothing_else_changes(groups, sizes, firsts, verify):
    if verify:
        pytest.importorskip("xxhash")
    caches = caches_of(groups)
    worker = worker_of(caches, verify=verify, states=(0, 1) if groups is HYBRID else ())
    from_ids, to_ids = list(range(sum(sizes))), list(range(10, 10 + sum(sizes)))
    chunks = [5, 2] if groups is ONE else [5, 2, 0]
    before = [one.tensor.clone() for one in caches.tensors]
    worker._pool.pages.fill_(0x5A)
    store(worker, 0, from_ids, chunks, sizes, firsts)
    worker.wait([0])
    pool = worker._pool.pages.clone()
    assert all(torch.equal(one.tensor, old) for one, old in zip(caches.tensors, before, strict=True))
    load(worker, 1, chunks, to_ids, sizes, firsts)
    worker.wait([1])
    expected, block = [one.clone() for one in before], 0
    rows = 0
    for refs, size in zip(caches.group_data_refs, sizes, strict=True):
        for i in range(block, block + size):
            for ref in refs:
                used = slice(0, ref.page_size_bytes)
                expected[ref.tensor_idx][to_ids[i], used] = before[ref.tensor_idx][from_ids[i], used]
        rows += size * sum(ref.page_size_bytes for ref in refs)
        block += size
    assert all(torch.equal(one.tensor, want) for one, want in zip(caches.tensors, expected, strict=True))
    assert torch.equal(worker._pool.pages, pool)
    assert int((pool != 0x5A).any(dim=1).sum()) == sum(sizes)
    ended = worker.finished()
    assert [(one.job_id, one.error, one.bytes) for one in ended] == [(0, None, rows), (1, None, rows)]
    assert worker.finished() == []
    worker.close()


def test_s3_a_state_is_loaded_before_attention():
    worker = worker_of(caches_of(HYBRID), states=(0, 1))
    with worker._mover.held():
        load(worker, 0, [0, 1, 2], [0, 1, 2], [1, 1, 1], [0, 0, 0])
        first, second = worker._jobs[0].transfers
    assert first.ticket < second.ticket
    assert {t.data_ptr() for t in first._job.written()} == {t.tensor.data_ptr() for t in caches_of_worker(worker)}
    first_groups, second_groups = (set(part.copies) for part in worker._copies._load)
    assert (first_groups, second_groups) == ({0, 1}, {2})
    worker.close()


def caches_of_worker(worker):
    return [CanonicalKVCacheTensor(tensor, PAGE) for tensor in worker.device]


def test_attention_fails_where_its_states_do():
    """The second transfer needs the first."""
    worker = worker_of(caches_of(HYBRID), states=(0, 1))
    with worker._mover.held():
        load(worker, 0, [0, 2], [0, 2], [1, 0, 1], [0, 0, 0])
        states, attention = worker._jobs[0].transfers
        assert states.cancel()
    worker.wait([0])
    assert attention.result().state == "failed"
    assert worker.finished()[0].error is not None
    worker.close()


@pytest.mark.parametrize(
    "device,chunks,why",
    [([BLOCKS], [0], "out of range|must be"), ([0], [99], "out of range|must be"), ([0, 1, 2, 3], [0], "group_sizes")],
)
def test_a_job_with_wrong_ids_fails_alone_and_is_logged_once(device, chunks, why, caplog):
    caches = caches_of(ONE)
    worker = worker_of(caches)
    before = [one.tensor.clone() for one in caches.tensors]
    with caplog.at_level(logging.WARNING, "kvkernels.connectors"):
        load(worker, 7, chunks, device, [1], [0])
        worker.wait([7])
        ended = worker.finished() + worker.finished()
    assert [one.job_id for one in ended] == [7] and ended[0].error is not None and ended[0].bytes == 0
    assert len(caplog.records) == 1 and "load 7 failed" in caplog.text
    assert all(torch.equal(one.tensor, old) for one, old in zip(caches.tensors, before, strict=True))
    store(worker, 8, [0], [0], [1], [0])
    worker.wait([8])
    assert worker.finished()[0].error is None
    worker.close()


@pytest.mark.parametrize("where", ["pool", "end", "sum", "copy"])
def test_a_page_that_changed_fails_its_check(where):
    pytest.importorskip("xxhash")
    caches = caches_of(ONE)
    worker = worker_of(caches, verify=True)
    store(worker, 0, [0, 1, 2], [3, 4], [3], [0])
    worker.wait([0])
    if where == "pool":
        worker.host[1][6, 7] ^= 1
    elif where == "end":
        worker.host[2][6, PAGE - 1] ^= 1
    elif where == "sum":
        worker._pool.pages[6, -1] ^= 1
    load(worker, 1, [3, 4], [5, 6, 7], [3], [0])
    if where == "copy":
        worker._jobs[1].transfers[0].wait()
        caches.tensors[2].tensor[5, 0] ^= 1
    worker.wait([1])
    stored, loaded = worker.finished()
    assert stored.error is None and isinstance(loaded.error, PageCheckError) and "1 blocks" in str(loaded.error)
    worker.close()


def test_padding_is_neither_copied_nor_checked():
    pytest.importorskip("xxhash")
    caches = caches_of(HYBRID)
    worker = worker_of(caches, verify=True, states=(0, 1))
    worker._pool.pages.fill_(0x5A)
    store(worker, 0, [0, 1], [0, 1], [1, 1, 0], [0, 0, 0])
    worker.wait([0])
    assert (worker.host[0][0, 160:] == 0x5A).all() and (worker.host[2][2, 160:] == 0x5A).all()
    worker.host[0][0, 170] ^= 1
    load(worker, 1, [0, 1], [4, 5], [1, 1, 0], [0, 0, 0])
    worker.wait([1])
    assert [one.error for one in worker.finished()] == [None, None]
    worker.close()


def test_an_expedited_load_that_fails_is_retried_by_the_reference():
    caches = caches_of(ONE)
    worker = worker_of(caches)
    store(worker, 0, [0], [3], [1], [0])
    worker.wait([0])
    submit = worker._copies.submit
    worker._copies.submit = lambda *arguments: raise_error(RuntimeError("no"))
    load(worker, 1, [3], [9], [1], [0], expedited=True)
    worker._copies.submit = submit
    worker.wait([1])
    assert [one.error for one in worker.finished()] == [None, None] and worker.take_bad_blocks() == set()
    assert all(torch.equal(one.tensor[9], one.tensor[0]) for one in caches.tensors)
    worker.close()


def raise_error(error):
    raise error


def test_an_expedited_load_that_fails_twice_names_its_blocks_once():
    pytest.importorskip("xxhash")
    worker = worker_of(caches_of(ONE), verify=True)
    store(worker, 0, [0, 1], [3], [2], [0])
    worker.wait([0])
    worker.host[0][7, 0] ^= 1
    load(worker, 1, [3], [9, 11], [2], [0], expedited=True)
    load(worker, 2, [3], [12], [1], [1])
    worker.wait([1, 2])
    errors = {one.job_id: one.error for one in worker.finished()}
    assert errors[0] is None and isinstance(errors[1], PageCheckError) and isinstance(errors[2], PageCheckError)
    # Of the load that nobody waits for in its step, the request is named instead.
    assert worker.take_bad_blocks() == {9, 11} and worker.take_bad_blocks() == set()
    worker.close()


def test_expedited_loads_overtake_loads_and_loads_stores():
    worker = worker_of(caches_of(ONE), chunks=12)
    ended = []
    with worker._mover.held():
        store(worker, 0, [0], [0], [1], [0])
        load(worker, 1, [3], [9], [1], [0])
        load(worker, 2, [4], [10], [1], [0], expedited=True)
        for job in (0, 1, 2):
            worker._jobs[job].transfers[0].add_callback(lambda transfer: ended.append(transfer.priority))
    worker._mover.drain()
    while len(ended) < 3:
        worker._mover.poll()
    assert sorted(ended) == ["expedited", "load", "store"]
    results = {worker._jobs[job].transfers[0].priority: worker._jobs[job].transfers[0].result() for job in (0, 1, 2)}
    assert results["expedited"].queue_seconds <= results["load"].queue_seconds + 1
    worker.close()


def test_s3_two_ranks_keep_their_shards_apart():
    """Two worker sides, as an engine with tensor parallelism has them: each its own pool of the same chunks."""
    sides = [caches_of(ONE, seed=rank) for rank in range(2)]
    workers = [worker_of(caches, rank=rank, ranks=2) for rank, caches in enumerate(sides)]
    for rank, worker in enumerate(workers):
        store(worker, 0, [0, 1, 2], [3, 4], [3], [0])
        worker.wait([0])
        for one in sides[rank].tensors:
            one.tensor[6:9] = 0
        load(worker, 1, [3, 4], [6, 7, 8], [3], [0])
        worker.wait([1])
        assert all(torch.equal(one.tensor[6:9], one.tensor[0:3]) for one in sides[rank].tensors)
    for worker in workers:
        worker.close()


def test_s3_ranks_with_the_same_bytes_share_a_pool_and_take_turns_to_write(request):
    pytest.importorskip("xxhash")
    name = f"test:{request.node.name[:30]}:{np.random.default_rng().integers(1 << 40)}"
    sides = [caches_of(ONE) for _ in range(3)]
    workers = [
        worker_of(caches, rank=rank, ranks=3, shared=name, verify=True) for rank, caches in enumerate(sides)
    ]  # fmt: skip
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(sides[0].tensors, sides[2].tensors, strict=True))
    written = []
    for worker in workers:
        before = worker._pool.pages.clone()
        store(worker, 0, [0, 1, 2, 3, 4, 5], [3, 4, 5], [6], [0])
        worker.wait([0])
        written.append({int(row) // 2 for row in (worker._pool.pages != before).any(dim=1).nonzero()})
    assert written == [{3}, {4}, {5}]
    for worker, caches in zip(workers, sides, strict=True):
        load(worker, 1, [3, 4, 5], [10, 11, 12, 13, 14, 15], [6], [0])
        worker.wait([1])
        assert [one.error for one in worker.finished()] == [None, None]
        assert all(torch.equal(one.tensor[10:16], one.tensor[0:6]) for one in caches.tensors)
    for worker in reversed(workers):
        worker.close()


def test_a_worker_sleeps_and_wakes():
    caches = caches_of(ONE)
    worker = worker_of(caches)
    store(worker, 0, [0, 1], [3], [2], [0])
    worker.unbind()
    worker.unbind()
    assert [one.error for one in worker.finished()] == [None]
    kept = [one.tensor[:2].clone() for one in caches.tensors]
    load(worker, 1, [3], [4, 5], [2], [0])
    (asleep,) = worker.finished()
    assert "must be bound, got those of one that sleeps" in str(asleep.error)
    for one in caches.tensors:
        storage = one.tensor.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        one.tensor.fill_(0x4B)
    worker.bind()
    worker.bind()
    load(worker, 2, [3], [4, 5], [2], [0])
    worker.wait([2])
    assert [one.error for one in worker.finished()] == [None]
    assert all(torch.equal(one.tensor[4:6], old) for one, old in zip(caches.tensors, kept, strict=True))
    worker.close()


def test_without_hooks_the_next_job_fails_with_a_sentence():
    caches = caches_of(ONE)
    worker = worker_of(caches)
    storage = caches.tensors[0].tensor.untyped_storage()
    storage.resize_(0)
    load(worker, 0, [3], [4], [1], [0])
    worker.wait([0])
    (ended,) = worker.finished()
    assert isinstance(ended.error, ValueError) and "resized" in str(ended.error)
    storage.resize_(BLOCKS * PAGE)
    worker.close()


def test_a_stage_without_layers_of_a_group_copies_the_others():
    caches = caches_of([[], [(0, PAGE)]])
    worker = worker_of(caches, states=(0,))
    store(worker, 0, [1, 2], [0, 1], [1, 1], [0, 0])
    worker.wait([0])
    load(worker, 1, [0, 1], [5, 6], [1, 1], [0, 0])
    worker.wait([1])
    assert [(one.error, one.bytes) for one in worker.finished()] == [(None, PAGE), (None, PAGE)]
    assert torch.equal(caches.tensors[0].tensor[6], caches.tensors[0].tensor[2])
    worker.close()


def test_jobs_in_flight_at_random_keep_every_byte():
    """Stores and loads of three groups that share tensors, several in flight, against a model of dictionaries."""
    draw = np.random.default_rng(5)
    caches = caches_of(HYBRID, blocks=60)
    worker = worker_of(caches, chunks=20, per_chunk=1, states=(0, 1))
    model, job, open_jobs = {}, 0, []
    for round_ in range(60):
        group = int(draw.integers(0, 3))
        size = int(draw.integers(1, 6))
        blocks = draw.permutation(60)[:size]
        sizes = [size if i == group else 0 for i in range(3)]
        if draw.random() < 0.5 or not any(key[0] == group for key in model):
            chunks = draw.permutation(20)[:size]
            store(worker, job, blocks, chunks, sizes, [0, 0, 0])
            worker.wait([job])
            for block, chunk in zip(blocks, chunks, strict=True):
                model = {key: value for key, value in model.items() if key[1] != chunk}
                refs = caches.group_data_refs[group]
                model[group, chunk] = [
                    caches.tensors[r.tensor_idx].tensor[block, : r.page_size_bytes].clone() for r in refs
                ]
        else:
            known = [chunk for one, chunk in model if one == group][:size]
            blocks = blocks[: len(known)]
            sizes[group] = len(known)
            load(worker, job, known, blocks, sizes, [0, 0, 0], expedited=bool(round_ % 3 == 0))
            open_jobs.append((job, group, known, blocks))
            worker.wait([job])
            for block, chunk in zip(blocks, known, strict=True):
                refs = caches.group_data_refs[group]
                got = [caches.tensors[r.tensor_idx].tensor[block, : r.page_size_bytes] for r in refs]
                assert all(torch.equal(a, b) for a, b in zip(got, model[group, chunk], strict=True))
        job += 1
    assert [one.error for one in worker.finished()] == [None] * job and len(open_jobs) > 10
    worker.close()
