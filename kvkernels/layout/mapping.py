"""How one tensor-parallel rank's page lies in the page without tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kvkernels.common.arguments import integer
from kvkernels.layout.cache import KVCache
from kvkernels.layout.layout import KVLayout
from kvkernels.layout.plan import Plan, compile_plan


@dataclass(frozen=True)
class CopyRun:
    """``num_fragments`` pieces of ``fragment_size`` bytes, evenly spaced in the rank's and in the canonical page."""

    local_offset: int
    canonical_offset: int
    fragment_size: int
    num_fragments: int
    local_stride: int
    canonical_stride: int


@dataclass(frozen=True)
class CanonicalPageMapping:
    """A rank's page and the canonical page, which is the same whatever the tensor parallelism.

    ``num_writers`` ranks hold the same bytes, this being the ``writer_index``-th: they take turns, block by block.
    ``parallelism_agnostic`` is False where the page is opaque, and so only fits the same ranks again.
    """

    canonical_page_size_bytes: int
    local_page_size_bytes: int
    runs: tuple[CopyRun, ...]
    num_writers: int
    writer_index: int
    parallelism_agnostic: bool

    def is_writer(self, block_id: int) -> bool:
        """Whether this rank writes the canonical page of a block."""
        return integer("CanonicalPageMapping.is_writer: block_id", block_id) % self.num_writers == self.writer_index


@dataclass(frozen=True)
class TensorParallel:
    """A rank among ``size``, of a model with ``total_kv_heads`` heads."""

    rank: int
    size: int
    total_kv_heads: int

    def __post_init__(self) -> None:
        for name in ("rank", "size", "total_kv_heads"):
            object.__setattr__(self, name, integer(f"TensorParallel: {name}", getattr(self, name)))
        if not 0 <= self.rank < self.size or self.total_kv_heads < 1:
            raise ValueError(f"TensorParallel: rank must be below size, and heads positive, got {self}")


def mapping_of_plan(plan: Plan) -> CanonicalPageMapping:
    """A plan between two layouts of one pool each, as the runs of one page in the other.

    Raises
    ------
    ValueError
        A side has several pools, or blocks of another size.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import KVLayout, compile_plan
    >>> whole = KVLayout("B N H D", B=8, N=4, H=2, D=8, dtype=torch.float16)
    >>> mapping = mapping_of_plan(compile_plan(whole.shard(1, 2), whole, allow_partial=True))
    >>> len(mapping.runs), mapping.runs[0].canonical_offset, mapping.runs[0].num_fragments
    (1, 16, 4)
    """
    sides = (*plan.src, *plan.dst)
    if len(sides) != 2 or any(layout.num_pools != 1 for layout in sides):
        pools = [sum(layout.num_pools for layout in side) for side in (plan.src, plan.dst)]
        raise ValueError(f"mapping_of_plan: each side must be one pool, got {pools[0]} and {pools[1]}")
    if plan.src_subblocks != 1 or plan.dst_subblocks != 1:
        raise ValueError(
            f"mapping_of_plan: blocks must be of one size, got {plan.src_subblocks} and {plan.dst_subblocks} units"
        )
    src, dst = sides
    runs = tuple(run for row in plan.runs.rows.tolist() for run in _copy_runs(row))
    return CanonicalPageMapping(
        dst.page_bytes, src.page_bytes, runs, src.replicas, src.replica, parallelism_agnostic=not src.opaque
    )


def _copy_runs(row: list[int]) -> list[CopyRun]:
    """One loop a run: the longest is kept, the others are written out."""
    src_offset, dst_offset, fragment = row[2:5]
    loops = sorted((tuple(row[i : i + 3]) for i in (7, 10, 13)), key=lambda loop: loop[0])
    extent, src_stride, dst_stride = loops.pop()
    if extent == 1:
        src_stride = dst_stride = fragment
    starts = [(src_offset, dst_offset)]
    for n, s, d in loops:
        starts = [(a + i * s, b + i * d) for a, b in starts for i in range(n)]
    return [CopyRun(a, b, fragment, extent, src_stride, dst_stride) for a, b in starts]


