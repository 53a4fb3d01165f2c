"""How far two arrays are apart, a slab at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvkernels_records.dtypes import Array, as_float64

Floats = npt.NDArray[np.float64]
_SLAB_ELEMENTS = 1 << 19


class Joined:
    """Shards along the first axis, without a copy."""

    def __init__(self, shards: list[Array]) -> None:
        self.shards = shards
        self.shape = (sum(len(shard) for shard in shards), *shards[0].shape[1:])
        self.dtype = shards[0].dtype

    def __getitem__(self, index: int) -> Array:
        for shard in self.shards:
            if index < len(shard):
                return np.asarray(shard[index])
            index -= len(shard)
        raise IndexError(index)


#: An array, or several that are joined along their first axis.
Rows = Array | Joined


class Sums:
    """What a group of elements comes to, for each of ``count`` groups; they can be added up in any order."""

    def __init__(self, count: int) -> None:
        self.elements = np.zeros(count)
        self.max_abs = np.zeros(count)
        self.sum_abs = np.zeros(count)
        self.dot, self.baseline, self.target = np.zeros(count), np.zeros(count), np.zeros(count)
        self.nonfinite = np.zeros(count, np.int64)

    def add(self, where: slice, part: Part, axis: int | None) -> None:
        """Add a slab's figures to these groups, one for each place along an axis, or to one."""
        mine = (self.sum_abs, self.dot, self.baseline, self.target, self.nonfinite)
        for sums, figures in zip(mine, part[2:], strict=True):
            sums[where] += figures.sum(axis)
        places = part.max_abs.size if axis is None else part.max_abs.shape[axis]
        self.elements[where] += part.elements * places
        np.maximum(self.max_abs[where], part.max_abs.max(axis, initial=0.0), out=self.max_abs[where])

    def merge(self, other: Sums, skipped: int = 0) -> None:
        """Add another's groups to those of the same number, or to those that come ``skipped`` later."""
        grown = skipped + len(other.elements) - len(self.elements)
        for name in vars(self):
            if grown > 0:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(grown, getattr(self, name).dtype)]))
            mine, theirs = getattr(self, name), getattr(other, name)
            head = mine[skipped : skipped + len(theirs)]
            np.maximum(head, theirs, out=head) if name == "max_abs" else np.add(head, theirs, out=head)

    def folded(self, size: int) -> Sums:
        """Every ``size`` groups as one."""
        found = Sums(-(-len(self.elements) // size))
        starts = np.arange(0, len(self.elements), size)
        for name in vars(self) if len(starts) else ():
            add = np.maximum if name == "max_abs" else np.add
            setattr(found, name, add.reduceat(getattr(self, name), starts))
        return found

    def figures(self, group: int) -> dict[str, float | int | None]:
        """One group's figures, as JSON has them."""
        return {
            "max_abs_diff": finite(self.max_abs[group]),
            "mean_abs_diff": finite(self.sum_abs[group] / max(1.0, self.elements[group])),
            "cosine": finite(cosine_of(self.dot[group], self.baseline[group], self.target[group])),
            "nonfinite_mismatches": int(self.nonfinite[group]),
        }


class Part(NamedTuple):
    """A slab's figures, ``(heads, tokens)`` each."""

    elements: int
    max_abs: Floats
    sum_abs: Floats
    dot: Floats
    baseline: Floats
    target: Floats
    nonfinite: npt.NDArray[np.int64]


class Measured(NamedTuple):
    """Two arrays, compared."""

    whole: Sums
    heads: Sums
    tokens: Sums
    largest_baseline: float
    first: tuple[int, int] | None  # head and token of the earliest token with an element over the threshold
    worst: tuple[int, int]  # of the largest difference
    cosine: float


def measure(a: Rows, b: Rows, max_abs: float) -> Measured:
    """Compare two arrays of one shape, ``(heads, tokens, dim)`` or whatever can be taken for that.

    Parameters
    ----------
    a, b : array or Joined
        The baseline and the target.
    max_abs : float
        Above which an element's difference makes it the first.
    """
    heads, tokens, _ = shape3(a.shape)
    whole, by_head, by_token = Sums(1), Sums(heads), Sums(tokens)
    first: tuple[int, int] | None = None
    worst, worst_diff, largest_a, largest_b = (0, 0), -1.0, 0.0, 0.0
    for head, token, slab_a, slab_b in _slabs(a, b):
        part, peak_a, peak_b = compare_rows(slab_a, slab_b)
        here, there = part.max_abs.shape
        with np.errstate(over="ignore", invalid="ignore"):  # sums that do not fit are found below
            whole.add(slice(0, 1), part, None)
            by_head.add(slice(head, head + here), part, 1)
            by_token.add(slice(token, token + there), part, 0)
        largest_a, largest_b = max(largest_a, peak_a), max(largest_b, peak_b)
        bad = (part.max_abs > max_abs) | (part.nonfinite > 0)
        if bad.any():
            earliest = int(bad.any(axis=0).argmax())
            if first is None or token + earliest < first[1]:
                first = head + int(bad[:, earliest].argmax()), token + earliest
        if part.max_abs.size and part.max_abs.max() > worst_diff:
            place = np.unravel_index(part.max_abs.argmax(), part.max_abs.shape)
            worst, worst_diff = (head + int(place[0]), token + int(place[1])), float(part.max_abs.max())
    cosine = cosine_of(whole.dot[0], whole.baseline[0], whole.target[0])
    if whole.max_abs[0] == 0:
        cosine = 1.0  # equal, and no rounding says otherwise
    elif not _in_range(whole.baseline[0], largest_a) or not _in_range(whole.target[0], largest_b):
        cosine = _scaled_cosine(a, b, largest_a, largest_b)
    return Measured(whole, by_head, by_token, largest_a, first, worst, cosine)


def compare_rows(a: Array, b: Array) -> tuple[Part, float, float]:
    """The figures of a slab ``(heads, tokens, dim)``, and the largest values of both sides."""
    x = as_float64(a)
    elements = x.shape[-1]
    finite_x = np.isfinite(x)
    clean_x = x if finite_x.all() else np.where(finite_x, x, 0.0)
    with np.errstate(over="ignore"):
        if a.dtype == b.dtype and a.tobytes() == b.tobytes():
            squares = np.einsum("htd,htd->ht", clean_x, clean_x)
            zeros = np.zeros(squares.shape)
            part = Part(elements, zeros, zeros, squares, squares, squares, zeros.astype(np.int64))
            peak = float(np.abs(clean_x).max(initial=0.0))
            return part, peak, peak
        y = as_float64(b)
        both = finite_x & np.isfinite(y)
        same = both | (np.isnan(x) & np.isnan(y)) | (x == y)
        x, y = np.where(both, x, 0.0), np.where(both, y, 0.0)
        diff = np.abs(x - y)
        if a.dtype.kind in "iu" and b.dtype.kind in "iu":
            diff = np.where(a != b, np.maximum(diff, 1.0), 0.0)  # large ones that float64 takes for equal
        part = Part(
            elements, diff.max(axis=2, initial=0.0), diff.sum(axis=2), np.einsum("htd,htd->ht", x, y),
            np.einsum("htd,htd->ht", x, x), np.einsum("htd,htd->ht", y, y), (~same).sum(axis=2),
        )  # fmt: skip
    return part, float(np.abs(x).max(initial=0.0)), float(np.abs(y).max(initial=0.0))


def cosine_of(dot: float, baseline: float, target: float) -> float:
    """From the products' sums: 1 where both sides are zero, 0 where one is."""
    if baseline == 0 or target == 0:
        return 1.0 if baseline == target else 0.0
    if not math.isfinite(baseline) or not math.isfinite(target):
        return math.nan
    return max(-1.0, min(1.0, float(dot / math.sqrt(baseline) / math.sqrt(target))))


def finite(value: float) -> float | None:
    """A number that strict JSON can say, or None."""
    return float(value) if math.isfinite(value) else None


def shape3(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as heads, tokens and dim: of fewer dimensions the last ones, of more the first ones together."""
    if len(shape) <= 1:
        return 1, shape[0] if shape else 1, 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _slabs(a: Rows, b: Rows) -> Iterator[tuple[int, int, Array, Array]]:
    """First head, first token, and ``(heads, tokens, dim)`` of both sides: several heads, or a part of one's tokens."""
    heads, tokens, dim = shape3(a.shape)
    step = max(1, _SLAB_ELEMENTS // max(1, dim))
    together = max(1, step // max(1, tokens))
    for head in range(0, heads, together):
        rows_a, rows_b = (_heads(side, head, min(heads, head + together), tokens, dim) for side in (a, b))
        for token in range(0, tokens, step):
            yield head, token, rows_a[:, token : token + step], rows_b[:, token : token + step]


def _heads(rows: Rows, start: int, stop: int, tokens: int, dim: int) -> Array:
    if isinstance(rows, Joined):
        if len(rows.shape) == 3:
            return np.stack([rows[head] for head in range(start, stop)])
        rows = np.concatenate(rows.shards)
    return np.asarray(rows).reshape(math.prod(rows.shape[:-2]), tokens, dim)[start:stop]


def _in_range(squares: float, largest: float) -> bool:
    """Whether a sum of squares neither overflowed nor lost what is not zero."""
    return math.isfinite(squares) and (largest == 0 or squares > 1e-280)


def _scaled_cosine(a: Rows, b: Rows, largest_a: float, largest_b: float) -> float:
    """The cosine of values whose squares float64 does not hold."""
    dot = baseline = target = 0.0
    for _, _, slab_a, slab_b in _slabs(a, b):
        x, y = as_float64(slab_a), as_float64(slab_b)
        both = np.isfinite(x) & np.isfinite(y)
        x, y = np.where(both, x, 0.0) / (largest_a or 1.0), np.where(both, y, 0.0) / (largest_b or 1.0)
        dot += float((x * y).sum())
        baseline += float((x * x).sum())
        target += float((y * y).sum())
    return cosine_of(dot, baseline, target)
