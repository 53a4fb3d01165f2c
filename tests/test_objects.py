"""Copies of every public object are the same thing again, by pickle, copy, torch.save and a queue between processes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from object_processes import fill

import kvkernels
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks
from kvkernels.layout import CopyRun, TensorParallel, canonicalize, copy_groups, empty_host_caches, opaque_mapping
from kvkernels.layout.specs import FullAttention, KVCacheGroup, Mamba
from kvkernels.names import BufferName


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "deepcopy": copy.deepcopy, "torch.save": _saved}
each_way = pytest.mark.parametrize("way", WAYS)

SIZES = {"L": 2, "B": 3, "N": 2, "D": 4, "dtype": torch.float32}
NBD, PACKED = KVLayout("L | B N D", **SIZES), KVLayout("B L N D", **SIZES)
SCALED = KVLayout(
    "B N D", B=3, N=2, D=4, dtype=torch.uint8, scales=KVLayout("B N", B=3, N=2, dtype=torch.float32, offset_bytes=24)
)
ATTENTION = FullAttention(block_size=2, num_kv_heads=1, head_size=4, dtype=torch.float32)


def _caches() -> dict[str, KVCache]:
    two_layers = torch.arange(48.0).view(3, 2, 2, 4)
    buffer = torch.arange(48, dtype=torch.uint8)
    return {
        "tensors of their own": KVCache(NBD, [torch.arange(24.0).view(3, 2, 4) + i for i in range(2)]),
        "one tensor": KVCache(PACKED, two_layers),
        "layers of one storage": KVCache(
            KVLayout("L | B N D", **SIZES, row_bytes=64), [two_layers[:, 0], two_layers[:, 1]]
        ),
        "a part of a buffer": KVCache(NBD, list(torch.arange(200.0)[5:53].split(24))),
        "scales in the cache's buffer": KVCache(SCALED, [buffer, buffer]),
    }


# Objects that say what they are by ==.
VALUES = [
    NBD, SCALED, NBD.shard(1, 2), compile_plan(NBD, PACKED), compile_plan(NBD, PACKED).inverse(), ATTENTION,
    KVCacheGroup(["a"], ATTENTION), Mamba(shapes=((2, 3),), dtypes=(torch.float16,)), opaque_mapping(8, 1, 2),
    CopyRun(0, 0, 1, 1, 1, 1), TensorParallel(0, 2, 4), BufferName.parse("past_key.10_VLLM_RetainedState"),
    kvkernels.explain("concat_tp_shards", [torch.zeros(2, 3)], 0),
]  # fmt: skip


@each_way
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values(way, value):
    again = WAYS[way](value)
    assert again == value and repr(again) == repr(value) and copy.copy(value) == value


@each_way
def test_plans_have_their_runs(way):
    plan = compile_plan(NBD, PACKED)
    assert len(plan.runs) == 2
    again, runs = WAYS[way](plan), WAYS[way](plan.runs)
    assert torch.equal(again.runs.all, plan.runs.all)
    assert torch.equal(runs[1], plan.runs[1])


@each_way
@pytest.mark.parametrize("kind", _caches())
def test_a_copy_of_a_cache_is_a_cache(way, kind):
    """Its pools are views of its tensors, which share memory where the first ones' do; and it has memory of its own."""
    cache = _caches()[kind]
    before = [tensor.clone() for tensor in cache.tensors]
    again = WAYS[way](cache)
    assert again.layout == cache.layout and again.device == cache.device
    for mine, theirs in zip(again.tensors, cache.tensors, strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
    storages = [len({tensor.untyped_storage().data_ptr() for tensor in one.tensors}) for one in (again, cache)]
    assert storages[0] == storages[1]
    for pool in again.pools:
        pool.zero_()
    for place, pool in zip(again.layout.places, again.pools, strict=False):
        assert pool.untyped_storage().data_ptr() == again.tensors[place.tensor].untyped_storage().data_ptr()
    assert all(torch.equal(tensor, value) for tensor, value in zip(cache.tensors, before, strict=True))
    shown = [tensor for tensor, place in zip(again.tensors, again.layout.places, strict=False) if place]
    assert not any(bool(tensor.flatten()[0]) for tensor in shown)


def test_a_shallow_copy_of_a_cache_has_its_tensors():
    for cache in _caches().values():
        again = copy.copy(cache)
        assert all(mine is theirs for mine, theirs in zip(again.tensors, cache.tensors, strict=True))


@each_way
def test_copies_into_a_copy_arrive(way):
    src, dst = (KVCache(NBD, [torch.full((3, 2, 4), v) for _ in range(2)]) for v in (1.0, 0.0))
    again = WAYS[way](dst)
    convert_blocks(src, again, torch.tensor([[0, 2]]))
    assert [float(tensor[2].sum()) for tensor in again.tensors] == [8.0, 8.0]
    assert not any(tensor.any() for tensor in dst.tensors)


def _packed_engine():
    """Two layers beside each other in the blocks of one tensor."""
    whole = torch.arange(3 * 2 * 16, dtype=torch.float32).view(3, 2, 2, 2, 1, 4)
    groups = [KVCacheGroup(["a", "b"], ATTENTION)]
    return canonicalize({"a": whole[:, 0], "b": whole[:, 1]}, groups, num_blocks=3)


@each_way
def test_canonical_caches(way):
    engine = _packed_engine()
    again = WAYS[way](engine)
    assert again.group_data_refs == engine.group_data_refs
    for mine, theirs in zip(again.tensors, engine.tensors, strict=True):
        assert torch.equal(mine.tensor, theirs.tensor) and mine.page_size_bytes == theirs.page_size_bytes
    assert len({one.tensor.untyped_storage().data_ptr() for one in again.tensors}) == 1
    host = WAYS[way](empty_host_caches(engine, 3))
    assert copy_groups(again, host, torch.tensor([2]), torch.tensor([0]), [1]) == 128
    assert all(
        torch.equal(h.tensor[0], e.tensor[2]) for h, e in zip(host.tensors, engine.tensors, strict=True)
    )  # fmt: skip
    assert copy.copy(engine).tensors[0] is engine.tensors[0]


def test_a_queue_between_processes_shares_the_tensors():
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=fill, args=(inbox, outbox), daemon=True)
    child.start()
    cache = KVCache(NBD, [torch.zeros(3, 2, 4) for _ in range(2)])
    inbox.put((cache, compile_plan(NBD, PACKED)))
    assert outbox.get(timeout=120) == 64
    assert [float(tensor.sum()) for tensor in cache.tensors] == [24.0, 24.0]
    inbox.put(None)
    child.join(60)
    assert child.exitcode == 0
