"""Random pairs of layouts, and an oracle that knows nothing of strides: it writes out one element after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvkernels import KVLayout

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)
# (layer, key/value, block, token, head, element), the heads counted over all ranks.
Coordinate = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Spelled:
    """A layout as a user writes it, and as the oracle reads it: the heads of this rank, one by one."""

    layout: KVLayout
    heads: tuple[int, ...]

    @property
    def own_tensors(self) -> int:
        return math.prod(self.size(letter) for letter in self.layout.outside)

    def size(self, letter: str, k: int = 0) -> int:
        if letter == "H":
            return len(self.heads)
        if letter == "D" and k == 1 and self.layout.D_v is not None:
            return self.layout.D_v
        return getattr(self.layout, letter)


def write_out(spelled: Spelled) -> list[list[tuple[Coordinate, int] | None]]:
    """Of each tensor, byte by byte: which byte of which element it is, or None for padding."""
    layout = spelled.layout
    outside, _, inside = layout.pattern.replace(" ", "").rpartition("|")

    def inner(letters: str, at: dict[str, int]) -> list:
        if not letters:
            coordinate = tuple(at.get(letter, 0) for letter in "LKBN")
            coordinate += (spelled.heads[at.get("H", 0)], at.get("D", 0))
            return [(coordinate, byte) for byte in range(layout.dtype.itemsize)]
        result = []
        for i in range(spelled.size(letters[0], at.get("K", 0))):
            part = inner(letters[1:], {**at, letters[0]: i})
            if letters[0] == "B" and layout.row_bytes is not None:
                part += [None] * (layout.row_bytes - len(part))
            result += part
        return result

    def outer(letters: str, at: dict[str, int]) -> Iterator[list]:
        if not letters:
            yield [None] * layout.offset_bytes + inner(inside, at)
            return
        for i in range(spelled.size(letters[0])):
            yield from outer(letters[1:], {**at, letters[0]: i})

    return list(outer(outside, {}))


def shard_heads(heads: int, size: int) -> list[tuple[int, ...]]:
    """Each rank's heads: dealt out in order, or held by several."""
    if size <= heads:
        return [tuple(map(int, part)) for part in np.array_split(np.arange(heads), size)]
    return [(rank * heads // size,) for rank in range(size)]


@dataclass(frozen=True)
class Side:
    ranks: tuple[Spelled, ...]
    tensors: tuple[tuple[torch.Tensor, ...], ...]  # by rank, scales last

    @property
    def layouts(self) -> list[KVLayout]:
        return [rank.layout for rank in self.ranks]


def _written(spelled: Spelled) -> list[tuple[str, list]]:
    """Every tensor of a rank, the scales' last, with what kind it is."""
    result = [("cache", tensor) for tensor in write_out(spelled)]
    scales = spelled.layout.scales
    if scales is not None:
        heads = spelled.heads if "H" in scales.pattern else (0,)
        result += [("scales", tensor) for tensor in write_out(Spelled(scales, heads))]
    return result


def expected(src: Side, dst: Side, mapping: Sequence[tuple[int, int]], layer: int | None = None) -> list[list[bytes]]:
    """The destination's tensors after the copy, element by element."""
    unit = math.gcd(src.layouts[0].N, dst.layouts[0].N)
    known: dict[tuple, int] = {}
    for rank, tensors in zip(src.ranks, src.tensors, strict=True):
        for (kind, places), tensor in zip(_written(rank), tensors, strict=True):
            for place, value in zip(places, tensor.tolist(), strict=False):
                if place is not None:
                    known.setdefault((kind, *place), value)
    source_of = dict(reversed(pair) for pair in mapping)
    result = []
    for rank, tensors in zip(dst.ranks, dst.tensors, strict=True):
        answers = []
        for (kind, places), tensor in zip(_written(rank), tensors, strict=True):
            values = tensor.tolist()
            for i, place in enumerate(places):
                if place is None or (layer is not None and place[0][0] != layer):
                    continue
                (of_layer, k, block, token, head, element), byte = place
                token += block * dst.layouts[0].N
                if token // unit not in source_of:
                    continue
                token = source_of[token // unit] * unit + token % unit
                block, token = divmod(token, src.layouts[0].N)
                value = known.get((kind, (of_layer, k, block, token, head, element), byte))
                values[i] = values[i] if value is None else value
            answers.append(bytes(values))
        result.append(answers)
    return result


# Random layouts.


def random_pattern(rng: np.random.Generator, letters: str, in_page: str) -> str:
    """The letters in any order, some of them left of a bar, B right of it; where D must be in the page, so after K."""
    while True:
        order = "".join(rng.permutation(list(letters)))
        cut = int(rng.integers(0, order.index("B") + 1))
        if set(in_page) & set(order[: order.index("B")]):
            continue
        if "D" in in_page and order.index("K") > order.index("D"):
            continue
        return f"{order[:cut]} | {order[cut:]}" if cut else order


def _random_side(rng: np.random.Generator, sizes: dict, common: str, n: int, in_page: str, tp: int) -> Side:
    heads = sizes["H"]
    blocks = int(rng.integers(2, 5)) if tp == 0 else int(rng.integers(2, 4))
    pattern = random_pattern(rng, common, in_page)
    scales = None
    if sizes["scales"]:
        letters = sizes["scales"]
        scales = KVLayout(
            random_pattern(rng, letters, in_page.replace("D", "")), L=sizes["L"], B=blocks, N=n,
            K=sizes["K"] if "K" in letters else 1, H=heads if "H" in letters else 1, dtype=torch.float32,
        )  # fmt: skip
    whole = KVLayout(
        pattern, L=sizes["L"], K=sizes["K"], B=blocks, N=n, H=heads, D=sizes["D"], D_v=sizes["D_v"],
        dtype=sizes["dtype"], scales=scales,
    )  # fmt: skip
    if tp == 0:
        ranks = [Spelled(whole, tuple(range(heads)))]
    else:
        parts = shard_heads(heads, tp) if "H" in common else [(0,)] * tp
        ranks = [Spelled(whole.shard(rank, tp), part) for rank, part in enumerate(parts)]
    ranks = [Spelled(_padded(rng, rank.layout), rank.heads) for rank in ranks]
    tensors = tuple(
        tuple(_flat(rng, len(places) + int(rng.integers(0, 9))) for _, places in _written(rank)) for rank in ranks
    )
    return Side(tuple(ranks), tensors)


def _padded(rng: np.random.Generator, layout: KVLayout) -> KVLayout:
    """A third of them with padded rows, a third somewhere inside a buffer."""
    changes = {}
    if rng.integers(3) == 0:
        changes["row_bytes"] = layout.page_bytes + int(rng.integers(0, 20))
    if rng.integers(3) == 0:
        changes["offset_bytes"] = int(rng.integers(0, 20))
    return replace(layout, **changes)


def _flat(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Random bytes, NaNs among them, at any alignment."""
    offset = int(rng.integers(0, 17))
    return torch.from_numpy(rng.integers(0, 256, count + offset + 32, dtype=np.uint8))[offset : offset + count]


def random_sides(rng: np.random.Generator) -> tuple[Side, Side]:
    """Two spellings of one cache: other orders, block sizes, shards and padding on either side."""
    letters = "".join(letter for letter in "LKNHD" if rng.integers(5)) + "B"
    n_src, n_dst = [(1, 1), (2, 2), (3, 3), (4, 4), (2, 4), (4, 2), (1, 3), (6, 4), (2, 3)][int(rng.integers(9))]
    if "N" not in letters:
        n_src = n_dst = 1
    sizes: dict = {letter: int(rng.integers(1, 4)) if letter in letters else 1 for letter in "LHD"}
    sizes["H"] = int(rng.integers(1, 7)) if "H" in letters else 1
    sizes["K"] = 2 if "K" in letters else 1
    sizes["D_v"] = int(rng.integers(1, 5)) if sizes["K"] == 2 and "D" in letters and rng.integers(4) == 0 else None
    sizes["dtype"] = DTYPES[int(rng.integers(len(DTYPES)))]
    sizes["scales"] = "".join(c for c in letters if c != "D" and (c not in "KH" or rng.integers(2)))
    if rng.integers(4):
        sizes["scales"] = ""
    tp = [int(rng.integers(0, 7)) if rng.integers(2) else 0 for _ in range(2)]
    # Blocks are cut inside their pages, and K and V have as many pools.
    in_page = ("N" if n_src != n_dst else "") + ("D" if sizes["D_v"] else "")
    src = _random_side(rng, sizes, letters, n_src, in_page, tp[0])
    dst = _random_side(rng, sizes, letters, n_dst, in_page, tp[1])
    return src, dst


def random_mapping(rng: np.random.Generator, src: Side, dst: Side) -> list[tuple[int, int]]:
    unit = math.gcd(src.layouts[0].N, dst.layouts[0].N)
    src_ids = min(layout.B for layout in src.layouts) * src.layouts[0].N // unit
    dst_ids = min(layout.B for layout in dst.layouts) * dst.layouts[0].N // unit
    count = int(rng.integers(0, dst_ids + 1))
    targets = rng.permutation(dst_ids)[:count]
    return [(int(rng.integers(src_ids)), int(target)) for target in targets]