def plan_of_mapping(mapping: CanonicalPageMapping) -> Plan:
    """The plan that copies a rank's page to its place in the canonical page; its ``inverse()`` copies it back.

    Raises
    ------
    ValueError
        A run leaves a page, or a byte of either page is in two runs.

    Examples
    --------
    >>> run = CopyRun(0, 32, 16, 2, 16, 64)
    >>> plan_of_mapping(CanonicalPageMapping(128, 32, (run,), 1, 0, True)).bytes
    32
    """
    rows = [
        (0, 0, run.local_offset, run.canonical_offset, run.fragment_size, 0, 0, run.num_fragments, run.local_stride,
         run.canonical_stride, 1, 0, 0, 1, 0, 0)
        for run in mapping.runs
    ]  # fmt: skip
    _check_in_pages(mapping)
    local = KVLayout("B", B=1, opaque=True, page_bytes=mapping.local_page_size_bytes)
    whole = KVLayout("B", B=1, opaque=True, page_bytes=mapping.canonical_page_size_bytes)
    moved = sum(run.fragment_size * run.num_fragments for run in mapping.runs)
    return Plan((local,), (whole,), 1, moved != mapping.canonical_page_size_bytes, tuple(rows))


def _check_in_pages(mapping: CanonicalPageMapping) -> None:
    for page, page_bytes in (
        ("local", mapping.local_page_size_bytes),
        ("canonical", mapping.canonical_page_size_bytes),
    ):
        starts = [
            (getattr(run, f"{page}_offset") + i * getattr(run, f"{page}_stride"), run.fragment_size)
            for run in mapping.runs for i in range(run.num_fragments)
        ]  # fmt: skip
        end = 0
        for start, size in sorted(starts):
            if start < end or start + size > page_bytes:
                raise ValueError(
                    f"plan_of_mapping: runs must have each byte of the {page} page of {page_bytes} bytes at most once, "
                    f"got bytes {start} to {start + size - 1} after {end}"
                )
            end = start + size


def opaque_mapping(page_bytes: int, rank: int, size: int) -> CanonicalPageMapping:
    """A page whose inside is unknown: whole, at a place of this rank's own.

    Examples
    --------
    >>> opaque_mapping(64, 1, 2).runs[0].canonical_offset
    64
    """
    rank, size = integer("opaque_mapping: rank", rank), integer("opaque_mapping: size", size)
    page_bytes = integer("opaque_mapping: page_bytes", page_bytes)
    run = CopyRun(0, rank * page_bytes, page_bytes, 1, page_bytes, page_bytes)
    return CanonicalPageMapping(size * page_bytes, page_bytes, (run,), 1, 0, parallelism_agnostic=False)


def layout_of(tensor: Tensor, spec: Any) -> KVLayout | None:
    """The layout of a layer's tensor, if its shape is one that engines use and leaves nothing open; else None.

    Known are ``[B, 2, N, H, D]``, ``[2, B, N, H, D]``, ``[B, H, N, 2 * D]``, ``[B, N, H, 2 * D]`` and, for MLA,
    ``[B, N, D]``, each in any physical order: the strides decide. With one head, equal strides are read as token-first.
    The two shapes of four dimensions leave open which is which where there are as many heads as tokens.

    Examples
    --------
    >>> import torch
    >>> from kvkernels.layout.specs import FullAttention
    >>> spec = FullAttention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)
    >>> layout_of(torch.zeros(6, 2, 2, 4, 8, dtype=torch.float16).transpose(2, 3), spec)
    KVLayout("B K H N D", K=2, B=6, N=4, H=2, D=8, float16)
    """
    steps = tensor.stride()
    fitting = known_forms(tensor, spec)
    if len(fitting) != 1:
        return None
    n, heads, d, d_v = spec.block_size, spec.num_kv_heads, spec.head_size, getattr(spec, "head_size_v", None)
    letters = fitting[0]
    order = sorted(range(len(letters)), key=lambda i: (-steps[i], "KBNHDC".index(letters[i])))
    pattern = " ".join(letters[i] for i in order).replace("C", "K D")
    sizes = dict(zip(letters, tensor.shape, strict=True))
    layout = KVLayout(
        pattern, K=1 if d_v == 0 else 2, B=sizes["B"], N=n, H=heads, D=d, dtype=spec.dtype,
        row_bytes=_padded_row(tensor, letters, order),
    )  # fmt: skip
    try:
        KVCache(layout, tensor)
    except ValueError:
        return None
    return layout


