"""Records of what an engine's KV cache held."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvkernels_records.config import CAPTURE_POINTS
from kvkernels_records.dtypes import Array, dtype_name

#: What a layer's cache is, by whose words it may be found in an engine.
KINDS = ("full_attention", "sliding_window", "chunked_local", "mla", "state")
_NAME = re.compile(rf"layer_(0|[1-9]\d{{0,8}})_({'|'.join(CAPTURE_POINTS)})_([a-z][a-z0-9_]*)")


@dataclass
class LayerCapture:
    """One layer at one capture point.

    Parameters
    ----------
    layer_index : int
    capture_point : str
        Of ``CAPTURE_POINTS``.
    key, value : array or None
        ``(num_heads, seq_len, head_dim)``, of one of ``DTYPES``. None where the layer has none of its own: MLA has a
        ``latent``, a recurrent layer its states, in ``parts``.
    kind : str
        Of ``KINDS``.
    parts : mapping of str to array
        Whatever else the layer holds: ``latent`` ``(1, seq_len, dim)``, ``state0``, ``state1``, ``key_scale``,
        ``value_scale``.
    first_token : int
        The place in the request of the first token that is there: a sliding window has given up earlier ones.

    Raises
    ------
    ValueError
        Something is out of range, or key and value are not of three dimensions, of one dtype and as many heads and
        tokens.
    TypeError
        A dtype that no capture holds.
    """

    layer_index: int
    capture_point: str
    key: Array | None = None
    value: Array | None = None
    kind: str = "full_attention"
    parts: Mapping[str, Array] = field(default_factory=dict)
    first_token: int = 0

    def __post_init__(self) -> None:
        if self.layer_index < 0:
            raise ValueError(f"LayerCapture: layer_index must be from 0 on, got {self.layer_index}")
        if self.capture_point not in CAPTURE_POINTS:
            raise ValueError(
                f"LayerCapture: capture_point must be of {', '.join(CAPTURE_POINTS)}, got {self.capture_point!r}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"LayerCapture: kind must be of {', '.join(KINDS)}, got {self.kind!r}")
        for name, array in self.arrays().items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"LayerCapture: parts must have names of a-z, 0-9 and _, got {name!r}")
            dtype_name(array.dtype)
        for what, given in (("key", self.key), ("value", self.value)):
            if given is not None and given.ndim != 3:
                raise ValueError(f"LayerCapture: {what} must be (heads, tokens, dim), got the shape {given.shape}")
        if self.key is not None and self.value is not None:
            if self.key.dtype != self.value.dtype:
                raise ValueError(
                    f"LayerCapture: key and value must be of one dtype, got {dtype_name(self.key.dtype)} and "
                    f"{dtype_name(self.value.dtype)}"
                )
            if self.key.shape[:2] != self.value.shape[:2]:
                raise ValueError(
                    "LayerCapture: key and value must have as many heads and tokens, got the shapes "
                    f"{self.key.shape} and {self.value.shape}"
                )

    def arrays(self) -> dict[str, Array]:
        """Everything that is there, under its name in a file: ``layer_0_after_prefill_key`` and so on."""
        given = {"key": self.key, "value": self.value, **self.parts}
        start = f"layer_{self.layer_index}_{self.capture_point}"
        return {f"{start}_{name}": array for name, array in given.items() if array is not None}


@dataclass
class CaptureResult:
    """Layers, and where they are from.

    Parameters
    ----------
    layers : list of LayerCapture
    metadata : dict
        What JSON can say: ``model``, ``engine``, ``versions``, ``dtype``, ``layout``, ``block_tokens``,
        ``prompt_tokens``, ``mock``, ``tp_size`` and, of a rank's file, ``tp_rank``.

    Raises
    ------
    ValueError
        A layer is there twice at one capture point.

    Examples
    --------
    >>> import numpy as np
    >>> key = np.zeros((2, 5, 4), np.float16)
    >>> result = CaptureResult([LayerCapture(3, "after_prefill", key, key)])
    >>> list(result.arrays())
    ['layer_3_after_prefill_key', 'layer_3_after_prefill_value']
    >>> result.get(3).key.shape
    (2, 5, 4)
    """

    layers: list[LayerCapture]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[tuple[int, str]] = set()
        for layer in self.layers:
            place = (layer.layer_index, layer.capture_point)
            if place in seen:
                raise ValueError(f"CaptureResult: layer {place[0]} must be given once for {place[1]}, got it twice")
            seen.add(place)

    def __iter__(self) -> Iterator[LayerCapture]:
        return iter(self.layers)

    def get(self, layer_index: int, capture_point: str = "after_prefill") -> LayerCapture:
        """One layer at one point.

        Raises
        ------
        KeyError
            It was not captured.
        """
        for layer in self.layers:
            if (layer.layer_index, layer.capture_point) == (layer_index, capture_point):
                return layer
        raise KeyError(f"layer {layer_index} was not captured {capture_point}")

    def arrays(self) -> dict[str, Array]:
        """All arrays by name."""
        return {name: array for layer in self.layers for name, array in layer.arrays().items()}

    def rank(self, tp_rank: int, tp_size: int) -> CaptureResult:
        """The part that one of ``tp_size`` ranks holds: its share of the heads, and all of what has none.

        Raises
        ------
        ValueError
            The heads of some layer cannot be divided evenly.
        """
        if not 0 <= tp_rank < tp_size:
            raise ValueError(f"CaptureResult: tp_rank must be from 0 to {tp_size - 1}, got {tp_rank}")

        def share(array: Array | None) -> Array | None:
            if array is None:
                return None
            heads = array.shape[0]
            if heads % tp_size:
                raise ValueError(f"CaptureResult: tp_size must divide the heads, got {tp_size} for {heads}")
            return array[heads * tp_rank // tp_size : heads * (tp_rank + 1) // tp_size]

        layers = [
            LayerCapture(
                one.layer_index, one.capture_point, share(one.key), share(one.value), one.kind, one.parts,
                one.first_token,
            )
            for one in self.layers
        ]  # fmt: skip
        return CaptureResult(layers, {**self.metadata, "tp_rank": tp_rank, "tp_size": tp_size})


def parse_name(name: str) -> tuple[int, str, str] | None:
    """Layer, capture point and part of an array's name, or None where it is no capture's.

    Examples
    --------
    >>> parse_name("layer_10_during_decode_key")
    (10, 'during_decode', 'key')
    """
    found = _NAME.fullmatch(name)
    return (int(found[1]), found[2], found[3]) if found else None


def reconstruct_tp_shards(shards: Sequence[Array], axis: int = 0) -> Array:
    """Join tensor-parallel shards in the order of their ranks.

    Parameters
    ----------
    shards : sequence of array
        One a rank, of one dtype, and of one shape but for ``axis``.
    axis : int
        Along which they are joined, from -ndim to ndim - 1.

    Returns
    -------
    array
        The only shard itself where there is one, else a new array.

    Raises
    ------
    ValueError
        No shard, or shards that do not fit; the text names the shard, the axis and both sizes.

    Examples
    --------
    >>> import numpy as np
    >>> reconstruct_tp_shards([np.zeros((4, 10, 8)), np.ones((4, 10, 8))]).shape
    (8, 10, 8)
    >>> reconstruct_tp_shards([np.zeros((4, 10, 8)), np.zeros((4, 9, 8))])
    Traceback (most recent call last):
    ...
    ValueError: reconstruct_tp_shards: shards[1] must have size 10 on axis 1 as shards[0] has, got 9
    """
    what = "reconstruct_tp_shards"
    if not shards:
        raise ValueError(f"{what}: shards must not be empty")
    first = shards[0]
    if not -first.ndim <= axis < first.ndim:
        raise ValueError(f"{what}: axis must be from {-first.ndim} to {first.ndim - 1}, got {axis}")
    joined = axis % first.ndim
    for rank, shard in enumerate(shards):
        if shard.ndim != first.ndim:
            raise ValueError(f"{what}: shards[{rank}] must have {first.ndim} dimensions, got {shard.ndim}")
        if shard.dtype != first.dtype:
            raise ValueError(f"{what}: shards[{rank}] must be of dtype {first.dtype}, got {shard.dtype}")
        for dim, (size, wanted) in enumerate(zip(shard.shape, first.shape, strict=True)):
            if dim != joined and size != wanted:
                raise ValueError(
                    f"{what}: shards[{rank}] must have size {wanted} on axis {dim} as shards[0] has, got {size}"
                )
    return first if len(shards) == 1 else np.concatenate(shards, axis=joined)
