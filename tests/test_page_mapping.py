"""How a rank's page lies in the canonical page: the runs of a mapping, and plans made of mappings and back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvkernels import KVCache, KVLayout, compile_plan, copy_pages
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
from kvkernels.layout.mapping import derive_page_mappings
from kvkernels.layout.specs import FullAttention, KVCacheGroup

SIZES = {"B": 1, "N": 6, "H": 3, "D": 4, "dtype": torch.int16}


def _replayed(mapping: CanonicalPageMapping, local: np.ndarray) -> np.ndarray:
    """The canonical page, with 255 in every byte that no run writes."""
    canonical = np.full(mapping.canonical_page_size_bytes, 255, np.uint8)
    for run in mapping.runs:
        for i in range(run.num_fragments):
            a, b = run.local_offset + i * run.local_stride, run.canonical_offset + i * run.canonical_stride
            canonical[b : b + run.fragment_size] = local[a : a + run.fragment_size]
    return canonical


@pytest.mark.parametrize(("src", "dst"), list(itertools.permutations(["N H D", "H N D", "D H N", "N D H"], 2)))
@pytest.mark.parametrize("k_and_v", [False, True])
def test_the_runs_of_a_mapping_copy_what_its_plan_copies(src, dst, k_and_v):
    """A run of a mapping has one loop: of a plan's, the longest is kept and the others are written out."""
    sizes = {**SIZES, "K": 2} if k_and_v else SIZES
    patterns = (f"B K {src}", f"B {dst} K") if k_and_v else (f"B {src}", f"B {dst}")
    plan = compile_plan(*(KVLayout(pattern, **sizes) for pattern in patterns))
    mapping = mapping_of_plan(plan)
    local = torch.randint(0, 255, (1, mapping.local_page_size_bytes), dtype=torch.uint8)
    canonical = torch.empty(1, mapping.canonical_page_size_bytes, dtype=torch.uint8)
    copy_pages([local], [canonical], torch.tensor([[0, 0]]), plan.runs.all)
    assert np.array_equal(_replayed(mapping, local[0].numpy()), canonical[0].numpy())
    extents = plan.runs.all[:, [7, 10, 13]]
    assert len(mapping.runs) == int((extents.prod(1) // extents.max(1).values).sum())


def test_the_plan_of_a_mapping_is_its_runs():
    runs = (CopyRun(0, 32, 16, 2, 16, 64), CopyRun(40, 0, 8, 3, 24, 8))
    plan = plan_of_mapping(CanonicalPageMapping(128, 96, runs, 2, 1, True))
    assert plan.runs.all.tolist() == [
        [0, 0, 0, 32, 16, 0, 0, 2, 16, 64, 1, 0, 0, 1, 0, 0],
        [0, 0, 40, 0, 8, 0, 0, 3, 24, 8, 1, 0, 0, 1, 0, 0],
    ]
    assert [(side.B, side.opaque, side.page_bytes) for side in (*plan.src, *plan.dst)] == [
        (1, True, 96), (1, True, 128)]  # fmt: skip
    assert plan.bytes == 2 * 16 + 3 * 8


def test_a_plan_of_a_mapping_is_partial_where_a_byte_of_its_page_has_no_source():
    whole = CanonicalPageMapping(64, 64, (CopyRun(0, 32, 8, 4, 8, 8), CopyRun(32, 0, 8, 4, 8, 8)), 1, 0, True)
    part = CanonicalPageMapping(96, 64, whole.runs, 1, 0, True)
    assert [plan_of_mapping(mapping).allow_partial for mapping in (whole, part)] == [False, True]
    assert [plan_of_mapping(mapping).inverse().allow_partial for mapping in (whole, part)] == [False, False]
    assert "every byte of the destination's block is written once" in plan_of_mapping(whole).explain()
    assert "bytes of the destination's block that no source holds" in plan_of_mapping(part).explain()


def test_each_side_of_a_mapping_is_one_pool():
    apart = KVLayout("L | B N D", L=2, B=1, N=4, D=1, dtype=torch.uint8)
    together = KVLayout("B L N D", L=2, B=1, N=4, D=1, dtype=torch.uint8)
    for src, dst, pools in ((apart, together, "2 and 1"), (together, apart, "1 and 2")):
        with pytest.raises(ValueError, match=f"each side must be one pool, got {pools}$"):
            mapping_of_plan(compile_plan(src, dst))


@pytest.mark.parametrize(("rank", "size", "heads"), [(2, 2, 4), (3, 2, 4), (-1, 2, 4), (0, 0, 4), (0, 2, 0)])
def test_a_rank_is_one_of_its_size_and_has_heads(rank, size, heads):
    with pytest.raises(ValueError, match="TensorParallel: rank must be below size, and heads positive, got"):
        TensorParallel(rank, size, heads)
    assert TensorParallel(1, 2, 1).total_kv_heads == 1


KNOWN = FullAttention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)


def _half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensor", "spec"),
    [
        (_half(), KNOWN),
        (_half(768), KNOWN),
        (_half(0, 2, 4, 2, 8), KNOWN),
        (_half(6, 2, 4, 2, 9)[..., :8], KNOWN),
        (_half(1, 2, 4, 2, 8).expand(6, 2, 4, 2, 8), KNOWN),
        (_half(6, 2, 4, 2, 8).to(torch.uint8), KNOWN),
        (_half(6, 2, 4, 2, 8), SimpleNamespace(block_size=4, num_kv_heads=2, head_size=8)),
        (_half(6, 2, 4, 2, 8), replace(KNOWN, head_size_v=4)),
    ],
    ids=["a number", "flat", "no blocks", "gaps", "one block many times", "other dtype", "no dtype", "a smaller V"],
)
def test_no_layout_is_made_up(tensor, spec):
    assert layout_of(tensor, spec) is None
    assert layout_of(_half(6, 2, 4, 2, 8), KNOWN) is not None


