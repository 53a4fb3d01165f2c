"""A layout as a picture: each letter with its size and step, the gaps, and what is one page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from kvkernels.layout.pattern import Word


def picture(layout: Any) -> str:
    """Of each part on its own, then of the row of bytes that they share."""
    members = layout.members
    if len(members) == 1:
        return "\n".join(_one(layout))
    pools = layout.num_pools
    lines = [f"{_count(layout.num_tensors, 'tensor')}, {_count(pools, 'pool')} of {_count(layout.B, 'page')}"]
    for member in members:
        head, *rest = _one(member.layout)
        lines += [f"{member.name}: {head}, from byte {member.layout.offset_bytes} of tensor {member.tensor}", *rest]
    return "\n".join([*lines, *_shared(layout)])


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _one(layout: Any) -> list[str]:
    tensors = math.prod(word.extent(layout.size(word.letter)) for word in layout.outside_words)
    pools = f"{_count(len(layout.places), 'pool')} of {layout.B} pages"
    lines = [f"{layout.pattern}   {_count(tensors, 'tensor')}, {pools}"]
    words = (*layout.outside_words, *layout.inside_words)
    label = max(len(str(word)) for word in words)
    lines += [
        f"  {word!s:{label}} {word.extent(layout.size(word.letter)):7}   tensors" for word in layout.outside_words
    ]
    geometry = layout._geometry
    steps = geometry.bytes_of[0]
    width = max(len(str(step)) for step in steps.values())
    inside = layout.inside_words
    at = [word.letter for word in inside].index("B")
    for i, word in enumerate(inside):
        role = "blocks" if i == at else "pools" if i < at else "|"
        if role == "|" and i == (len(inside) + at) // 2:
            role = f"| one page: {layout.page_bytes} bytes"
        step = steps[str(word)]
        gap = step - geometry.dense_bytes[0][str(word)]
        extent = word.extent(layout.size(word.letter))
        line = f"  {word!s:{label}} {extent:7} x {step:{width}} bytes   {role}"
        lines.append(line + (f"   {gap} bytes lie between" if gap and extent > 1 else ""))
    return lines


def _shared(layout: Any) -> Iterator[str]:
    """What lies in the innermost step that several parts share, byte by byte."""
    groups = itertools.groupby(sorted(layout.members, key=lambda member: member.tensor), key=lambda m: m.tensor)
    for tensor, group in groups:
        members = sorted(group, key=lambda member: member.layout.offset_bytes)
        if len(members) < 2:
            continue
        cells = [_cell(member.layout) for member in members]
        cell = cells[0][0]
        if cell == 0 or any(other != cell for other, _ in cells):
            continue
        begin, words, at = min(member.layout.offset_bytes for member in members) // cell * cell, [], 0
        for member, (_, size) in zip(members, cells, strict=True):
            start = member.layout.offset_bytes - begin
            words += [f"({start - at} bytes)"] if start > at else []
            words.append(f"{member.name} {start} to {start + size - 1}")
            at = start + size
        words += [f"({cell - at} bytes)"] if cell > at else []
        yield f"every {cell} bytes of tensor {tensor}: | {' | '.join(words)} |"


def _cell(layout: Any) -> tuple[int, int]:
    """The innermost step that leaves a gap, and the bytes that lie inside of it."""
    geometry = layout._geometry
    inner: list[Word] = []
    for word in reversed(geometry.page_words):
        step = geometry.bytes_of[0][str(word)]
        span = layout.element_bytes + sum(
            (w.extent(layout.size(w.letter)) - 1) * geometry.bytes_of[0][str(w)] for w in inner
        )
        if step > span and word.letter != "K":
            return step, span
        inner.append(word)
    return 0, 0
