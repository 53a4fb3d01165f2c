"""Where a part's elements lie: steps of its letters, and the pools that its tensors are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvkernels.layout.pattern import Word


@dataclass(frozen=True)
class Step:
    """How far one step along a letter is: in pools, and in bytes of a page. One of them is 0."""

    pools: int
    bytes: int


@dataclass(frozen=True)
class PoolPlace:
    """Where a pool lies: its first page in one tensor of the list."""

    tensor: int
    offset_bytes: int
    page_bytes: int
    row_bytes: int


@dataclass(frozen=True)
class Digit:
    """A word as steps: coordinate ``x`` of its letter is the ``x // divisor % extent``-th."""

    extent: int
    divisor: int
    pools: int
    bytes: int


class Measured(Protocol):
    """What of a layout decides where its elements lie."""

    @property
    def outside_words(self) -> tuple[Word, ...]: ...
    @property
    def inside_words(self) -> tuple[Word, ...]: ...
    @property
    def K(self) -> int: ...
    @property
    def B(self) -> int: ...
    @property
    def row_bytes(self) -> int | None: ...
    @property
    def offset_bytes(self) -> int: ...
    @property
    def steps(self) -> Mapping[str, int]: ...
    @property
    def element_bytes(self) -> int: ...
    def size(self, letter: str, k: int = 0) -> int: ...


@dataclass(frozen=True)
class Geometry:
    """Of a layout without its other parts; lists are by K and V."""

    places: tuple[PoolPlace, ...]
    k_of_tensor: tuple[int, ...]
    k_of_pool: tuple[int, ...]
    starts: tuple[tuple[int, int], ...]  # the pool, and the byte of its page
    bytes_of: tuple[dict[str, int], ...]  # the step in bytes of each word right of the bar
    dense_bytes: tuple[dict[str, int], ...]  # what that step would be, if nothing were said of it
    pool_steps: dict[str, int]  # the step in pools of each word that counts them
    page_words: tuple[Word, ...]
    page_bytes: tuple[int, ...]

    def step(self, word: str, k: int) -> Step:
        """How far one step along a word is."""
        if word in self.pool_steps:
            return Step(self.pool_steps[word], 0)
        return Step(0, self.bytes_of[k].get(word, 0))

    @property
    def num_tensors(self) -> int:
        """Tensors of its own."""
        return len(self.k_of_tensor)


def pool_words(layout: Measured) -> tuple[Word, ...]:
    """Words that count pools: those left of ``B``, the first of them counting slowest."""
    return layout.outside_words + tuple(itertools.takewhile(lambda word: word.letter != "B", layout.inside_words))


def measure(layout: Measured) -> Geometry:
    """From the innermost letter outwards; K's and V's each on their own, since their sizes may differ.

    A step that is given replaces the computed one, and may leave a gap but not make two elements meet.
    """
    whole = range(layout.K)
    bytes_of: list[dict[str, int]] = [{} for _ in whole]
    dense: list[dict[str, int]] = [{} for _ in whole]
    # Of what is inside: the next step if that is dense, and the bytes up to its last one.
    size = [layout.element_bytes for _ in whole]
    span, page, k_offset = list(size), list(size), [0 for _ in whole]
    for word in reversed(layout.inside_words):
        name = str(word)
        if word.letter == "K":
            k_offset = list(itertools.accumulate(size, initial=0))[:-1]
            for k in whole:
                dense[k][name] = k_offset[-1]
            k_offset[1:] = [_checked(name, layout.steps.get(name, k_offset[1]), span[0])] if layout.K > 1 else []
            last = k_offset[-1]
            for k in whole:
                bytes_of[k][name] = last
            size, span = [last + size[-1] for _ in whole], [last + span[-1] for _ in whole]
            continue
        for k in whole:
            extent = word.extent(layout.size(word.letter, k))
            dense[k][name] = size[k]
            if word.letter == "B":
                page[k] = span[k]
                bytes_of[k][name] = _row_bytes(layout, size[k], span[k])
            else:
                bytes_of[k][name] = _checked(name, layout.steps.get(name, size[k]), span[k])
            span[k] += max(extent - 1, 0) * bytes_of[k][name]
            size[k] = bytes_of[k][name] * extent
    pools, count = {}, 1
    outer = pool_words(layout)
    for word in reversed(outer):
        pools[str(word)] = count
        count *= word.extent(layout.size(word.letter))
    in_page = layout.inside_words[len(outer) - len(layout.outside_words) + 1 :]
    k_in_page = any(word.letter == "K" for word in in_page)
    starts = tuple((k * pools.get("K", 0), k_offset[k] if k_in_page else 0) for k in whole)
    places = tuple(_places(layout, bytes_of, k_offset, page))
    k_of_tensor, k_of_pool = (
        tuple(coordinates.get("K", 0) for coordinates in _coordinates(layout, words))
        for words in (layout.outside_words, outer)
    )
    return Geometry(places, k_of_tensor, k_of_pool, starts, tuple(bytes_of), tuple(dense), pools, in_page, tuple(page))


def _checked(name: str, step: int, span: int) -> int:
    if step < span:
        raise ValueError(f"steps[{name!r}] must be at least the {span} bytes that lie inside, got {step}")
    return step


def _row_bytes(layout: Measured, page_bytes: int, least: int) -> int:
    if layout.row_bytes is not None and layout.row_bytes < least:
        raise ValueError(f"row_bytes must be at least the page's {least} bytes, got {layout.row_bytes}")
    return page_bytes if layout.row_bytes is None else layout.row_bytes


def _coordinates(layout: Measured, words: tuple[Word, ...]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*(range(word.extent(layout.size(word.letter))) for word in words)):
        yield dict(zip(map(str, words), values, strict=True))


def _places(
    layout: Measured, bytes_of: list[dict[str, int]], k_offset: list[int], page: list[int]
) -> Iterator[PoolPlace]:
    words = pool_words(layout)
    inner = [str(word) for word in words[len(layout.outside_words) :]]
    for coordinates in _coordinates(layout, words):
        k = coordinates.get("K", 0)
        tensor = 0
        for word in layout.outside_words:
            tensor = tensor * word.extent(layout.size(word.letter)) + coordinates[str(word)]
        offset = layout.offset_bytes + sum(bytes_of[k][name] * coordinates[name] for name in inner if name != "K")
        offset += k_offset[k] if "K" in inner else 0
        yield PoolPlace(tensor, offset, page[k], bytes_of[k]["B"])
