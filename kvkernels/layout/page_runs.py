"""A rank's page in the canonical page as runs of bytes, and as a plan."""

from __future__ import annotations

from dataclasses import dataclass

from kvkernels.common.arguments import integer
from kvkernels.layout.layout import KVLayout
from kvkernels.layout.plan import Plan


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
    """A rank's page and the canonical page, which is the same whatever the parallelism.

    ``num_writers`` ranks hold the same bytes, this being the ``writer_index``-th: they take turns, block by block.
    Where tokens are dealt out, the canonical page holds those of all context ranks' blocks with one id: pages of one
    layer that are ``parallelism_agnostic`` and of one size are the same bytes, whether one rank's block has so many
    tokens or several ranks' together. ``parallelism_agnostic`` is False where the page is opaque, and so only fits the
    same ranks again.
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