def known_forms(tensor: Tensor, spec: Any) -> list[str]:
    """The engines' shapes that a tensor has, as letters by dimension; ``C`` is K and V of one head."""
    wanted = ("block_size", "num_kv_heads", "head_size", "dtype")
    if not all(hasattr(spec, name) for name in wanted) or tensor.dim() == 0 or 0 in tensor.shape:
        return []
    if tensor.element_size() != spec.dtype.itemsize:
        return []
    n, heads, d = spec.block_size, spec.num_kv_heads, spec.head_size
    d_v = getattr(spec, "head_size_v", None)
    first, second = tensor.shape[0], tensor.shape[min(1, tensor.dim() - 1)]
    forms: list[tuple[tuple[int, ...], str]] = []
    if d_v == 0:
        forms = [((first, n, d), "BND")] if heads == 1 else []
    elif d_v in (None, d):
        forms = [
            ((first, 2, n, heads, d), "BKNHD"), ((2, second, n, heads, d), "KBNHD"),
            ((first, heads, n, 2 * d), "BHNC"), ((first, n, heads, 2 * d), "BNHC"),
        ]  # fmt: skip
    # One head, or one token: both ways of writing [B, H, N, C] say the same then, and the strides decide.
    fitting = [letters for shape, letters in forms if tuple(tensor.shape) == shape]
    return fitting[:1] if fitting == ["BHNC", "BNHC"] and 1 in (n, heads) else fitting


def _padded_row(tensor: Tensor, letters: str, order: list[int]) -> int | None:
    """From block to block, where something lies between two pages."""
    at = letters.index("B")
    inside = math.prod(tensor.shape[i] for i in order[order.index(at) + 1 :])
    return tensor.stride(at) * tensor.element_size() if tensor.stride(at) > inside else None


def derive_page_mappings(
    cache: Tensor | Sequence[Tensor], spec: Any, page_bytes: Sequence[int], tensor_parallel: TensorParallel
) -> list[CanonicalPageMapping]:
    """How a layer's pages, of these bytes, lie in the canonical pages; whole where that cannot be proven.

    The canonical page holds all heads, in the rank's own order of letters. It is opaque, and never a guess, where heads
    are not divisible by ranks nor ranks by heads, where values carry scales inside the page, and where strides are
    unknown.
    """
    rank, size = tensor_parallel.rank, tensor_parallel.size
    opaque = [opaque_mapping(n, rank, size) for n in page_bytes]
    if not isinstance(cache, Tensor) or not hasattr(spec, "num_kv_heads"):
        return opaque
    if getattr(getattr(spec, "kv_quant_mode", None), "is_per_token_head", False):
        return opaque
    layout = layout_of(cache, spec)
    if layout is None or set(layout.pool_letters) - {"K"}:
        return opaque
    if "H" in layout.pattern:
        total = tensor_parallel.total_kv_heads
        if (total % size and size % total) or max(1, total // size) != layout.H:
            return opaque
        whole = replace(layout, H=total, total_heads=total, row_bytes=None, page_bytes=0)
    else:
        whole = replace(layout, row_bytes=None, page_bytes=0)
    pattern = whole.pattern[whole.pattern.index("B") :]
    one_pool = replace(whole, pattern=pattern, K=whole.K if "K" in pattern else 1)
    mapping = mapping_of_plan(compile_plan(one_pool.shard(rank, size), one_pool, allow_partial=True))
    if any(mapping.local_page_size_bytes != n for n in page_bytes):
        return opaque
    return [mapping] * len(page_bytes)
