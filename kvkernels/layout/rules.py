"""What can be wrong with a layout, and what its fields are settled to: called once, when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from kvkernels.common.arguments import integer
from kvkernels.layout.geometry import measure
from kvkernels.layout.pattern import LETTERS, read, write
from kvkernels.layout.shards import FIELDS

_INTEGERS = (
    "L", "K", "B", "N", "W", "H", "D", "D_v", "row_bytes", "offset_bytes", "page_bytes", "tensor", "first_layer",
    "total_layers", "first_head", "total_heads", "first_d", "total_d", "replica", "replicas",
)  # fmt: skip
_OPTIONAL = ("D_v", "row_bytes", "tensor")


def settle(layout: Any) -> None:
    """Check all of a layout, or ValueError."""
    _check_types(layout)
    try:
        put(layout, "pattern", write(*read(layout.pattern)))
    except ValueError as error:
        fail(layout, str(error))
    _check_letters(layout)
    _check_sizes(layout)
    _check_ranges(layout)
    _check_deal(layout)
    _settle_steps(layout)
    page_bytes = max(layout._geometry.page_bytes)
    if layout.page_bytes not in (0, page_bytes):
        fail(layout, f"page_bytes must be {page_bytes} or left out, got {layout.page_bytes}")
    put(layout, "page_bytes", page_bytes)
    if layout.scales is not None:
        _check_scales(layout, layout.scales)
    if layout.scales is not None or layout.beside:
        _check_members(layout)


def fail(layout: Any, message: str) -> NoReturn:
    """ValueError, naming the layout by its pattern."""
    raise ValueError(f'KVLayout("{layout.pattern}"): {message}')


def put(layout: Any, name: str, value: object) -> None:
    """A field of a layout that is being made."""
    object.__setattr__(layout, name, value)


def _check_types(layout: Any) -> None:
    if not isinstance(layout.pattern, str):
        raise ValueError(f"KVLayout: pattern must be a str, got {layout.pattern!r}")
    for name in _INTEGERS:
        value = getattr(layout, name)
        if value is None and name in _OPTIONAL:
            continue
        put(layout, name, integer(f'KVLayout("{layout.pattern}"): {name}', value))
    for name, kind in (("dtype", torch.dtype), ("scales", type(layout))):
        value = getattr(layout, name)
        if value is not None and not isinstance(value, kind):
            fail(layout, f"{name} must be a {kind.__name__}, got {value!r}")


def _check_letters(layout: Any) -> None:
    if "B" not in layout.inside:
        fail(layout, "the pattern must have B, and not left of the bar")
    if layout.opaque and layout.inside[-1] != "B":
        fail(layout, "an opaque layout's pattern must end with B: what is in its pages is unknown")


def _check_sizes(layout: Any) -> None:
    for letter in LETTERS:
        size = layout.size(letter)
        if size < (0 if letter == "B" else 1):
            fail(layout, f"{letter} must be a positive integer, got {size!r}")
        if size != 1 and letter != "B" and letter not in layout.outside + layout.inside:
            fail(layout, f"the pattern lacks {letter}, whose size is {size}")
    if layout.K > 2:
        fail(layout, f"K must be 1 or 2, got {layout.K}")
    if layout.opaque:
        if layout.page_bytes <= 0:
            fail(layout, f"an opaque layout needs a positive page_bytes, got {layout.page_bytes}")
    elif layout.dtype is None:
        fail(layout, "dtype must be given")
    if layout.D_v is not None:
        order = layout.outside + layout.inside
        if layout.D_v < 1 or layout.K != 2 or "D" not in layout.page_letters or order.index("K") > order.index("D"):
            fail(layout, f"D_v must be positive and goes with K=2 and D in the page, right of K; got {layout.D_v}")
    for word in (*layout.outside_words, *layout.inside_words):
        size = layout.size(word.letter)
        if word.cut and any(layout.size(word.letter, k) % word.by for k in range(layout.K)):
            fail(layout, f"{word.letter} must be a multiple of {word.by}, as {word} says, got {size}")
    if layout.offset_bytes < 0:
        fail(layout, f"offset_bytes must not be negative, got {layout.offset_bytes}")
    if layout.tensor is not None and layout.tensor < 0:
        fail(layout, f"tensor must not be negative, got {layout.tensor}")


def _check_ranges(layout: Any) -> None:
    if layout.D_v == layout.D:
        put(layout, "D_v", None)
    put(layout, "total_heads", layout.total_heads or layout.H)
    for letter in "LD":
        first, total = FIELDS[letter]
        if (getattr(layout, first), getattr(layout, total)) == (0, layout.size(letter)):
            put(layout, total, 0)
    for letter, words in (("H", "heads"), ("L", "layers"), ("D", "elements")):
        first, size, total = layout.first(letter), layout.size(letter), layout.total(letter)
        if not 0 <= first <= first + size <= total:
            fail(layout, f"{words} {first} to {first + size - 1} must be of {total}")
    if layout.total_d and layout.D_v is not None:
        fail(
            layout,
            f"first_d and total_d must be left out where K and V differ, got {layout.first_d} of {layout.total_d}",
        )
    if not 0 <= layout.replica < layout.replicas:
        fail(layout, f"replica must be below replicas and not negative, got {layout.replica} and {layout.replicas}")


def _check_deal(layout: Any) -> None:
    if layout.deal is None:
        return
    numbers = tuple(layout.deal) if isinstance(layout.deal, Sequence) else ()
    if len(numbers) != 3:
        fail(layout, f"deal must be (rank, of, interleave), got {layout.deal!r}")
    rank, of, interleave = (integer(f'KVLayout("{layout.pattern}"): deal', number) for number in numbers)
    if not 0 <= rank < of or interleave < 1 or layout.N % interleave or "N" not in layout.outside + layout.inside:
        fail(layout, f"deal must be a rank below of, and an interleave that divides N={layout.N}, got {layout.deal}")
    put(layout, "deal", (rank, of, interleave) if of > 1 else None)


def _settle_steps(layout: Any) -> None:
    """Known words only, and of these only what memory that is dense would not have anyway."""
    if not isinstance(layout.steps, Mapping):
        fail(layout, f"steps must be a mapping of letters to bytes, got {layout.steps!r}")
    inside = [str(word) for word in layout.inside_words]
    steps = {}
    for word, step in layout.steps.items():
        if word not in inside:
            fail(layout, f"steps must be of {', '.join(inside)}, got {word!r}")
        name = f'KVLayout("{layout.pattern}"): steps[{word!r}]'
        steps[word] = integer(name, step, "a positive number of bytes", least=1)
    row = steps.pop("B", None)
    if row is not None and layout.row_bytes not in (None, row):
        fail(layout, f"row_bytes must be steps['B'], which is {row}, got {layout.row_bytes}")
    put(layout, "row_bytes", layout.row_bytes if row is None else row)
    put(layout, "steps", MappingProxyType(steps))
    try:
        geometry = measure(layout)
    except ValueError as error:
        fail(layout, str(error))
    dense = geometry.dense_bytes
    told = {word: steps[word] for word in inside if word in steps and any(d[word] != steps[word] for d in dense)}
    put(layout, "steps", MappingProxyType(told))
    if row is not None and all(d["B"] == row for d in dense):
        put(layout, "row_bytes", None)
    put(layout, "_geometry", geometry)


def _check_scales(layout: Any, scales: Any) -> None:
    ranges = ("L", "B", "first_layer", "total_layers", *(["N", "deal"] if "N" in scales.letters else []))
    same = all(getattr(layout, name) == getattr(scales, name) for name in ranges)
    same = same and scales.K in (1, layout.K) and not (layout.deal and "N" not in scales.letters)
    if "H" in scales.letters:
        heads = ("H", "first_head", "total_heads")
        same = same and all(getattr(layout, name) == getattr(scales, name) for name in heads)
    if not same or layout.opaque or scales.opaque or scales.scales is not None or scales.beside or layout.beside:
        fail(layout, f"scales must have the same layers, blocks, tokens and heads (or none), got {scales!r}")


def _check_members(layout: Any) -> None:
    names = [name for member in layout.members for name in member.names]
    if len(set(names)) < len(names):
        fail(layout, f"parts must have names of their own, got {', '.join(names)}")
    first = layout.members[0].layout
    for member in layout.members:
        part = member.layout
        for name in ("B", "L", "first_layer", "total_layers"):
            if getattr(part, name) != getattr(first, name):
                fail(layout, f"{name} of part {member.name} must be {getattr(first, name)}, got {getattr(part, name)}")
        tokens = (part.N, part.deal)
        if tokens != (layout.block_tokens, layout.deal_of_tokens) and ("N" in part.letters or layout.deal_of_tokens):
            fail(
                layout,
                f"part {member.name} must have {layout.block_tokens} tokens of a block, dealt out alike, "
                f"got {part.N} and deal {part.deal}",
            )
        if part.opaque:
            fail(layout, f"part {member.name} must not be opaque")
    try:
        _ = layout._pools
    except ValueError as error:
        fail(layout, str(error))
