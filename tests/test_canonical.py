"""Canonical KV caches: every backend's tensors as pages on their own memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvkernels import copy_pages
from kvkernels.layout import (
    CanonicalPageMapping,
    CopyRun,
    TensorParallel,
    canonicalize,
    layout_of,
    mapping_of_plan,
    opaque_mapping,
    plan_of_mapping,
)
from kvkernels.layout.specs import MLA, ChunkedLocalAttention, FullAttention, KVCacheGroup, Mamba, SlidingWindow

B, N, H, D = 10, 16, 4, 64
PAGE = 2 * N * H * D * 2
FULL = FullAttention(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float16)


def _half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


def _one(cache, spec=FULL, **options):
    return canonicalize({"layer": cache}, [KVCacheGroup(["layer"], spec)], **options)


def _geometry(canonical):
    return [(tuple(t.tensor.shape), t.tensor.stride(0), t.page_size_bytes) for t in canonical.tensors]


def _refs(canonical):
    return [[(ref.tensor_idx, ref.page_size_bytes) for ref in refs] for refs in canonical.group_data_refs]


@pytest.mark.parametrize(
    "shape", [(B, 2, N, H, D), (B, H, N, 2 * D), (B, N, H, 2 * D), (B, PAGE // 2)], ids=lambda shape: str(shape)
)
def test_blocks_outermost_are_one_view(shape):
    cache = _half(*shape)
    canonical = _one(cache)
    (one,) = canonical.tensors
    assert one.tensor.dtype == torch.int8 and one.tensor.data_ptr() == cache.data_ptr()
    assert _geometry(canonical) == [((B, PAGE), PAGE, PAGE)] and _refs(canonical) == [[(0, PAGE)]]


def test_blocks_outermost_in_memory_though_not_by_shape():
    cache = _half(B, 2, H, N, D).permute(1, 0, 3, 2, 4)
    assert cache.shape == (2, B, N, H, D)
    canonical = _one(cache)
    assert _geometry(canonical) == [((B, PAGE), PAGE, PAGE)]
    assert canonical.tensors[0].tensor.data_ptr() == cache.data_ptr()


def test_k_before_v_is_two_tensors_of_half_a_page():
    cache = _half(2, B, N, H, D)
    canonical = _one(cache)
    assert _geometry(canonical) == [((B, PAGE // 2), PAGE // 2, PAGE // 2)] * 2
    assert _refs(canonical) == [[(0, PAGE // 2), (1, PAGE // 2)]]
    assert [t.tensor.data_ptr() for t in canonical.tensors] == [cache.data_ptr(), cache[1].data_ptr()]


def test_k_and_v_apart_with_offsets_and_other_head_sizes():
    """Ascend: views into one buffer, each from an offset of its own."""
    spec = FullAttention(block_size=N, num_kv_heads=H, head_size=D, head_size_v=32, dtype=torch.float16)
    buffer = _half(3 + B * N * H * (D + 32) + 5)
    k = buffer[3 : 3 + B * N * H * D].view(B, N, H, D)
    v = buffer[8 + B * N * H * D :].view(B, N, H, 32)
    canonical = _one([k, v], spec)
    assert _geometry(canonical) == [((B, 8192), 8192, 8192), ((B, 4096), 4096, 4096)]
    assert [t.tensor.data_ptr() for t in canonical.tensors] == [k.data_ptr(), v.data_ptr()]
    assert _refs(canonical) == [[(0, 8192), (1, 4096)]]


def test_padded_rows_are_kept():
    spec = FullAttention(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float16, page_size_padded=PAGE + 512)
    padded = _half(B, (PAGE + 512) // 2)
    cache = padded.as_strided((B, 2, N, H, D), ((PAGE + 512) // 2, N * H * D, H * D, D, 1))
    canonical = _one(cache, spec, num_blocks=B)
    assert _geometry(canonical) == [((B, PAGE + 512), PAGE + 512, PAGE + 512)]
    assert _refs(canonical) == [[(0, PAGE)]]


def test_layers_packed_into_one_block_are_views_at_the_blocks_distance():
    """Two layers take turns in a block: a row is longer than a page, and no byte is in two tensors."""
    packed = _half(B, 2, N, H, 2 * D)
    caches = {"a": packed[:, 0].transpose(1, 2), "b": packed[:, 1].transpose(1, 2)}
    canonical = canonicalize(caches, [KVCacheGroup(["a", "b"], FULL)])
    assert _geometry(canonical) == [((B, PAGE), 2 * PAGE, PAGE)] * 2
    assert [t.tensor.data_ptr() - packed.data_ptr() for t in canonical.tensors] == [0, PAGE]


def _mamba(padded: int | None, *, storage: torch.Tensor | None = None, blocks: int = B):
    """A state of two tensors in one page."""
    spec = Mamba(shapes=((8, 128), (4, 1760)), dtypes=(torch.float32, torch.float16), page_size_padded=padded)
    row = spec.page_size_bytes
    storage = torch.zeros(blocks * row, dtype=torch.int8) if storage is None else storage
    conv = storage.view(torch.float32).as_strided((blocks, 8, 128), (row // 4, 128, 1))
    ssm = storage.view(torch.float16).as_strided((blocks, 4, 1760), (row // 2, 1760, 1), 2048)
    return spec, [conv, ssm], storage


def test_mamba_is_the_page_its_states_share():
    spec, states, storage = _mamba(18432)
    assert spec.unpadded_page_size_bytes == 18176 and spec.block_size == 1
    canonical = _one(states, spec)
    assert _geometry(canonical) == [((B, 18432), 18432, 18432)] and _refs(canonical) == [[(0, 18176)]]
    assert canonical.tensors[0].tensor.data_ptr() == storage.data_ptr()


def test_states_with_storages_of_their_own_are_a_tensor_each():
    spec, states, _ = _mamba(None)
    canonical = _one([state.clone() for state in states], spec)
    assert _geometry(canonical) == [((B, 4096), 4096, 4096), ((B, 14080), 14080, 14080)]
    assert _refs(canonical) == [[(0, 4096), (1, 14080)]]


def test_the_worked_case():
    """Four groups over three shared tensors: attention, MLA, states that fill their page or not."""
    storages = [torch.zeros(B * PAGE, dtype=torch.int8) for _ in range(3)]
    typed = [storage.view(torch.float16) for storage in storages]

    def state(shapes, index):
        row, at, tensors = PAGE // 2, 0, []
        for shape in shapes:
            tensors.append(typed[index].as_strided((B, *shape), (row, shape[1], 1), at))
            at += shape[0] * shape[1]
        return tensors

    mla = MLA(block_size=N, head_size=512, dtype=torch.float16)
    unaligned = Mamba(shapes=((32, 126), (64, 64)), dtypes=(torch.float16,) * 2, page_size_padded=PAGE)
    aligned = Mamba(shapes=((32, 128), (64, 64)), dtypes=(torch.float16,) * 2)
    assert (mla.page_size_bytes, unaligned.unpadded_page_size_bytes, aligned.page_size_bytes) == (16384, 16256, 16384)
    caches = {f"full.{i}": typed[i].view(B, 2, N, H, D) for i in range(3)}
    caches |= {f"mla.{i}": typed[i].view(B, N, 512) for i in range(3)}
    caches |= {f"unaligned.{i}": state(unaligned.shapes, i) for i in range(3)}
    caches |= {f"aligned.{i}": state(aligned.shapes, i) for i in range(2)}
    groups = [
        KVCacheGroup([f"full.{i}" for i in range(3)], FULL), KVCacheGroup([f"mla.{i}" for i in range(3)], mla),
        KVCacheGroup([f"unaligned.{i}" for i in range(3)], unaligned),
        KVCacheGroup([f"aligned.{i}" for i in range(2)], aligned),
    ]  # fmt: skip
    canonical = canonicalize(caches, groups)
    assert _geometry(canonical) == [((10, 16384), 16384, 16384)] * 3
    assert [t.tensor.data_ptr() for t in canonical.tensors] == [storage.data_ptr() for storage in storages]
    assert _refs(canonical) == [
        [(0, 16384), (1, 16384), (2, 16384)], [(0, 16384), (1, 16384), (2, 16384)],
        [(0, 16256), (1, 16256), (2, 16256)], [(0, 16384), (1, 16384)],
    ]  # fmt: skip


def test_layers_of_one_group_may_differ():
    wide = FullAttention(block_size=N, num_kv_heads=2 * H, head_size=D, dtype=torch.float16)
    caches = {"a": _half(B, 2, N, H, D), "b": _half(B, 2, N, 2 * H, D)}
    by_name = {"a": FULL, "b": wide}
    for spec in (by_name, SimpleNamespace(kv_cache_specs=by_name)):
        canonical = canonicalize(caches, [KVCacheGroup(["a", "b"], spec)])
        assert _refs(canonical) == [[(0, 16384), (1, 32768)]]


def test_all_layers_in_one_block():
    cache = _half(B, 5, 2, N, H, D)
    canonical = canonicalize(cache, [KVCacheGroup([f"{i}" for i in range(5)], FULL)])
    assert _geometry(canonical) == [((B, 5 * PAGE), 5 * PAGE, 5 * PAGE)] and _refs(canonical) == [[(0, 5 * PAGE)]]
    assert canonical.tensors[0].tensor.data_ptr() == cache.data_ptr()
    with pytest.raises(ValueError, match="must come with one group, got 2"):
        canonicalize(cache, [KVCacheGroup(["a"], FULL), KVCacheGroup(["b"], FULL)])
    with pytest.raises(ValueError, match="of all layers must have"):
        canonicalize(_half(2, B, 2, N, H, D), [KVCacheGroup(["a", "b"], FULL)], num_blocks=B)


@pytest.mark.parametrize("ratio", [2, 4])
def test_kernel_blocks_are_regrouped(ratio):
    cache = _half(B * ratio, 2, N // ratio, H, D)
    canonical = _one(cache, num_blocks=B)
    assert _geometry(canonical) == [((B, PAGE), PAGE, PAGE)] and _refs(canonical) == [[(0, PAGE)]]
    assert (
        _geometry(_one(_half(2, B * ratio, N // ratio, H, D), num_blocks=B))
        == [((B, PAGE // 2),) + (PAGE // 2,) * 2] * 2
    )
    with pytest.raises(ValueError, match="'layer' must have 7 blocks of 16384 bytes"):
        _one(cache, num_blocks=7)


def test_a_shape_that_could_be_read_in_two_ways_is_refused():
    cache = _half(2, 2, N, H, D)
    with pytest.raises(ValueError, match=r"one dimension that counts blocks \(block_dim names it\)"):
        _one(cache)
    assert _geometry(_one(cache, block_dim=0)) == [((2, PAGE), PAGE, PAGE)]
    assert _geometry(_one(cache, block_dim=1)) == [((2, PAGE // 2), PAGE // 2, PAGE // 2)] * 2


def test_each_kind_of_attention_has_a_spec():
    common = {"block_size": N, "num_kv_heads": H, "head_size": D, "dtype": torch.float16}
    for spec in (SlidingWindow(sliding_window=64, **common), ChunkedLocalAttention(attention_chunk_size=64, **common)):
        assert _geometry(_one(_half(B, 2, N, H, D), spec)) == [((B, PAGE), PAGE, PAGE)]


def test_refusals():
    cache = _half(B, 2, N, H, D)
    with pytest.raises(
        ValueError, match="layer 'layer' must have the spec of an attention layer or of a state, got dict_keys"
    ):
        _one(cache, {}.keys())
    known = {"num_kv_heads": H, "head_size": D, "dtype": torch.float16, "block_size": N, "page_size_bytes": PAGE}
    assert _geometry(_one(cache, SimpleNamespace(**known))) == [((B, PAGE), PAGE, PAGE)]
    state = {"shapes": ((8,),), "dtypes": (torch.float32,), "page_size_bytes": 32}
    for names in (known, state):
        for name in names:
            with pytest.raises(ValueError, match="must have the spec of an attention layer or of a state, got Simple"):
                _one(cache, SimpleNamespace(**{key: value for key, value in names.items() if key != name}))
    with pytest.raises(ValueError, match="kv_caches must have layer 'other' of the groups"):
        canonicalize({"layer": cache}, [KVCacheGroup(["other"], FULL)])
    with pytest.raises(ValueError, match="specs must have layer 'layer', got"):
        _one(cache, {"other": FULL})
    with pytest.raises(ValueError, match="must have blocks of 16384 bytes, as its spec says, got 102400 bytes in all"):
        _one(_half(B, 5, 1024))
    with pytest.raises(ValueError, match="must have 5 blocks of 16384 bytes"):
        canonicalize({"a": _half(5, 2, N, H, D), "b": cache}, [KVCacheGroup(["a", "b"], FULL)], num_blocks=5)
    with pytest.raises(ValueError, match="each in one piece"):
        _one(_half(B, 2, N, H, 2 * D)[..., :D])
    spec, states, _ = _mamba(None)
    with pytest.raises(ValueError, match="must have the tensors of its state, got none"):
        _one([], spec)
    with pytest.raises(ValueError, match="must have 18176 bytes a block in its state, as its spec says, got 4096"):
        _one(states[:1], spec)
    with pytest.raises(ValueError, match="must have 10 blocks, each in one piece"):
        _one([states[0], states[1][:9]], spec)


def test_sharers_that_disagree_are_refused():
    storage = _half(B * PAGE // 2)
    half = FullAttention(block_size=N, num_kv_heads=H // 2, head_size=D, dtype=torch.float16)
    caches = {"a": storage.view(B, 2, N, H, D), "b": storage[: B * PAGE // 4].view(B, 2, N, H // 2, D)}
    with pytest.raises(ValueError, match="must agree on their pages, got 16384 bytes every 16384, and 8192"):
        canonicalize(caches, [KVCacheGroup(["a"], FULL), KVCacheGroup(["b"], half)])
    shifted = _half((B + 1) * PAGE // 2)
    caches = {
        "a": shifted[: B * PAGE // 2].view(B, 2, N, H, D),
        "b": shifted[256 : 256 + B * PAGE // 2].view(B, 2, N, H, D),
    }
    with pytest.raises(ValueError, match="from byte 512 on"):
        canonicalize(caches, [KVCacheGroup(["a", "b"], FULL)])


@pytest.mark.parametrize("begin", [128, PAGE // 2, PAGE - 2, PAGE + 2, 2 * PAGE - 2])
def test_packed_layers_that_run_into_each_other_are_refused(begin):
    """Rows have room for both pages, but the second begins inside the first, or ends inside the next block's."""
    packed = _half((B * 2 + 1) * PAGE // 2)
    strides = (2 * PAGE // 2, N * H * D, H * D, D, 1)
    caches = {
        "a": packed.as_strided((B, 2, N, H, D), strides), "b": packed.as_strided((B, 2, N, H, D), strides, begin // 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"from byte {begin} on"):
        canonicalize(caches, [KVCacheGroup(["a", "b"], FULL)])


# Transfers.


TOKENS = 6
LOCAL_SHAPES = {
    "B K N H D": lambda h: _half(B, 2, TOKENS, h, 8),
    "B K H N D": lambda h: _half(B, 2, h, TOKENS, 8).transpose(2, 3),
    "B H N K D": lambda h: _half(B, h, TOKENS, 16),
    "B N H K D": lambda h: _half(B, TOKENS, h, 16).transpose(1, 2),
    "K B N H D": lambda h: _half(2, B, TOKENS, h, 8),
}


def _mapping(cache, heads, rank, size, total):
    spec = FullAttention(block_size=TOKENS, num_kv_heads=heads, head_size=8, dtype=torch.float16)
    canonical = _one(cache, spec, tensor_parallel=TensorParallel(rank, size, total), num_blocks=B)
    return [ref.mapping for ref in canonical.group_data_refs[0]]


@pytest.mark.parametrize("order", LOCAL_SHAPES)
@pytest.mark.parametrize(("total", "size"), [(8, 1), (8, 2), (8, 4), (8, 8), (2, 4), (1, 4), (4, 8)])
def test_pages_of_ranks_tile_the_canonical_page(order, total, size):
    """Each byte has a number of its own; the canonical page has all heads, in the same order of letters."""
    heads = max(1, total // size)
    tags = np.arange(2 * TOKENS * total * 8 * 2).reshape(2, TOKENS, total, 8, 2)  # K N H D and bytes of an element
    axes = {"K": 0, "N": 1, "H": 2, "D": 3}
    inside = order.replace(" ", "").split("B")[1]
    whole = tags.transpose([*(axes[c] for c in inside), 4]) if "K" in inside else None
    for block in range(size):
        page: dict[int, np.ndarray] = {}
        for rank in range(size):
            first = rank * heads if total >= size else rank * total // size
            mappings = _mapping(LOCAL_SHAPES[order](heads), heads, rank, size, total)
            assert len(mappings) == (1 if "K" in inside else 2)
            for half, mapping in enumerate(mappings):
                mine = tags[:, :, first : first + heads]
                mine = mine.transpose([*(axes[c] for c in inside), 4]) if "K" in inside else (
                    mine[half].transpose([*(axes[c] - 1 for c in inside), 3]))  # fmt: skip
                assert mapping.parallelism_agnostic and mapping.num_writers == max(1, size // total)
                if not mapping.is_writer(block):
                    continue
                canonical = page.setdefault(half, np.full(mapping.canonical_page_size_bytes, -1))
                for run in mapping.runs:
                    for i in range(run.num_fragments):
                        a = run.local_offset + i * run.local_stride
                        b = run.canonical_offset + i * run.canonical_stride
                        assert (canonical[b : b + run.fragment_size] == -1).all()
                        canonical[b : b + run.fragment_size] = mine.ravel()[a : a + run.fragment_size]
        for half, canonical in page.items():
            all_of_it = whole if whole is not None else tags[half].transpose([*(axes[c] - 1 for c in inside), 3])
            assert (canonical == all_of_it.ravel()).all()


def test_mla_is_replicated():
    spec = MLA(block_size=4, head_size=16, dtype=torch.float16)
    options = {"tensor_parallel": TensorParallel(2, 4, 1), "num_blocks": B}
    (ref,) = _one(_half(B, 4, 16), spec, **options).group_data_refs[0]
    assert ref.mapping == CanonicalPageMapping(128, 128, (CopyRun(0, 0, 128, 1, 128, 128),), 4, 2, True)
    assert [ref.mapping.is_writer(block) for block in range(4)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("cache", "spec", "heads"),
    [
        (_half(B, 2, 4, 2, 8), {"num_kv_heads": 2}, 7),
        (_half(B, 2, 4, 2, 8), {"num_kv_heads": 2, "kv_quant_mode": SimpleNamespace(is_per_token_head=True)}, 6),
        (_half(B, 4, 2, 2, 8), {"num_kv_heads": 2}, 6),
        (_half(B, 128), {"num_kv_heads": 2}, 6),
        (_half(B, 4, 4, 8), {"num_kv_heads": 4, "head_size": 4}, 12),
    ],
    ids=["heads not divisible", "scales inside", "unknown shape", "flat", "as many heads as tokens"],
)
def test_what_cannot_be_proven_is_opaque(cache, spec, heads):
    known = {"block_size": 4, "head_size": 8, "dtype": torch.float16, "page_size_bytes": 256, **spec}
    options = {"tensor_parallel": TensorParallel(1, 3, heads), "num_blocks": B}
    (ref,) = _one(cache, SimpleNamespace(**known), **options).group_data_refs[0]
    assert ref.mapping == CanonicalPageMapping(768, 256, (CopyRun(0, 256, 256, 1, 256, 256),), 1, 0, False)


@pytest.mark.parametrize("order", LOCAL_SHAPES)
def test_a_mapping_is_a_plan_and_back(order):
    (mapping, *_) = _mapping(LOCAL_SHAPES[order](2), 2, 1, 4, 8)
    plan = plan_of_mapping(mapping)
    assert plan.bytes == mapping.local_page_size_bytes
    rng = np.random.default_rng(1)
    local = torch.from_numpy(rng.integers(0, 256, (3, mapping.local_page_size_bytes), dtype=np.uint8))
    canonical = torch.zeros(3, mapping.canonical_page_size_bytes, dtype=torch.uint8)
    copy_pages([local], [canonical], torch.tensor([[2, 0]]), plan.runs.all)
    wanted = torch.zeros_like(canonical)
    for run in mapping.runs:
        for i in range(run.num_fragments):
            a, b = run.local_offset + i * run.local_stride, run.canonical_offset + i * run.canonical_stride
            wanted[0, b : b + run.fragment_size] = local[2, a : a + run.fragment_size]
    assert torch.equal(canonical, wanted)
    back = torch.zeros_like(local)
    copy_pages([canonical], [back], torch.tensor([[0, 1]]), plan.inverse().runs.all)
    assert torch.equal(back[1], local[2])
    again = mapping_of_plan(plan)
    assert sorted(map(str, again.runs)) == sorted(map(str, mapping.runs))
    assert plan_of_mapping(again) == plan and hash(plan_of_mapping(again)) == hash(plan)


def test_heads_outside_the_blocks_are_parts_of_their_own_and_opaque():
    """Two heads, each with all blocks: no page holds both, so nothing is known of a page of all ranks' heads."""
    cache = _half(2, B, 4, 16).transpose(0, 1)
    spec = FullAttention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)
    canonical = _one(cache, spec, tensor_parallel=TensorParallel(0, 2, 4), num_blocks=B)
    assert _geometry(canonical) == [((B, 128), 128, 128)] * 2
    assert [ref.mapping.parallelism_agnostic for ref in canonical.group_data_refs[0]] == [False, False]


def test_both_spellings_of_packed_pages_are_known():
    spec = FullAttention(block_size=6, num_kv_heads=4, head_size=8, dtype=torch.float16)
    assert layout_of(_half(B, 4, 6, 16), spec).pattern == "B H N K D"
    assert layout_of(_half(B, 6, 4, 16), spec).pattern == "B N H K D"
    square = FullAttention(block_size=4, num_kv_heads=4, head_size=8, dtype=torch.float16)
    assert layout_of(_half(B, 4, 4, 16), square) is None


def test_two_blocks_are_told_from_k_and_v_by_a_known_shape():
    """A first dimension of two cannot be K and V of MLA, or of pages that hold both side by side."""
    mla = MLA(block_size=4, head_size=8, dtype=torch.float16)
    assert _geometry(_one(_half(2, 4, 8), mla)) == [((2, 64), 64, 64)]
    spec = FullAttention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)
    assert _geometry(_one(_half(2, 2, 4, 16), spec)) == [((2, 256), 256, 256)]
    assert _geometry(_one(_half(2, 1, 4, 2, 8), spec)) == [((1, 128), 128, 128)] * 2


@pytest.mark.parametrize("shape", [(4, 4, 2, 4, 2, 8), (4, 2, 2, 4, 2, 8)])
def test_layers_outermost_are_not_taken_for_blocks(shape):
    spec = FullAttention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)
    group = KVCacheGroup([str(i) for i in range(shape[0])], spec)
    with pytest.raises(ValueError, match="layer of all layers must have"):
        canonicalize(_half(*shape), [group], num_blocks=shape[1])


def test_heads_outermost_are_not_taken_for_blocks():
    spec = FullAttention(block_size=6, num_kv_heads=8, head_size=8, dtype=torch.float16)
    with pytest.raises(ValueError, match="layer 'layer' must have"):
        _one(_half(8, 4, 6, 16), spec, num_blocks=4)


def test_states_whose_blocks_overlap_are_refused():
    spec = Mamba(shapes=((8,),), dtypes=(torch.float32,))
    for state in (torch.arange(100.0).as_strided((10, 8), (4, 1)), torch.arange(8.0).expand(10, 8)):
        with pytest.raises(ValueError, match="must have blocks of 32 bytes that do not overlap"):
            _one([state], spec)


def test_wrong_kinds_of_arguments_are_named():
    mla = MLA(block_size=4, head_size=8, dtype=torch.float16)
    group = [KVCacheGroup(["layer"], mla)]
    for caches, match in (
        ([_half(2, 4, 8)], "kv_caches must be a mapping by layer, or one Tensor, got list"),
        ({"layer": None}, "'layer' must be a Tensor or a list of them, got NoneType"),
        ({"layer": _half(0, 4, 8)}, "'layer' must have blocks, got shape"),
        ({"layer": _half(6, 4, 8).to("meta")}, "'layer' must be on the cpu or a cuda device, got meta"),
        ({"layer": torch.tensor(1.0)}, "'layer' must have blocks, got shape"),
    ):
        with pytest.raises(ValueError, match=match):
            canonicalize(caches, group)
    with pytest.raises(ValueError, match="block_dim must be one of 3 dimensions, got 7"):
        canonicalize({"layer": _half(6, 4, 8)}, group, block_dim=7)
    for options in ({"num_blocks": 6.0}, {"num_blocks": -1}, {"block_dim": -1}):
        with pytest.raises(ValueError, match="must be an integer from 0 on, got"):
            canonicalize({"layer": _half(6, 4, 8)}, group, **options)
    with pytest.raises(ValueError, match="must have layers, got none"):
        canonicalize(_half(6, 4, 8), [KVCacheGroup([], mla)])


def test_all_layers_in_one_block_are_opaque_to_tensor_parallelism():
    group = KVCacheGroup(["a", "b"], FULL)
    found = canonicalize(_half(B, 2, 2, N, H, D), [group], tensor_parallel=TensorParallel(1, 2, 8))
    assert found.group_data_refs[0][0].mapping == opaque_mapping(2 * PAGE, 1, 2)


def test_a_mapping_needs_one_pool_a_side():
    from kvkernels import KVLayout, compile_plan

    two = KVLayout("L | B N D", L=2, B=1, N=4, D=1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="each side must be one pool, got 2 and 2"):
        mapping_of_plan(compile_plan(two, two))
    one, other = (KVLayout("B N D", B=1, N=n, D=1, dtype=torch.uint8) for n in (2, 4))
    with pytest.raises(ValueError, match="blocks must be of one size, got 1 and 2 units"):
        mapping_of_plan(compile_plan(one, other))


@pytest.mark.parametrize(
    "run",
    [
        CopyRun(0, 120, 16, 1, 16, 16),
        CopyRun(24, 0, 16, 1, 16, 16),
        CopyRun(0, 0, 16, 2, 8, 32),
        CopyRun(-1, 0, 8, 1, 8, 8),
    ],
)
def test_mappings_that_leave_a_page_or_hold_a_byte_twice_are_refused(run):
    with pytest.raises(ValueError, match="plan_of_mapping: runs must have each byte of the"):
        plan_of_mapping(CanonicalPageMapping(128, 32, (run,), 1, 0, True))


def test_opaque_mappings_lie_side_by_side():
    mapping = CanonicalPageMapping(768, 256, (CopyRun(0, 256, 256, 1, 256, 256),), 1, 0, False)
    assert mapping_of_plan(plan_of_mapping(mapping)) == mapping


def test_the_last_page_may_end_with_its_storage():
    """Padding included, as long as the storage has it: to the byte."""
    row = PAGE + 512
    spec = FullAttention(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float16, page_size_padded=row)
    for short in (0, 2):
        storage = _half((B * row - short) // 2)
        cache = storage.as_strided((B, 2, N, H, D), (row // 2, N * H * D, H * D, D, 1))
        if short:
            with pytest.raises(ValueError, match=rf"10 pages of {row} bytes, padding included, must lie in their stor"):
                _one(cache, spec, num_blocks=B)
        else:
            assert _geometry(_one(cache, spec, num_blocks=B)) == [((B, row), row, row)]
    single = _half(PAGE // 2 + 8)[8:].view(1, 2, N, H, D)
    assert _geometry(_one(single)) == [((1, PAGE), PAGE, PAGE)]


def test_dimensions_that_count_blocks():
    flat = _half(B * PAGE // 2)
    assert _geometry(_one(flat, num_blocks=B)) == [((B, PAGE), PAGE, PAGE)]
    assert _geometry(_one(flat.view(B, -1), block_dim=0)) == [((B, PAGE), PAGE, PAGE)]
    with pytest.raises(ValueError, match="block_dim must be one of 2 dimensions, got 2"):
        _one(flat.view(B, -1), block_dim=2)
    with pytest.raises(ValueError, match="must have 10 blocks of 16384 bytes, each in one piece"):
        _one(flat.view(B, -1), block_dim=1)
    with pytest.raises(ValueError, match="'of all layers' must be on the cpu"):
        canonicalize(torch.zeros(B, PAGE, device="meta"), [KVCacheGroup(["a"], FULL)])


def test_separate_tensors_must_come_to_a_page():
    k, v = _half(B, N, H, D), _half(B, N, H, D)
    assert _refs(_one([k, v])) == [[(0, PAGE // 2), (1, PAGE // 2)]]
    with pytest.raises(
        ValueError, match=r"have 16384 bytes a block in its tensors, as its spec says, got \[8192, 4096\]"
    ):
        _one([k, _half(B, N, H, D // 2)], num_blocks=B)
    with pytest.raises(ValueError, match="layer 'layer' must have"):
        _one([k, v], num_blocks=0)


def test_states_of_one_block_have_no_distance():
    """What torch calls the stride of one block says nothing."""
    spec = Mamba(shapes=((8,), (4,)), dtypes=(torch.float32, torch.float32))
    storage = torch.zeros(12)
    states = [storage.as_strided((1, 8), (1, 1)), storage.as_strided((1, 4), (3, 1), 8)]
    canonical = _one(states, spec)
    assert _refs(canonical) == [[(0, 32), (1, 16)]]
    assert [t.tensor.data_ptr() - storage.data_ptr() for t in canonical.tensors] == [0, 32]


def test_states_of_two_blocks_have_one():
    spec = Mamba(shapes=((8,), (4,)), dtypes=(torch.float32, torch.float32))
    storage = torch.zeros(40)
    states = [storage.as_strided((2, 8), (20, 1)), storage.as_strided((2, 4), (20, 1), 8)]
    assert _geometry(_one(states, spec)) == [((2, 48), 80, 48)]


def test_states_that_are_no_page_together_are_a_tensor_each():
    """Another order, a gap, or a block that does not hold them: each is copied where it is."""
    spec = Mamba(shapes=((8,), (4,)), dtypes=(torch.float32, torch.float32))
    storage = torch.zeros(200)

    def state(size: int, row: int, at: int) -> torch.Tensor:
        return storage.as_strided((B, size), (row, 1), at)

    page = [state(8, 12, 0), state(4, 12, 8)]
    assert _geometry(_one(page, spec)) == [((B, 48), 48, 48)]
    wider = [state(8, 16, 0), state(4, 16, 8)]
    assert _geometry(_one(wider, spec)) == [((B, 48), 64, 48)]
    padded = Mamba(shapes=spec.shapes, dtypes=spec.dtypes, page_size_padded=56)
    assert _geometry(_one(wider, padded)) == [((B, 56), 64, 56)]
    for apart in (
        [state(8, 16, 0), state(4, 16, 9)],
        [state(8, 12, 4), state(4, 12, 0)],
        [state(8, 8, 0), state(4, 4, 80)],
    ):
        assert len(_one(apart, spec).tensors) == 2
    with pytest.raises(ValueError, match="must have 10 blocks, each in one piece"):
        _one([storage.as_strided((B, 4, 2), (12, 3, 1)), page[1]], spec)


def test_kernel_blocks_need_no_gap_between_them():
    """Two kernel blocks of a page, with padding between: no page can say them."""
    spec = FullAttention(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float16)
    half = PAGE // 4
    gaps = _half(2 * B, half + 8).as_strided((2 * B, N // 2, H, 2 * D), (half + 8, H * 2 * D, 2 * D, 1))
    with pytest.raises(ValueError, match="must have 10 blocks of 16384 bytes, each in one piece"):
        _one(gaps, spec, num_blocks=B)
    dense = _half(2 * B, N // 2, H, 2 * D)
    assert _geometry(_one(dense, spec, num_blocks=B)) == [((B, PAGE), PAGE, PAGE)]
