"""Captures of no engine, for trying the tools. They say so: ``mock`` in their metadata is true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvkernels_records.capture import CaptureResult, LayerCapture, reconstruct_tp_shards
from kvkernels_records.config import faults_of, raise_faults
from kvkernels_records.dtypes import Array


def capture_kv_mock(
    prompt: str,
    *,
    layers: Sequence[int] | None = None,
    capture_points: Sequence[str] = ("after_prefill",),
    tp_size: int = 1,
    max_tokens: int = 1,
    num_layers: int = 32,
    num_heads: int = 32,
    head_dim: int = 128,
    seed: int = 0,
) -> CaptureResult:
    """A capture of random float16 values, a token a word.

    Each rank's heads are made on their own and joined by ``reconstruct_tp_shards``, and the values do not depend on
    ``tp_size``.

    Parameters
    ----------
    prompt : str
    layers, capture_points, tp_size, max_tokens
        As ``CaptureConfig`` has them.
    num_layers, num_heads, head_dim : int
        The model that is made up.
    seed : int
        The same seed and prompt give the same values.

    Raises
    ------
    ValueError
        It names every fault.

    Examples
    --------
    >>> capture_kv_mock("three words here", layers=[0]).get(0).key.shape
    (32, 3, 128)
    """
    faults = faults_of(layers, capture_points, max_tokens, tp_size)
    if not prompt.split():
        faults.append("prompt must not be empty")
    if layers is not None:
        faults += [f"layers must be below {num_layers}, got {layer}" for layer in layers if layer >= num_layers]
    if tp_size > 0 and num_heads % tp_size:
        faults.append(f"tp_size must divide {num_heads} heads, got {tp_size}")
    raise_faults("capture_kv_mock", faults)
    words = len(prompt.split())
    found = []
    for layer in range(num_layers) if layers is None else layers:
        for point in capture_points:
            tokens = words + max_tokens - 1 if point == "during_decode" else words

            def heads_of(part: int, layer: int = layer, tokens: int = tokens) -> Array:
                # A head's and a token's values hang on nothing else, so that points and ranks agree.
                shards = [
                    np.stack([_head(seed, layer, part, head, tokens, head_dim) for head in heads])
                    for heads in np.array_split(np.arange(num_heads), tp_size)
                ]
                return reconstruct_tp_shards(shards)

            found.append(LayerCapture(layer, point, heads_of(0), heads_of(1)))
    metadata = {
        "mock": True, "model": "mock", "engine": "mock", "dtype": "float16", "layout": "H T D", "seed": seed,
        "prompt_tokens": words, "tp_size": tp_size,
    }  # fmt: skip
    return CaptureResult(found, metadata)


def _head(seed: int, layer: int, part: int, head: int, tokens: int, dim: int) -> Array:
    draw = np.random.default_rng([seed, layer, part, head])
    return draw.standard_normal((tokens, dim), dtype=np.float32).astype(np.float16)
