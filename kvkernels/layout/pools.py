"""The pools of a layout's parts: parts that lie in one row of a block share a pool, and no two of them a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvkernels.layout.geometry import Geometry, Measured, PoolPlace

_Bytes: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True)
class Placed:
    """A part's geometry, the first of its tensors in the list, and what it is called."""

    name: str
    layout: Measured
    geometry: Geometry
    tensor: int

    def places(self) -> list[PoolPlace]:
        """With tensors counted over all parts."""
        return [replace(place, tensor=place.tensor + self.tensor) for place in self.geometry.places]


@dataclass
class _Sheet:
    """Pools that are shared by parts."""

    places: list[PoolPlace]
    parts: list[Placed]


def joined(parts: Sequence[Placed]) -> tuple[tuple[PoolPlace, ...], list[tuple[int, int]]]:
    """All pools, and for each part the first of its pools and the byte of the page at which it begins there."""
    sheets: list[_Sheet] = []
    of_part: list[_Sheet] = []
    for part in parts:
        mine = part.places()
        for sheet in sheets:
            union = _union(sheet.places, mine)
            if union is not None:
                sheet.places, sheet.parts = union, [*sheet.parts, part]
                break
        else:
            sheet = _Sheet(mine, [part])
            sheets.append(sheet)
        of_part.append(sheet)
    if len(parts) > 1:
        _check_apart(sheets)
    first, count = {}, 0
    for sheet in sheets:
        first[id(sheet)] = count
        count += len(sheet.places)
    begins = [
        (first[id(sheet)], part.geometry.places[0].offset_bytes - sheet.places[0].offset_bytes)
        for part, sheet in zip(parts, of_part, strict=True)
    ]
    return tuple(place for sheet in sheets for place in sheet.places), begins


def _union(ours: list[PoolPlace], theirs: list[PoolPlace]) -> list[PoolPlace] | None:
    """Pools of both, if each of ours lies in one row with one of theirs, always in the same way."""
    if len(ours) != len(theirs):
        return None
    union = []
    for one, other in zip(ours, theirs, strict=True):
        begin = min(one.offset_bytes, other.offset_bytes)
        end = max(one.offset_bytes + one.page_bytes, other.offset_bytes + other.page_bytes)
        if (one.tensor, one.row_bytes) != (other.tensor, other.row_bytes) or end - begin > one.row_bytes:
            return None
        union.append(PoolPlace(one.tensor, begin, end - begin, one.row_bytes))
    distances = {one.offset_bytes - other.offset_bytes for one, other in zip(ours, theirs, strict=True)}
    return union if len(distances) == 1 else None


def _check_apart(sheets: list[_Sheet]) -> None:
    """That no two parts have a byte in common."""
    for sheet in sheets:
        # Pages of the same K or V are alike.
        ks = list(zip(*(part.geometry.k_of_pool for part in sheet.parts), strict=True))
        for pool in {k: pool for pool, k in enumerate(ks)}.values():
            _check_page(sheet, pool)
    spans = []
    for sheet in sheets:
        blocks = max(max(part.layout.B for part in sheet.parts) - 1, 0)
        by_tensor: dict[int, list[int]] = {}
        for place in sheet.places:
            end = place.offset_bytes + blocks * place.row_bytes + place.page_bytes
            by_tensor.setdefault(place.tensor, []).extend((place.offset_bytes, end))
        spans += [(tensor, min(ends), max(ends), sheet.parts[0].name) for tensor, ends in by_tensor.items()]
    spans.sort()
    for before, after in pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(
                f"parts {before[3]} and {after[3]} must lie in one row of a block or apart, got both in tensor "
                f"{after[0]} from byte {after[1]} on"
            )


def _check_page(sheet: _Sheet, pool: int) -> None:
    begins, ends, owners = [], [], []
    if len(sheet.parts) == 1:
        return
    for i, part in enumerate(sheet.parts):
        starts, size = _fragments(part, part.geometry.k_of_pool[pool])
        starts = starts + part.geometry.places[pool].offset_bytes - sheet.places[pool].offset_bytes
        begins.append(starts)
        ends.append(starts + size)
        owners.append(np.full(len(starts), i))
    begin, end, owner = (np.concatenate(values) for values in (begins, ends, owners))
    order = np.argsort(begin, kind="stable")
    meet = np.flatnonzero(end[order][:-1] > begin[order][1:])
    if len(meet):
        one, other = (sheet.parts[owner[order[meet[0] + i]]].name for i in (0, 1))
        at = int(begin[order[meet[0] + 1]])
        raise ValueError(f"parts {one} and {other} must not have a byte in common, got byte {at} of a page twice")


def _fragments(part: Placed, k: int) -> tuple[_Bytes, int]:
    """Where in its page a part's contiguous pieces begin, and their bytes: V's too, where K is inside of the page."""
    geometry, size = part.geometry, part.layout.element_bytes
    ks = range(part.layout.K) if any(word.letter == "K" for word in geometry.page_words) else (k,)
    words = [word for word in geometry.page_words if word.letter != "K"]
    pieces = []
    if words and geometry.bytes_of[0][str(words[-1])] == size and part.layout.size("D", 0) == part.layout.size("D", 1):
        size *= words[-1].extent(part.layout.size(words.pop().letter))
    for each in ks:
        starts = np.array([geometry.starts[each][1]], dtype=np.int64)
        for word in words:
            steps = np.arange(word.extent(part.layout.size(word.letter, each)), dtype=np.int64)
            starts = (starts[:, None] + steps * geometry.bytes_of[each][str(word)]).ravel()
        pieces.append(starts)
    return np.concatenate(pieces), size
