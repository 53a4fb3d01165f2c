"""From two layouts to the runs that convert one into the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvkernels.common.arguments import RUN_COLUMNS, integer
from kvkernels.layout.layout import KVLayout

#: A layout, or one a tensor-parallel rank.
Layouts: TypeAlias = "KVLayout | Sequence[KVLayout]"

#: More than these would cost more to go through than the copy itself.
MAX_RUNS = 4096

_LOOPS = 3
_SRC_POOL, _DST_POOL, _SRC_OFFSET, _DST_OFFSET, _FRAGMENT, _SRC_SUBBLOCK, _DST_SUBBLOCK, _FIRST_LOOP = range(8)
_INVERSE = [1, 0, 3, 2, 4, 6, 5, *(c for first in (7, 10, 13) for c in (first, first + 2, first + 1))]
_EXTENTS = [_FIRST_LOOP + 3 * i for i in range(_LOOPS)]

_Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How every block of one layout becomes a block of another: made by ``compile_plan``, for ``copy_pages``.

    Ids count units of ``unit_tokens`` tokens: a block of ``src_subblocks`` units has the ids ``block * src_subblocks``
    to ``block * src_subblocks + src_subblocks - 1``. Where both sides have the same block size, a unit is a block.

    Plans are equal, and hash equal, where their layouts are. A plan with ``given`` rows is what those say, and not
    compiled: its layouts are opaque.
    """

    src: tuple[KVLayout, ...]
    dst: tuple[KVLayout, ...]
    unit_tokens: int
    allow_partial: bool = False
    given: tuple[tuple[int, ...], ...] | None = None

    @cached_property
    def src_subblocks(self) -> int:
        """Units of a source block."""
        return self.src[0].N // self.unit_tokens

    @cached_property
    def dst_subblocks(self) -> int:
        """Units of a destination block."""
        return self.dst[0].N // self.unit_tokens

    @cached_property
    def runs(self) -> PlanRuns:
        """``runs.all`` of every layer, ``runs[layer]`` of one: int64 ``[r, 16]``, as copy_pages takes them."""
        return PlanRuns(self)

    @cached_property
    def bytes(self) -> int:
        """Bytes that one pair of ids moves."""
        return _bytes_of(self.runs.rows)

    @cached_property
    def fragments(self) -> int:
        """Contiguous pieces that one pair of ids moves, before neighbouring ids are merged."""
        return int(self.runs.rows[:, _EXTENTS].prod(axis=1).sum())

    @cached_property
    def largest_fragment_bytes(self) -> int:
        """Bytes of the largest contiguous piece."""
        return int(self.runs.rows[:, _FRAGMENT].max(initial=0))

    @cached_property
    def smallest_fragment_bytes(self) -> int:
        """Bytes of the smallest contiguous piece."""
        return int(self.runs.rows[:, _FRAGMENT].min(initial=self.largest_fragment_bytes))

    def inverse(self) -> Plan:
        """The plan back: every destination byte that has a source. Replicas are then written, each of them."""
        if self.given is not None:
            swapped = tuple(tuple(row[column] for column in _INVERSE) for row in self.given)
            partial = self.bytes != self.src[0].page_bytes
            return Plan(self.dst, self.src, self.unit_tokens, partial, swapped)
        back = not _covers(self.dst, self.src)
        return compile_plan(self.dst, self.src, allow_partial=back, unit_tokens=self.unit_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without its runs, which are compiled again."""
        return Plan, (self.src, self.dst, self.unit_tokens, self.allow_partial, self.given)

    def explain(self) -> str:
        """What it moves, in words.

        Examples
        --------
        >>> import torch
        >>> from kvkernels import KVLayout, compile_plan
        >>> sizes = dict(L=2, K=2, B=8, N=4, H=2, D=8, dtype=torch.float16)
        >>> print(compile_plan(KVLayout("L | K B N H D", **sizes), KVLayout("B L K H N D", **sizes)).explain())
        from KVLayout("L | K B N H D", L=2, K=2, B=8, N=4, H=2, D=8, float16)
        to   KVLayout("B L K H N D", L=2, K=2, B=8, N=4, H=2, D=8, float16)
        an id is a block of 4 tokens
        4 runs; a pair of ids moves 512 bytes in 32 fragments of 16 bytes
        every byte of the destination's block is written once
        """
        return _explain(self)


class PlanRuns(Sequence[Tensor]):
    """A plan's runs, layer by layer: ``runs[layer]`` is what copies one layer, ``runs.all`` everything.

    Both are copies that a caller may change.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._layers: dict[int, _Rows] = {}

    @cached_property
    def rows(self) -> _Rows:
        """Every layer's runs, which nobody may change."""
        return _compile(self._plan, range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanRuns, (self._plan,)

    @property
    def all(self) -> Tensor:
        """Every layer's runs, int64 ``[r, 16]`` on the CPU."""
        return self.of(None).clone()

    def of(self, layer: int | None) -> Tensor:
        """The plan's own runs of a layer, or of all, which nobody may change.

        The tensor is made anew: it is of the mode that it was made under (fake, inference), which may be over before
        the plan is used again.
        """
        return torch.from_numpy(self.rows if layer is None else self._rows_of(layer))

    def _rows_of(self, layer: int) -> _Rows:
        wanted = f"below {len(self)} and not negative"
        try:
            layer = integer("Plan.runs: layer", layer, wanted, least=0)
        except ValueError as error:
            raise IndexError(str(error)) from None
        if layer >= len(self):
            raise IndexError(f"Plan.runs: layer must be {wanted}, got {layer}")
        if layer not in self._layers:
            self._layers[layer] = _compile(self._plan, range(layer, layer + 1))
        return self._layers[layer]

    def __len__(self) -> int:
        return self._plan.src[0].L

    def __getitem__(self, layer: int) -> Tensor:  # type: ignore[override]
        return self.of(layer).clone()


def compile_plan(src: Layouts, dst: Layouts, *, allow_partial: bool = False, unit_tokens: int | None = None) -> Plan:
    """The runs that turn pages of one layout into pages of another.

    Parameters
    ----------
    src, dst : KVLayout or sequence of KVLayout
        The two sides. A sequence is one layout a tensor-parallel rank, whose pools follow each other; all ranks use the
        same block ids. A byte that several sources hold (replicas) is read from the first of them, and every
        destination gets its copy.
    allow_partial : bool
        Leave bytes of the destination untouched that no source holds, such as other ranks' heads. Otherwise each byte
        must have a source.
    unit_tokens : int, optional
        Tokens that an id stands for: by default as many as divide both block sizes, a block where they are the same. 1
        gives a plan for token slots.

    Returns
    -------
    Plan
        Cached: the same layouts give the same object.

    Raises
    ------
    ValueError
        The layouts do not hold the same cache, one cannot be expressed in the other's blocks, or more than 4,096 runs
        would be needed; the message names both. ``convert_blocks`` with a ``layer`` needs that layer's runs alone.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import KVLayout, compile_plan
    >>> whole = KVLayout("L | B N H D", L=4, B=64, N=16, H=8, D=128, dtype=torch.bfloat16)
    >>> plan = compile_plan([whole.shard(rank, 2) for rank in range(2)], whole)
    >>> plan.bytes, plan.fragments, plan.largest_fragment_bytes
    (131072, 128, 1024)
    """
    plan = plan_of(src, dst, allow_partial=allow_partial, unit_tokens=unit_tokens)
    _ = plan.runs.rows  # or the reason why there are none
    return plan


def plan_of(src: Layouts, dst: Layouts, *, allow_partial: bool, unit_tokens: int | None) -> Plan:
    """``compile_plan`` before the runs of any layer are compiled."""
    srcs, dsts = _as_tuple("src", src), _as_tuple("dst", dst)
    unit = math.gcd(srcs[0].N, dsts[0].N)
    if unit_tokens is not None:
        unit = integer("compile_plan: unit_tokens", unit_tokens)
    return _compiled(srcs, dsts, unit, bool(allow_partial))


@lru_cache(maxsize=256)
def _compiled(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...], unit: int, allow_partial: bool) -> Plan:
    common = math.gcd(src[0].N, dst[0].N)
    if unit < 1 or common % unit:
        _refuse(src, dst, f"unit_tokens must divide {common}, which divides both block sizes, got {unit}")
    _check_one_cache(src, dst, unit)
    plan = Plan(src, dst, unit, allow_partial)
    if not allow_partial and not _covers(src, dst):
        _refuse(src, dst, "the sources lack heads that the destination has; allow_partial=True leaves them untouched")
    return plan


def _check_tiles(plan: Plan, rows: _Rows, layers: int) -> None:
    """That the runs write every byte of some of the destination's layers once. They come from disjoint heads, and a
    layout gives each element a byte of its own, so that counting the bytes is enough."""
    wanted = sum(layout.block_bytes for layout in plan.dst) // plan.dst[0].L * layers
    written = _bytes_of(rows) * plan.dst_subblocks
    if written > wanted or (written < wanted and not plan.allow_partial):
        _refuse(plan.src, plan.dst, f"{written} bytes would be written into blocks of {wanted}")


def _as_tuple(name: str, layouts: Layouts) -> tuple[KVLayout, ...]:
    result = (layouts,) if isinstance(layouts, KVLayout) else tuple(layouts) if isinstance(layouts, Sequence) else ()
    if not result or not all(isinstance(layout, KVLayout) for layout in result):
        raise ValueError(f"compile_plan: {name} must be a KVLayout or a list of them, got {layouts!r}")
    return result


def _names(layouts: tuple[KVLayout, ...]) -> str:
    return repr(layouts[0]) if len(layouts) == 1 else f"{len(layouts)} shards, the first being {layouts[0]!r}"


def _refuse(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...], why: str) -> None:
    raise ValueError(f"compile_plan: {why}; src is {_names(src)}, dst is {_names(dst)}")


