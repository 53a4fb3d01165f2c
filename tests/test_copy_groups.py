"""Transfers of several groups between canonical KV caches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkernels.layout import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    canonicalize,
    copy_groups,
    empty_host_caches,
)
from kvkernels.layout.specs import MLA, KVCacheGroup, Mamba

IDS = torch.tensor([3]), torch.tensor([1])
PARTS = "must be the same caches or share no storage, got parts of one storage"


def _refs(canonical):
    return [[(ref.tensor_idx, ref.page_size_bytes) for ref in refs] for refs in canonical.group_data_refs]


def _engine(blocks: int = 12):
    """Two groups on one tensor, of which the second uses less of a page, and a third on one of its own."""
    storage = torch.randint(-128, 128, (blocks, 64), dtype=torch.int8)
    mla = MLA(block_size=4, head_size=8, dtype=torch.float16)
    state = Mamba(shapes=((5, 5),), dtypes=(torch.float16,), page_size_padded=64)
    small = MLA(block_size=4, head_size=3, dtype=torch.float16)
    caches = {
        "mla": storage.view(torch.float16).view(blocks, 4, 8),
        "state": [storage.view(torch.float16).as_strided((blocks, 5, 5), (32, 5, 1))],
        "small": torch.randint(-128, 128, (blocks, 24), dtype=torch.int8).view(torch.float16).view(blocks, 4, 3),
    }
    groups = [KVCacheGroup(["mla"], mla), KVCacheGroup(["state"], state), KVCacheGroup(["small"], small)]
    return canonicalize(caches, groups)


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_transfers_of_groups(seed, ratio):
    """Engine to host and back, groups empty or not, beginning and ending anywhere in a host block."""
    rng = np.random.default_rng(seed)
    engine = _engine()
    host = empty_host_caches(engine, 13, blocks_per_host_block=ratio)
    for one in host.tensors:
        one.tensor.copy_(torch.randint(-128, 128, one.tensor.shape, dtype=torch.int8))
    taken = rng.permutation(12)
    sizes = [int(n) for n in rng.multinomial(int(rng.integers(0, 12)), [1 / 3] * 3)]
    skips = [int(rng.integers(ratio)) for _ in sizes]
    hosts, free = [], list(rng.permutation(13))
    for size, skip in zip(sizes, skips, strict=True):
        hosts.append([int(free.pop()) for _ in range(-(-(skip + size) // ratio) if size else 0)])
    engine_ids = torch.tensor([int(b) for b in taken[: sum(sizes)]], dtype=torch.int64)
    host_ids = torch.tensor([b for group in hosts for b in group], dtype=torch.int64)
    starts = np.cumsum([0, *sizes])
    used = [64, 50, 24]
    for store in (True, False):
        pairs = [
            (group, int(engine_ids[starts[group] + i]), hosts[group][(skips[group] + i) // ratio],
             (skips[group] + i) % ratio)
            for group in range(3) for i in range(sizes[group])
        ]  # fmt: skip
        src, dst = (engine, host) if store else (host, engine)
        if not store:
            for one in engine.tensors:
                one.tensor.copy_(torch.randint(-128, 128, one.tensor.shape, dtype=torch.int8))
        wanted = [one.tensor.clone() for one in dst.tensors]
        kept = [one.tensor.clone() for one in src.tensors]
        for group, engine_block, host_block, part in pairs:
            t, n = (0, 0, 1)[group], used[group]
            page = engine.tensors[t].page_size_bytes
            host_bytes = slice(part * page, part * page + n)
            if store:
                wanted[t][host_block, host_bytes] = kept[t][engine_block, :n]
            else:
                wanted[t][engine_block, :n] = kept[t][host_block, host_bytes]
        ids = (engine_ids, host_ids) if store else (host_ids, engine_ids)
        moved = copy_groups(src, dst, *ids, sizes, first_blocks=skips)
        assert moved == sum(size * n for size, n in zip(sizes, used, strict=True))
        assert all(torch.equal(one.tensor, w) for one, w in zip(dst.tensors, wanted, strict=True))
        assert all(torch.equal(one.tensor, k) for one, k in zip(src.tensors, kept, strict=True))


@pytest.mark.parametrize(
    ("src", "dst", "sizes", "options", "error", "match"),
    [
        ([0, 1], [0], [1, 1], {}, ValueError, r"must have 3 groups, got \(2, 2\)"),
        ([0], [0], [-1, 1, 1], {}, ValueError, "must not be negative, got"),
        ([0], [0], [1, 0, 0], {"first_blocks": [3, 0, 0]}, ValueError, "must lie inside a block of 3, got"),
        ([0, 1], [0], [1, 0, 0], {}, ValueError, r"src_block_ids must be \[1\], which the group sizes make"),
        ([0, 1], [0], [2, 0, 0], {"first_blocks": [2, 0, 0]}, ValueError, r"dst_block_ids must be \[2\]"),
        ([0, 12], [0, 1], [1, 1, 0], {}, IndexError, "src_block_ids has 12 in group 1, of 12 blocks"),
        ([0, 1], [0, 9], [1, 0, 1], {}, IndexError, "dst_block_ids has 9 in group 2, of 9 blocks"),
        ([0, -1], [0, 1], [1, 1, 0], {}, IndexError, "src_block_ids has -1 in group 1"),
        ([0, 1], [4, 4], [1, 1, 0], {}, ValueError, "dst_block_ids must name a block once, got 4 of tensor 0 twice"),
        (range(5), [1, 3, 3], [4, 1, 0], {"first_blocks": [2, 0, 0]}, ValueError, "got 3 of tensor 0 twice"),
    ],
)  # fmt: skip
def test_bad_transfers_move_nothing(src, dst, sizes, options, error, match):
    engine = _engine()
    host = empty_host_caches(engine, 9, blocks_per_host_block=3)
    before = [one.tensor.clone() for one in host.tensors]
    with pytest.raises(error, match=f"^copy_groups: .*{match}"):
        copy_groups(engine, host, torch.tensor(list(src)), torch.tensor(dst), sizes, **options)
    assert all(torch.equal(one.tensor, b) for one, b in zip(host.tensors, before, strict=True))


@pytest.mark.parametrize("to_host", [True, False])
def test_a_page_that_is_longer_than_its_tensors_is_refused(to_host):
    """Not only where the larger blocks of the other side have room for it."""
    engine = _engine()
    refs = [[replace(ref, page_size_bytes=65) for ref in group] for group in engine.group_data_refs]
    engine = replace(engine, group_data_refs=refs)
    host = empty_host_caches(engine, 4, blocks_per_host_block=2)
    sides = (engine, host) if to_host else (host, engine)
    with pytest.raises(ValueError, match=r"^whole_page_runs: page_bytes must be at most the pools'"):
        copy_groups(*sides, torch.tensor([0]), torch.tensor([1]), [1, 0, 0])


def test_the_tensor_with_the_fewest_blocks_limits_a_group():
    spec = MLA(block_size=4, head_size=8, dtype=torch.float16)
    caches = {name: torch.zeros(6, 4, 8, dtype=torch.float16) for name in "ab"}
    engine = canonicalize(caches, [KVCacheGroup(["a", "b"], spec)])
    host = empty_host_caches(engine, 5, blocks_per_host_block=2)
    fewer = replace(host.tensors[1], tensor=host.tensors[1].tensor[:3])
    host = replace(host, tensors=[host.tensors[0], fewer])
    assert copy_groups(engine, host, torch.tensor([0]), torch.tensor([2]), [1]) == 2 * 64
    with pytest.raises(IndexError, match=r"^copy_groups: dst_block_ids has 3 in group 0, of 3 blocks$"):
        copy_groups(engine, host, torch.tensor([0]), torch.tensor([3]), [1])


def test_a_group_of_no_blocks_is_not_looked_at():
    """Its tensor may lie in the other side's memory, and the others' be copied."""
    engine = _engine()
    host = empty_host_caches(engine, 4)
    inside = replace(host.tensors[1], tensor=engine.tensors[1].tensor[2:])
    shared = replace(host, tensors=[host.tensors[0], inside])
    assert copy_groups(engine, shared, torch.tensor([3]), torch.tensor([1]), [1, 0, 0]) == 64
    with pytest.raises(ValueError, match=PARTS):
        copy_groups(engine, shared, torch.tensor([3]), torch.tensor([1]), [0, 0, 1])


def test_sides_that_are_parts_of_one_storage_are_refused():
    """Where the same ids do not name the same bytes."""
    engine = _engine()
    shifted = replace(engine.tensors[1], tensor=engine.tensors[1].tensor[2:])
    with pytest.raises(ValueError, match=PARTS):
        copy_groups(engine, replace(engine, tensors=[engine.tensors[0], shifted]), *IDS, [0, 0, 1])
    larger = [
        replace(one, tensor=one.tensor.view(6, -1), page_size_bytes=2 * one.page_size_bytes) for one in engine.tensors
    ]
    with pytest.raises(ValueError, match=PARTS):
        copy_groups(engine, replace(engine, tensors=larger), *IDS, [0, 0, 1])
    assert copy_groups(engine, engine, *IDS, [0, 0, 1]) == 24


def _with_pages(*pages: int, refs: int | None = None) -> CanonicalKVCaches:
    """A tensor of so many bytes a page each, all of one group."""
    tensors = [CanonicalKVCacheTensor(torch.zeros(4, page, dtype=torch.int8), page) for page in pages]
    return CanonicalKVCaches(
        tensors, [[CanonicalKVCacheRef(i, 8) for i in range(len(pages) if refs is None else refs)]]
    )


@pytest.mark.parametrize(
    ("src", "dst", "match"),
    [
        (_with_pages(8, 8), _with_pages(8, 8, 8, refs=2), "the same tensors and references, got 2 and 3 tensors"),
        (_with_pages(8, 8), _with_pages(8, 8, refs=1), "the same tensors and references, got 2 and 2 tensors"),
        (_with_pages(16), _with_pages(24), r"one multiple of the other's, got \[\(16, 24\)\]"),
        (_with_pages(16, 16), _with_pages(32, 24), r"one multiple of the other's, got \[\(16, 32\), \(16, 24\)\]"),
        (_with_pages(8, 8), _with_pages(16, 24), r"one multiple of the other's, got \[\(8, 16\), \(8, 24\)\]"),
        (_with_pages(8, 16), _with_pages(16, 8), r"one multiple of the other's, got \[\(8, 16\), \(16, 8\)\]"),
    ],
)
def test_sides_that_do_not_match_are_refused(src, dst, match):
    with pytest.raises(ValueError, match=f"^copy_groups: .*{match}$"):
        copy_groups(src, dst, *IDS, [1])


def test_a_group_of_layers_that_keep_nothing():
    nothing = CanonicalKVCaches([], [[]])
    assert copy_groups(nothing, nothing, torch.tensor([1, 2]), torch.tensor([3, 0]), [2]) == 0


def test_host_caches_may_have_no_blocks():
    assert [one.tensor.shape for one in empty_host_caches(_engine(), 0).tensors] == [(0, 64), (0, 24)]
    with pytest.raises(ValueError, match="counted from 0, and from 1 in a host block, got num_blocks -1"):
        empty_host_caches(_engine(), -1)


def test_layers_that_share_a_tensor_in_one_group_are_copied_once():
    cache = torch.randint(-128, 128, (6, 64), dtype=torch.int8)
    mla = MLA(block_size=4, head_size=8, dtype=torch.float16)
    small = MLA(block_size=2, head_size=8, dtype=torch.float16, page_size_padded=64)
    typed = cache.view(torch.float16)
    caches = {"a": typed.view(6, 4, 8), "b": typed[:, :16].unflatten(1, (2, 8)), "c": typed.view(6, 4, 8)}
    engine = canonicalize(caches, [KVCacheGroup(["b", "a", "c"], {"a": mla, "b": small, "c": mla})], num_blocks=6)
    assert _refs(engine) == [[(0, 32), (0, 64), (0, 64)]]
    host = empty_host_caches(engine, 2)
    assert copy_groups(engine, host, torch.tensor([4, 1]), torch.tensor([0, 1]), [2]) == 128
    assert torch.equal(host.tensors[0].tensor, cache[[4, 1]])


def test_groups_that_read_what_another_writes_move_nothing():
    engine = _engine()
    before = [one.tensor.clone() for one in engine.tensors]
    with pytest.raises(ValueError, match="no block must be read and written, got block 1 of tensor 0"):
        copy_groups(engine, engine, torch.tensor([0, 1]), torch.tensor([1, 2]), [1, 1, 0])
    with pytest.raises(ValueError, match="no block must be read and written, got block 2 of tensor 1"):
        copy_groups(engine, engine, torch.tensor([0, 2]), torch.tensor([1, 2]), [1, 0, 1])
    assert all(torch.equal(one.tensor, b) for one, b in zip(engine.tensors, before, strict=True))
    assert copy_groups(engine, engine, torch.tensor([0, 3]), torch.tensor([1, 2]), [1, 1, 0]) == 64 + 50
    assert torch.equal(engine.tensors[0].tensor[1], before[0][0])


def test_a_group_that_is_refused_leaves_those_before_it_undone():
    """By what a tensor is, which the copy of its group finds: all groups are checked before the first is copied."""
    mla = MLA(block_size=4, head_size=8, dtype=torch.float16)
    groups = [KVCacheGroup([name], mla) for name in ("a", "b")]
    src = canonicalize({name: torch.ones(6, 4, 8, dtype=torch.float16) for name in ("a", "b")}, groups)
    dst = empty_host_caches(src, 3)
    dst.tensors[0].tensor.zero_()
    tensor = dst.tensors[1].tensor
    bad = replace(dst.tensors[1], tensor=tensor[:1].expand(tensor.shape))
    dst = replace(dst, tensors=[dst.tensors[0], bad])
    with pytest.raises(ValueError, match=r"copy_pages: dst\[0\] must have a row stride of at least its page"):
        copy_groups(src, dst, torch.tensor([1, 2]), torch.tensor([0, 1]), [1, 1])
    assert not dst.tensors[0].tensor.any()


def test_wrong_kinds_of_arguments_are_named():
    engine = _engine()
    with pytest.raises(ValueError, match="blocks must be counted from 0, and from 1 in a host block"):
        empty_host_caches(engine, 2, blocks_per_host_block=0)
    host = empty_host_caches(engine, 4, blocks_per_host_block=4)
    for ids in (torch.tensor([1.7]), torch.tensor([True]), [1]):
        with pytest.raises(ValueError, match="src_block_ids must be an int64 or int32 Tensor on the cpu, got"):
            copy_groups(engine, host, ids, torch.tensor([0]), [1, 0, 0])
    with pytest.raises(ValueError, match="must leave their blocks in int64"):
        copy_groups(engine, host, torch.tensor([1]), torch.tensor([2**62]), [1, 0, 0])
    with pytest.raises(ValueError, match="must be integers, got"):
        copy_groups(engine, host, torch.tensor([1]), torch.tensor([0]), [1.0, 0, 0])


def test_many_blocks_inside_one_cache():
    """Thousands of pairs in 64 tensors: those that are read and written are found, and the others are copied."""
    names = [f"layer.{i}" for i in range(64)]
    spec = MLA(block_size=1, head_size=8, dtype=torch.uint8)
    pages = {name: torch.randint(256, (8192, 1, 8), dtype=torch.uint8) for name in names}
    before = {name: page.clone() for name, page in pages.items()}
    engine = canonicalize(pages, [KVCacheGroup(names, spec)])
    ids = torch.randperm(8192)
    with pytest.raises(ValueError, match=f"no block must be read and written, got block {int(ids[0])} of tensor 0"):
        copy_groups(engine, engine, ids[:2], ids[[2, 0]], [2])
    copy_groups(engine, engine, ids[:4096], ids[4096:], [4096])
    for name, page in pages.items():
        assert torch.equal(page[ids[4096:]], before[name][ids[:4096]])
        assert torch.equal(page[ids[:4096]], before[name][ids[:4096]])


def _windows(full: int, window: int):
    """Two layers that attend to everything, and two to a window, in pools of lengths of their own."""
    specs = [MLA(block_size=4, head_size=8, dtype=torch.float16), MLA(block_size=4, head_size=6, dtype=torch.float16)]
    caches, groups = {}, []
    for spec, blocks in zip(specs, (full, window), strict=True):
        names = [f"{spec.head_size}.{i}" for i in range(2)]
        caches |= {name: torch.randint(-9, 9, (blocks, 4, spec.head_size)).to(torch.float16) for name in names}
        groups.append(KVCacheGroup(names, spec))
    return caches, groups


@pytest.mark.parametrize("num_blocks", [None, [12, 5]])
@pytest.mark.parametrize("ratio", [1, 3])
def test_pools_of_other_lengths_a_group(num_blocks, ratio):
    """As SGLang and TensorRT-LLM keep them: a window's pool is shorter, on both sides."""
    caches, groups = _windows(12, 5)
    engine = canonicalize(caches, groups, num_blocks=num_blocks)
    host = empty_host_caches(engine, [4, 2], blocks_per_host_block=ratio)
    assert [len(one.tensor) for one in engine.tensors] == [12, 12, 5, 5]
    assert [len(one.tensor) for one in host.tensors] == [4, 4, 2, 2]
    for one in host.tensors:
        one.tensor.fill_(77)
    wanted = [one.tensor.clone().view(len(one.tensor), ratio, -1) for one in host.tensors]
    sizes, ids = [2, 2], torch.tensor([11, 3, 4, 0])
    host_ids = torch.tensor([3, 1, 1, 0]) if ratio == 1 else torch.tensor([3, 1])
    assert copy_groups(engine, host, ids, host_ids, sizes) == 2 * 2 * (64 + 48)
    for tensor, one in enumerate(engine.tensors):
        for i in range(2):
            group = tensor // 2
            to = (int(host_ids[2 * group + i]), 0) if ratio == 1 else (int(host_ids[group]), i)
            wanted[tensor][to] = one.tensor[ids[2 * group + i]]
    assert all(torch.equal(one.tensor, want.flatten(1)) for one, want in zip(host.tensors, wanted, strict=True))
    before = [one.tensor.clone() for one in engine.tensors]
    for one in engine.tensors:
        one.tensor.fill_(0)
    copy_groups(host, engine, host_ids, ids, sizes)
    for tensor, one in enumerate(engine.tensors):
        mine = ids[2 * (tensor // 2) : 2 * (tensor // 2) + 2]
        assert torch.equal(one.tensor[mine], before[tensor][mine])
        assert int(one.tensor.count_nonzero()) == int(before[tensor][mine].count_nonzero())
    with pytest.raises(IndexError, match=r"src_block_ids has 5 in group 1, of 5 blocks"):
        copy_groups(engine, host, torch.tensor([5, 5]), torch.tensor([0, 0]), [1, 1])


def test_lengths_a_group_are_one_a_group():
    caches, groups = _windows(12, 5)
    with pytest.raises(ValueError, match=r"^canonicalize: num_blocks must be one number, or one a group of 2, got "):
        canonicalize(caches, groups, num_blocks=[12])
    with pytest.raises(ValueError, match="must have 12 blocks of 48 bytes"):
        canonicalize(caches, groups, num_blocks=12)
    engine = canonicalize(caches, groups)
    with pytest.raises(ValueError, match=r"^empty_host_caches: num_blocks must be one number, or one a group of 2"):
        empty_host_caches(engine, [1, 2, 3])
    with pytest.raises(ValueError, match=r"counted from 0, and from 1 in a host block, got num_blocks \[1, -2\]"):
        empty_host_caches(engine, [1, -2])


def test_groups_that_share_memory_have_one_number_of_blocks():
    storage = torch.zeros(12, 4, 8, dtype=torch.float16)
    spec = MLA(block_size=4, head_size=8, dtype=torch.float16)
    groups = [KVCacheGroup(["a"], spec), KVCacheGroup(["b"], spec)]
    assert len(canonicalize({"a": storage, "b": storage}, groups).tensors) == 1
    with pytest.raises(ValueError, match="layers sharing memory must agree on their blocks, got 12 and 5"):
        canonicalize({"a": storage, "b": storage[:5]}, groups)


def test_a_tensor_of_several_groups_has_the_blocks_of_the_largest():
    for of_group, lengths in (([5, 2, 1], [5, 1]), ([2, 5, 1], [5, 1])):
        host = empty_host_caches(_engine(), of_group)
        assert [len(one.tensor) for one in host.tensors] == lengths
