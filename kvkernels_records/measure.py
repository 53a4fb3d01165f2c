"""How far two arrays are apart, a slab at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvkernels_records.dtypes import Array, as_float64

Floats = npt.NDArray[np.float64]
_SLAB_ELEMENTS = 1 << 19


class Rows(Protocol):
    """An array, or several that are joined along their first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""

    def __getitem__(self, index: int, /) -> Any:
        """One row of the first axis."""


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


class Sums:
    """What a group of elements comes to, for each of ``count`` groups; they can be added up in any order."""

    def __init__(self, count: int) -> None:
        self.elements = np.zeros(count)
        self.max_abs = np.zeros(count)
        self.sum_abs = np.zeros(count)
        self.dot, self.baseline, self.target = np.zeros(count), np.zeros(count), np.zeros(count)
        self.nonfinite = np.zeros(count, np.int64)

    def add(self, where: int | slice, part: Part) -> None:
        """Add a slab's rows: to one group, or each to its own."""
        one = isinstance(where, int)
        self.elements[where] += part.elements * len(part.max_abs) if one else part.elements
        self.max_abs[where] = np.maximum(self.max_abs[where], part.max_abs.max(initial=0) if one else part.max_abs)
        for mine, of_rows in (
            (self.sum_abs, part.sum_abs), (self.dot, part.dot), (self.baseline, part.baseline),
            (self.target, part.target), (self.nonfinite, part.nonfinite),
        ):  # fmt: skip
            mine[where] += of_rows.sum() if one else of_rows

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
    """The rows of a slab: each figure of one token of one head."""

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
    for head, start, slab_a, slab_b in _slabs(a, b):
        part, peak_a, peak_b = compare_rows(slab_a, slab_b)
        stop = start + len(part.max_abs)
        whole.add(0, part)
        by_head.add(head, part)
        by_token.add(slice(start, stop), part)
        largest_a, largest_b = max(largest_a, peak_a), max(largest_b, peak_b)
        bad = (part.max_abs > max_abs) | (part.nonfinite > 0)
        if bad.any():
            token = start + int(bad.argmax())
            if first is None or token < first[1]:
                first = head, token
        if len(part.max_abs) and part.max_abs.max() > worst_diff:
            worst, worst_diff = (head, start + int(part.max_abs.argmax())), float(part.max_abs.max())
    cosine = cosine_of(whole.dot[0], whole.baseline[0], whole.target[0])
    if whole.max_abs[0] == 0:
        cosine = 1.0  # equal, and no rounding says otherwise
    elif not _in_range(whole.baseline[0], largest_a) or not _in_range(whole.target[0], largest_b):
        cosine = _scaled_cosine(a, b, largest_a, largest_b)
    return Measured(whole, by_head, by_token, largest_a, first, worst, cosine)


def compare_rows(a: Array, b: Array) -> tuple[Part, float, float]:
    """The figures of each row of a slab, and the largest values of both sides."""
    x = as_float64(a)
    rows, elements = x.shape
    equal = a.dtype == b.dtype and a.tobytes() == b.tobytes()
    finite_x = np.isfinite(x)
    clean_x = x if finite_x.all() else np.where(finite_x, x, 0.0)
    with np.errstate(over="ignore"):
        if equal:
            squares = np.einsum("ij,ij->i", clean_x, clean_x)
            zeros = np.zeros(rows)
            part = Part(elements, zeros, zeros, squares, squares, squares, np.zeros(rows, np.int64))
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
            elements, diff.max(axis=1, initial=0.0), diff.sum(axis=1), np.einsum("ij,ij->i", x, y),
            np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", y, y), (~same).sum(axis=1),
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
    """Head, first token, and ``(tokens, dim)`` of both sides."""
    heads, tokens, dim = shape3(a.shape)
    step = max(1, _SLAB_ELEMENTS // max(1, dim))
    for head in range(heads):
        row_a, row_b = (_row(side, head, tokens, dim) for side in (a, b))
        for start in range(0, tokens, step):
            yield head, start, row_a[start : start + step], row_b[start : start + step]


def _row(rows: Rows, head: int, tokens: int, dim: int) -> Array:
    if len(rows.shape) == 3:
        return np.asarray(rows[head])
    whole = rows if isinstance(rows, np.ndarray) else np.concatenate(rows.shards)  # type: ignore[attr-defined]
    return np.asarray(whole.reshape(-1, tokens, dim)[head] if whole.size else whole.reshape(tokens, dim))


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
