"""What an engine's layers hold for given blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvkernels.capture.packing import Packing
from kvkernels_records.capture import LayerCapture
from kvkernels_records.sources import numpy_of


@dataclass
class CachedLayer:
    """One layer's cache, and how it is read.

    Parameters
    ----------
    index : int
        The layer's number in the model.
    kind : str
        As in ``LayerCapture``.
    group : int
        Which of a request's block tables is the layer's.
    block_tokens : int
        Tokens of one of the table's blocks; a block may be several of the cache.
    caches : sequence of Tensor
        Attention: one, ``(blocks, heads, tokens, ...)``. MLA: one, ``(blocks, tokens, dim)``. A state: any number,
        ``(blocks, ...)``.
    packing : Packing, optional
        Of attention.
    dtype : torch.dtype, optional
        What the elements of a cache of bytes are.
    scales : mapping of str to float
        ``key_scale`` and ``value_scale`` of a cache that is quantised.
    """

    index: int
    kind: str
    group: int
    block_tokens: int
    caches: Sequence[Tensor]
    packing: Packing | None = None
    dtype: torch.dtype | None = None
    scales: Mapping[str, float] = field(default_factory=dict)

    def capture(self, point: str, table: Sequence[int], num_tokens: int) -> LayerCapture:
        """What the layer holds of a request.

        Parameters
        ----------
        point : str
            Of ``CAPTURE_POINTS``.
        table : sequence of int
            The request's blocks in the layer's group; 0 is vLLM's null block, which holds nothing.
        num_tokens : int
            How many of the request's tokens are wanted, from the first.

        Raises
        ------
        ValueError
            The table is too short, or holds nothing of these tokens.
        """
        table = list(table[: -(-num_tokens // self.block_tokens)])
        if self.kind == "state":
            held = [block for block in table if block]
            if not held:
                raise ValueError(f"capture: layer {self.index} must hold a state, got a table without a block")
            parts = {f"state{i}": numpy_of(cache[held[-1]].clone()) for i, cache in enumerate(self.caches)}
            return LayerCapture(self.index, point, None, None, "state", parts)
        if len(table) * self.block_tokens < num_tokens:
            raise ValueError(
                f"capture: layer {self.index} must hold {num_tokens} tokens, got a table of {len(table)} blocks of "
                f"{self.block_tokens}"
            )
        nulls = [place for place, block in enumerate(table) if not block]
        first = nulls[-1] + 1 if nulls else 0  # what a sliding window gave up
        if first == len(table):
            raise ValueError(f"capture: layer {self.index} holds none of the request's {num_tokens} tokens any more")
        (cache,) = self.caches
        token_axis = 2 if self.packing else 1
        pieces = self.block_tokens // cache.shape[token_axis]  # blocks of the cache for one of the table
        ids = [block * pieces + piece for block in table[first:] for piece in range(pieces)]
        pages = cache[torch.tensor(ids, device=cache.device)]
        start = first * self.block_tokens
        count = num_tokens - start
        if self.packing is None:
            latent = self._typed(pages.flatten(0, 1)[:count])
            return LayerCapture(self.index, point, None, None, self.kind, {"latent": numpy_of(latent[None])}, start)
        key, value = (self._typed(part[:, :count].contiguous()) for part in self.packing.read(pages))
        parts = {name: numpy_of(torch.tensor([scale])) for name, scale in self.scales.items()}
        return LayerCapture(self.index, point, numpy_of(key), numpy_of(value), self.kind, parts, start)

    def _typed(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.dtype) if self.dtype is not None else tensor


def capture_blocks(
    layers: Sequence[CachedLayer], tables: Sequence[Sequence[int]], num_tokens: int, point: str = "after_prefill",
    wanted: Sequence[int] | None = None,
) -> list[LayerCapture]:  # fmt: skip
    """What an engine holds of a request, while it cannot write: between two steps, or in a worker's hook.

    Parameters
    ----------
    layers : sequence of CachedLayer
        As ``vllm_layers`` finds them.
    tables : sequence of sequence of int
        The request's blocks, a table a group.
    num_tokens : int
    point : str
    wanted : sequence of int, optional
        Layers; all by default.

    Returns
    -------
    list of LayerCapture

    Raises
    ------
    ValueError
        A layer that is wanted does not exist, or a table does not hold the tokens.
    """
    check_wanted(layers, wanted)
    return [
        layer.capture(point, tables[layer.group], num_tokens)
        for layer in layers
        if wanted is None or layer.index in wanted
    ]


def check_wanted(layers: Sequence[CachedLayer], wanted: Sequence[int] | None) -> None:
    """Raise for a layer that does not exist.

    Raises
    ------
    ValueError
        It names the layer and those that there are.
    """
    known = {layer.index for layer in layers}
    if missing := sorted(set(wanted or ()) - known):
        raise ValueError(f"capture: layers must be of {_ranges(known)}, got {missing[0]}")


def layer_indices(names: Sequence[str]) -> dict[str, int]:
    """Each layer's number: the one in its name where those are distinct, else its place.

    Examples
    --------
    >>> layer_indices(["model.layers.3.self_attn.attn", "model.layers.10.self_attn.attn"])
    {'model.layers.3.self_attn.attn': 3, 'model.layers.10.self_attn.attn': 10}
    """
    found = {name: re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in names}
    numbers = {name: int(digits[0]) for name, digits in found.items() if len(digits) == 1}
    if len(set(numbers.values())) == len(names):
        return numbers
    return {name: place for place, name in enumerate(names)}


def _ranges(numbers: Any) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]} to {ordered[-1]}" if ordered == list(range(ordered[0], ordered[-1] + 1)) else str(ordered)
