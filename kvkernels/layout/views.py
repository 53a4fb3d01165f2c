"""What the tensor that an engine registered says of its layout: sizes, order and gaps, read off its strides."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvkernels.common.arguments import shape_text
from kvkernels.layout.pattern import LETTERS, Word, words_of, write

_DIMENSION = re.compile(r"\(([^()]*)\)|([A-Za-z](?:[/%]\d+)?)")


def fields_of_view(view: Tensor | Sequence[Tensor], letters: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the layout that a view is, its dimensions being these letters; ValueError where they do not fit."""
    views = [view] if isinstance(view, Tensor) else list(view) if isinstance(view, (list, tuple)) else []
    if not views or not all(isinstance(one, Tensor) and one.layout == torch.strided for one in views):
        _fail("view must be a strided Tensor or a list of them", type(view).__name__)
    if not isinstance(letters, str):
        _fail("letters must be a str", repr(letters))
    outside, bar, inside = letters.rpartition("|")
    if (not bar) != isinstance(view, Tensor):
        _fail("letters must have a bar for a list of views, and none for one view", repr(letters))
    first = views[0]
    if any((one.shape, one.stride(), one.dtype) != (first.shape, first.stride(), first.dtype) for one in views):
        _fail("view must be Tensors of one shape, one dtype and the same strides", [shape_text(v.shape) for v in views])
    outer, dimensions = words_of(outside), _dimensions(inside)
    if outer is None or dimensions is None or len(dimensions) != first.dim():
        _fail(f"letters must name each of the view's {first.dim()} dimensions", repr(letters))
    if not any(word.letter == "B" for words in dimensions for word in words):
        _fail("letters must have B, and not left of the bar", repr(letters))
    if any(n > 1 and step == 0 for n, step in zip(first.shape, first.stride(), strict=True)):
        _fail("view must have memory of its own for each element", f"strides of {shape_text(first.stride())}")
    sizes = {name: given[name] for name in (*LETTERS, "D_v") if name in given}
    extents: dict[str, int] = {}
    for words, extent in ((outer, len(views)), *zip(dimensions, first.shape, strict=True)):
        _resolve(words, extent, sizes, extents)
    item = first.element_size()
    if given.get("dtype", first.dtype).itemsize != item:
        _fail(f"dtype must have the {item} bytes of the view's elements", given["dtype"])
    steps = {}
    for words, step in zip(dimensions, first.stride(), strict=True):
        counted = [word for word in words if extents[str(word)] > 1]
        if counted:
            steps[str(counted[-1])] = step * item
    order = [word for i in _order(first) for word in dimensions[i]]
    by_letter: dict[str, int] = {}
    for word in (*outer, *order):
        by_letter[word.letter] = by_letter.get(word.letter, 1) * extents[str(word)]
    for letter, size in by_letter.items():
        if sizes.get(letter, size) != size:
            _fail(f"{letter} must be what the view has, {size}", sizes[letter])
    return {"pattern": write(outer, tuple(order)), "dtype": first.dtype, **given, **by_letter, "steps": steps}


def _fail(rule: str, got: object) -> NoReturn:
    raise ValueError(f"KVLayout.of: {rule}, got {got}")


def _dimensions(inside: str) -> list[tuple[Word, ...]] | None:
    """The words of each dimension; None where something else stands there."""
    text = re.sub(r"\s", "", inside)
    found = list(_DIMENSION.finditer(text))
    words = [words_of(m[1] or m[2]) for m in found]
    if "".join(m[0] for m in found) != text or None in words:
        return None
    return [one for one in words if one is not None]


def _resolve(words: tuple[Word, ...], extent: int, sizes: dict[str, int], extents: dict[str, int]) -> None:
    """How many there are of each word of one dimension: all but one must be known."""
    text = f"({' '.join(map(str, words))})"
    if [word.letter for word in words] == ["K", "D"] and "D_v" in sizes:
        extents.update(K=2, D=extent - sizes["D_v"])
        return
    known = {
        str(word): word.by if word.cut == "%" else word.extent(sizes[word.letter])
        for word in words
        if word.cut == "%" or word.letter in sizes
    }
    unknown = [str(word) for word in words if str(word) not in known]
    if len(words) == 1:
        known, unknown = {}, [str(words[0])]
    product = math.prod(known.values())
    if len(unknown) > 1 or product == 0 or extent % product or (not unknown and extent != product):
        _fail(f"the sizes of all but one of {text} must be given, and divide {extent}", sizes)
    extents.update(known)
    extents.update({word: extent // product for word in unknown})


def _order(view: Tensor) -> list[int]:
    """Dimensions by falling stride; the stride of one of size 1 says nothing: it stays behind its neighbour."""
    strides = view.stride()
    order = sorted((i for i, n in enumerate(view.shape) if n != 1), key=lambda i: -strides[i])
    for i, n in enumerate(view.shape):
        if n == 1:
            order.insert(order.index(i - 1) + 1 if i else 0, i)
    return order
