"""The layout language: which tensor of a list, and in what physical order inside it, a KV cache keeps its elements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

import kvkernels.layout.rules as rules
from kvkernels.common.arguments import dtype_text, integer
from kvkernels.layout.geometry import Geometry, PoolPlace, Step, pool_words
from kvkernels.layout.pattern import LETTERS, Word, read
from kvkernels.layout.picture import picture
from kvkernels.layout.pools import Placed, joined
from kvkernels.layout.shards import FIELDS, shard_fields
from kvkernels.layout.views import fields_of_view
from kvkernels.layout.words import is_layout, printed, read_again


@dataclass(frozen=True)
class Member:
    """One of a layout's parts as it was written: what it is called, and the first of its tensors in the list."""

    name: str
    layout: KVLayout
    tensor: int

    @property
    def tensors(self) -> range:
        """Where in the list its tensors are."""
        return range(self.tensor, self.tensor + self.layout._geometry.num_tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """What plans match: ``k`` and ``v`` where the part is a pair."""
        if self.layout.K == 1:
            return (self.name,)
        return ("k", "v") if self.name == "kv" else (f"k_{self.name}", f"v_{self.name}")


@dataclass(frozen=True, repr=False)
class KVLayout:
    """The physical layout of a KV cache, written as a pattern of letters.

    ``L`` layers, ``K`` the key/value pair (K first; absent for MLA), ``B`` blocks, ``N`` tokens of a block, ``H``
    heads, ``D`` elements of a head, ``W`` the rows of a state. Left of the bar: which tensor of a list. Right of it:
    the physical order inside a tensor, outermost first. Letters left of ``B`` count pools, those right of it are the
    inside of a page::

        "L | K B N H D"          one tensor a layer, token-first (NHD)              2 L pools
        "L | B H N K D"          one tensor a layer, head-first, K and V in turn      L pools
        "L K | B N H D"          K and V in tensors of their own                    2 L pools
        "L K B N H D"            everything in one tensor                           2 L pools
        "B L K N H D"            page first, as host pools like it                  1 pool
        "L | B N D"              MLA                                                  L pools
        "L | B H D/8 N D%8"      D cut in two: eights of a head, then their elements  L pools

    What differs in more than its order is named ``parts``.

    Parameters
    ----------
    pattern : str
        Letters, each at most once, in any order; spaces are free. ``B`` must come, right of the bar. A letter but ``K``
        and ``B`` may be cut in two, which stand apart: ``D/8`` counts eights, ``D%8`` is inside of one.
    L, K, B, N, W, H, D : int
        Sizes; a letter that the pattern lacks has size 1. ``K`` is at most 2.
    dtype : torch.dtype
        Of an element; opaque layouts need none.
    D_v : int, optional
        Elements of a head of V, where they differ from K's ``D``.
    row_bytes : int, optional
        From one block of a pool to the next, where rows are padded; by default nothing lies between blocks. The same as
        ``steps["B"]``.
    steps : mapping of str to int
        Bytes from one to the next of letters, or halves of letters, that stand right of the bar, where memory is not
        dense: ``{"N": 656}`` where a token's row is wider than what of it is this layout's. The steps of letters left
        of it follow.
    offset_bytes : int
        From a tensor's first byte to the first page, 0 by default.
    opaque : bool
        Pages whose inside is unknown (compressed pages): copied whole, never converted or resharded. Its pattern ends
        with ``B``.
    page_bytes : int, optional
        Bytes of one block in one pool. Needed for opaque layouts, computed for others: the larger of the two where K's
        and V's pools differ.
    scales : KVLayout, optional
        Further tensors with the same blocks, such as a quantised cache's scales: their pools come after the others, and
        one call converts both. The part named ``scales`` of ``parts``.
    deal : (int, int, int), optional
        ``(rank, of, interleave)``: tokens are dealt out to ``of`` ranks, ``interleave`` in turn, and this is what one
        of them holds. Its token ``t`` is the token ``(t // interleave * of + rank) * interleave + t % interleave`` of
        all, and its block covers ``N * of`` tokens.
    first_layer, total_layers, first_head, total_heads, first_d, total_d : int
        A range of what the whole has, as ``shard`` sets it: ``H`` heads from ``first_head`` on, of ``total_heads``;
        the layers of a pipeline stage; elements of a part that is resharded along ``D``.
    replica, replicas : int
        Which of how many ranks with the same heads.
    tensor : int, optional
        As one of ``parts``: the first of its tensors in the list. By default after those of the part before it; a part
        with an ``offset_bytes`` lies in the same.

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
    >>> KVLayout("L | B N D", L=2, B=8, N=64, D=576, dtype=torch.bfloat16, deal=(3, 8, 1)).span_tokens
    512
    """

    pattern: str
    L: int = field(default=1, kw_only=True)
    K: int = field(default=1, kw_only=True)
    B: int = field(kw_only=True)
    N: int = field(default=1, kw_only=True)
    W: int = field(default=1, kw_only=True)
    H: int = field(default=1, kw_only=True)
    D: int = field(default=1, kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)
    D_v: int | None = field(default=None, kw_only=True)
    row_bytes: int | None = field(default=None, kw_only=True)
    steps: Mapping[str, int] = field(default_factory=dict, kw_only=True, hash=False)
    offset_bytes: int = field(default=0, kw_only=True)
    opaque: bool = field(default=False, kw_only=True)
    page_bytes: int = field(default=0, kw_only=True)
    scales: KVLayout | None = field(default=None, kw_only=True)
    deal: tuple[int, int, int] | None = field(default=None, kw_only=True)
    first_layer: int = field(default=0, kw_only=True)
    total_layers: int = field(default=0, kw_only=True)
    first_head: int = field(default=0, kw_only=True)
    total_heads: int = field(default=0, kw_only=True)
    first_d: int = field(default=0, kw_only=True)
    total_d: int = field(default=0, kw_only=True)
    replica: int = field(default=0, kw_only=True)
    replicas: int = field(default=1, kw_only=True)
    tensor: int | None = field(default=None, kw_only=True)
    #: As the first of ``parts``: its name, and the others by theirs.
    name: str = field(default="kv", kw_only=True)
    beside: tuple[tuple[str, KVLayout], ...] = field(default=(), kw_only=True)
    #: A shard whose whole has padding or begins inside a buffer, and which says of itself nothing of the kind.
    padding_unsaid: bool = field(default=False, repr=False, compare=False, kw_only=True)
    text: str = field(init=False, repr=False, compare=False)
    _geometry: Geometry = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rules.settle(self)
        rules.put(self, "text", self._as_text())

    def _as_text(self) -> str:
        """All fields as JSON, which ``from_text`` reads; kept, since a compiler cannot write it while it traces."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        dtype = None if self.dtype is None else dtype_text(self.dtype)
        scales = None if self.scales is None else self.scales.text
        beside = [(name, part.text) for name, part in self.beside]
        return json.dumps({**values, "dtype": dtype, "scales": scales, "beside": beside, "steps": dict(self.steps)})

    @staticmethod
    def from_text(text: str) -> KVLayout:
        """The layout with this ``text``, or that is printed so.

        Examples
        --------
        >>> from kvkernels import KVLayout
        >>> KVLayout.from_text('KVLayout("B N D", B=8, N=4, D=16, float16, elements 16 to 31 of 64)').first_d
        16
        """
        return _from_text(text)

    @staticmethod
    def of(view: Tensor | Sequence[Tensor], letters: str, **given: Any) -> KVLayout:
        """The layout of what an engine registered: a letter a dimension, the rest is read off its strides.

        Parameters
        ----------
        view : Tensor or sequence of Tensor
            As it was registered; several of one shape where the letters have a bar.
        letters : str
            What each dimension counts, in the view's own order. Letters in brackets are one dimension: ``(K D)`` is K
            and then V of a head.
        **given
            Fields of ``KVLayout`` that a shape does not say, such as ``first_head``; and sizes, where a dimension is
            several letters.

        Raises
        ------
        ValueError
            The letters are not the view's dimensions, or elements share memory.

        Examples
        --------
        >>> import torch
        >>> from kvkernels import KVLayout
        >>> KVLayout.of(torch.zeros(8, 16, 4, 64).transpose(1, 2), "B H N D")
        KVLayout("B N H D", B=8, N=16, H=4, D=64, float32)
        >>> rows = torch.zeros(8, 16, 576, dtype=torch.bfloat16)
        >>> KVLayout.of(rows[..., 512:], "B N D")
        KVLayout("B N D", B=8, N=16, D=64, bfloat16, steps={"N": 1152})
        >>> KVLayout.of([torch.zeros(8, 4, 16, 192)], "L | B H N (K D)", D_v=64)
        KVLayout("L | B H N K D", L=1, K=2, B=8, N=16, H=4, D=128, D_v=64, float32)
        """
        return KVLayout(**fields_of_view(view, letters, given))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_text, (self.text,)

    # The pattern's parts.

    @cached_property
    def outside_words(self) -> tuple[Word, ...]:
        """What stands left of the bar."""
        return read(self.pattern)[0]

    @cached_property
    def inside_words(self) -> tuple[Word, ...]:
        """What stands right of the bar, outermost first."""
        return read(self.pattern)[1]

    @cached_property
    def outside(self) -> str:
        """Letters left of the bar."""
        return _letters(self.outside_words)

    @cached_property
    def inside(self) -> str:
        """Letters right of the bar, outermost first; one that is cut in two comes twice."""
        return _letters(self.inside_words)

    @cached_property
    def letters(self) -> str:
        """All of the pattern's letters."""
        return self.outside + self.inside

    @cached_property
    def pool_letters(self) -> str:
        """Letters that count pools: those left of ``B``, the first of them counting slowest."""
        return _letters(pool_words(self))

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

    def first(self, letter: str) -> int:
        """The first of a letter that is held here; 0 where the letter has no range."""
        return int(getattr(self, FIELDS[letter][0])) if letter in FIELDS else 0

    def total(self, letter: str, k: int = 0) -> int:
        """How many there are of a letter in the whole that this is a range of."""
        total = getattr(self, FIELDS[letter][1]) if letter in FIELDS else 0
        return int(total) or self.size(letter, k)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element; of an opaque layout, its page."""
        return self.page_bytes if self.dtype is None or self.opaque else self.dtype.itemsize

    # All parts together.

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The parts as they were written, each a layout of its own: one, its scales, or what ``parts`` was given."""
        others = (*((("scales", self.scales),) if self.scales else ()), *self.beside)
        own = replace(self, scales=None, beside=()) if self.beside or self.scales else self
        members = [Member(self.name, own, self.tensor or 0)]
        for name, part in others:
            before = members[-1].tensors
            follows = before.start if part.offset_bytes and part is not self.scales else before.stop
            members.append(Member(name, part, follows if part.tensor is None else part.tensor))
        return tuple(members)

    @cached_property
    def _pools(self) -> tuple[tuple[PoolPlace, ...], list[tuple[int, int]]]:
        """All pools, and where in them each of the members begins."""
        return joined([Placed(m.name, m.layout, m.layout._geometry, m.tensor) for m in self.members])

    @property
    def num_tensors(self) -> int:
        """Tensors in the list, those of all parts."""
        return max(member.tensors.stop for member in self.members)

    @property
    def num_pools(self) -> int:
        """Pools that the tensors are, those of all parts; parts that lie in one row of a block share a pool."""
        return len(self._pools[0])

    @property
    def pools(self) -> tuple[PoolPlace, ...]:
        """Where each pool lies, those of all parts."""
        return self._pools[0]

    @property
    def begins(self) -> list[tuple[int, int]]:
        """For each of the members the first of its pools, and the byte of the page at which it begins there."""
        return self._pools[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all parts, what lies between elements left out."""
        return sum(member.layout._own_block_bytes for member in self.members)

    @property
    def _own_block_bytes(self) -> int:
        if self.opaque:
            return sum(place.page_bytes for place in self.places)
        return self.element_bytes * self.L * self.N * self.W * self.H * sum(self.size("D", k) for k in range(self.K))

    @cached_property
    def block_tokens(self) -> int:
        """Tokens of a block: those of the first part that has ``N``."""
        return next((m.layout.N for m in self.members if "N" in m.layout.letters), 1)

    @cached_property
    def deal_of_tokens(self) -> tuple[int, int, int] | None:
        """How the tokens of the parts are dealt out."""
        return next((m.layout.deal for m in self.members if "N" in m.layout.letters), None)

    @property
    def span_tokens(self) -> int:
        """Tokens that a block covers, those included that other ranks hold."""
        return self.block_tokens * (self.deal_of_tokens[1] if self.deal_of_tokens else 1)

    @property
    def places(self) -> tuple[PoolPlace, ...]:
        """Where each pool lies, of the first part alone."""
        return self._geometry.places

    def needed_bytes(self, tensor: int) -> int:
        """From the first byte of a tensor of the list to the end of the last page in it."""
        last = max(self.B - 1, 0)
        mine = [place for place in self.pools if place.tensor == tensor]
        return max(place.offset_bytes + last * place.row_bytes + place.page_bytes for place in mine) if self.B else 0

    def dimensions(self, tensor: int) -> list[tuple[int, int]] | None:
        """Size and step in bytes of each letter inside a tensor, outermost first; None where K's and V's differ."""
        words, k = self.inside_words, self._geometry.k_of_tensor[tensor]
        steps = self._geometry.bytes_of[k]
        if self.D_v is None or "K" not in self.inside:
            return [(word.extent(self.size(word.letter, k)), steps[str(word)]) for word in words]
        if words[-2].letter != "K" or words[-1].letter != "D" or self.steps.keys() & {"K", "D"}:
            return None
        # K's and V's elements of a head as one letter.
        outer = [(word.extent(self.size(word.letter)), steps[str(word)]) for word in words[:-2]]
        return [*outer, (self.D + self.D_v, self.element_bytes)]

    def step(self, letter: str, k: int = 0) -> Step:
        """How far one step along a letter, or a half of one, is, in K (0) or V (1): their pages may differ."""
        return self._geometry.step(letter, k)

    def start(self, k: int) -> tuple[int, int]:
        """Pool and byte of its page at which K (0) or V (1) begins, other letters being 0."""
        return self._geometry.starts[k]

    # What is made of it.

    def shard(self, rank: int, size: int, along: str = "H") -> KVLayout:
        """The layout of one of ``size`` ranks, tensor-parallel ones by default.

        Heads are dealt out in order, the first ranks getting one more where ``size`` does not divide them. With more
        ranks than heads, rank ``r`` holds head ``r * H // size``: those with the same head are replicas. A layout
        without ``H`` (MLA) is held whole by every rank. ``along="L"`` are pipeline stages, and ``along="D"`` the
        elements of a state. ``row_bytes``, ``offset_bytes`` and steps of letters left of that are the whole's, and do
        not carry over: a rank whose buffers have padding, too, says so by ``dataclasses.replace``.

        Raises
        ------
        ValueError
            The rank is out of range, the layout is opaque or a shard itself, or parts that share a page would move in
            it: shard each of them, and say where it lies.

        Examples
        --------
        >>> import torch
        >>> from kvkernels import KVLayout
        >>> layout = KVLayout("L | B N H D", B=8, H=2, D=4, dtype=torch.float32)
        >>> [(s.first_head, s.replica) for s in (layout.shard(rank, 4) for rank in range(4))]
        [(0, 0), (0, 1), (1, 0), (1, 1)]
        """
        rank, size = integer("KVLayout.shard: rank", rank), integer("KVLayout.shard: size", size)
        if along not in FIELDS:
            rules.fail(self, f"along must be one of {', '.join(FIELDS)}, got {along!r}")
        if not 0 <= rank < size:
            rules.fail(self, f"rank must be below size and not negative, got rank {rank} of {size}")
        if self.opaque:
            rules.fail(self, "opaque pages cannot be sharded: what is in them is unknown")
        if self.total(along) != self.size(along) or self.replicas != 1:
            rules.fail(self, "a shard cannot be sharded again")
        if along == "D" and self.D_v is not None:
            rules.fail(self, f"along must be H or L where K and V differ, got {along!r}")
        changes = [shard_fields(member.layout, along, rank, size) for member in self.members]
        for member, fields_ in zip(self.members, changes, strict=True):
            if any(other.tensor == member.tensor for other in self.members if other is not member):
                self._keep_place(member, fields_, along)
        first, *others = (
            replace(member.layout, **fields_) for member, fields_ in zip(self.members, changes, strict=True)
        )
        if self.scales:
            return replace(first, scales=others[0])
        return replace(first, beside=tuple(zip((name for name, _ in self.beside), others, strict=True)))

    def _keep_place(self, member: Member, fields_: dict[str, Any], along: str) -> None:
        """A part that shares its page with others lies where it did, unless a cut one moves it: then ValueError."""
        part = member.layout
        beside = [other.layout for other in self.members if other.tensor == member.tensor]
        if any(along in layout.letters for layout in beside):
            room = min(fields_["steps"].values(), default=0)
            if fields_["steps"] != part.steps or part.offset_bytes >= room:
                rules.fail(
                    self,
                    f"part {member.name} cannot be sharded along {along} where it lies, beside others in one page: "
                    "shard each part, and say where in its rank's page it lies",
                )
        else:
            fields_["row_bytes"] = part.row_bytes
        fields_ |= {"offset_bytes": part.offset_bytes, "steps": part.steps, "padding_unsaid": False}

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
        return printed(self)

    def draw(self) -> str:
        """A picture of it: each letter with its size and its step in bytes, what lies between, and what is one page.

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
        return picture(self)


def _letters(words: Sequence[Word]) -> str:
    return "".join(word.letter for word in words)


@lru_cache(maxsize=256)
def _from_text(text: str) -> KVLayout:
    if not text.startswith("{"):
        kind, values = read_again(text)
        values = {name: _from_text(one) if is_layout(one) else one for name, one in values.items()}
        if kind == "parts":
            return parts(**values)
        try:
            return KVLayout(**values)
        except TypeError as error:
            raise ValueError(f"KVLayout.from_text: text must be what a layout is printed as, got {text!r}") from error
    values = json.loads(text)
    values["dtype"] = None if values["dtype"] is None else getattr(torch, values["dtype"])
    values["scales"] = None if values["scales"] is None else _from_text(values["scales"])
    values["beside"] = tuple((name, _from_text(part)) for name, part in values["beside"])
    return KVLayout(**values)


def parts(**given: Any) -> KVLayout:
    """A layout of several named parts, such as K and V in other orders, or a latent, its scale and its rope.

    Plans match parts by name. ``K=2`` of one layout are the parts ``k`` and ``v``, one without K is ``kv``.

    Parameters
    ----------
    **given
        A name and its ``KVLayout``, its pattern, or ``(pattern, D, dtype, offset_bytes)``, the last of which may be
        left out; then the fields of ``KVLayout`` that patterns have in common. A part lies in tensors of its own, which
        follow those of the part before it; one with an ``offset_bytes`` lies in the same. ``tensor`` says otherwise.

    Returns
    -------
    KVLayout
        Its own fields are those of the first part.

    Raises
    ------
    ValueError
        A part is neither, the parts do not have the same layers, blocks and tokens, or two of them share a byte.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import KVLayout
    >>> from kvkernels.layout import parts
    >>> parts(k="L | B H D/8 N D%8", v="L | B H D N", L=2, B=8, N=16, H=4, D=64, dtype=torch.float16).num_tensors
    4
    >>> f8, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    >>> page = parts(
    ...     latent=("B N D", 512, f8), scale=("B N D", 4, f32, 512), rope=("B N D", 64, bf16, 528),
    ...     B=8, N=64, steps={"N": 656},
    ... )
    >>> page.num_pools, page.page_bytes, page.block_bytes
    (1, 41840, 41984)
    """
    common_names = {f.name for f in fields(KVLayout)} - {"pattern", "scales", "name", "beside", "text"}
    common = {name: value for name, value in given.items() if name in common_names}
    found: list[tuple[str, KVLayout]] = []
    for name, part in given.items():
        if name in common_names:
            continue
        if isinstance(part, str):
            part = _of_pattern(part, common)
        elif isinstance(part, tuple) and len(part) in (3, 4) and isinstance(part[0], str):
            own = dict(zip(("D", "dtype", "offset_bytes"), part[1:], strict=False))
            part = _of_pattern(part[0], {**common, **own})
        if not isinstance(part, KVLayout) or part.scales or part.beside:
            raise ValueError(f"parts: {name} must be a pattern or a KVLayout without further parts, got {part!r}")
        found.append((name, part))
    if not found:
        raise ValueError(f"parts: a part must be given, got {', '.join(given) or 'nothing'}")
    (name, first), *others = found
    return replace(first, name=name, beside=tuple(others))


def _of_pattern(pattern: str, common: Mapping[str, Any]) -> KVLayout:
    """With those of the common fields that are of its letters."""
    lacks = {letter for letter in LETTERS if letter not in pattern}
    unsaid = lacks | {name for letter in lacks & FIELDS.keys() for name in FIELDS[letter]}
    unsaid |= {"deal"} if "N" in lacks else set()
    own = {name: value for name, value in common.items() if name not in unsaid}
    if isinstance(own.get("steps"), Mapping):
        own["steps"] = {word: step for word, step in own["steps"].items() if word[:1] not in lacks}
    return KVLayout(pattern, **own)