def _check_one_cache(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...], unit: int) -> None:
    """That both sides hold the same elements, and that ids can name the same tokens on both."""
    first, both = src[0], (*src, *dst)
    for layout in both:
        if layout.opaque != first.opaque:
            _refuse(src, dst, "an opaque page can only become the same opaque page")
        for name in ("L", "K") if first.opaque else ("L", "K", "D", "D_v", "total_heads", "dtype"):
            ours, theirs = getattr(first, name), getattr(layout, name)
            if ours != theirs:
                _refuse(src, dst, f"{name} must be the same on both sides, got {ours} and {theirs}")
    for side in (src, dst):
        if any(layout.N != side[0].N for layout in side):
            _refuse(src, dst, "the shards of a side must have one block size")
    if first.opaque:
        pages = [[layout.page_bytes for layout in side] for side in (src, dst)]
        if pages[0] != pages[1] or (unit, unit) != (src[0].N, dst[0].N):
            _refuse(src, dst, "opaque pages must be as many and as large on both sides")
    for layout in both:
        if unit != layout.N and "N" not in layout.page_letters:
            _refuse(src, dst, f"blocks of {layout.N} tokens cannot be cut into {unit} where N counts pools")
    scales = [tuple(layout.scales for layout in side if layout.scales is not None) for side in (src, dst)]
    if (len(scales[0]), len(scales[1])) not in ((0, 0), (len(src), len(dst))):
        _refuse(src, dst, "scales must be on both sides or on neither")
    if scales[0]:
        _check_one_cache(scales[0], scales[1], unit)


