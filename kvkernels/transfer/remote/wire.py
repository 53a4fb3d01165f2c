"""What pages are between two machines: packed as the sender has them, and put where the receiver's layout wants them.

::

    sender's pools       K of layer 0, V of layer 0, K of layer 1, …         a block is a page in each
    packed, a segment    | K0 V0 K1 V1 of block 7 | K0 V0 K1 V1 of block 3 | …
    receiver             takes each segment for pools of the sender's layout, and runs the plan between the layouts

A block whose pages are more than a segment holds is cut into parts, each some neighbouring pools. What is sent, summed
and counted is a *unit*: one block's pages in one part. Unit ``part * blocks + i`` is of the transfer's block ``i``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvkernels.layout.cache import KVCache
from kvkernels.layout.layout import KVLayout
from kvkernels.layout.plan import Plan, compile_plan
from kvkernels.ops import copy_pages, gather_blocks
from kvkernels.transfer.remote.errors import ChecksumError, PlanError, ProtocolError
from kvkernels.transfer.remote.messages import MOST_PAGES
from kvkernels.transfer.remote.sums import first_difference, sums_of

MOST_RING_BYTES = 1 << 28
_MOST_ROWS = 1 << 24  # layers times K and V times tokens times heads
#: A run with its sides exchanged.
_SWAPPED = [1, 0, 3, 2, 4, 6, 5, 7, 9, 8, 10, 12, 11, 13, 15, 14]


def as_cache(pools: KVCache | Sequence[Tensor]) -> KVCache:
    """A cache, or one of opaque pages made of plain tensors; ValueError where pages are not all of one size."""
    if isinstance(pools, KVCache):
        cache = pools
    else:
        tensors = list(pools) if isinstance(pools, Sequence) else []
        if not tensors or not all(isinstance(one, Tensor) and one.dim() >= 1 and len(one) for one in tensors):
            raise ValueError(f"RemotePool: pools must be a KVCache or a list of Tensors with blocks, got {pools!r}")
        rows = {(len(one), one[0].numel() * one.element_size(), one.stride(0) * one.element_size()) for one in tensors}
        if len(rows) > 1:
            raise ValueError(
                "RemotePool: pools must be a KVCache, or tensors with as many blocks of as many bytes each, got "
                f"(blocks, page bytes, row bytes) of {sorted(rows)}"
            )
        ((blocks, page_bytes, row_bytes),) = rows
        layout = KVLayout("L | B", opaque=True, L=len(tensors), B=blocks, page_bytes=page_bytes, row_bytes=row_bytes)
        cache = KVCache(layout, tensors)
    if cache.device.type != "cpu":
        raise ValueError(f"RemotePool: pools must be on the host, got ones on {cache.device}")
    return cache


def layout_of_text(text: str) -> KVLayout:
    """A peer's layout; ProtocolError where it is none, or has more pools than anything that is served."""
    try:
        values = json.loads(text)
        pools = values
        while pools is not None:  # the cache, then its scales
            if math.prod(int(pools[letter]) for letter in "LKNH") > _MOST_ROWS:
                raise ValueError(f"more than {_MOST_ROWS} rows of heads in a block")
            pools = None if pools["scales"] is None else json.loads(pools["scales"])
        return KVLayout.from_text(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"remote: layout must be a KVLayout's text, got one with {error!r}"[:500]) from None


@dataclass(frozen=True)
class Part:
    """Neighbouring pools of a block that go together: ``starts[p]`` is where pool ``first_pool + p`` begins."""

    first_pool: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Of one block in it."""
        return self.starts[-1] + self.sizes[-1]

    @property
    def pools(self) -> slice:
        """Which of the layout's."""
        return slice(self.first_pool, self.first_pool + len(self.sizes))


