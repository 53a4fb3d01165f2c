"""From two layouts to the runs that convert one into the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvkernels.common.arguments import RUN_COLUMNS, integer
from kvkernels.layout.agree import check_one_cache
from kvkernels.layout.axes import Dimension, stretches
from kvkernels.layout.layout import KVLayout
from kvkernels.layout.nests import (
    DST_OFFSET,
    DST_POOL,
    EXTENTS,
    FRAGMENT,
    INVERSE,
    MAX_RUNS,
    SRC_OFFSET,
    SRC_POOL,
    Rows,
    bytes_of,
    joined,
    nest,
)
from kvkernels.layout.pieces import Held, Piece, lacking, matched, pieces

#: A layout, or one a rank.
Layouts: TypeAlias = "KVLayout | Sequence[KVLayout]"


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
        return self.src[0].span_tokens // self.unit_tokens

    @cached_property
    def dst_subblocks(self) -> int:
        """Units of a destination block."""
        return self.dst[0].span_tokens // self.unit_tokens

    @cached_property
    def runs(self) -> PlanRuns:
        """``runs.all`` of every layer, ``runs[layer]`` of one: int64 ``[r, 16]``, as copy_pages takes them."""
        return PlanRuns(self)

    @cached_property
    def bytes(self) -> int:
        """Bytes that one pair of ids moves."""
        return bytes_of(self.runs.rows)

    @cached_property
    def fragments(self) -> int:
        """Contiguous pieces that one pair of ids moves, before neighbouring ids are merged."""
        return int(self.runs.rows[:, EXTENTS].prod(axis=1).sum())

    @cached_property
    def largest_fragment_bytes(self) -> int:
        """Bytes of the largest contiguous piece."""
        return int(self.runs.rows[:, FRAGMENT].max(initial=0))

    @cached_property
    def smallest_fragment_bytes(self) -> int:
        """Bytes of the smallest contiguous piece."""
        return int(self.runs.rows[:, FRAGMENT].min(initial=self.largest_fragment_bytes))

    def inverse(self) -> Plan:
        """The plan back: every destination byte that has a source. Replicas are then written, each of them."""
        if self.given is not None:
            swapped = tuple(tuple(row[column] for column in INVERSE) for row in self.given)
            partial = self.bytes != self.src[0].page_bytes
            return Plan(self.dst, self.src, self.unit_tokens, partial, swapped)
        back = bool(_lacking(self.dst, self.src))
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

    Layers are counted over all pipeline stages. Both are copies that a caller may change.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._layers: dict[int, Rows] = {}

    @cached_property
    def rows(self) -> Rows:
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

    def _rows_of(self, layer: int) -> Rows:
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
        return self._plan.src[0].total("L")

    def __getitem__(self, layer: int) -> Tensor:  # type: ignore[override]
        return self.of(layer).clone()


def compile_plan(src: Layouts, dst: Layouts, *, allow_partial: bool = False, unit_tokens: int | None = None) -> Plan:
    """The runs that turn pages of one layout into pages of another.

    Parameters
    ----------
    src, dst : KVLayout or sequence of KVLayout
        The two sides. A sequence is one layout a rank (tensor or context parallel, or a pipeline stage), whose pools
        follow each other; all ranks use the same block ids. Parts meet by name, and elements by the layer, token, head
        and place in a head that they have among all ranks. A byte that several sources hold (replicas) is read from
        the first of them, and every destination gets its copy.
    allow_partial : bool
        Leave bytes of the destination untouched that no source holds, such as other ranks' heads. Otherwise each byte
        must have a source.
    unit_tokens : int, optional
        Tokens that an id stands for: by default as many as divide both block sizes, a block where they are the same. 1
        gives a plan for token slots. Where tokens are dealt out, a block is all that it covers, and a unit is whole
        turns of all ranks.

    Returns
    -------
    Plan
        Cached: the same layouts give the same object.

    Raises
    ------
    ValueError
        The layouts do not hold the same parts of the same cache, one cannot be expressed in the other's blocks, or more
        than 4,096 runs would be needed; the message names both. ``convert_blocks`` with a ``layer`` needs that layer's
        runs alone.

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
    unit = math.gcd(srcs[0].span_tokens, dsts[0].span_tokens)
    if unit_tokens is not None:
        unit = integer("compile_plan: unit_tokens", unit_tokens)
    return _compiled(srcs, dsts, unit, bool(allow_partial))


@lru_cache(maxsize=256)
def _compiled(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...], unit: int, allow_partial: bool) -> Plan:
    common = math.gcd(src[0].span_tokens, dst[0].span_tokens)
    if unit < 1 or common % unit:
        _refuse(src, dst, f"unit_tokens must divide {common}, which divides both block sizes, got {unit}")
    try:
        check_one_cache(src, dst, unit)
    except ValueError as error:
        _refuse(src, dst, str(error))
    lacks = "" if allow_partial else _lacking(src, dst)
    if lacks:
        _refuse(
            src, dst, f"the sources lack {lacks} that the destination has; allow_partial=True leaves them untouched"
        )
    return Plan(src, dst, unit, allow_partial)


def _lacking(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...]) -> str:
    """What the destination has and the sources do not, in a word."""
    words = (lacking(ours, theirs) for ours, theirs in matched(src, dst))
    return next((word for word in words if word), "")


