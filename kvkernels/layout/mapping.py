"""How a layer's pages lie in the canonical pages: what can be proven of its tensors, its spec and its rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvkernels.layout.forms import is_latent, layout_of, rows_are_tokens
from kvkernels.layout.page_runs import CanonicalPageMapping, CopyRun, mapping_of_plan, opaque_mapping
from kvkernels.layout.parallel import Parallel, Share, share_of
from kvkernels.layout.parallel import TensorParallel as TensorParallel  # where it was
from kvkernels.layout.plan import compile_plan


def derive_page_mappings(
    cache: Tensor | Sequence[Tensor], spec: Any, page_bytes: Sequence[int], parallel: Parallel
) -> list[CanonicalPageMapping]:
    """How a layer's pages, of these bytes, lie in the canonical pages; whole where that cannot be proven.

    The canonical page holds all heads and, where tokens are dealt out, those of all context ranks, in the rank's own
    order of letters. A latent that all ranks have is its own canonical page. A page is opaque, and never a guess, where
    heads are not divisible by ranks nor ranks by heads, where values carry scales inside the page, where strides are
    unknown, and where the context ranks do not hold each token of each head equally often.
    """
    found: list[CanonicalPageMapping] | None
    if hasattr(spec, "shapes"):
        found = _of_states([cache] if isinstance(cache, Tensor) else cache, spec, page_bytes, parallel)
    elif getattr(getattr(spec, "kv_quant_mode", None), "is_per_token_head", False):
        found = None
    else:
        found = _of_attention(cache, spec, page_bytes, parallel)
    if found is None or [mapping.local_page_size_bytes for mapping in found] != list(page_bytes):
        return [opaque_mapping(n, parallel.rank % parallel.stage_ranks, parallel.stage_ranks) for n in page_bytes]
    return found


def derive_block_mapping(
    tensor: Tensor, specs: Sequence[Any], page_bytes: int, parallel: Parallel
) -> CanonicalPageMapping:
    """How a block of all of a stage's layers, ``[B, L, ...]``, lies in the block of all layers of the model."""
    first, total = parallel.first_layer, parallel.total_layers
    if parallel.pp == 1 and not total:
        total = len(specs)
    found = None
    if all(spec == specs[0] for spec in specs) and first + len(specs) <= total:
        found = _of_attention(tensor, specs[0], [page_bytes], parallel, (first, len(specs), total))
    if found is None or found[0].local_page_size_bytes != page_bytes:
        return opaque_mapping(page_bytes, parallel.rank, parallel.world)
    return found[0]


def _of_attention(
    cache: Tensor | Sequence[Tensor], spec: Any, page_bytes: Sequence[int], parallel: Parallel,
    layers: tuple[int, int, int] | None = None,
) -> list[CanonicalPageMapping] | None:  # fmt: skip
    """Of a layer, or of a block with several: the first of them, how many, and how many there are in all."""
    is_dealt = parallel.context_ranks > 1 and getattr(spec, "dcp_sharded", True)
    latent = is_latent(spec)
    heads = 1 if latent else _total_heads(spec, parallel)
    share = None if heads is None else share_of(parallel, None if latent else heads, is_dealt)
    if heads is None or share is None:
        return None
    if latent and not is_dealt and layers is None:
        return [_whole(n, share) for n in page_bytes]
    if is_dealt and (spec.block_size % parallel.interleave or (latent and not rows_are_tokens(spec))):
        return None
    first_layer, num_layers, total_layers = layers or (0, None, 1)
    layout = layout_of(cache, spec, num_layers) if isinstance(cache, Tensor) else None
    if layout is None or set(layout.pool_letters) - {"K"}:
        return None
    pattern = layout.pattern[layout.pattern.index("B") :]
    whole = replace(
        layout, pattern=pattern, L=total_layers, K=layout.K if "K" in pattern else 1, N=layout.N * share.context_ranks,
        H=heads, total_heads=heads, row_bytes=None, page_bytes=0,
    )  # fmt: skip
    deal = (share.context_rank, share.context_ranks, parallel.interleave) if is_dealt else None
    local = replace(
        whole, L=layout.L, first_layer=first_layer, total_layers=total_layers, N=layout.N, H=share.heads,
        first_head=share.first_head, deal=deal, page_bytes=0,
    )  # fmt: skip
    mapping = mapping_of_plan(compile_plan(local, whole, allow_partial=True))
    mapping = replace(mapping, num_writers=share.writers, writer_index=share.writer_index)
    return [mapping] * len(page_bytes)


