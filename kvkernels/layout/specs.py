"""What a layer keeps in its blocks: specs of our own, and vLLM's, which are read by their attributes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """A block of ``block_size`` tokens: K and V of ``num_kv_heads`` heads.

    ``page_size_padded`` is the bytes from one block to the next where the engine pads pages, ``state_content_bytes``
    what it keeps of a head and token where that is packed (656 for DeepSeek V3.2's latent), and ``dcp_sharded`` whether
    context ranks have tokens of their own of this layer.
    """

    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    head_size_v: int | None = None
    page_size_padded: int | None = None
    state_content_bytes: int | None = None
    dcp_sharded: bool = True

    @property
    def unpadded_page_size_bytes(self) -> int:
        """Bytes of one block that the layer uses."""
        v = self.head_size if self.head_size_v is None else self.head_size_v
        packed = self.state_content_bytes
        cell_bytes = (self.head_size + v) * self.dtype.itemsize if packed is None else packed
        return self.block_size * self.num_kv_heads * cell_bytes

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block, padding included."""
        return self.page_size_padded or self.unpadded_page_size_bytes


@dataclass(frozen=True, kw_only=True)
class FullAttention(_Attention):
    """A layer that attends to everything before.

    Examples
    --------
    >>> import torch
    >>> FullAttention(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.float16).page_size_bytes
    16384
    """


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(_Attention):
    """A layer that attends to the last ``sliding_window`` tokens."""

    sliding_window: int


@dataclass(frozen=True, kw_only=True)
class ChunkedLocalAttention(_Attention):
    """A layer that attends inside chunks of ``attention_chunk_size`` tokens."""

    attention_chunk_size: int


@dataclass(frozen=True, kw_only=True)
class MLA(_Attention):
    """Multi-head latent attention: one latent vector a token, and no V."""

    num_kv_heads: int = 1
    head_size_v: int | None = 0


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """A layer whose block is a state: tensors of these shapes and dtypes, one after the other.

    ``cuts`` says how tensor parallelism cuts each of them: along which dimension of its shape, and the whole model's
    sizes of what lies there side by side, each cut on its own: ``((1, (4096, 1024, 1024)), (0, (64,)))`` for a conv
    state ``[width, x | B | C]`` and 64 heads. With ``tp_replicated`` every rank has the whole state.

    Examples
    --------
    >>> import torch
    >>> spec = Mamba(shapes=((3, 1536), (16, 64, 128)), dtypes=(torch.bfloat16,) * 2,
    ...              cuts=((1, (4096, 1024, 1024)), (0, (64,))))
    >>> spec.page_size_bytes
    271360
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    block_size: int = 1
    page_size_padded: int | None = None
    cuts: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    tp_replicated: bool = False

    @property
    def unpadded_page_size_bytes(self) -> int:
        """Bytes of one block that the layer uses."""
        return sum(math.prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block, padding included."""
        return self.page_size_padded or self.unpadded_page_size_bytes


@dataclass(frozen=True)
class KVCacheGroup:
    """Layers that share one block table, and what they keep: one spec for all of them, or one a layer's name."""

    layer_names: Sequence[str]
    kv_cache_spec: Any


@dataclass(frozen=True)
class PageFacts:
    """What of a spec decides where its bytes are."""

    page_bytes: int
    unpadded_page_bytes: int
    is_state: bool
    spec: Any


def spec_of_layer(group: Any, layer_name: str) -> Any:
    """A layer's spec: a group has one for all of its layers, or one by name, as ``UniformTypeKVCacheSpecs`` does."""
    spec = group.kv_cache_spec
    by_name = spec if isinstance(spec, Mapping) else getattr(spec, "kv_cache_specs", None)
    if by_name is None:
        return spec
    if layer_name not in by_name:
        raise ValueError(f"canonicalize: the group's specs must have layer {layer_name!r}, got {sorted(by_name)}")
    return by_name[layer_name]


def page_facts(layer_name: str, spec: Any) -> PageFacts:
    """What a spec, ours or vLLM's, says of its page, or ValueError naming a spec that says nothing."""
    is_state = hasattr(spec, "shapes") and hasattr(spec, "dtypes")
    is_attention = all(hasattr(spec, name) for name in ("num_kv_heads", "head_size", "dtype", "block_size"))
    if not (is_state or is_attention) or not hasattr(spec, "page_size_bytes"):
        raise ValueError(
            f"canonicalize: layer {layer_name!r} must have the spec of an attention layer or of a state, "
            f"got {type(spec).__name__}"
        )
    if is_state:
        unpadded = sum(math.prod(s) * d.itemsize for s, d in zip(spec.shapes, spec.dtypes, strict=True))
    else:
        # vLLM's name for it has changed.
        names = ("unpadded_page_size_bytes", "real_page_size_bytes", "page_size_bytes")
        unpadded = next(getattr(spec, name) for name in names if hasattr(spec, name))
    return PageFacts(int(spec.page_size_bytes), int(unpadded), is_state, spec)
