"""Comparing two captures, array by array."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvkernels_records.capture import parse_name
from kvkernels_records.config import CAPTURE_POINTS
from kvkernels_records.errors import CaptureFileError
from kvkernels_records.measure import Floats, Measured, Rows, Sums, finite, measure
from kvkernels_records.rules import Rule
from kvkernels_records.sources import Source

UNITS = ("layer", "head", "token", "page")
_MAP_COLUMNS = 512


@dataclass(frozen=True)
class Limits:
    """How far apart arrays may be.

    Parameters
    ----------
    max_abs : float
        The largest absolute difference of two elements; from 0 on.
    cosine : float
        The least cosine of two arrays; -1 to 1.
    rules : sequence of Rule
        In place of both for arrays that a rule's pattern is found in, the first such rule.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    max_abs: float = 1e-3
    cosine: float = 0.999
    rules: Sequence[Rule] = ()

    def __post_init__(self) -> None:
        if not self.max_abs >= 0:
            raise ValueError(f"check-kv: --max-abs-threshold must be a number from 0 on, got {self.max_abs}")
        if not -1 <= self.cosine <= 1:
            raise ValueError(f"check-kv: --cosine-threshold must be a number from -1 to 1, got {self.cosine}")


@dataclass
class Report:
    """What a comparison found.

    Parameters
    ----------
    keys : list of dict
        For each array ``key``, ``divergent``, ``reason``, ``max_abs_diff``, ``mean_abs_diff``, ``rel``, ``cosine``,
        ``nonfinite_mismatches``, ``shape`` and ``dtype`` of both sides; a figure that is no finite number is None.
    first : dict or None
        The first array that diverges, by layer: ``key``, ``layer``, ``capture_point``, ``part``, ``head``, ``token``.
    units : list of dict
        What ``by`` asked for, in order.
    error_map : dict
        For a picture: part to ``(layers, columns)`` of the largest differences, ``tokens`` and ``layers``.
    """

    baseline: str
    target: str
    limits: Limits
    keys: list[dict[str, Any]] = field(default_factory=list)
    first: dict[str, Any] | None = None
    units: list[dict[str, Any]] = field(default_factory=list)
    error_map: dict[str, Any] = field(default_factory=dict)

    @property
    def divergent(self) -> bool:
        """Whether anything is."""
        return any(key["divergent"] for key in self.keys)

    def as_json(self) -> dict[str, Any]:
        """All of it, for strict JSON."""
        return {
            "baseline": self.baseline,
            "target": self.target,
            "max_abs_threshold": finite(self.limits.max_abs),
            "cosine_threshold": self.limits.cosine,
            "rules": [rule.text for rule in self.limits.rules],
            "divergent": self.divergent,
            "compared": len(self.keys),
            "diverging": sum(key["divergent"] for key in self.keys),
            "first_divergence": self.first,
            "keys": self.keys,
            "by": self.units,
        }


def compare(
    baseline: Source,
    target: Source,
    limits: Limits,
    *,
    by: str | None = None,
    page_tokens: int | None = None,
    on_key: Callable[[dict[str, Any]], object] = lambda key: None,
) -> Report:
    """Compare everything that either side has.

    Arrays are read a few MiB at a time and once each. Figures are float64. NaN and infinities are equal where both
    sides have them in the same places. Empty arrays are equal.

    Parameters
    ----------
    baseline, target : Source
    limits : Limits
    by : str, optional
        Of ``UNITS``: figures for each layer, head, token or page as well.
    page_tokens : int, optional
        Tokens of a page; by default as the baseline's metadata has it.
    on_key : callable
        Is given each array's figures when it has been compared, in order.

    Returns
    -------
    Report

    Raises
    ------
    CaptureFileError
        There is nothing to compare, or a file is damaged.
    ValueError
        ``by`` is unknown, or wants pages whose size nobody said.
    """
    names = sorted({*baseline.names, *target.names}, key=_order)
    if not names:
        raise CaptureFileError(f"{baseline.label}, {target.label}: there is nothing to compare")
    units = Units(by, page_tokens or baseline.metadata.get("block_tokens"))
    report = Report(baseline.label, target.label, limits)
    pictures: dict[str, dict[int, Floats]] = {}
    lengths: dict[str, int] = {}
    for name in names:
        found, measured = _compare_one(name, baseline, target, limits)
        report.keys.append(found)
        if measured:
            units.add(name, measured, baseline.first_token(name))
            _draw(pictures, lengths, name, measured)
        if found["divergent"] and report.first is None:
            report.first = _first_of(name, measured, baseline.first_token(name))
        on_key(found)
    report.units = units.found(baseline)
    report.error_map = _map_of(pictures, lengths)
    return report


