"""The layout language: which tensor of a list, and in what physical order inside it, a KV cache keeps its elements."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache

import torch

from kvkernels.common.arguments import dtype_text, integer

_INTEGERS = (
    "L", "K", "B", "N", "H", "D", "D_v", "row_bytes", "offset_bytes", "page_bytes", "first_head", "total_heads",
    "replica", "replicas",
)  # fmt: skip

#: Layers, key/value, blocks, tokens of a block, heads, elements of a head.
LETTERS = "LKBNHD"


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


@dataclass(frozen=True, repr=False)
class KVLayout:
    """The physical layout of a KV cache, written as a pattern of letters.

    ``L`` layers, ``K`` the key/value pair (K first; absent for MLA), ``B`` blocks, ``N`` tokens of a block, ``H``
    heads, ``D`` elements of a head. Left of the bar: which tensor of a list. Right of it: the physical order inside a
    tensor, outermost first. Letters left of ``B`` count pools, those right of it are the inside of a page::

        "L | K B N H D"     one tensor a layer, token-first (NHD)              2 L pools
        "L | B H N K D"     one tensor a layer, head-first, K and V in turn      L pools
        "L K | B N H D"     K and V in tensors of their own                    2 L pools
        "L K B N H D"       everything in one tensor                           2 L pools
        "B L K N H D"       page first, as host pools like it                  1 pool
        "L | B N D"         MLA                                                  L pools

    Parameters
    ----------
    pattern : str
        Letters, each at most once, in any order; spaces are free. ``B`` must come, right of the bar.
    L, K, B, N, H, D : int
        Sizes; a letter that the pattern lacks has size 1. ``K`` is at most 2.
    dtype : torch.dtype
        Of an element; opaque layouts need none.
    D_v : int, optional
        Elements of a head of V, where they differ from K's ``D``.
    row_bytes : int, optional
        From one block of a pool to the next, where rows are padded; by default nothing lies between blocks.
    offset_bytes : int
        From a tensor's first byte to the first page, 0 by default.
    opaque : bool
        Pages whose inside is unknown (Mamba's state, compressed pages): copied whole, never converted or resharded. Its
        pattern ends with ``B``.
    page_bytes : int, optional
        Bytes of one block in one pool. Needed for opaque layouts, computed for others: the larger of the two where K's
        and V's pools differ.
    scales : KVLayout, optional
        Further tensors with the same blocks, such as a quantised cache's scales: their pools come after the others, and
        one call converts both.
    first_head, total_heads, replica, replicas : int
        A shard's part, as ``shard`` sets it: ``H`` heads from ``first_head`` on, of ``total_heads``; and which of how
        many ranks with the same heads.

    Raises
    ------
    ValueError
        The pattern or a size makes no sense; the message says which.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import KVLayout
    >>> layout = KVLayout("L | K B N H D", L=32, K=2, B=1024, N=16, H=8, D=128, dtype=torch.bfloat16)
    >>> layout.num_pools, layout.page_bytes
    (64, 32768)
    >>> layout.shard(1, 4)
    KVLayout("L | K B N H D", L=32, K=2, B=1024, N=16, H=2, D=128, bfloat16, heads 2 to 3 of 8)
    """

    pattern: str
    L: int = field(default=1, kw_only=True)
    K: int = field(default=1, kw_only=True)
    B: int = field(kw_only=True)
    N: int = field(default=1, kw_only=True)
    H: int = field(default=1, kw_only=True)
    D: int = field(default=1, kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)
    D_v: int | None = field(default=None, kw_only=True)
    row_bytes: int | None = field(default=None, kw_only=True)
    offset_bytes: int = field(default=0, kw_only=True)
    opaque: bool = field(default=False, kw_only=True)
    page_bytes: int = field(default=0, kw_only=True)
    scales: KVLayout | None = field(default=None, kw_only=True)
    first_head: int = field(default=0, kw_only=True)
    total_heads: int = field(default=0, kw_only=True)
    replica: int = field(default=0, kw_only=True)
    replicas: int = field(default=1, kw_only=True)
    #: A shard whose whole has padding or begins inside a buffer, and which says of itself nothing of the kind.
    padding_unsaid: bool = field(default=False, repr=False, compare=False, kw_only=True)
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_types()
        outside, _, inside = self.pattern.rpartition("|")
        words = [" ".join(part.replace(" ", "")) for part in (outside, inside)]
        self._set("pattern", " | ".join(word for word in words if word))
        self._check_letters()
        self._check_sizes()
        if self.D_v == self.D:
            self._set("D_v", None)
        self._set("total_heads", self.total_heads or self.H)
        self._check_shard()
        pages = [place.page_bytes for place in self._geometry.places]
        if self.page_bytes not in (0, max(pages)):
            self._fail(f"page_bytes must be {max(pages)} or left out, got {self.page_bytes}")
        self._set("page_bytes", max(pages))
        if self.scales is not None:
            self._check_scales(self.scales)
        self._set("text", self._as_text())

    def _as_text(self) -> str:
        """All fields as JSON, which ``from_text`` reads; kept, since a compiler cannot write it while it traces."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        dtype = None if self.dtype is None else dtype_text(self.dtype)
        scales = None if self.scales is None else self.scales.text
        return json.dumps({**values, "dtype": dtype, "scales": scales})

    @staticmethod
    @lru_cache(maxsize=256)
    def from_text(text: str) -> KVLayout:
        """The layout with this ``text``."""
        values = json.loads(text)
        values["dtype"] = None if values["dtype"] is None else getattr(torch, values["dtype"])
        values["scales"] = None if values["scales"] is None else KVLayout.from_text(values["scales"])
        return KVLayout(**values)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _fail(self, message: str) -> None:
        raise ValueError(f'KVLayout("{self.pattern}"): {message}')

    # What can be wrong.

    def _check_types(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"KVLayout: pattern must be a str, got {self.pattern!r}")
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is None and name in ("D_v", "row_bytes"):
                continue
            self._set(name, integer(f'KVLayout("{self.pattern}"): {name}', value))
        for name, kind in (("dtype", torch.dtype), ("scales", KVLayout)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                self._fail(f"{name} must be a {kind.__name__}, got {value!r}")

    def _check_letters(self) -> None:
        letters = self.outside + self.inside
        unknown = [letter for letter in letters if letter not in LETTERS]
        if unknown or len(set(letters)) < len(letters) or self.pattern.count("|") > 1:
            self._fail(f"the pattern must have each of {', '.join(LETTERS)} at most once, and at most one bar")
        if "B" not in self.inside:
            self._fail("the pattern must have B, and not left of the bar")
        if self.opaque and self.inside[-1] != "B":
            self._fail("an opaque layout's pattern must end with B: what is in its pages is unknown")

    def _check_sizes(self) -> None:
        for letter in LETTERS:
            size = self.size(letter)
            if size < (0 if letter == "B" else 1):
                self._fail(f"{letter} must be a positive integer, got {size!r}")
            if size != 1 and letter != "B" and letter not in self.outside + self.inside:
                self._fail(f"the pattern lacks {letter}, whose size is {size}")
        if self.K > 2:
            self._fail(f"K must be 1 or 2, got {self.K}")
        if self.opaque:
            if self.page_bytes <= 0:
                self._fail(f"an opaque layout needs a positive page_bytes, got {self.page_bytes}")
        elif self.dtype is None:
            self._fail("dtype must be given")
        if self.D_v is not None:
            order = self.outside + self.inside
            if self.D_v < 1 or self.K != 2 or "D" not in self.page_letters or order.index("K") > order.index("D"):
                self._fail(f"D_v must be positive and goes with K=2 and D in the page, right of K; got {self.D_v}")
        if self.offset_bytes < 0:
            self._fail(f"offset_bytes must not be negative, got {self.offset_bytes}")

    def _check_shard(self) -> None:
        if not 0 <= self.first_head <= self.first_head + self.H <= self.total_heads:
            self._fail(f"heads {self.first_head} to {self.first_head + self.H - 1} must be of {self.total_heads}")
        if not 0 <= self.replica < self.replicas:
            self._fail(f"replica must be below replicas and not negative, got {self.replica} and {self.replicas}")

    def _check_scales(self, scales: KVLayout) -> None:
        same = all(self.size(letter) == scales.size(letter) for letter in "LBN")
        same = same and scales.K in (1, self.K)
        if "H" in scales.pattern:
            heads = ("H", "first_head", "total_heads")
            same = same and all(getattr(self, name) == getattr(scales, name) for name in heads)
        if not same or self.opaque or scales.opaque or scales.scales is not None:
            self._fail(f"scales must have the same layers, blocks, tokens and heads (or none), got {scales!r}")

    # The pattern's parts.

    @cached_property
    def outside(self) -> str:
        """Letters left of the bar."""
        return self.pattern.rpartition("|")[0].replace(" ", "")

    @cached_property
    def inside(self) -> str:
        """Letters right of the bar, outermost first."""
        return self.pattern.rpartition("|")[2].replace(" ", "")

    @cached_property
    def pool_letters(self) -> str:
        """Letters that count pools: those left of ``B``, the first of them counting slowest."""
        return self.outside + self.inside[: self.inside.index("B")]

    @cached_property
    def page_letters(self) -> str:
        """Letters that are the inside of a page, outermost first."""
        return self.inside[self.inside.index("B") + 1 :]

    def size(self, letter: str, k: int = 0) -> int:
        """How many there are of a letter; of ``D``, in K (0) or in V (1)."""
        if letter == "D" and k == 1 and self.D_v is not None:
            return self.D_v
        size: int = getattr(self, letter)
        return size

    @property
    def element_bytes(self) -> int:
        """Bytes of one element; of an opaque layout, its page."""
        return self.page_bytes if self.dtype is None or self.opaque else self.dtype.itemsize

    @property
    def num_tensors(self) -> int:
        """Tensors in the list, scales included."""
        own = math.prod(self.size(letter) for letter in self.outside)
        return own + (self.scales.num_tensors if self.scales else 0)

    @property
    def num_pools(self) -> int:
        """Pools that the tensors are, scales included."""
        return len(self._geometry.places) + (self.scales.num_pools if self.scales else 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all pools, padding left out, scales included."""
        own = sum(place.page_bytes for place in self._geometry.places)
        return own + (self.scales.block_bytes if self.scales else 0)

    @property
    def places(self) -> tuple[PoolPlace, ...]:
        """Where each pool lies, without the scales'."""
        return self._geometry.places

    def needed_bytes(self, tensor: int) -> int:
        """From the first byte of a tensor of the list to the end of its last page, without the scales'."""
        last = max(self.B - 1, 0)
        mine = [place for place in self.places if place.tensor == tensor]
        return max(place.offset_bytes + last * place.row_bytes + place.page_bytes for place in mine) if self.B else 0

    def dimensions(self, tensor: int) -> list[tuple[int, int]] | None:
        """Size and step in bytes of each letter inside a tensor, outermost first; None where K's and V's differ."""
        if self.D_v is not None and "K" in self.inside:
            return None
        k = self._geometry.k_of_tensor[tensor]
        steps = self._geometry.bytes_of[k]
        return [(self.size(letter, k), steps[letter]) for letter in self.inside]

    def step(self, letter: str, k: int = 0) -> Step:
        """How far one step along a letter is, in K (0) or V (1): their pages differ where ``D_v`` does."""
        return self._geometry.steps[k].get(letter, Step(0, 0))

    def start(self, k: int) -> tuple[int, int]:
        """Pool and byte of its page at which K (0) or V (1) begins, other letters being 0."""
        return self._geometry.starts[k]

    @cached_property
    def _geometry(self) -> _Geometry:
        return _measure(self)

    # What is made of it.

    def shard(self, rank: int, size: int) -> KVLayout:
        """The layout of one of ``size`` tensor-parallel ranks.

        Heads are dealt out in order, the first ranks getting one more where ``size`` does not divide them. With more
        ranks than heads, rank ``r`` holds head ``r * H // size``: those with the same head are replicas. A layout
        without ``H`` (MLA) is held whole by every rank. ``row_bytes`` and ``offset_bytes`` are the whole's, and do not
        carry over: a rank whose buffers have padding, too, says so by ``dataclasses.replace``.

        Raises
        ------
        ValueError
            The rank is out of range, or the layout is opaque or a shard itself.

        Examples
        --------
        >>> import torch
        >>> from kvkernels import KVLayout
        >>> layout = KVLayout("L | B N H D", B=8, H=2, D=4, dtype=torch.float32)
        >>> [(s.first_head, s.replica) for s in (layout.shard(rank, 4) for rank in range(4))]
        [(0, 0), (0, 1), (1, 0), (1, 1)]
        """
        rank, size = integer("KVLayout.shard: rank", rank), integer("KVLayout.shard: size", size)
        if not 0 <= rank < size:
            self._fail(f"rank must be below size and not negative, got rank {rank} of {size}")
        if self.opaque:
            self._fail("opaque pages cannot be sharded: what is in them is unknown")
        if self.total_heads != self.H or self.replicas != 1:
            self._fail("a shard cannot be sharded again")
        scales = self.scales.shard(rank, size) if self.scales else None
        first, heads, replica, replicas = _heads_of_rank(self.H, rank, size)
        if "H" not in self.outside + self.inside:
            first, heads, replica, replicas = 0, 1, rank, size
        return replace(
            self, H=heads, first_head=first, total_heads=self.H, replica=replica, replicas=replicas, scales=scales,
            row_bytes=None, offset_bytes=0, page_bytes=0,
            padding_unsaid=self.row_bytes is not None or self.offset_bytes > 0,
        )  # fmt: skip

    def is_writer(self, block_id: int) -> bool:
        """Whether this rank writes the block where ranks with the same heads write one destination: they take turns.

        Examples
        --------
        >>> import torch
        >>> from kvkernels import KVLayout
        >>> mla = KVLayout("L | B N D", B=8, N=4, D=4, dtype=torch.float32)
        >>> [block for block in range(8) if mla.shard(1, 4).is_writer(block)]
        [1, 5]
        """
        return integer("KVLayout.is_writer: block_id", block_id) % self.replicas == self.replica

    def __repr__(self) -> str:
        letters = [letter for letter in LETTERS if letter in self.outside + self.inside]
        words = [f'"{self.pattern}"', *(f"{letter}={self.size(letter)}" for letter in letters)]
        words += [f"D_v={self.D_v}"] if self.D_v is not None else []
        words += [dtype_text(self.dtype)] if self.dtype is not None else []
        words += ["opaque", f"page_bytes={self.page_bytes}"] if self.opaque else []
        words += [f"row_bytes={self.row_bytes}"] if self.row_bytes is not None else []
        words += [f"offset_bytes={self.offset_bytes}"] if self.offset_bytes else []
        if self.total_heads != self.H:
            last = self.first_head + self.H - 1
            which = f"head {last}" if self.H == 1 else f"heads {self.first_head} to {last}"
            words.append(f"{which} of {self.total_heads}")
        words += [f"replica {self.replica} of {self.replicas}"] if self.replicas > 1 else []
        words += [f"scales={self.scales!r}"] if self.scales else []
        return f"KVLayout({', '.join(words)})"

    def draw(self) -> str:
        """A picture of it: each letter with its size and its step in bytes, and what is one page.

        Examples
        --------
        >>> import torch
        >>> from kvkernels import KVLayout
        >>> print(KVLayout("L | K B N H D", L=32, K=2, B=1024, N=16, H=8, D=128, dtype=torch.bfloat16).draw())
        L | K B N H D   32 tensors, 64 pools of 1024 pages
          L      32   tensors
          K       2 x 33554432 bytes   pools
          B    1024 x    32768 bytes   blocks
          N      16 x     2048 bytes   |
          H       8 x      256 bytes   | one page: 32768 bytes
          D     128 x        2 bytes   |
        """
        return _draw(self)


@dataclass(frozen=True)
class _Geometry:
    places: tuple[PoolPlace, ...]
    k_of_tensor: tuple[int, ...]
    steps: tuple[dict[str, Step], ...]  # by K or V
    starts: tuple[tuple[int, int], ...]  # by K or V
    bytes_of: tuple[dict[str, int], ...]  # by K or V: the step in bytes of each letter right of the bar


def _heads_of_rank(heads: int, rank: int, size: int) -> tuple[int, int, int, int]:
    """First head, number of heads, which replica, how many replicas."""
    if size <= heads:
        share, more = divmod(heads, size)
        return rank * share + min(rank, more), share + (rank < more), 0, 1
    head = rank * heads // size
    holders = [r for r in range(size) if r * heads // size == head]
    return head, 1, holders.index(rank), len(holders)


def _measure(layout: KVLayout) -> _Geometry:
    """From the innermost letter outwards; K's and V's parts each on their own, since ``D`` may differ."""
    whole = range(layout.K)
    bytes_of: list[dict[str, int]] = [{} for _ in whole]
    size = [layout.element_bytes for _ in whole]
    page, k_offset = list(size), [0 for _ in whole]
    for letter in reversed(layout.inside):
        if letter == "K":
            k_offset = list(itertools.accumulate(size, initial=0))[:-1]
            for k in whole:
                bytes_of[k][letter] = k_offset[-1]
            size = [sum(size) for _ in whole]
            continue
        for k in whole:
            bytes_of[k][letter] = size[k]
            if letter == "B":
                page[k] = size[k]
                bytes_of[k][letter] = _row_bytes(layout, size[k])
            size[k] = bytes_of[k][letter] * layout.size(letter, k)
    pool_steps, count = {}, 1
    for letter in reversed(layout.pool_letters):
        pool_steps[letter] = count
        count *= layout.size(letter)
    steps = tuple(
        {
            **{letter: Step(pool_steps[letter], 0) for letter in layout.pool_letters},
            **{letter: Step(0, bytes_of[k][letter]) for letter in layout.page_letters},
        }
        for k in whole
    )
    starts = tuple((k * pool_steps.get("K", 0), k_offset[k] if "K" in layout.page_letters else 0) for k in whole)
    places = tuple(_places(layout, bytes_of, k_offset, page))
    k_of_tensor = tuple(coordinates.get("K", 0) for coordinates in _coordinates(layout, layout.outside))
    return _Geometry(places, k_of_tensor, steps, starts, tuple(bytes_of))


def _row_bytes(layout: KVLayout, page_bytes: int) -> int:
    if layout.row_bytes is not None and layout.row_bytes < page_bytes:
        layout._fail(f"row_bytes must be at least the page's {page_bytes} bytes, got {layout.row_bytes}")
    return page_bytes if layout.row_bytes is None else layout.row_bytes


def _coordinates(layout: KVLayout, letters: str) -> Iterator[dict[str, int]]:
    for values in itertools.product(*(range(layout.size(letter)) for letter in letters)):
        yield dict(zip(letters, values, strict=True))


def _places(
    layout: KVLayout, bytes_of: list[dict[str, int]], k_offset: list[int], page: list[int]
) -> Iterator[PoolPlace]:
    for coordinates in _coordinates(layout, layout.pool_letters):
        k = coordinates.get("K", 0)
        tensor = 0
        for letter in layout.outside:
            tensor = tensor * layout.size(letter) + coordinates[letter]
        inner = [letter for letter in layout.pool_letters if letter in layout.inside and letter != "K"]
        offset = layout.offset_bytes + sum(bytes_of[k][letter] * coordinates[letter] for letter in inner)
        offset += k_offset[k] if "K" in layout.inside and "K" in layout.pool_letters else 0
        yield PoolPlace(tensor, offset, page[k], bytes_of[k]["B"])


def _draw(layout: KVLayout) -> str:
    tensors = math.prod(layout.size(letter) for letter in layout.outside)
    pools = len(layout.places)
    count = lambda n, word: f"{n} {word}" if n == 1 else f"{n} {word}s"  # noqa: E731
    lines = [f"{layout.pattern}   {count(tensors, 'tensor')}, {count(pools, 'pool')} of {layout.B} pages"]
    for letter in layout.outside:
        lines.append(f"  {letter} {layout.size(letter):7}   tensors")
    steps = layout._geometry.bytes_of[0]
    width = max(len(str(step)) for step in steps.values())
    for i, letter in enumerate(layout.inside):
        role = "blocks" if letter == "B" else "pools" if letter in layout.pool_letters else "|"
        if role == "|" and i == (len(layout.inside) + layout.inside.index("B")) // 2:
            role = f"| one page: {layout.page_bytes} bytes"
        lines.append(f"  {letter} {layout.size(letter):7} x {steps[letter]:{width}} bytes   {role}")
    return "\n".join(lines)
