"""Which source every element of a destination comes from: boxes of layers, heads, elements and tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvkernels.layout.geometry import Digit
from kvkernels.layout.layout import KVLayout

#: Letters of which a layout may hold a range.
RANGES = "LHD"

#: What an error calls a range of a letter, and tokens that are dealt out.
WORDS = {"L": "layers", "H": "heads", "D": "elements", "N": "tokens"}

_Owners: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True)
class Held:
    """What one layout of a side has of a part, or of a pair of parts that differ in nothing but where they begin."""

    names: tuple[str, ...]
    layout: KVLayout
    ks: tuple[int, ...]
    pool: int
    byte: int

    def digits(self, letter: str) -> tuple[Digit, ...]:
        """The steps of a letter."""
        layout, k = self.layout, self.ks[0]
        return tuple(
            Digit(word.extent(layout.size(letter, k)), word.divisor, step.pools, step.bytes)
            for word in (*layout.outside_words, *layout.inside_words)
            if word.letter == letter
            for step in (layout.step(str(word), k),)
        )

    def start(self, i: int = 0) -> tuple[int, int]:
        """Pool and byte at which one of its names begins."""
        pool, byte = self.layout.start(self.ks[i])
        return self.pool + pool, self.byte + byte

    def range(self, letter: str) -> tuple[int, int]:
        """The first of a letter, and the one behind the last."""
        first = self.layout.first(letter)
        return first, first + self.layout.size(letter, self.ks[0])

    def total(self, letter: str) -> int:
        """How many there are of a letter on all ranks."""
        return self.layout.total(letter, self.ks[0])

    @property
    def deal(self) -> tuple[int, int, int]:
        """Rank, of how many, and how many tokens in turn."""
        return self.layout.deal or (0, 1, 1)

    def has(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the tokens it holds."""
        rank, of, interleave = self.deal
        return np.equal(tokens // interleave % of, rank)

    def places(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens as it counts them itself."""
        _, of, interleave = self.deal
        return tokens // (interleave * of) * interleave + tokens % interleave


@dataclass(frozen=True)
class Piece:
    """A box that one source has and one destination wants; tokens are those of a unit, or all of a plain one."""

    src: Held
    dst: Held
    ranges: dict[str, tuple[int, int]]
    tokens: NDArray[np.int64] | None


def held_by(side: Sequence[KVLayout]) -> list[list[Held]]:
    """Of each layout, what it has: a pair as one."""
    result, base = [], 0
    for layout in side:
        mine = []
        for member, (pool, byte) in zip(layout.members, layout.begins, strict=True):
            ks = tuple(range(member.layout.K))
            mine.append(Held(member.names, member.layout, ks, base + pool, byte))
        base += layout.num_pools
        result.append(mine)
    return result


def matched(src: Sequence[KVLayout], dst: Sequence[KVLayout]) -> list[tuple[list[Held], list[Held]]]:
    """By name, who has it on the two sides. Pairs stay pairs where all have them so; opaque pages go rank by rank."""
    sides = [held_by(side) for side in (src, dst)]
    if src[0].opaque:
        return [(ours, theirs) for ours, theirs in zip(*sides, strict=True)]
    everyone = [held for side in sides for mine in side for held in mine]
    pairs = {held.names for held in everyone if len(held.names) == 2 and held.layout.D_v is None}
    apart = {name for held in everyone if held.names not in pairs for name in held.names}
    found: dict[tuple[str, ...], tuple[list[Held], list[Held]]] = {}
    for i, side in enumerate(sides):
        for held in itertools.chain.from_iterable(side):
            whole = held.names in pairs and not apart & set(held.names)
            for k, name in [(0, "")] if whole else list(enumerate(held.names)):
                one = held if whole else Held((name,), held.layout, (held.ks[k],), held.pool, held.byte)
                found.setdefault(one.names, ([], []))[i].append(one)
    return list(found.values())


def pieces(src: Sequence[Held], dst: Sequence[Held], unit_tokens: int, layers: range | None = None) -> Iterator[Piece]:
    """Everything that a destination wants, from the first source that has it."""
    period = math.lcm(*(held.deal[1] * held.deal[2] for held in (*src, *dst)))
    for wanted in dst:
        owners, cuts, groups = _owners(src, wanted, period)
        if layers is not None:
            # A layer on its own: no other cell has it.
            cuts["L"], owners = _within(cuts["L"], owners, layers)
        for cell in zip(*np.nonzero(owners >= 0), strict=True):
            ranges = {letter: cuts[letter][cell[i]] for i, letter in enumerate(RANGES)}
            tokens = None
            if period > 1:
                times = np.arange(0, unit_tokens, period, dtype=np.int64)
                tokens = (times[:, None] + groups[cell[-1]]).ravel()
            yield Piece(src[int(owners[cell])], wanted, ranges, tokens)


def lacking(src: Sequence[Held], dst: Sequence[Held]) -> str:
    """What the sources lack of what the destinations have, in a word; empty where they have all."""
    period = math.lcm(*(held.deal[1] * held.deal[2] for held in (*src, *dst)))
    for wanted in dst:
        owners, _, _ = _owners(src, wanted, period)
        if (owners < 0).any():
            # The letter along which nothing is found, if there is one.
            alone = [i for i in range(owners.ndim) if (owners < 0).all(axis=_others(owners, i)).any()]
            return WORDS[(RANGES + "N")[alone[0]]] if alone and not (owners < 0).all() else _far(src, wanted)
    return ""


def _others(owners: _Owners, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(owners.ndim) if i != axis)


def _far(src: Sequence[Held], wanted: Held) -> str:
    """The first letter whose range meets no source's."""
    for letter in RANGES:
        begin, end = wanted.range(letter)
        if not any(held.range(letter)[0] < end and begin < held.range(letter)[1] for held in src):
            return WORDS[letter]
    return WORDS["N"] if src else "parts"


def _owners(
    src: Sequence[Held], wanted: Held, period: int
) -> tuple[_Owners, dict[str, list[tuple[int, int]]], list[NDArray[np.int64]]]:
    """By cell of the destination's box, the first source that has it, or -1; the cells' ranges, and their tokens."""
    cuts: dict[str, list[tuple[int, int]]] = {}
    for letter in RANGES:
        begin, end = wanted.range(letter)
        bounds = {begin, end, *(min(max(x, begin), end) for held in src for x in held.range(letter))}
        cuts[letter] = list(itertools.pairwise(sorted(bounds)))
    tokens = np.arange(period, dtype=np.int64)
    tokens = tokens[wanted.has(tokens)]
    # Tokens of a kind are those that the same sources have.
    kinds, groups = np.ones((len(src), 1), dtype=bool), [tokens]
    if period > 1 and src:
        kinds, kind_of = np.unique(np.stack([held.has(tokens) for held in src]), axis=1, return_inverse=True)
        groups = [tokens[kind_of.ravel() == i] for i in range(kinds.shape[1])]
    owners = np.full((*(len(cuts[letter]) for letter in RANGES), len(groups)), -1, dtype=np.int64)
    for i, held in reversed(list(enumerate(src))):
        inside = [[held.range(x)[0] <= a and b <= held.range(x)[1] for a, b in cuts[x]] for x in RANGES]
        owners[np.ix_(*inside, kinds[i])] = i
    return _merged(owners, cuts, groups)


def _merged(
    owners: _Owners, cuts: dict[str, list[tuple[int, int]]], groups: list[NDArray[np.int64]]
) -> tuple[_Owners, dict[str, list[tuple[int, int]]], list[NDArray[np.int64]]]:
    """With neighbours made one that have the same owners all along."""
    for axis, letter in enumerate(RANGES):
        if owners.shape[axis] == 1:
            continue
        slabs = np.moveaxis(owners, axis, 0)
        kept = [i for i in range(len(slabs)) if i == 0 or not np.array_equal(slabs[i], slabs[i - 1])]
        ends = [*kept[1:], len(slabs)]
        cuts[letter] = [(cuts[letter][i][0], cuts[letter][end - 1][1]) for i, end in zip(kept, ends, strict=True)]
        owners = np.take(owners, kept, axis=axis)
    if len(groups) == 1:
        return owners, cuts, groups
    alike: dict[bytes, list[int]] = {}
    for i in range(len(groups)):
        alike.setdefault(owners[..., i].tobytes(), []).append(i)
    groups = [np.sort(np.concatenate([groups[i] for i in same])) for same in alike.values()]
    return owners[..., [same[0] for same in alike.values()]], cuts, groups


def _within(cuts: list[tuple[int, int]], owners: _Owners, layers: range) -> tuple[list[tuple[int, int]], _Owners]:
    """The cells of some layers, cut to them."""
    kept = [i for i, (begin, end) in enumerate(cuts) if begin < layers.stop and layers.start < end]
    cut = [(max(cuts[i][0], layers.start), min(cuts[i][1], layers.stop)) for i in kept]
    return cut, owners[kept]