def _check_tiles(plan: Plan, rows: Rows, layers: range) -> None:
    """That the runs write every byte of some of the destination's layers once. They come from disjoint boxes, and a
    layout gives each element a byte of its own, so that counting the bytes is enough."""
    wanted = sum(_unit_bytes(layout, plan.unit_tokens, layers) for layout in plan.dst)
    written = bytes_of(rows)
    if written > wanted or (written < wanted and not plan.allow_partial):
        _refuse(plan.src, plan.dst, f"{written} bytes would be written into blocks of {wanted}")


def _unit_bytes(layout: KVLayout, unit_tokens: int, layers: range) -> int:
    """Bytes that a layout has of some layers of a unit."""
    begin = layout.first("L")
    held = range(max(begin, layers.start), min(begin + layout.L, layers.stop))
    return layout.block_bytes // layout.L * len(held) * unit_tokens // layout.span_tokens


def _as_tuple(name: str, layouts: Layouts) -> tuple[KVLayout, ...]:
    result = (layouts,) if isinstance(layouts, KVLayout) else tuple(layouts) if isinstance(layouts, Sequence) else ()
    if not result or not all(isinstance(layout, KVLayout) for layout in result):
        raise ValueError(f"compile_plan: {name} must be a KVLayout or a list of them, got {layouts!r}")
    return result


def _names(layouts: tuple[KVLayout, ...]) -> str:
    return repr(layouts[0]) if len(layouts) == 1 else f"{len(layouts)} shards, the first being {layouts[0]!r}"


def _refuse(src: tuple[KVLayout, ...], dst: tuple[KVLayout, ...], why: str) -> NoReturn:
    raise ValueError(f"compile_plan: {why}; src is {_names(src)}, dst is {_names(dst)}")


def _compile(plan: Plan, layers: range) -> Rows:
    if plan.given is not None:
        return np.array(plan.given, dtype=np.int64).reshape(-1, RUN_COLUMNS)
    found: list[Rows] = []
    count = 0
    for src, dst in matched(plan.src, plan.dst):
        for piece in pieces(src, dst, plan.unit_tokens, layers):
            for rows in _piece_rows(plan, piece):
                count += len(rows)
                if count > MAX_RUNS:
                    _refuse(plan.src, plan.dst, f"more than {MAX_RUNS} runs would be needed")
                found.append(rows)
    rows = joined(np.concatenate(found)) if found else np.empty((0, RUN_COLUMNS), dtype=np.int64)
    _check_tiles(plan, rows, layers)
    # Shards that stripe one side's rows follow each other, so that an executor can take those rows whole.
    first = (DST_OFFSET, DST_POOL) if len(plan.src) > len(plan.dst) else (SRC_OFFSET, SRC_POOL)
    return np.ascontiguousarray(rows[np.lexsort(tuple(rows[:, column] for column in first))])


def _piece_rows(plan: Plan, piece: Piece) -> Iterator[Rows]:
    """A nest for each way to take a regular stretch of every letter."""
    src, dst = piece.src, piece.dst
    axes = []
    for letter, (begin, end) in piece.ranges.items():
        at_src, at_dst = (range(begin - held.range(letter)[0], end - held.range(letter)[0]) for held in (src, dst))
        axes.append(stretches(src.digits(letter), dst.digits(letter), at_src, at_dst))
    rows = range(src.layout.W)
    axes.append(stretches(src.digits("W"), dst.digits("W"), rows, rows))
    if "N" in src.layout.letters or "N" in dst.layout.letters:
        plain = range(plan.unit_tokens)
        at_src, at_dst = (plain if piece.tokens is None else held.places(piece.tokens).tolist() for held in (src, dst))
        axes.append(stretches(src.digits("N"), dst.digits("N"), at_src, at_dst))
    first = [side.start() for side in (src, dst)]
    pair: tuple[Dimension, ...] = ()
    if len(src.ks) > 1:
        (s_pool, s_byte), (d_pool, d_byte) = (
            tuple(b - a for a, b in zip(side.start(0), side.start(1), strict=True)) for side in (src, dst)
        )
        pair = (Dimension(2, s_pool, d_pool, s_byte, d_byte),)
    subblock_strides = (
        _subblock_bytes(src, plan.unit_tokens) if plan.src_subblocks > 1 else 0,
        _subblock_bytes(dst, plan.unit_tokens) if plan.dst_subblocks > 1 else 0,
    )
    for choice in itertools.product(*axes):
        base = [first[0][0], first[1][0], first[0][1], first[1][1]]
        for stretch in choice:
            base[SRC_POOL] += stretch.src_pools
            base[DST_POOL] += stretch.dst_pools
            base[SRC_OFFSET] += stretch.src_bytes
            base[DST_OFFSET] += stretch.dst_bytes
        loops = [*(loop for stretch in choice for loop in stretch.loops), *pair]
        yield nest(base, src.layout.element_bytes, subblock_strides, loops)


def _subblock_bytes(held: Held, unit_tokens: int) -> int:
    """From one unit of a block to the next."""
    tokens = unit_tokens // held.deal[1]
    return sum(tokens // digit.divisor % digit.extent * digit.bytes for digit in held.digits("N"))


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
    whole = not plan.allow_partial if plan.given is not None else not _lacking(plan.src, plan.dst)
    lines.append(
        "every byte of the destination's block is written once"
        if whole
        else "bytes of the destination's block that no source holds stay untouched; the others are written once"
    )
    return "\n".join(lines)