def ring_of(layout: KVLayout, segments: int, segment_bytes: int) -> tuple[int, int]:
    """Segments and their bytes for a sender of these pages: larger ones, and maybe fewer, where pages need them."""
    segment_bytes = max(segment_bytes, *_page_bytes(layout))
    if segment_bytes > MOST_RING_BYTES:
        raise PlanError(f"remote: a pool's page must have at most {MOST_RING_BYTES} bytes, got {segment_bytes}")
    return min(segments, MOST_RING_BYTES // segment_bytes), segment_bytes


def parts_of(layout: KVLayout, segment_bytes: int) -> list[Part]:
    """As few as fit in segments; PlanError where one pool's page does not."""
    parts: list[Part] = []
    sizes: list[int] = []
    first = 0
    for page_bytes in _page_bytes(layout):
        if page_bytes > segment_bytes:
            raise PlanError(f"remote: a pool's page must fit in {segment_bytes} bytes, got {page_bytes}")
        if sum(sizes) + page_bytes > segment_bytes:
            parts.append(_part(first, sizes))
            first, sizes = first + len(sizes), []
        sizes.append(page_bytes)
    return [*parts, _part(first, sizes)]


def units_in(part: Part, segment_bytes: int) -> int:
    """The most of a part that one segment takes."""
    return min(segment_bytes // part.page_bytes, MOST_PAGES)


def _part(first: int, sizes: list[int]) -> Part:
    return Part(first, tuple(accumulate(sizes[:-1], initial=0)), tuple(sizes))


def _page_bytes(layout: KVLayout) -> list[int]:
    scales = [] if layout.scales is None else _page_bytes(layout.scales)
    return [place.page_bytes for place in layout.places] + scales


class Conversion:
    """From pages of one layout, packed, to pages of another; both sides make it, and compare its ``digest``.

    PlanError where the layouts do not hold the same cache, or have no head in common.
    """

    def __init__(self, src: KVLayout, dst: KVLayout, segment_bytes: int) -> None:
        if src.N != dst.N:
            raise PlanError(f"remote: blocks must be of as many tokens on both sides, got {src.N} and {dst.N}")
        try:
            plan = compile_plan(src, dst, allow_partial=True)
        except ValueError as error:
            raise PlanError(str(error)) from None
        if plan.bytes == 0:
            raise PlanError(f"remote: the sender must have heads that the receiver wants, got {src!r} for {dst!r}")
        self.src, self.dst = src, dst
        self.parts = parts_of(src, segment_bytes)
        self.segment_bytes = segment_bytes
        self._runs = [_runs_of(plan, part) for part in self.parts]
        said = [src.text.encode(), dst.text.encode(), plan.runs.rows.astype("<i8").tobytes()]
        self.digest = hashlib.sha256(b"".join(len(one).to_bytes(8, "big") + one for one in said)).digest()

    def unpack(self, part: int, packed: Tensor, ids: Tensor, pools: Sequence[Tensor]) -> None:
        """Put packed pages, uint8 ``[n, page_bytes]``, where they belong in the receiver's pools."""
        here = torch.arange(len(ids))
        views = self._views(part, packed)
        copy_pages(views, pools, torch.stack([here, ids], 1), self._runs[part], 1, 1, False, "auto", 0)

    def check(self, part: int, packed: Tensor, ids: Tensor, pools: Sequence[Tensor]) -> None:
        """ChecksumError where the pools do not hold what was unpacked: they are gathered back and compared."""
        there, here = torch.zeros_like(packed), torch.zeros_like(packed)
        back = self._runs[part][:, _SWAPPED].contiguous()
        same = self._runs[part].clone()
        same[:, [1, 3, 6, 9, 12, 15]] = same[:, [0, 2, 5, 8, 11, 14]]
        rows = torch.arange(len(ids))
        copy_pages(pools, self._views(part, there), torch.stack([ids, rows], 1), back, 1, 1, False, "auto", 0)
        pairs = torch.stack([rows, rows], 1)
        copy_pages(self._views(part, packed), self._views(part, here), pairs, same, 1, 1, False, "auto", 0)
        if not torch.equal(there, here):
            raise ChecksumError("remote: pages must read back as they were written, got other bytes")

    def _views(self, part: int, packed: Tensor) -> list[Tensor]:
        this = self.parts[part]
        return [packed[:, at : at + size] for at, size in zip(this.starts, this.sizes, strict=True)]


def _runs_of(plan: Plan, part: Part) -> Tensor:
    rows = plan.runs.rows
    mine = rows[(rows[:, 0] >= part.pools.start) & (rows[:, 0] < part.pools.stop)].copy()
    mine[:, 0] -= part.first_pool
    return torch.from_numpy(mine)


def pack(pools: Sequence[Tensor], part: Part, ids: Tensor, packed: Tensor) -> bytes:
    """Gather blocks into ``packed``, uint8 ``[n, page_bytes]``, and return their sums."""
    gather_blocks(list(pools[part.pools]), ids, packed)
    return sums_of(packed)


def check_sums(packed: Tensor, sums: bytes) -> None:
    """ChecksumError where the pages are not those that the sums are of."""
    at = first_difference(sums_of(packed), sums)
    if at is not None:
        raise ChecksumError(f"remote: a page's bytes must have its sum, got others in page {at} of {len(packed)}")
