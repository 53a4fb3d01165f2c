"""vLLM's own specs, views and page mappings against canonical KV caches, which know vLLM by its attributes only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import canonical_mapping
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    compute_layout_strides,
    create_kv_cache_views,
)

from kvkernels.layout import Parallel, TensorParallel, canonicalize

BLOCKS, TOKENS, LAYERS, TOTAL_HEADS = 6, 16, 3, 8
# Blocks that lie whole in memory; in the other two a layer's heads are apart, and have a reference each.
WHOLE = (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLHNC, KVCacheLayout.BLNHC)
TP_SIZES = (1, 2, 4, 8, 16)
# Tensor ranks, decode and prefill context ranks, tokens in turn.
CONTEXTS = ((4, 4, 1, 1), (4, 2, 1, 2), (2, 2, 2, 4), (8, 4, 2, 16), (1, 1, 4, 1))


def attention(heads: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=TOKENS, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16)


def views(spec: Any, layout: KVCacheLayout) -> list[torch.Tensor]:
    """The layers' tensors as vLLM makes them."""
    size = LAYERS * BLOCKS * spec.page_size_bytes
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    names = [f"layer.{i}" for i in range(LAYERS)]
    tensor = KVCacheTensor(size=size, layers=names, layer_stride=layer_stride, block_stride=block_stride)
    raw = torch.zeros(size, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, BLOCKS, layout, tensor)


def byte_map(mapping: Any) -> dict[int, int]:
    """Where each byte of the rank's page lies in the canonical page."""
    return {
        run.local_offset + i * run.local_stride + byte: run.canonical_offset + i * run.canonical_stride + byte
        for run in mapping.runs for i in range(run.num_fragments) for byte in range(run.fragment_size)
    }  # fmt: skip


def compare_pages(spec: Any, caches: dict[str, torch.Tensor], what: str) -> Iterator[str]:
    canonical = canonicalize(caches, [KVCacheGroupSpec(list(caches), spec)], num_blocks=BLOCKS)
    for cache, one in zip(caches.values(), canonical.tensors, strict=True):
        got = (one.tensor.data_ptr(), one.tensor.stride(0), tuple(one.tensor.shape))
        wanted = (cache.data_ptr(), cache.stride(0) * cache.element_size(), (BLOCKS, spec.page_size_bytes))
        if got != wanted:
            yield f"pages: {what}: {got} instead of {wanted}"


