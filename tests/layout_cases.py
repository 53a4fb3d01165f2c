"""Random pairs of layouts, and an oracle that knows nothing of strides: it writes out one element after the other.

A side is what ranks hold of one cache. The cache's parts (``Thing``) say how many heads and elements there are in all;
a rank's ``Part`` says which of them it holds, one by one, and in what order it writes them down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from kvkernels import KVLayout
from kvkernels.layout import parts

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)
# Name, layer, block, token of the block's span, row, head, element, all of them counted over all ranks; byte.
Place = tuple[str, int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Part:
    """A part as a user writes it for one rank, and as the oracle reads it: what is held, one by one."""

    name: str
    outside: tuple[str, ...]  # words: D, D/2, D%2
    inside: tuple[str, ...]
    blocks: int
    dtype: torch.dtype
    layers: tuple[int, ...] = (0,)
    tokens: tuple[int, ...] = (0,)  # of the block's span
    rows: int = 1
    heads: tuple[int, ...] = (0,)
    elements: tuple[int, ...] = (0,)
    pair: bool = False
    elements_v: int | None = None
    steps: dict[str, int] = field(default_factory=dict)
    offset: int = 0
    tensor: int | None = None
    totals: tuple[int, int, int] = (1, 1, 1)  # layers, heads, elements
    deal: tuple[int, int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        if not self.pair:
            return (self.name,)
        return ("k", "v") if self.name == "kv" else (f"k_{self.name}", f"v_{self.name}")

    def count(self, letter: str, k: int = 0) -> int:
        if letter == "D" and k and self.elements_v is not None:
            return self.elements_v
        sizes = {"L": self.layers, "N": self.tokens, "H": self.heads, "D": self.elements}
        if letter in sizes:
            return len(sizes[letter])
        return {"K": 1 + self.pair, "B": self.blocks, "W": self.rows}[letter]

    def extent(self, word: str, k: int = 0) -> int:
        if "%" in word:
            return int(word[2:])
        return self.count(word[0], k) // (int(word[2:]) if "/" in word else 1)

    def layout(self) -> KVLayout:
        """As the user's side of the language says it."""
        pattern = " ".join(self.outside) + (" | " if self.outside else "") + " ".join(self.inside)
        present = {word[0] for word in (*self.outside, *self.inside)}
        sizes = {letter: self.count(letter) for letter in "LKNWHD" if letter in present}
        options: dict = {"D_v": self.elements_v} if self.elements_v is not None else {}
        for letter, held, total, name in (
            ("L", self.layers, self.totals[0], "layer"), ("H", self.heads, self.totals[1], "head"),
            ("D", self.elements, self.totals[2], "d"),
        ):  # fmt: skip
            if len(held) != total or letter == "H":
                whole = {"layer": "total_layers", "head": "total_heads", "d": "total_d"}[name]
                options |= {f"first_{name}": held[0], whole: total}
        if self.deal is not None:
            options["deal"] = self.deal
        if self.tensor is not None:
            options["tensor"] = self.tensor
        return KVLayout(
            pattern, B=self.blocks, dtype=self.dtype, steps=self.steps, offset_bytes=self.offset, **sizes, **options
        )

    def write_out(self) -> list[list[Place | None]]:
        """Of each of its tensors, byte by byte: which byte of which element it is, or None for what lies between."""

        def element(at: dict[str, int]) -> list[Place | None]:
            d = at.get("D", 0)
            where = (
                self.names[at.get("K", 0)], self.layers[at.get("L", 0)], at["B"], self.tokens[at.get("N", 0)],
                at.get("W", 0), self.heads[at.get("H", 0)], self.elements[d] if self.elements_v is None else d,
            )  # fmt: skip
            return [(*where, byte) for byte in range(self.dtype.itemsize)]

        def counted(word: str, at: dict[str, int]) -> Iterator[dict[str, int]]:
            each = int(word[2:]) if "/" in word else 1
            before = at.get(word[0], 0)
            for i in range(self.extent(word, at.get("K", 0))):
                yield {**at, word[0]: before + i * each}

        def inner(words: tuple[str, ...], at: dict[str, int]) -> list[Place | None]:
            if not words:
                return element(at)
            items = [inner(words[1:], one) for one in counted(words[0], at)]
            step = self.steps.get(words[0], 0)
            padded = items[:-1] if words[0] == "K" else items  # what follows V follows it at once
            for item in padded:
                item += [None] * (step - len(item))
            return list(itertools.chain.from_iterable(items))

        def outer(words: tuple[str, ...], at: dict[str, int]) -> Iterator[list[Place | None]]:
            if not words:
                yield [None] * self.offset + inner(self.inside, at)
                return
            for one in counted(words[0], at):
                yield from outer(words[1:], one)

        return [_trimmed(tensor) for tensor in outer(self.outside, {})]