def _held(layouts: tuple[KVLayout, ...]) -> set[int]:
    return {head for layout in layouts for head in range(layout.first_head, layout.first_head + layout.H)}


def _covers(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...]) -> bool:
    return _held(dst) <= _held(src)


@dataclass(frozen=True)
class _Piece:
    """Heads that one source has and one destination wants."""

    src: int
    dst: int
    first_head: int
    heads: int


def _pieces(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...]) -> Iterator[_Piece]:
    """Every head that a destination wants, from the first source that has it."""
    if src[0].opaque:
        yield from (_Piece(rank, rank, layout.first_head, layout.H) for rank, layout in enumerate(src))
        return
    holder: dict[int, int] = {}
    for rank, layout in reversed(list(enumerate(src))):
        holder.update(dict.fromkeys(range(layout.first_head, layout.first_head + layout.H), rank))
    for rank, layout in enumerate(dst):
        head, end = layout.first_head, layout.first_head + layout.H
        while head < end:
            owner, first = holder.get(head), head
            while head < end and holder.get(head) == owner:
                head += 1
            if owner is not None:
                yield _Piece(owner, rank, first, head - first)


def _compile(plan: Plan, layers: range) -> _Rows:
    if plan.given is not None:
        return np.array(plan.given, dtype=np.int64).reshape(-1, RUN_COLUMNS)
    parts: list[_Rows] = []
    count = 0
    for src, dst, src_bases, dst_bases in _tensors_of(plan):
        for piece in _pieces(src, dst):
            bases = (src_bases[piece.src], dst_bases[piece.dst])
            for rows in _piece_rows(plan, src[piece.src], dst[piece.dst], piece, bases, layers):
                count += len(rows)
                if count > MAX_RUNS:
                    _refuse(plan.src, plan.dst, f"more than {MAX_RUNS} runs would be needed")
                parts.append(rows)
    rows = _joined(np.concatenate(parts)) if parts else np.empty((0, RUN_COLUMNS), dtype=np.int64)
    _check_tiles(plan, rows, len(layers))
    # Shards that stripe one side's rows follow each other, so that an executor can take those rows whole.
    first = (_DST_OFFSET, _DST_POOL) if len(plan.src) > len(plan.dst) else (_SRC_OFFSET, _SRC_POOL)
    return np.ascontiguousarray(rows[np.lexsort(tuple(rows[:, column] for column in first))])


