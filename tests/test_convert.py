"""Conversions: every element where an oracle without strides puts it, and nothing else moved."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
from layout_cases import Part, Rank, Side, expected, random_mapping, random_sides, shard_heads, side_of

import kvkernels
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks

#: Pairs of layouts; KVKERNELS_EXAMPLES=10 makes them 5,000.
PAIRS = max(20, round(500 * float(os.environ.get("KVKERNELS_EXAMPLES", "1"))))


def _caches(side: Side) -> list[KVCache]:
    return [KVCache(layout, tensors) for layout, tensors in zip(side.layouts, side.tensors, strict=True)]


def _bytes(side: Side) -> list[list[bytes]]:
    return [[bytes(tensor.tolist()) for tensor in tensors] for tensors in side.tensors]


def _convert_and_compare(rng, executors: tuple[str, ...]) -> None:
    src, dst = random_sides(rng)
    mapping = random_mapping(rng, src, dst)
    total_layers = src.ranks[0].parts[0].totals[0]
    layer = int(rng.integers(total_layers)) if rng.integers(4) == 0 else None
    wanted, complete = expected(src, dst, mapping, layer)
    source, poison = _bytes(src), _bytes(dst)
    ids = torch.tensor(mapping, dtype=torch.int64).reshape(-1, 2)
    caches, out = _caches(src), _caches(dst)
    text = lambda: f"{src.layouts} to {dst.layouts} with {mapping}, layer {layer}"  # noqa: E731
    if not complete:
        with pytest.raises(ValueError, match=r"compile_plan: the sources lack \w+ that the destination has"):
            convert_blocks(caches, out, ids, layer=layer)
        assert _bytes(dst) == poison, text()
    for executor in executors:
        for tensors, values in zip(dst.tensors, poison, strict=True):
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(torch.frombuffer(bytearray(value), dtype=torch.uint8)) if value else None
        convert_blocks(caches, out, ids, layer=layer, executor=executor, allow_partial=not complete)
        assert _bytes(dst) == wanted, f"{executor}: {text()}"
        assert _bytes(src) == source, f"{executor}: {text()}"


def _kinds(src: Side, dst: Side) -> set[str]:
    """What there is in a pair of sides."""
    parts = [part for side in (src, dst) for rank in side.ranks for part in rank.parts]
    words = {word for part in parts for word in (*part.outside, *part.inside)}
    found = {
        "block sizes": src.span != dst.span,
        "ranks": max(len(src.ranks), len(dst.ranks)) > 1,
        "parts": any(len(rank.parts) > 1 for side in (src, dst) for rank in side.ranks),
        "one page": any(part.tensor == 0 and part.offset for part in parts),
        "scales": any(rank.scales for side in (src, dst) for rank in side.ranks),
        "dealt": any(part.deal for part in parts),
        "stages": any(len(part.layers) < part.totals[0] for part in parts),
        "elements": any(len(part.elements) < part.totals[2] for part in parts),
        "heads": any(len(part.heads) < part.totals[1] for part in parts),
        "gaps": any(part.steps for part in parts),
        "cuts": any("/" in word for word in words),
        "state": "W" in words,
        "uneven": any(part.elements_v is not None for part in parts),
    }
    return {kind for kind, is_there in found.items() if is_there}


@pytest.mark.parametrize("seed", range(20))
def test_random_pairs(seed):
    """Two spellings of one cache: orders, cuts, gaps, parts in one page or apart, ranks of any kind, block sizes."""
    rng = np.random.default_rng([5, seed])
    for _ in range(PAIRS // 20):
        _convert_and_compare(rng, ("cpu", "reference"))


def test_random_pairs_are_of_every_kind():
    rng = np.random.default_rng(1)
    seen = Counter(kind for _ in range(150) for kind in _kinds(*random_sides(rng)))
    assert len(seen) == 13 and min(seen.values()) >= 4, seen


TP_PAIRS = [(1, 8), (8, 1), (2, 4), (4, 2), (3, 2), (6, 4), (5, 3), (8, 8), (1, 1)]


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8])
@pytest.mark.parametrize(("src_ranks", "dst_ranks"), TP_PAIRS)
@pytest.mark.parametrize("patterns", [("L | K B N H D", "L | B H N K D"), ("B L K N H D", "L | K B N H D")])
def test_tensor_parallel_sizes(patterns, src_ranks, dst_ranks, heads):
    """More ranks than heads, and sizes that do not divide them, in either direction."""
    rng = np.random.default_rng(heads)
    sides = []
    for pattern, ranks in zip(patterns, (src_ranks, dst_ranks), strict=True):
        whole = KVLayout(pattern, L=2, K=2, B=3, N=2, H=heads, D=3, dtype=torch.float16)
        outside, _, inside = pattern.replace(" ", "").rpartition("|")
        parts = [
            Part(
                "kv", tuple(outside), tuple(inside), 3, torch.float16, (0, 1), (0, 1), 1, held, (0, 1, 2), True,
                totals=(2, heads, 3),
            )
            for held in shard_heads(heads, ranks)
        ]  # fmt: skip
        side = side_of(rng, [Rank((part,)) for part in parts], 2)
        for rank, layout in enumerate(side.layouts):
            assert whole.shard(rank, ranks).__dict__["_geometry"] == layout.__dict__["_geometry"]
        sides.append(side)
    src, dst = sides
    mapping = [(2, 0), (0, 2)]
    wanted, complete = expected(src, dst, mapping)
    assert complete
    convert_blocks(_caches(src), _caches(dst), torch.tensor(mapping))
    assert _bytes(dst) == wanted


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_that_write_on_their_own_take_turns(ranks):
    """Each writes its heads of its blocks into one cache: together they write every byte, and none twice."""
    whole = KVLayout("L | B N H D", L=2, B=8, N=2, H=2, D=4, dtype=torch.uint8)
    source = torch.randint(1, 256, (2, 8, 2, 2, 4), dtype=torch.uint8)
    out = KVCache(whole, [torch.zeros(8, 2, 2, 4, dtype=torch.uint8) for _ in range(2)])
    blocks = torch.arange(8)
    written = 0
    for rank in range(ranks):
        layout = whole.shard(rank, ranks)
        mine = source[:, :, :, layout.first_head : layout.first_head + layout.H].contiguous()
        writes = torch.tensor([block for block in blocks.tolist() if layout.is_writer(block)])
        kvkernels.reset_counters()
        convert_blocks(
            KVCache(layout, list(mine)), out, torch.stack((writes, writes), dim=1), allow_partial=True
        )  # fmt: skip
        written += kvkernels.counters()["cpu"]["bytes"]
    assert torch.equal(torch.stack(out.tensors), source)
    assert written == source.nbytes


def test_opaque_pages_are_copied_whole_and_their_padding_is_not():
    src = KVLayout("L | B", L=2, B=4, opaque=True, page_bytes=10, row_bytes=16)
    dst = KVLayout("L B", L=2, B=3, opaque=True, page_bytes=10)
    states = [torch.randint(1, 256, (4, 16), dtype=torch.uint8) for _ in range(2)]
    out = torch.zeros(60, dtype=torch.uint8)
    convert_blocks(KVCache(src, states), KVCache(dst, out), torch.tensor([[3, 1]]))
    wanted = torch.zeros(2, 3, 10, dtype=torch.uint8)
    wanted[0, 1], wanted[1, 1] = states[0][3, :10], states[1][3, :10]
    assert torch.equal(out.view(2, 3, 10), wanted)


def test_a_state_of_many_tensors_is_its_own_shape():
    """An opaque page may be shown as anything that is one page long."""
    layout = KVLayout("L | B", L=1, B=4, opaque=True, page_bytes=24)
    for tensor in (torch.zeros(4, 24, dtype=torch.int8), torch.zeros(4, 2, 3), torch.zeros(4, 3, dtype=torch.float64)):
        (pool,) = KVCache(layout, tensor).pools
        assert pool.shape == (4, 24) and pool.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mapping": [[0, 4]]}, IndexError, r"mapping\[0, 1\] = 4 is out of range"),
        ({"mapping": [[0, -1]]}, IndexError, r"mapping\[0, 1\] = -1 is out of range"),
        ({"mapping": [[0, 1], [2, 1]]}, ValueError, "mapping must name each destination once"),
        ({"executor": "fast"}, ValueError, "executor must be one of"),
        ({"sm_budget": -1}, ValueError, "sm_budget must not be negative"),
        ({"unit_tokens": 3}, ValueError, "unit_tokens must divide 2, which divides both block sizes, got 3"),
        ({"layer": 5}, IndexError, "layer must be below 2 and not negative, got 5"),
        ({"layer": 0.5}, IndexError, "layer must be below 2 and not negative, got 0.5"),
        ({"src": None}, ValueError, "convert_blocks: src must be a KVCache or a list of them, got None"),
        ({"src": []}, ValueError, r"convert_blocks: src must be a KVCache or a list of them, got \[\]"),
        ({"dst": [torch.zeros(3)]}, ValueError, "convert_blocks: dst must be a KVCache or a list of them"),
    ],
)
def test_refused_calls_write_nothing(options, error, match):
    layout = KVLayout("L | B N H D", L=2, B=4, N=2, H=1, D=4, dtype=torch.uint8)
    src, dst = ([torch.full((4, 2, 1, 4), fill, dtype=torch.uint8) for _ in range(2)] for fill in (1, 2))
    arguments = {"src": KVCache(layout, src), "dst": KVCache(layout, dst), "mapping": [[0, 1]], **options}
    arguments["mapping"] = torch.tensor(arguments["mapping"])
    with pytest.raises(error, match=match):
        convert_blocks(**arguments)
    assert all((tensor == 2).all() for tensor in dst) and all((tensor == 1).all() for tensor in src)


def test_one_tensor_may_be_both_sides():
    """Blocks of a cache in another order of letters, in place, where no block is read and written."""
    tensor = torch.arange(24, dtype=torch.uint8).reshape(3, 8)
    nhd, hnd = (KVLayout(p, B=3, N=2, H=2, D=2, dtype=torch.uint8) for p in ("B N H D", "B H N D"))
    convert_blocks(KVCache(nhd, tensor), KVCache(hnd, tensor), torch.tensor([[0, 2]]))
    assert tensor[2].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    with pytest.raises(ValueError, match="must not write what it reads"):
        convert_blocks(KVCache(nhd, tensor), KVCache(hnd, tensor), torch.tensor([[0, 0]]))


def test_a_layer_needs_no_other_layers_runs():
    """2 layers of 3,000 runs each: too many for one call, not for two."""
    sizes = {"L": 2, "B": 2, "N": 3000, "D": 2, "dtype": torch.uint8}
    src, dst = KVLayout("L | B N D", **sizes), KVLayout("L | N B D", **sizes)
    values = [torch.randint(0, 256, (2, 3000, 2), dtype=torch.uint8) for _ in range(2)]
    cache, turned = KVCache(src, values), KVCache(dst, [torch.zeros(3000, 2, 2, dtype=torch.uint8) for _ in range(2)])
    with pytest.raises(ValueError, match="more than 4096 runs would be needed"):
        convert_blocks(cache, turned, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="more than 4096 runs would be needed"):
        compile_plan(src, dst)
    for layer in range(2):
        convert_blocks(cache, turned, torch.tensor([[0, 1]]), layer=layer)
        assert torch.equal(turned.tensors[layer][:, 1], values[layer][0])
    with pytest.raises(IndexError, match="layer must be below 2 and not negative, got 2"):
        convert_blocks(cache, turned, torch.tensor([[0, 1]]), layer=2)
