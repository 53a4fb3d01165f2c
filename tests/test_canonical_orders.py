"""vLLM's six orders as canonical pages: a reference a layer, or one a head where heads lie apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvkernels.layout import TensorParallel, canonicalize, layout_of, opaque_mapping
from kvkernels.layout.specs import FullAttention, KVCacheGroup

B = 10

# vLLM's six orders, by how each nests the layers, blocks, heads and tokens of [L, B, H, N, C].
SIX = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def one(cache, spec):
    return canonicalize({"layer": cache}, [KVCacheGroup(["layer"], spec)], num_blocks=B)


def _in_order(order: str, layers: int, blocks: int, heads: int, tokens: int, row: int):
    """Each layer's [B, H, N, C] as vLLM views it, and the numbers of all of them as [L, B, H, N, C]."""
    sizes = dict(zip("LBHNC", (layers, blocks, heads, tokens, row), strict=True))
    memory = torch.arange(layers * blocks * heads * tokens * row, dtype=torch.int32)
    nested = memory.view([sizes[letter] for letter in order])
    logical = nested.permute([order.index(letter) for letter in "LBHNC"])
    return list(logical), logical


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("order", SIX)
def test_all_of_vllms_orders_are_pages(order, heads, ratio):
    """Where a layer's heads lie outside its blocks, or with other layers between them, it has a reference a head: the
    references' pages together are the layer's block, each byte once."""
    views, logical = _in_order(order, 3, 5 * ratio, heads, 16 // ratio, 128)
    spec = FullAttention(block_size=16, num_kv_heads=heads, head_size=64, dtype=torch.int32)
    caches = {str(i): view for i, view in enumerate(views)}
    packed = order in ("BLHNC", "BLNHC", "BHLNC")
    if ratio > 1 and packed:
        with pytest.raises(ValueError, match="must have 5 blocks of"):
            canonicalize(caches, [KVCacheGroup(list(caches), spec)], num_blocks=5)
        return
    canonical = canonicalize(caches, [KVCacheGroup(list(caches), spec)], num_blocks=5)
    each = heads if order in ("LHBNC", "BHLNC") else 1
    refs = canonical.group_data_refs[0]
    assert len(refs) == 3 * each and sum(ref.page_size_bytes for ref in refs[:each]) == heads * 16 * 128 * 4
    assert len(canonical.tensors) == 3 * each
    for layer, block in np.ndindex(3, 5):
        mine = [canonical.tensors[ref.tensor_idx].tensor[block] for ref in refs[layer * each : (layer + 1) * each]]
        wanted = logical[layer, block * ratio : (block + 1) * ratio]
        wanted = wanted.transpose(1, 2) if "NHC" in order else wanted
        parts = wanted.unbind(1) if each > 1 else [wanted]
        for page, part in zip(mine, parts, strict=True):
            assert torch.equal(page.view(torch.int32), part.flatten())


def test_heads_apart_need_room_for_one_another():
    """Heads that lie in each other's rows, or blocks in the next ones."""
    spec = FullAttention(block_size=4, num_kv_heads=3, head_size=4, dtype=torch.float16)
    memory = torch.zeros(4096, dtype=torch.float16)
    for strides in ((8, 512, 8, 1), (96, 24, 8, 1)):
        with pytest.raises(ValueError, match=r"layer 'layer' must have|must agree on their pages"):
            one(memory.as_strided((B, 3, 4, 8), strides), spec)
    assert len(one(memory.as_strided((B, 3, 4, 8), (96, 32 * 32, 8, 1)), spec).tensors) == 3
    padded = FullAttention(block_size=4, num_kv_heads=3, head_size=4, dtype=torch.float16, page_size_padded=256)
    with pytest.raises(ValueError, match="layer 'layer' must have"):
        one(memory.as_strided((B, 3, 4, 8), (96, 1024, 8, 1)), padded)


@pytest.mark.parametrize("order", ["LHBNC", "LBHNC", "BLHNC", "BHLNC"])
def test_planes_of_k_and_v_are_no_heads(order):
    """ROCm's and B12X's: two slots of ``heads * size``, not heads of ``2 * size``, which look alike for two heads. What
    is inside a slot is its backend's, and so the page is opaque; where slots lie apart, each is a reference."""
    spec = SimpleNamespace(
        block_size=6, num_kv_heads=2, head_size=5, head_size_v=5, dtype=torch.int32, num_head_slots=2,
        state_content_bytes=2 * 5 * 4, page_size_bytes=2 * 6 * 10 * 4,
    )  # fmt: skip
    views, _ = _in_order(order, 3, 5, 2, 6, 10)
    assert layout_of(views[0], spec) is None
    caches = {str(i): view for i, view in enumerate(views)}
    found = canonicalize(
        caches, [KVCacheGroup(list(caches), spec)], num_blocks=5, tensor_parallel=TensorParallel(1, 2, 4)
    )
    refs = found.group_data_refs[0]
    assert len(refs) == (6 if order in ("LHBNC", "BHLNC") else 3)
    assert {ref.mapping for ref in refs} == {opaque_mapping(480 * 3 // len(refs), 1, 2)}
