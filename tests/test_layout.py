"""Layouts, plans and conversions: every element where an oracle without strides puts it, and nothing else moved."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from layout_cases import Side, expected, random_mapping, random_sides

from kvkernels import KVCache, convert_blocks


def _caches(side: Side) -> list[KVCache]:
    return [KVCache(layout, tensors) for layout, tensors in zip(side.layouts, side.tensors, strict=True)]


def _bytes(side: Side) -> list[list[bytes]]:
    return [[bytes(tensor.tolist()) for tensor in tensors] for tensors in side.tensors]


def _convert_and_compare(rng, executors: tuple[str, ...]) -> str:
    """What the pair was, for the count of what was seen."""
    src, dst = random_sides(rng)
    mapping = random_mapping(rng, src, dst)
    layer = int(rng.integers(src.layouts[0].L)) if rng.integers(4) == 0 else None
    wanted, source, poison = expected(src, dst, mapping, layer), _bytes(src), _bytes(dst)
    ids = torch.tensor(mapping, dtype=torch.int64).reshape(-1, 2)
    for executor in executors:
        for tensors, values in zip(dst.tensors, poison, strict=True):
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8)) if value else None
        convert_blocks(_caches(src), _caches(dst), ids, layer=layer, executor=executor)
        text = f"{executor}: {src.layouts} to {dst.layouts} with {mapping}, layer {layer}"
        assert _bytes(dst) == wanted, text
        assert _bytes(src) == source, text
    ranks = (len(src.ranks), len(dst.ranks))
    kind = "blocks" if src.layouts[0].N != dst.layouts[0].N else "same"
    return f"{kind} {'scales' if src.layouts[0].scales else ''} {'tp' if max(ranks) > 1 else ''}"


@pytest.mark.parametrize("seed", range(20))
def test_random_pairs(seed):
    """2,000 pairs of layouts: any order of letters, any shards, block sizes, padding, scales and head sizes."""
    rng = np.random.default_rng([5, seed])
    seen = Counter(_convert_and_compare(rng, ("cpu", "reference")) for _ in range(100))
    assert len(seen) == 8, seen