def _trimmed(places: list[Place | None]) -> list[Place | None]:
    """Without what lies behind the last element, which need not be there."""
    last = max((i for i, place in enumerate(places) if place is not None), default=-1)
    return places[: last + 1]


@dataclass(frozen=True)
class Rank:
    """What one rank holds: one layout of one or more parts, the last of them as ``scales=`` if so spelled."""

    parts: tuple[Part, ...]
    scales: bool = False

    @cached_property
    def layout(self) -> KVLayout:
        layouts = {part.name: part.layout() for part in self.parts}
        if self.scales:
            return replace(layouts["kv"], scales=layouts["scales"])
        return layouts["kv"] if layouts.keys() == {"kv"} else parts(**layouts)

    @cached_property
    def written(self) -> list[list[Place | None]]:
        """Every tensor byte by byte, in which several parts may lie."""
        tensors: list[list[Place | None]] = []
        for part in self.parts:
            mine = part.write_out()
            first = len(tensors) if part.tensor is None else part.tensor
            for i, places in enumerate(mine):
                if first + i == len(tensors):
                    tensors.append([])
                whole = tensors[first + i]
                whole += [None] * (len(places) - len(whole))
                for at, place in enumerate(places):
                    if place is not None:
                        assert whole[at] is None, "two parts in one byte"
                        whole[at] = place
        return tensors


@dataclass(frozen=True)
class Side:
    ranks: tuple[Rank, ...]
    tensors: tuple[tuple[torch.Tensor, ...], ...]  # by rank
    span: int  # tokens that a block covers

    @property
    def layouts(self) -> list[KVLayout]:
        return [rank.layout for rank in self.ranks]

    @property
    def blocks(self) -> int:
        return min(rank.parts[0].blocks for rank in self.ranks)


def side_of(rng: np.random.Generator, ranks: Sequence[Rank], span: int) -> Side:
    """With random bytes, NaNs among them, at any alignment, and some bytes more than there must be."""
    tensors = []
    for rank in ranks:
        mine = []
        for places in rank.written:
            offset, count = int(rng.integers(0, 17)), len(places) + int(rng.integers(0, 9))
            whole = torch.from_numpy(rng.integers(0, 256, count + offset + 32, dtype=np.uint8))
            mine.append(whole[offset : offset + count])
        tensors.append(tuple(mine))
    return Side(tuple(ranks), tuple(tensors), span)


def unit_of(src: Side, dst: Side) -> int:
    return math.gcd(src.span, dst.span)


