"""Where an attention back end puts each element of K and V in a page: learned from the back end's own writes.

vLLM's CPU kernels keep K in orders of their own, one for each instruction set. None of them is written down here. What
goes where is found by writing index patterns into a scratch cache with the layer's own update, a bit of the index a
time: an element of the page is 0 or not, whatever the cache's dtype and scale are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Writes ``key`` and ``value``, ``(tokens, heads, dim)``, to slots of a cache, as the engine would.
Update = Callable[[Tensor, Tensor, Tensor, Tensor], object]


class Packing(NamedTuple):
    """The places of a page's elements.

    Parameters
    ----------
    key, value : Tensor
        int64 ``(heads, tokens, dim)``: each element's index in a page that is flattened, ``cache[block].reshape(-1)``.
    """

    key: Tensor
    value: Tensor

    def read(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of pages.

        Parameters
        ----------
        pages : Tensor
            ``(blocks, ...)``, as the layer's cache is.

        Returns
        -------
        tuple of Tensor
            ``(heads, blocks * tokens, dim)``, each.
        """
        flat = pages.reshape(len(pages), -1)
        key, value = (flat[:, places.to(flat.device)] for places in (self.key, self.value))
        return key.transpose(0, 1).flatten(1, 2), value.transpose(0, 1).flatten(1, 2)


def learn_packing(
    cache: Tensor, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, update: Update,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Packing:  # fmt: skip
    """Find out how a back end packs its pages.

    Parameters
    ----------
    cache : Tensor
        The layer's, ``(blocks, heads, tokens, ...)``; nothing of it is read or written, a scratch cache of two blocks
        has its strides.
    heads, key_dim, value_dim : int
        Of the layer.
    dtype : torch.dtype
        Of the keys and values that the layer writes.
    update : callable
        ``update(key, value, cache, slots)``.
    scales : tuple of float
        By which the layer divides keys and values of a cache that is quantised.

    Raises
    ------
    ValueError
        What the back end writes is no permutation of what it was given, or depends on how many tokens come at once.
    """
    tokens = cache.shape[2]
    scratch = _scratch_like(cache)
    key = _places_of(scratch, update, tokens, heads, key_dim, value_dim, dtype, scales, which=0)
    value = _places_of(scratch, update, tokens, heads, value_dim, key_dim, dtype, scales, which=1)
    if torch.isin(key.flatten(), value.flatten()).any():
        raise ValueError("learn_packing: the back end keeps K and V in the same elements of a page")
    packing = Packing(key, value)
    _check_by_pieces(packing, scratch, update, heads, key_dim, value_dim, dtype, scales)
    return packing


def _scratch_like(cache: Tensor) -> Tensor:
    """Two blocks with the strides of a cache."""
    shape = (2, *cache.shape[1:])
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, cache.stride(), strict=True))
    return torch.zeros(elements, dtype=cache.dtype, device=cache.device).as_strided(shape, cache.stride())


def _places_of(
    scratch: Tensor, update: Update, tokens: int, heads: int, dim: int, other_dim: int, dtype: torch.dtype,
    scales: tuple[float, float], *, which: int,
) -> Tensor:  # fmt: skip
    """Where K (``which`` 0) or V lies, from one write for each bit of an element's index."""
    count = tokens * heads * dim
    index = torch.arange(count).reshape(tokens, heads, dim)
    other = torch.zeros(tokens, heads, other_dim, dtype=dtype, device=scratch.device)
    slots = torch.arange(tokens, 2 * tokens, device=scratch.device)  # of the second block

    def written(pattern: Tensor) -> Tensor:
        """Which elements of the page are not 0 once a pattern of 0 and 1 was written."""
        scratch.zero_()
        mine = (pattern * scales[which]).to(device=scratch.device, dtype=dtype)
        update(*((mine, other) if which == 0 else (other, mine)), scratch, slots)
        if _nonzero(scratch[0]).any():
            raise ValueError("learn_packing: the back end writes into another block than that of the slot")
        return _nonzero(scratch[1]).reshape(-1).cpu()

    used = written(torch.ones_like(index, dtype=torch.float32)).nonzero().flatten()
    found = torch.zeros(len(used), dtype=torch.int64)
    for bit in range(max(1, (count - 1).bit_length())):
        found |= written((index >> bit & 1).float())[used].long() << bit
    if len(used) != count or not torch.equal(found.sort().values, torch.arange(count)):
        raise ValueError(
            f"learn_packing: the back end must keep each of {count} elements once, got {len(used)} in a page"
        )
    places = torch.empty(count, dtype=torch.int64)
    places[found] = used
    return places.reshape(tokens, heads, dim).transpose(0, 1).contiguous()


def _nonzero(page: Tensor) -> Tensor:
    return page.contiguous().view(torch.uint8).reshape(*page.shape, -1).any(dim=-1)


def _check_by_pieces(
    packing: Packing, scratch: Tensor, update: Update, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype,
    scales: tuple[float, float],
) -> None:  # fmt: skip
    """Random zeros and ones in pieces of 1, 3 and all other tokens must be read back as they were written."""
    tokens = packing.key.shape[1]
    draw = torch.Generator().manual_seed(0)
    scratch.zero_()
    bits = [torch.randint(0, 2, (tokens, heads, dim), generator=draw) for dim in (key_dim, value_dim)]
    key, value = (
        (one.float() * scale).to(device=scratch.device, dtype=dtype) for one, scale in zip(bits, scales, strict=True)
    )
    for start, stop in ((0, 1), (1, min(4, tokens)), (min(4, tokens), tokens)):
        if start < stop:
            slots = torch.arange(tokens + start, tokens + stop, device=scratch.device)
            update(key[start:stop].contiguous(), value[start:stop].contiguous(), scratch, slots)
    for got, wanted in zip(packing.read(scratch[1:]), bits, strict=True):
        if not torch.equal(_nonzero(got).cpu(), wanted.transpose(0, 1).bool()):
            raise ValueError("learn_packing: how the back end packs a page depends on how many tokens come at once")