def _bytes_of(rows: _Rows) -> int:
    """Bytes that one pair of ids moves."""
    return int((rows[:, _FRAGMENT] * rows[:, _EXTENTS].prod(axis=1)).sum())


def _tensors_of(plan: Plan) -> Iterator[tuple[tuple[KVLayout, ...], tuple[KVLayout, ...], list[int], list[int]]]:
    """The two sides' layouts with each one's first pool: of the cache itself, then of its scales."""
    src_bases, dst_bases = _first_pools(plan.src), _first_pools(plan.dst)
    yield plan.src, plan.dst, src_bases, dst_bases
    scales = [tuple(layout.scales for layout in side if layout.scales is not None) for side in (plan.src, plan.dst)]
    if scales[0]:
        after = [
            [base + len(layout.places) for base, layout in zip(bases, side, strict=True)]
            for bases, side in ((src_bases, plan.src), (dst_bases, plan.dst))
        ]
        yield scales[0], scales[1], after[0], after[1]


def _first_pools(layouts: tuple[KVLayout, ...]) -> list[int]:
    return list(itertools.accumulate((layout.num_pools for layout in layouts[:-1]), initial=0))


@dataclass(frozen=True)
class _Dimension:
    """A letter as both sides step through it."""

    extent: int
    src_pools: int
    dst_pools: int
    src_bytes: int
    dst_bytes: int


def _piece_rows(
    plan: Plan, src: KVLayout, dst: KVLayout, piece: _Piece, bases: tuple[int, int], layers: range
) -> Iterator[_Rows]:
    """K and V on their own where their heads differ, in one nest otherwise."""
    for k in range(src.K) if src.D_v is not None else (0,):
        sizes = {"L": len(layers), "N": plan.unit_tokens, "H": piece.heads, "D": src.size("D", k)}
        if src.D_v is None:
            sizes["K"] = src.K
        begins = {"L": (layers.start, layers.start)}
        begins["H"] = (piece.first_head - src.first_head, piece.first_head - dst.first_head)
        base = [bases[0] + src.start(k)[0], bases[1] + dst.start(k)[0], src.start(k)[1], dst.start(k)[1]]
        dimensions = []
        for letter, extent in sizes.items():
            s, d = src.step(letter, k), dst.step(letter, k)
            at_src, at_dst = begins.get(letter, (0, 0))
            base[0] += at_src * s.pools
            base[1] += at_dst * d.pools
            base[2] += at_src * s.bytes
            base[3] += at_dst * d.bytes
            if extent > 1:
                dimensions.append(_Dimension(extent, s.pools, d.pools, s.bytes, d.bytes))
        subblock_strides = (
            plan.unit_tokens * src.step("N", k).bytes if plan.src_subblocks > 1 else 0,
            plan.unit_tokens * dst.step("N", k).bytes if plan.dst_subblocks > 1 else 0,
        )
        yield _nest(base, src.element_bytes, subblock_strides, dimensions)