def expected(
    src: Side, dst: Side, mapping: Sequence[tuple[int, int]], layer: int | None = None
) -> tuple[list[list[bytes]], bool]:
    """The destination's tensors after the copy, element by element; and whether each element had a source."""
    unit = unit_of(src, dst)
    known: dict[tuple, int] = {}
    for rank, tensors in zip(src.ranks, src.tensors, strict=True):
        for places, tensor in zip(rank.written, tensors, strict=True):
            for place, value in zip(places, tensor.tolist(), strict=False):
                if place is not None:
                    name, of_layer, block, token, *rest = place
                    known.setdefault((name, of_layer, block * src.span + token, *rest), value)
    held = {(name, of_layer, token % unit, *rest) for name, of_layer, token, *rest in known}
    source_of = dict(reversed(pair) for pair in mapping)
    result, complete = [], True
    for rank, tensors in zip(dst.ranks, dst.tensors, strict=True):
        answers = []
        for places, tensor in zip(rank.written, tensors, strict=True):
            values = tensor.tolist()
            for i, place in enumerate(places):
                if place is None:
                    continue
                name, of_layer, block, token, *rest = place
                token += block * dst.span
                complete &= (name, of_layer, token % unit, *rest) in held
                if token // unit not in source_of or (layer is not None and of_layer != layer):
                    continue
                token = source_of[token // unit] * unit + token % unit
                values[i] = known.get((name, of_layer, token, *rest), values[i])
            answers.append(bytes(values))
        result.append(answers)
    return result, complete


# Random layouts.


@dataclass(frozen=True)
class Thing:
    """A part of the cache itself, whoever holds it."""

    name: str
    letters: str  # of L N W H D, those that it has
    heads: int
    elements: int
    rows: int
    dtype: torch.dtype


def shard_heads(heads: int, size: int) -> list[tuple[int, ...]]:
    """Each rank's heads: dealt out in order, or held by several."""
    if size <= heads:
        return [tuple(map(int, part)) for part in np.array_split(np.arange(heads), size)]
    return [(rank * heads // size,) for rank in range(size)]


def dealt(rank: int, of: int, interleave: int, span: int) -> tuple[int, ...]:
    """A rank's tokens of a span: it takes its turn, some at a time."""
    turns = itertools.cycle(range(of))
    owner = [turn for turn in itertools.islice(turns, span) for _ in range(interleave)][:span]
    return tuple(token for token in range(span) if owner[token] == rank)


def random_things(rng: np.random.Generator) -> tuple[list[Thing], int]:
    """The parts of a cache, and its layers."""
    kind = ("pair", "pair", "pair scaled", "latent", "pair and scales", "latents", "state", "uneven")[rng.integers(8)]
    layers = int(rng.integers(1, 4))
    letters = "".join(letter for letter in "LNH" if rng.integers(5))
    dtype = lambda: DTYPES[int(rng.integers(len(DTYPES)))]  # noqa: E731
    d = lambda: int(rng.integers(1, 5))  # noqa: E731
    heads = int(rng.integers(1, 7)) if "H" in letters else 1
    one = Thing("kv", letters + "D", heads, d(), 1, dtype())
    scaled = "".join(c for c in letters if c != "H" or rng.integers(2))
    scaled = scaled if rng.integers(2) else scaled.replace("N", "")
    scales = Thing("scales", scaled, heads if "H" in scaled else 1, 1, 1, torch.float32)
    k, v = replace(one, name="k"), replace(one, name="v")
    if kind.startswith("pair"):
        things = [k, v]
        if "scaled" in kind or "scales" in kind:
            things += [scales] if rng.integers(2) else [replace(scales, name=f"{x}_scales") for x in "kv"]
    elif kind == "latent":
        things = [one]
    elif kind == "latents":
        things = [
            Thing(name, letters + "D", 1, d(), 1, dtype()) for name in ("latent", "scale", "rope")
        ]  # fmt: skip
    elif kind == "state":
        own = "L" * ("L" in letters)
        things = [Thing(name, own + "WD", 1, d() + 1, int(rng.integers(1, 4)), dtype()) for name in ("x", "b")]
        things = [replace(thing, rows=things[0].rows) for thing in things]
        things += [Thing("ssm", own + "HWD", heads, d(), d(), dtype())] if rng.integers(2) else []
    else:
        things = [k, replace(v, elements=d(), heads=int(rng.integers(1, 5)) if "H" in letters else 1)]
    return things, layers if "L" in letters else 1


def _cut(rng: np.random.Generator, words: list[str], part: Part, unit_tokens: int) -> list[str]:
    """Some letters cut in two, the halves anywhere after each other's place; tokens so that units are whole."""
    for letter in "DHWN":
        whole = unit_tokens if letter == "N" else part.count(letter)
        divisors = [x for x in range(1, whole + 1) if whole % x == 0]
        if letter in words and part.elements_v is None and rng.integers(5) == 0:
            by = divisors[int(rng.integers(len(divisors)))]
            at = words.index(letter)
            words[at : at + 1] = [f"{letter}/{by}", f"{letter}%{by}"]
            if rng.integers(2):
                one = words.pop(at + 1)
                words.insert(
                    int(rng.integers(words.index("B") + 1, len(words) + 1)) if at > words.index("B") else at, one
                )
    return words


def _random_words(rng: np.random.Generator, letters: str, in_page: str, uneven: bool) -> tuple[list[str], int]:
    """Letters in any order, and how many of them stand left of the bar."""
    while True:
        order = [str(letter) for letter in rng.permutation(list(letters))]
        before = order[: order.index("B")]
        if set(in_page) & set(before):
            continue
        if uneven and ("D" in before or order.index("K") > order.index("D")):
            continue
        return order, int(rng.integers(0, len(before) + 1))


def _own(rng: np.random.Generator, part: Part, letters: str, in_page: str, unit_tokens: int) -> Part:
    """In tensors of its own: any order, cuts, gaps and begin."""
    order, cut = _random_words(rng, letters + "B" + "K" * part.pair, in_page, part.elements_v is not None)
    outside, inside = order[:cut], _cut(rng, order[cut:], part, unit_tokens)
    steps: dict[str, int] = {}
    part = replace(part, outside=tuple(outside), inside=tuple(inside))
    if rng.integers(3) == 0:
        part = replace(part, offset=int(rng.integers(0, 20)))
    for word in reversed(inside):
        if rng.integers(4) == 0 and part.elements_v is None:
            steps[word] = _dense(part, steps, word) + int(rng.integers(0, 6))
    return replace(part, steps=steps)


def _dense(part: Part, steps: dict[str, int], until: str) -> int:
    """Bytes of all that is right of a word, gaps included."""
    size = part.dtype.itemsize
    for word in reversed(part.inside[part.inside.index(until) + 1 :]):
        step = steps.get(word, size)
        last = (part.extent(word) - 1) * step + size if word == "K" else part.extent(word) * step
        size = last
    return size


def _shared(rng: np.random.Generator, members: list[Part], letters: dict[str, str], in_page: str) -> list[Part]:
    """All in the same rows: the letters that they have in common outside, each one's others in its place of a cell."""
    common = [c for c in "LNHW" if all(c in letters[m.name] for m in members)]
    common = [c for c in common if len({m.count(c) for m in members}) == 1 and rng.integers(3)]
    order, cut = _random_words(rng, "".join(common) + "B", in_page, False)
    outside, outer = order[:cut], order[cut:]
    inners: dict[str, list[str]] = {}
    for member in members:
        inners[member.name] = [str(c) for c in rng.permutation([c for c in letters[member.name] if c not in common])]
    at = int(rng.integers(0, 5))
    start, placed = at, []
    sizes = {m.name: m.dtype.itemsize * math.prod(m.count(c) for c in inners[m.name]) for m in members}
    for member in (members[int(i)] for i in rng.permutation(len(members))):
        placed.append((member, at))
        at += sizes[member.name] + int(rng.integers(0, 2)) * int(rng.integers(0, 7))
    cell = at - start
    by_name = {
        member.name: replace(
            member, outside=tuple(outside), inside=(*outer, *inners[member.name]), offset=begin, tensor=0,
            steps={outer[-1]: cell},
        )
        for member, begin in placed
    }  # fmt: skip
    return [by_name[member.name] for member in members]


def _random_ranks(
    rng: np.random.Generator, things: list[Thing], layers: int, span: int, unit: int, deal: tuple[int, int]
) -> list[Rank]:
    """Any way to deal out layers, heads, elements and tokens, and each rank its own way to write them down."""
    blocks = int(rng.integers(2, 4))
    stages = int(rng.integers(1, layers + 1)) if rng.integers(3) == 0 else 1
    tp = int(rng.integers(1, 6)) if rng.integers(2) else 1
    along = "D" if rng.integers(4) == 0 else "H"
    # The parts that all ranks spell as one pair, and whether scales are spelled as such.
    paired = {name for name in ("kv", "scales") if _are_pair(things, name) and rng.integers(4)}
    ranks = []
    for stage, shard, turn in itertools.product(range(stages), range(tp), range(deal[0])):
        held_layers = tuple(map(int, np.array_split(np.arange(layers), stages)[stage]))
        tokens = dealt(turn, *deal, span)
        members, letters = [], {}
        for thing in _spelled(things, paired):
            pair = thing.name in paired
            heads, elements = (tuple(range(n)) for n in (thing.heads, thing.elements))
            if along == "H":
                heads = shard_heads(thing.heads, tp)[shard]
            elif not (pair and _differ(things)):
                elements = shard_heads(thing.elements, tp)[shard]
            members.append(
                Part(
                    thing.name, (), (), blocks, thing.dtype, held_layers if "L" in thing.letters else (0,),
                    tokens if "N" in thing.letters else (0,), thing.rows, heads, elements, pair,
                    next(t.elements for t in things if t.name == "v") if pair and _differ(things) else None,
                    totals=(layers, thing.heads, thing.elements),
                    deal=(turn, *deal) if deal[0] > 1 and "N" in thing.letters else None,
                )
            )  # fmt: skip
            letters[thing.name] = thing.letters
        cut_inside = "N" if unit != span else ""
        shares = len(members) > 1 and not paired and rng.integers(2)
        if shares:
            members = _shared(rng, members, letters, cut_inside)
        else:
            members = [_own(rng, member, letters[member.name], cut_inside, unit // deal[0]) for member in members]
            if len(members) > 1:
                first = itertools.accumulate((len(m.write_out()) for m in members), initial=0)
                members = [replace(m, tensor=at) for m, at in zip(members, first, strict=False)]
        names = [member.name for member in members]
        spelled = names == ["kv", "scales"] and not shares and rng.integers(2) == 0
        same_heads = len({(m.heads, m.totals[1]) for m in members if "H" in letters[m.name]}) < 2
        if spelled and same_heads:
            members = [replace(member, tensor=None) for member in members]
        ranks.append(Rank(tuple(members), scales=bool(spelled and same_heads)))
    return ranks


def _are_pair(things: list[Thing], name: str) -> bool:
    """Whether two things can be spelled as K and V of one."""
    wanted = ("k", "v") if name == "kv" else (f"k_{name}", f"v_{name}")
    two = [thing for thing in things if thing.name in wanted]
    if len(two) < 2:
        return False
    k, v = two
    uneven = replace(v, name=k.name, elements=k.elements) == k and name == "kv"
    return replace(v, name=k.name) == k or uneven


def _differ(things: list[Thing]) -> bool:
    sizes = {thing.elements for thing in things if thing.name in "kv" and len(thing.name) == 1}
    return len(sizes) > 1


def _spelled(things: list[Thing], paired: set[str]) -> list[Thing]:
    """Pairs as one, under the name that the language has for both."""
    result = []
    for thing in things:
        pair = {"k": "kv", "k_scales": "scales"}.get(thing.name)
        if pair in paired:
            result.append(replace(thing, name=pair))
        elif {"v": "kv", "v_scales": "scales"}.get(thing.name) not in paired:
            result.append(thing)
    return result


def random_sides(rng: np.random.Generator) -> tuple[Side, Side]:
    """Two spellings of one cache: other orders, block sizes, ranks, gaps and pages on either side."""
    things, layers = random_things(rng)
    deals, spans = [(1, 1), (1, 1)], (1, 1)
    if all("N" in thing.letters for thing in things):
        spans = [(1, 1), (2, 2), (3, 3), (4, 4), (2, 4), (4, 2), (1, 3), (6, 4), (2, 3)][int(rng.integers(9))]
        if rng.integers(3) == 0:
            deals = [(int(rng.integers(1, 4)), int(rng.integers(1, 3))) for _ in range(2)]
            turn = math.lcm(*(of * interleave for of, interleave in deals))
            spans = (turn, turn) if turn > 8 else [(turn, turn), (turn, 2 * turn), (2 * turn, turn)][rng.integers(3)]
    elif any("N" in thing.letters for thing in things):
        spans = [(n, n) for n in (1, 2, 4)][int(rng.integers(3))]
    unit = math.gcd(*spans)
    sides = []
    for span, deal in zip(spans, deals, strict=True):
        ranks = _random_ranks(rng, things, layers, span, unit, deal)
        if len(ranks) > 1 and rng.integers(6) == 0:
            ranks.pop(int(rng.integers(len(ranks))))
        sides.append(side_of(rng, ranks, span))
    return sides[0], sides[1]


def random_mapping(rng: np.random.Generator, src: Side, dst: Side) -> list[tuple[int, int]]:
    unit = unit_of(src, dst)
    src_ids, dst_ids = (side.blocks * side.span // unit for side in (src, dst))
    count = int(rng.integers(0, dst_ids + 1))
    targets = rng.permutation(dst_ids)[:count]
    return [(int(rng.integers(src_ids)), int(target)) for target in targets]