def _total_heads(spec: Any, parallel: Parallel) -> int | None:
    """Heads of the whole model, where they are known."""
    if parallel.total_kv_heads is not None:
        return parallel.total_kv_heads
    return getattr(spec, "num_kv_heads", None) if parallel.tp == 1 else None


def _whole(page_bytes: int, share: Share) -> CanonicalPageMapping:
    """A page that all of them have."""
    run = CopyRun(0, 0, page_bytes, 1, page_bytes, page_bytes)
    return CanonicalPageMapping(page_bytes, page_bytes, (run,), share.writers, share.writer_index, True)


def _of_states(
    states: Sequence[Tensor], spec: Any, page_bytes: Sequence[int], parallel: Parallel
) -> list[CanonicalPageMapping] | None:
    """States are cut by tensor-parallel ranks where the spec says along what, and never dealt out by tokens."""
    if getattr(spec, "tp_replicated", False):
        everyone = share_of(parallel, None, False)
        return None if everyone is None else [_whole(n, everyone) for n in page_bytes]
    cuts = getattr(spec, "cuts", None)
    if cuts is None or not (_is_one_page(states, spec) or _are_in_order(states, spec)):
        return None
    sides = [_state_runs(*one, parallel) for one in zip(spec.shapes, spec.dtypes, cuts, strict=True)]
    if any(side is None for side in sides):
        return None
    known = [side for side in sides if side is not None]
    together = list(page_bytes) == [sum(local for local, _ in known)]
    return [_side_by_side(group, parallel) for group in ([known] if together else [[side] for side in known])]


def _is_one_page(states: Sequence[Tensor], spec: Any) -> bool:
    """Whether it is the states' bytes in one tensor, which lie there as the spec says: one after the other."""
    return len(states) == 1 and states[0].element_size() == 1 and states[0][0].is_contiguous()


def _are_in_order(states: Sequence[Tensor], spec: Any) -> bool:
    """Whether the blocks of all of them lie in memory as the spec's shapes say."""
    return len(states) == len(spec.shapes) and all(
        tuple(state.shape[1:]) == tuple(shape) and state.dtype == dtype and state[0].is_contiguous()
        for state, shape, dtype in zip(states, spec.shapes, spec.dtypes, strict=True)
    )


#: Bytes of a rank's state, and its runs from its own begin to the whole state's.
_Side: TypeAlias = "tuple[int, list[CopyRun]]"


def _state_runs(
    shape: Sequence[int], dtype: torch.dtype, cut: tuple[int, Sequence[int]], parallel: Parallel
) -> _Side | None:
    """Along one dimension, what lies there side by side (x, B and C of a conv state) is each cut on its own."""
    dim, sizes = cut
    if any(size % parallel.tp for size in sizes) or sum(sizes) != shape[dim] * parallel.tp:
        return None
    step = math.prod(shape[dim + 1 :]) * dtype.itemsize
    rows, row_bytes = math.prod(shape[:dim]), shape[dim] * step
    runs, begin = [], 0
    for size in sizes:
        mine = size // parallel.tp
        at_whole = begin * parallel.tp + parallel.tp_rank * mine
        runs.append(CopyRun(begin * step, at_whole * step, mine * step, rows, row_bytes, row_bytes * parallel.tp))
        begin += mine
    return rows * row_bytes, runs


def _side_by_side(sides: Sequence[_Side], parallel: Parallel) -> CanonicalPageMapping:
    """One page of several states, one after the other; the ranks of other contexts have the same."""
    runs, at = [], 0
    for local_bytes, mine in sides:
        for run in mine:
            begin = (run.local_offset + at, run.canonical_offset + at * parallel.tp)
            runs.append(replace(run, local_offset=begin[0], canonical_offset=begin[1]))
        at += local_bytes
    return CanonicalPageMapping(at * parallel.tp, at, tuple(runs), parallel.pcp, parallel.pcp_rank, True)