def _nest(
    base: list[int], fragment_bytes: int, subblock_strides: tuple[int, int], dimensions: list[_Dimension]
) -> _Rows:
    """Rows for a box of coordinates: what stays inside a page on both sides is looped over, the rest listed."""
    listed = [d for d in dimensions if d.src_pools or d.dst_pools]
    fragment_bytes, loops = _merged(fragment_bytes, [d for d in dimensions if not (d.src_pools or d.dst_pools)])
    loops.sort(key=lambda d: (-d.dst_bytes, -d.src_bytes))
    while len(loops) > _LOOPS:
        smallest = min(loops, key=lambda d: d.extent)
        loops.remove(smallest)
        listed.append(smallest)
    total = math.prod(d.extent for d in listed)
    if total > MAX_RUNS:
        # Counted by the caller, never written out.
        return np.broadcast_to(np.int64(0), (total, RUN_COLUMNS))
    rows = np.ones((total, RUN_COLUMNS), dtype=np.int64)
    rows[:, : _DST_OFFSET + 1] = base
    rows[:, _FRAGMENT : _DST_SUBBLOCK + 1] = (fragment_bytes, *subblock_strides)
    rows[:, _FIRST_LOOP:] = (1, 0, 0) * _LOOPS
    for i, loop in enumerate(loops):
        rows[:, _FIRST_LOOP + 3 * i : _FIRST_LOOP + 3 * i + 3] = (loop.extent, loop.src_bytes, loop.dst_bytes)
    grid = np.indices([d.extent for d in listed]).reshape(len(listed), total)
    for dimension, index in zip(listed, grid, strict=True):
        rows[:, _SRC_POOL] += index * dimension.src_pools
        rows[:, _DST_POOL] += index * dimension.dst_pools
        rows[:, _SRC_OFFSET] += index * dimension.src_bytes
        rows[:, _DST_OFFSET] += index * dimension.dst_bytes
    return rows


def _merged(fragment_bytes: int, loops: list[_Dimension]) -> tuple[int, list[_Dimension]]:
    """With loops that continue the fragment, or another loop, on both sides made part of it."""
    loops = list(loops)
    while True:
        into = next((d for d in loops if d.src_bytes == d.dst_bytes == fragment_bytes), None)
        if into is not None:
            fragment_bytes *= into.extent
            loops.remove(into)
            continue
        pair = next(
            (
                (outer, inner)
                for outer in loops
                for inner in loops
                if outer.src_bytes == inner.src_bytes * inner.extent
                and outer.dst_bytes == inner.dst_bytes * inner.extent
            ),
            None,
        )
        if pair is None:
            return fragment_bytes, loops
        outer, inner = pair
        loops.remove(outer)
        loops[loops.index(inner)] = _Dimension(outer.extent * inner.extent, 0, 0, inner.src_bytes, inner.dst_bytes)


def _joined(rows: _Rows) -> _Rows:
    """With runs made one that are the same nest of neighbouring fragments."""
    same = [_SRC_POOL, _DST_POOL, _SRC_SUBBLOCK, _DST_SUBBLOCK, *range(_FIRST_LOOP, RUN_COLUMNS)]
    rows = rows[np.lexsort(tuple(rows[:, column] for column in (_SRC_OFFSET, *reversed(same))))]
    before, after = rows[:-1], rows[1:]
    joins = (before[:, same] == after[:, same]).all(axis=1)
    for offset in (_SRC_OFFSET, _DST_OFFSET):
        joins &= before[:, offset] + before[:, _FRAGMENT] == after[:, offset]
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    if len(heads) == len(rows):
        return rows
    kept = rows[heads]
    kept[:, _FRAGMENT] = np.add.reduceat(rows[:, _FRAGMENT], heads)
    return np.concatenate([_folded(row) for row in kept])


def _folded(row: _Rows) -> _Rows:
    """With loops that continue a fragment that has grown made part of it."""
    loops = [_Dimension(int(row[i]), 0, 0, int(row[i + 1]), int(row[i + 2])) for i in _EXTENTS if row[i] > 1]
    base = [int(value) for value in row[: _DST_OFFSET + 1]]
    return _nest(base, int(row[_FRAGMENT]), (int(row[_SRC_SUBBLOCK]), int(row[_DST_SUBBLOCK])), loops)


def _explain(plan: Plan) -> str:
    word = "unit" if plan.src_subblocks > 1 or plan.dst_subblocks > 1 else "block"
    lines = [f"from {_names(plan.src)}", f"to   {_names(plan.dst)}", f"an id is a {word} of {plan.unit_tokens} tokens"]
    if word == "unit":
        lines[-1] += f": {plan.src_subblocks} a source block, {plan.dst_subblocks} a destination block"
    smallest, largest = plan.smallest_fragment_bytes, plan.largest_fragment_bytes
    sizes = f"{largest} bytes" if smallest == largest else f"{smallest} to {largest} bytes"
    lines.append(
        f"{len(plan.runs.rows)} runs; a pair of ids moves {plan.bytes} bytes in {plan.fragments} fragments of {sizes}"
    )
    whole = not plan.allow_partial if plan.given is not None else _covers(plan.src, plan.dst)
    lines.append(
        "every byte of the destination's block is written once"
        if whole
        else "bytes of the destination's block that no source holds stay untouched; the others are written once"
    )
    return "\n".join(lines)