class Units:
    """Figures by layer, head, token or page, over all arrays."""

    def __init__(self, by: str | None, page_tokens: Any) -> None:
        if by is not None and by not in UNITS:
            raise ValueError(f"check-kv: --by must be of {', '.join(UNITS)}, got {by!r}")
        if by == "page" and (type(page_tokens) is not int or page_tokens < 1):
            raise ValueError(f"check-kv: --page-tokens must be from 1 on with --by page, got {page_tokens}")
        self.by = by
        self.page_tokens = page_tokens
        self._sums: dict[int, Sums] = {}

    def add(self, name: str, measured: Measured, first_token: int) -> None:
        """Add an array."""
        parsed = parse_name(name)
        if self.by is None or parsed is None:
            return
        sums = {"layer": measured.whole, "head": measured.heads, "token": measured.tokens, "page": measured.tokens}
        group = parsed[0] if self.by == "layer" else 0
        skipped = first_token if self.by in ("token", "page") else 0
        self._sums.setdefault(group, Sums(0)).merge(sums[self.by], skipped)

    def found(self, baseline: Source) -> list[dict[str, Any]]:
        """The figures of each unit."""
        if self.by == "layer":
            return [{"layer": layer, **self._sums[layer].figures(0)} for layer in sorted(self._sums)]
        if not self._sums:
            return []
        sums = self._sums[0].folded(self.page_tokens) if self.by == "page" else self._sums[0]
        return [{str(self.by): unit, **sums.figures(unit)} for unit in range(len(sums.elements))]


def _compare_one(name: str, baseline: Source, target: Source, limits: Limits) -> tuple[dict[str, Any], Measured | None]:
    found: dict[str, Any] = {
        "key": name, "divergent": True, "reason": None, "max_abs_diff": None, "mean_abs_diff": None, "rel": None,
        "cosine": None, "nonfinite_mismatches": None, "shape": [None, None], "dtype": [None, None],
    }  # fmt: skip
    for side, source in (("baseline", baseline), ("target", target)):
        if name not in source.names:
            found["reason"] = f"missing in {side}"
            return found, None
    a, b = baseline.rows(name), target.rows(name)
    found["shape"] = [list(a.shape), list(b.shape)]
    found["dtype"] = [_dtype_name(a), _dtype_name(b)]
    if a.shape != b.shape:
        found["reason"] = f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
        return found, None
    measured = measure(a, b, limits.max_abs)
    found.update(measured.whole.figures(0), cosine=finite(measured.cosine))
    largest, reach = float(measured.whole.max_abs[0]), measured.largest_baseline
    relative = 0.0 if largest == 0 else largest / reach if reach else math.inf
    found["rel"] = finite(relative)
    found["reason"] = _reason(name, found, largest, relative, measured, limits)
    found["divergent"] = found["reason"] is not None
    return found, measured


def _reason(
    name: str, found: dict[str, Any], largest: float, relative: float, measured: Measured, limits: Limits
) -> str | None:
    """Why an array diverges, or None."""
    if found["nonfinite_mismatches"]:
        return f"{found['nonfinite_mismatches']} NaN or Inf on one side"
    mean = float(measured.whole.sum_abs[0] / max(1.0, measured.whole.elements[0]))
    figures = {"max_abs": largest, "mean_abs": mean, "rel": relative, "cosine": measured.cosine}
    for rule in limits.rules:
        if rule.pattern.search(name):
            return None if rule.holds(figures) else f"not {rule.text.partition(' ')[2].strip()}"
    if not largest <= limits.max_abs:
        return f"max_abs_diff {largest:.3g} > {limits.max_abs:g}"
    if not measured.cosine >= limits.cosine:
        return f"cosine {measured.cosine:.6f} < {limits.cosine:g}"
    return None


def _first_of(name: str, measured: Measured | None, first_token: int) -> dict[str, Any]:
    layer, point, part = parse_name(name) or (None, None, None)
    head, token = (None, None) if measured is None else measured.first or measured.worst
    return {
        "key": name, "layer": layer, "capture_point": point, "part": part, "head": head,
        "token": None if token is None else token + first_token,
    }  # fmt: skip


def _draw(pictures: dict[str, dict[int, Floats]], lengths: dict[str, int], name: str, measured: Measured) -> None:
    """Keep an array's largest differences by token, in few columns."""
    parsed = parse_name(name)
    tokens = len(measured.tokens.max_abs)
    if parsed is None or not tokens:
        return
    starts = np.linspace(0, tokens, min(tokens, _MAP_COLUMNS), endpoint=False).astype(np.int64)
    row = np.maximum.reduceat(np.where(measured.tokens.nonfinite > 0, np.inf, measured.tokens.max_abs), starts)
    title = f"{parsed[1]} {parsed[2]}"
    pictures.setdefault(title, {})[parsed[0]] = row
    lengths[title] = max(tokens, lengths.get(title, 0))


def _map_of(pictures: dict[str, dict[int, Floats]], lengths: dict[str, int]) -> dict[str, Any]:
    return {
        title: {
            "tokens": lengths[title],
            "layers": sorted(rows),
            "max_abs_diff": [[finite(value) for value in rows[layer]] for layer in sorted(rows)],
        }
        for title, rows in pictures.items()
    }


def _order(name: str) -> tuple[Any, ...]:
    """Captures by layer, point and part, then everything else with numbers in their order."""
    parsed = parse_name(name)
    if parsed:
        return 0, parsed[0], CAPTURE_POINTS.index(parsed[1]), parsed[2]
    return 1, [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _dtype_name(rows: Rows) -> str:
    return rows.dtype.names[0] if rows.dtype.names else rows.dtype.name