def compare_mappings(layout: KVCacheLayout, size: int) -> Iterator[str]:
    spec = attention(max(1, TOTAL_HEADS // size))
    caches = {f"layer.{i}": view for i, view in enumerate(views(spec, layout))}
    what = f"{layout.name}, {size} ranks"
    yield from compare_pages(spec, caches, what)
    for rank in range(size):
        context = canonical_mapping._RankContext(
            tp_size=size, dcp_size=1, pcp_size=1, interleave=1, total_kv_heads=TOTAL_HEADS, rank=rank
        )
        theirs = canonical_mapping._layer_mapping(spec, caches["layer.0"], BLOCKS, context)
        groups = [KVCacheGroupSpec(list(caches), spec)]
        found = canonicalize(
            caches, groups, num_blocks=BLOCKS, tensor_parallel=TensorParallel(rank, size, TOTAL_HEADS)
        )  # fmt: skip
        ours = found.group_data_refs[0][0].mapping
        if theirs is None or ours is None or not ours.parallelism_agnostic:
            yield f"mappings: {what}, rank {rank}: vLLM's {theirs}, ours {ours}"
            continue
        facts = [
            (m.canonical_page_size_bytes, m.local_page_size_bytes, m.num_writers, m.writer_index, byte_map(m))
            for m in (ours, theirs)
        ]
        if facts[0] != facts[1]:
            yield f"mappings: {what}, rank {rank}: other bytes than vLLM's"


def compare_contexts() -> Iterator[str]:
    """MLA's rows, dealt out to context ranks: the places of the bytes are vLLM's."""
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    cache = views(spec, KVCacheLayout.LBNHC)[0]
    for tp, dcp, pcp, interleave in CONTEXTS:
        for rank in range(tp * pcp):
            context = canonical_mapping._RankContext(
                tp_size=tp, dcp_size=dcp, pcp_size=pcp, interleave=interleave, total_kv_heads=1, rank=rank
            )
            theirs = canonical_mapping._layer_mapping(spec, cache, BLOCKS, context)
            parallel = Parallel(tp=tp, dcp=dcp, pcp=pcp, rank=rank, interleave=interleave)
            groups = [KVCacheGroupSpec(["layer.0"], spec)]
            found = canonicalize({"layer.0": cache}, groups, num_blocks=BLOCKS, parallel=parallel)
            ours = found.group_data_refs[0][0].mapping
            facts = [
                None if m is None else (m.canonical_page_size_bytes, m.num_writers, m.writer_index, byte_map(m))
                for m in (ours, theirs)
            ]
            if facts[0] != facts[1]:
                yield f"contexts: {tp}, {dcp}, {pcp}, {interleave}, rank {rank}: other bytes than vLLM's"


def compare_heads_apart(layout: KVCacheLayout) -> Iterator[str]:
    """A reference a head, whose page is vLLM's view of it."""
    spec = attention(4)
    caches = {f"layer.{i}": view for i, view in enumerate(views(spec, layout))}
    found = canonicalize(caches, [KVCacheGroupSpec(list(caches), spec)], num_blocks=BLOCKS)
    got = [(one.tensor.data_ptr(), one.tensor.stride(0), one.page_size_bytes) for one in found.tensors]
    wanted = [
        (view[:, head].data_ptr(), view.stride(0) * 2, TOKENS * 128 * 2)
        for view in caches.values() for head in range(4)
    ]  # fmt: skip
    if got != wanted:
        yield f"pages: {layout.name}: {got} instead of {wanted}"


def compare_specs() -> Iterator[str]:
    """Every kind of spec, and the shapes of its cache."""
    mla = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    window = SlidingWindowSpec(
        block_size=TOKENS, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, sliding_window=64
    )  # fmt: skip
    uniform = UniformTypeKVCacheSpecs(
        block_size=TOKENS, kv_cache_specs={"layer.0": attention(4), "layer.1": attention(8)}
    )
    for spec in (mla, window):
        caches = {f"layer.{i}": view for i, view in enumerate(views(spec, KVCacheLayout.LBNHC))}
        yield from compare_pages(spec, caches, type(spec).__name__)
    caches = {
        name: create_kv_cache_views(
            torch.zeros(BLOCKS * one.page_size_bytes, dtype=torch.int8), one, BLOCKS, KVCacheLayout.LBNHC,
            KVCacheTensor(size=0, layers=[name], layer_stride=1, block_stride=one.page_size_bytes),
        )[0]
        for name, one in uniform.kv_cache_specs.items()
    }  # fmt: skip
    canonical = canonicalize(caches, [KVCacheGroupSpec(list(caches), uniform)])
    if [ref.page_size_bytes for ref in canonical.group_data_refs[0]] != [16384, 32768]:
        yield "specs: UniformTypeKVCacheSpecs with other pages"
    state = MambaSpec(block_size=TOKENS, shapes=((4, 32), (8, 16)), dtypes=(torch.float32,) * 2, page_size_padded=1280)
    raw = torch.zeros(BLOCKS * 1280, dtype=torch.int8).view(torch.float32)
    states = [raw.as_strided((BLOCKS, 4, 32), (320, 32, 1)), raw.as_strided((BLOCKS, 8, 16), (320, 16, 1), 128)]
    canonical = canonicalize({"layer.0": states}, [KVCacheGroupSpec(["layer.0"], state)])
    (one,) = canonical.tensors
    if (tuple(one.tensor.shape), canonical.group_data_refs[0][0].page_size_bytes) != ((BLOCKS, 1280), 1024):
        yield f"specs: MambaSpec as {tuple(one.tensor.shape)}"


def run() -> dict[str, Any]:
    findings = list(compare_specs())
    for layout in WHOLE:
        for size in TP_SIZES:
            findings += compare_mappings(layout, size)
    for layout in set(KVCacheLayout) - set(WHOLE):
        findings += compare_heads_apart(layout)
    findings += compare_contexts()
    return {"findings": findings}