def test_one_token_of_one_head_has_a_layout_in_either_spelling():
    one = FullAttention(block_size=1, num_kv_heads=1, head_size=8, dtype=torch.float16)
    layout = layout_of(_half(6, 1, 1, 16), one)
    assert layout is not None and (layout.page_bytes, layout.H, layout.N) == (32, 1, 1)


@pytest.mark.parametrize(
    ("shape", "strides", "row_bytes"),
    [
        ((6, 2, 4, 2, 8), (128, 64, 16, 8, 1), None),
        ((6, 2, 4, 2, 8), (130, 64, 16, 8, 1), 260),
        ((2, 6, 4, 2, 8), (6 * 64, 64, 16, 8, 1), None),
        ((2, 6, 4, 2, 8), (6 * 70, 70, 16, 8, 1), 140),
        ((2, 6, 4, 2, 8), (64, 128, 16, 8, 1), None),
        ((2, 6, 4, 2, 8), (64, 200, 16, 8, 1), 400),
    ],
)
def test_rows_are_said_where_something_lies_between_two_pages(shape, strides, row_bytes):
    cache = torch.empty_strided(shape, strides, dtype=torch.float16)
    layout = layout_of(cache, KNOWN)
    assert layout is not None and layout.row_bytes == row_bytes
    assert [pool.stride(0) for pool in KVCache(layout, cache).pools] == [2 * strides[shape.index(6)]] * layout.num_pools


def test_k_and_v_in_tensors_of_their_own_are_opaque_to_tensor_parallelism():
    caches = {"layer": [_half(6, 4, 2, 8), _half(6, 4, 2, 8)]}
    found = canonicalize(caches, [KVCacheGroup(["layer"], KNOWN)], tensor_parallel=TensorParallel(1, 2, 4))
    assert [ref.mapping for ref in found.group_data_refs[0]] == [opaque_mapping(128, 1, 2)] * 2


def test_pages_that_are_not_what_the_shape_says_are_opaque():
    """A spec may count bytes that the tensor does not show, such as scales."""
    cache = _half(6, 2, 4, 2, 8)
    known, *_ = derive_page_mappings(cache, KNOWN, [256], TensorParallel(1, 2, 4))
    assert known.parallelism_agnostic and known.canonical_page_size_bytes == 512
    assert derive_page_mappings(cache, KNOWN, [260], TensorParallel(1, 2, 4)) == [opaque_mapping(260, 1, 2)]
