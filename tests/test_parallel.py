"""Ranks in vLLM's order, and their pages in the canonical page: by an oracle that knows the tokens one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parallel_oracle import BLOCKS, Latent, filled, one, place, replayed, tokens_of

from kvkernels import copy_pages
from kvkernels.layout import (
    Parallel,
    TensorParallel,
    canonicalize,
    layout_of,
    opaque_mapping,
    plan_of_mapping,
)
from kvkernels.layout.specs import FullAttention, KVCacheGroup

SIZES = [
    {"tp": 8}, {"tp": 8, "dcp": 2}, {"tp": 8, "dcp": 8}, {"tp": 2, "pcp": 2, "pp": 2}, {"tp": 4, "dcp": 2, "pcp": 3},
    {"tp": 4, "pcp": 2, "dcp": 2, "pcp_deals": False}, {"tp": 2, "pcp": 2, "dcp": 4, "pcp_deals": False},
    {"tp": 2, "pcp": 4, "pcp_deals": False}, {"tp": 4, "dcp": 4, "pp": 3},
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ranks_are_where_vllm_has_them(sizes):
    world = Parallel(**sizes).world
    assert world == sizes.get("tp", 1) * sizes.get("pcp", 1) * sizes.get("pp", 1)
    for rank in range(world):
        mine, wanted = Parallel(rank=rank, **sizes), place(rank, **sizes)
        assert (mine.tp_rank, mine.pp_rank) == (wanted.tp_rank, wanted.pp_rank)
        assert (mine.context_rank, mine.context_ranks) == (wanted.context, wanted.contexts)
        if sizes.get("pcp", 1) == 1:
            assert mine.dcp_rank == mine.tp_rank % mine.dcp == mine.context_rank


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"tp": 8, "dcp": 3}, "dcp must divide tp, got 3 and 8$"),
        ({"tp": 2, "dcp": 4, "pcp": 2}, "dcp must divide tp, got 4 and 2$"),
        (
            {"tp": 2, "dcp": 8, "pcp": 2, "pcp_deals": False},
            r"dcp must be 1, pcp or tp \* pcp without pcp_deals, got 8",
        ),
        ({"tp": 8, "dcp": 3, "pcp_deals": False}, "dcp must divide tp, got 3 and 8$"),
        ({"tp": 0}, "tp must be positive, got 0$"),
        ({"interleave": 0}, "interleave must be positive, got 0$"),
        ({"total_kv_heads": -1}, "total_kv_heads must be positive, got -1$"),
        ({"tp": 2, "pp": 2, "rank": 4}, r"rank must be below tp \* pcp \* pp = 4, got 4$"),
        ({"rank": -1}, r"rank must be below tp \* pcp \* pp = 1, got -1$"),
        ({"tp": 2.0}, "tp must be an integer, got 2.0$"),
    ],
)
def test_sizes_that_make_no_sense_are_named(words, match):
    with pytest.raises(ValueError, match=f"^Parallel: {match}"):
        Parallel(**words)


def test_tensor_parallelism_is_the_same_by_its_older_words():
    old, new = TensorParallel(3, 8, 2, dcp=2), Parallel(tp=8, dcp=2, rank=3, total_kv_heads=2)
    assert isinstance(old, Parallel) and (old.rank, old.size, old.total_kv_heads) == (3, 8, 2)
    assert (old.tp_rank, old.context_rank, old.context_ranks) == (new.tp_rank, new.context_rank, new.context_ranks)
    assert repr(old) == "TensorParallel(rank=3, size=8, total_kv_heads=2, dcp=2)"
    assert replace(TensorParallel(0, 2, 4), rank=1) == TensorParallel(1, 2, 4)
    assert replace(TensorParallel(0, 2, 4), size=4) == TensorParallel(0, 4, 4)
    cache, spec = torch.zeros(3, 2, 4, 1, 8, dtype=torch.float16), GQA
    assert one(cache, spec, new) == [
        ref.mapping
        for ref in canonicalize({"layer": cache}, [KVCacheGroup(["layer"], spec)], tensor_parallel=old).group_data_refs[
            0
        ]
    ]
    with pytest.raises(ValueError, match="canonicalize: parallel must be given by one name, got tensor_parallel, too"):
        canonicalize({"layer": cache}, [KVCacheGroup(["layer"], spec)], parallel=new, tensor_parallel=old)


GQA = FullAttention(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float16)


# MLA as vLLM 0.32 registers it.


LATENTS = {
    "576 bfloat16": Latent(64, 576, torch.bfloat16),
    "576 fp8": Latent(64, 576, torch.float8_e4m3fn),
    "656 packed": Latent(64, 576, torch.uint8, 656),
    "132 of an indexer": Latent(64, 132, torch.uint8),
    "584 packed, a row for four tokens": Latent(64, 512, torch.uint8, 584, tokens_per_state=4, page_size_padded=9792),
}


def latent_cache(spec: Latent, kernel_blocks: int = 1) -> torch.Tensor:
    rows = spec.block_size // spec.tokens_per_state // kernel_blocks
    row = spec.unpadded_page_size_bytes // spec.dtype.itemsize // rows // kernel_blocks
    step = spec.page_size_bytes // spec.dtype.itemsize
    if spec.page_size_padded is None:
        step = rows * row
    storage = torch.zeros(BLOCKS * kernel_blocks * step * spec.dtype.itemsize, dtype=torch.uint8).view(spec.dtype)
    return storage.as_strided((BLOCKS * kernel_blocks, 1, rows, row), (step, rows * row, row, 1))


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_a_latent_is_its_own_canonical_page_and_its_ranks_write_in_turns(name, kernel_blocks):
    spec = LATENTS[name]
    if spec.page_size_padded and kernel_blocks > 1:
        return
    page = spec.unpadded_page_size_bytes
    local = np.random.default_rng(1).integers(0, 256, page)
    for tp, pp in ((8, 1), (1, 1), (16, 2)):
        cache = latent_cache(spec, kernel_blocks)
        ranks = [Parallel(tp=tp, pp=pp, rank=rank) for rank in range(tp)]
        mappings = [one(cache, spec, rank, num_blocks=BLOCKS)[0] for rank in ranks]
        assert all(mapping.parallelism_agnostic and mapping.num_writers == tp for mapping in mappings)
        assert [mapping.writer_index for mapping in mappings] == list(range(tp))
        pages = filled(mappings, [local] * tp, tp + 1)
        assert all((written == local).all() for written in pages) and len(pages[0]) == page


def test_a_latent_with_scales_inside_is_opaque():
    spec = SimpleNamespace(
        block_size=4, num_kv_heads=1, head_size=8, head_size_v=0, dtype=torch.uint8, page_size_bytes=64,
        state_content_bytes=16, kv_quant_mode=SimpleNamespace(is_per_token_head=True),
    )  # fmt: skip
    (mapping,) = one(torch.zeros(3, 1, 4, 16, dtype=torch.uint8), spec, Parallel(tp=2, rank=1))
    assert mapping == opaque_mapping(64, 1, 2)


# Heads and tokens.


ORDERS = ("B N H K D", "B H N K D", "B K N H D", "B K H N D", "K B N H D")


def registered(order: str, heads: int, n: int, d: int, d_v: int | None = None) -> torch.Tensor:
    """A layer's cache of float32 in one of the engines' shapes, in this order in memory."""
    if "K D" in order:
        row = d + (d if d_v is None else d_v)
        shape = (BLOCKS, n, heads, row) if order.startswith("B N") else (BLOCKS, heads, n, row)
        cache = torch.zeros(shape)
        return cache.transpose(1, 2) if order.startswith("B N") else cache
    sizes = {"B": BLOCKS, "K": 2, "N": n, "H": heads, "D": d}
    cache = torch.zeros([sizes[letter] for letter in order.split()])
    return cache.transpose(2, 3) if "H N" in order else cache


def numbered(order: str, heads: list[int], tokens: list[int], d: int, d_v: int, half: int | None) -> np.ndarray:
    """A page's bytes, element by element: each is known by what it is of, whoever holds it."""
    names = []
    inside = order.split()[order.split().index("B") + 1 :]

    def walk(letters: list[str], at: dict[str, int]) -> None:
        if not letters:
            k = at.get("K", half or 0)
            number = ((k * 64 + heads[at["H"]]) * 4096 + tokens[at["N"]]) * 64 + at["D"]
            names.extend(number * 4 + byte for byte in range(4))
            return
        k = at.get("K", half or 0)
        size = {"K": 2, "N": len(tokens), "H": len(heads), "D": d_v if k else d}[letters[0]]
        for i in range(size):
            walk(letters[1:], {**at, letters[0]: i})

    walk(inside, {})
    return np.array(names)


def stage_pages(order: str, sizes: dict, interleave: int, total: int, n: int, d: int, d_v: int):
    """The mappings of all ranks of a stage, and what each has in its page, by halves where K and V lie apart."""
    world = sizes.get("tp", 1) * sizes.get("pcp", 1)
    tp = sizes.get("tp", 1)
    each = max(1, total // tp)
    mappings, pages = [], []
    for rank in range(world):
        where = place(rank, **sizes)
        heads = list(range(where.tp_rank * total // tp, where.tp_rank * total // tp + each))
        tokens = tokens_of(where.context, where.contexts, interleave, n)
        spec = FullAttention(block_size=n, num_kv_heads=each, head_size=d, head_size_v=d_v, dtype=torch.float32)
        parallel = Parallel(rank=rank, total_kv_heads=total, interleave=interleave, **sizes)
        mappings.append(one(registered(order, each, n, d, d_v), spec, parallel, num_blocks=BLOCKS))
        halves = [None] if order.startswith("B") else [0, 1]
        pages.append([numbered(order, heads, tokens, d, d_v, half) for half in halves])
    return mappings, pages


DEALT = [
    ({"tp": 4, "dcp": 2}, 2, 1), ({"tp": 4, "dcp": 4}, 1, 2), ({"tp": 8, "dcp": 2}, 2, 4), ({"tp": 2, "pcp": 2}, 2, 2),
    ({"tp": 4, "dcp": 2, "pcp": 2}, 2, 1), ({"tp": 2, "dcp": 2, "pcp": 2, "pcp_deals": False}, 1, 2),
    ({"tp": 2, "dcp": 4, "pcp": 2, "pcp_deals": False}, 1, 1), ({"tp": 4, "dcp": 2, "pp": 2}, 2, 2),
    ({"tp": 4, "pcp": 2, "pcp_deals": False}, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("sizes", "total", "interleave"), DEALT, ids=str)
def test_dealt_pages_fill_the_page_of_all_tokens(order, sizes, total, interleave):
    """Each writer's bytes go where the oracle has them in the page of all heads and of all context ranks' tokens."""
    n, d, d_v = 4, 3, 2 if "K D" in order else 3
    mappings, pages = stage_pages(order, sizes, interleave, total, n, d, d_v)
    contexts = place(0, **sizes).contexts
    writers = len(mappings) // (min(total, sizes["tp"]) * contexts)
    for half in range(len(pages[0])):
        mine = [each[half] for each in mappings]
        assert all(mapping.parallelism_agnostic and mapping.num_writers == writers for mapping in mine)
        whole = numbered(
            order, list(range(total)), list(range(n * contexts)), d, d_v, None if len(pages[0]) == 1 else half
        )
        for page in filled(mine, [page[half] for page in pages], 2 * writers):
            assert page.tolist() == whole.tolist()


@pytest.mark.parametrize("order", ORDERS[:2])
def test_a_span_is_the_same_page_whoever_wrote_it(order):
    """16 tokens: one rank's block, or what several ranks' blocks with one id hold together; and back to any of them."""
    ways = [
        ({"tp": 1}, 16, 1), ({"tp": 2}, 16, 1), ({"tp": 4, "dcp": 2}, 8, 1), ({"tp": 4, "dcp": 2}, 8, 8),
        ({"tp": 8, "dcp": 4}, 4, 2), ({"tp": 2, "pcp": 4}, 4, 4), ({"tp": 4, "dcp": 2, "pcp": 2}, 4, 1),
    ]  # fmt: skip
    found = []
    for sizes, n, interleave in ways:
        mappings, pages = stage_pages(order, sizes, interleave, 2, n, 3, 3)
        (page,) = filled([each[0] for each in mappings], [each[0] for each in pages], 1)
        found.append(page.tolist())
        for each, local in zip(mappings, pages, strict=True):
            back = np.full(len(local[0]), -1, np.int64)
            mine, at = replayed(each[0])
            back[mine] = np.array(page)[at]
            assert back.tolist() == local[0].tolist()
    assert all(page == found[0] for page in found)


@pytest.mark.parametrize("name", ["576 bfloat16", "576 fp8", "656 packed", "352 packed"])
@pytest.mark.parametrize(
    ("sizes", "interleave"),
    [({"tp": 8, "dcp": 8}, 1), ({"tp": 8, "dcp": 2}, 64), ({"tp": 4, "dcp": 2, "pcp": 2}, 4)], ids=str,
)  # fmt: skip
def test_dealt_latents_at_real_sizes(name, sizes, interleave):
    """Rows of tokens: rank c's are every so many of the page, and ranks of one context write in turns."""
    spec = LATENTS.get(name) or Latent(64, 576, torch.uint8, 352)
    row = spec.page_size_bytes // 64
    world = sizes["tp"] * sizes.get("pcp", 1)
    contexts = place(0, **sizes).contexts
    rows = np.random.default_rng(2).integers(0, 256, (64 * contexts, row))
    mappings, pages = [], []
    for rank in range(world):
        (mapping,) = one(latent_cache(spec), spec, Parallel(rank=rank, interleave=interleave, **sizes))
        mappings.append(mapping)
        pages.append(rows[tokens_of(place(rank, **sizes).context, contexts, interleave, 64)].ravel())
    assert {mapping.num_writers for mapping in mappings} == {world // contexts}
    assert {mapping.canonical_page_size_bytes for mapping in mappings} == {spec.page_size_bytes * contexts}
    assert all(mapping.parallelism_agnostic for mapping in mappings)
    for page in filled(mappings, pages, world // contexts):
        assert (page == rows.ravel()).all()


def test_what_cannot_be_dealt_is_opaque():
    """An indexer's page is no rows; 3 tokens in turn are no part of a block; a group's ranks that have other heads."""
    dealt = {"tp": 4, "dcp": 2}
    indexer, packed = LATENTS["132 of an indexer"], LATENTS["584 packed, a row for four tokens"]
    for cache, spec, parallel in (
        (latent_cache(indexer), indexer, Parallel(rank=1, **dealt)),
        (latent_cache(packed), packed, Parallel(rank=1, **dealt)),
        (latent_cache(LATENTS["576 fp8"]), LATENTS["576 fp8"], Parallel(rank=1, interleave=3, **dealt)),
        (registered(ORDERS[0], 1, 4, 8), spec_of(4, 1, 8), Parallel(rank=1, total_kv_heads=4, **dealt)),
        (registered(ORDERS[0], 1, 4, 8), spec_of(4, 1, 8), Parallel(tp=6, dcp=3, rank=1, total_kv_heads=3)),
    ):
        (mapping,) = one(cache, spec, parallel, num_blocks=BLOCKS)
        assert mapping == opaque_mapping(spec.unpadded_page_size_bytes, parallel.rank, parallel.tp)


def spec_of(n: int, heads: int, d: int) -> FullAttention:
    return FullAttention(block_size=n, num_kv_heads=heads, head_size=d, dtype=torch.float32)


def test_a_group_that_is_not_dealt_is_replicated():
    """vLLM says so of a draft model's layers: context ranks then hold the same tokens."""
    spec = FullAttention(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32, dcp_sharded=False)
    (mapping,) = one(registered(ORDERS[0], 1, 4, 8), spec, Parallel(tp=8, dcp=4, rank=5, total_kv_heads=2))
    assert (mapping.canonical_page_size_bytes, mapping.num_writers, mapping.writer_index) == (512, 4, 1)


def test_cells_of_packed_values_are_cut_by_heads_and_tokens():
    """A slot a head and token, whatever is in it: TurboQuant's, in vLLM's token-first order."""
    page = np.arange(2 * 8 * 136).reshape(8, 2, 136)  # tokens, heads, bytes
    mappings, pages = [], []
    for rank in range(4):
        spec = FullAttention(
            block_size=4, num_kv_heads=1, head_size=128, dtype=torch.uint8, state_content_bytes=136
        )  # fmt: skip
        cache = torch.zeros(BLOCKS, 4, 1, 136, dtype=torch.uint8).transpose(1, 2)
        mappings += one(cache, spec, Parallel(tp=4, dcp=2, rank=rank, total_kv_heads=2))
        pages.append(page[tokens_of(rank % 2, 2, 1, 4), rank // 2].ravel())
    assert (filled(mappings, pages, 1)[0] == page.ravel()).all()


# Blocks of several layers.


def layers_page(order: str, layers: list[int], heads: list[int], tokens: list[int]) -> np.ndarray:
    """A block of several layers, element by element."""
    sizes = {"L": layers, "K": [0, 1], "N": tokens, "H": heads, "D": [0, 1, 2]}
    names = [
        sum(value << shift for value, shift in zip(coordinate, shifts, strict=True))
        for letters in [order.replace("B", "").replace(" ", "")]
        for shifts in [[{"L": 16, "K": 15, "N": 8, "H": 4, "D": 0}[letter] for letter in letters]]
        for coordinate in itertools.product(*(sizes[letter] for letter in letters))
    ]
    return (np.array(names)[:, None] * 4 + np.arange(4)).ravel()


@pytest.mark.parametrize("order", ["B L K N H D", "B H L N K D", "B N L H K D", "B L N H K D", "B L K H N D"])
@pytest.mark.parametrize(
    "sizes", [{"tp": 1}, {"tp": 2}, {"tp": 2, "pp": 2}, {"tp": 4, "dcp": 2, "pp": 3}, {"tp": 4, "pp": 2}], ids=str
)
def test_stages_fill_the_block_of_all_layers(order, sizes):
    """Twelve layers: stages of the block that has all of them, with heads and tokens cut, too."""
    tp, pp, total, n = sizes["tp"], sizes.get("pp", 1), 2, 4
    each, heads = 12 // pp, max(1, total // tp)
    letters = order.split()
    shown = "BLHN" if "K D" in order else "BLKNH"
    mappings, pages = [], []
    for rank in range(tp * pp):
        where = place(rank, **sizes)
        counts = {"B": BLOCKS, "L": each, "K": 2, "N": n, "H": heads, "D": 3}
        memory = torch.zeros([counts[letter] for letter in letters])
        if "K D" in order:
            memory = memory.flatten(-2)
        tensor = memory.permute([*(letters.index(letter) for letter in shown), memory.dim() - 1])
        spec = FullAttention(block_size=n, num_kv_heads=heads, head_size=3, dtype=torch.float32)
        first = where.pp_rank * each
        parallel = Parallel(rank=rank, total_kv_heads=total, first_layer=first, total_layers=12, **sizes)
        group = KVCacheGroup([str(first + i) for i in range(each)], spec)
        found = canonicalize(tensor, [group], num_blocks=BLOCKS, block_dim=0, parallel=parallel)
        mappings.append(found.group_data_refs[0][0].mapping)
        mine = [where.tp_rank * total // tp + i for i in range(heads)]
        tokens = tokens_of(where.context, where.contexts, 1, n)
        pages.append(layers_page(order, list(range(first, first + each)), mine, tokens))
    assert all(mapping.parallelism_agnostic for mapping in mappings)
    contexts = place(0, **sizes).contexts
    whole = layers_page(order, list(range(12)), [0, 1], list(range(n * contexts)))
    for page in filled(mappings, pages, 2):
        assert (page == whole).all()


def test_blocks_of_layers_that_cannot_be_placed_are_opaque():
    spec = spec_of(4, 2, 8)
    tensor = torch.zeros(BLOCKS, 3, 2, 4, 2, 8)
    names = ["a", "b", "c"]
    wide = {"a": spec, "b": spec, "c": spec_of(8, 1, 8)}
    two = torch.zeros(BLOCKS, 2, 2, 4, 2, 8)
    known = Parallel(tp=2, rank=1, total_kv_heads=4)
    found = canonicalize(tensor, [KVCacheGroup(names, spec)], block_dim=0, parallel=known)
    assert found.group_data_refs[0][0].mapping.parallelism_agnostic
    for cache, group, parallel in (
        (tensor, KVCacheGroup(names, spec), Parallel(tp=2, pp=2, rank=1, total_kv_heads=4)),
        (tensor, KVCacheGroup(names, spec), Parallel(tp=2, rank=1, total_kv_heads=4, first_layer=1, total_layers=3)),
        (tensor, KVCacheGroup(names, wide), known),
        (two, KVCacheGroup(names[:2], spec), known),
        (tensor.view(BLOCKS, 3, -1), KVCacheGroup(names, spec), known),
        (
            torch.zeros(BLOCKS, 3, 3, 5, 16),
            KVCacheGroup(names, spec_of(5, 3, 8)),
            Parallel(tp=2, rank=1, total_kv_heads=6),
        ),
    ):
        found = canonicalize(cache, [group], num_blocks=BLOCKS, block_dim=0, parallel=parallel).group_data_refs[0][0]
        assert found.mapping == opaque_mapping(found.page_size_bytes, 1, parallel.world)
    with pytest.raises(ValueError, match="first_layer must be in total_layers and not negative, got 5 and 3"):
        Parallel(first_layer=5, total_layers=3)


def test_a_block_of_latents_of_all_layers():
    mappings = []
    for rank in range(4):
        parallel = Parallel(tp=2, pp=2, rank=rank, first_layer=rank // 2 * 3, total_layers=6)
        spec = LATENTS["576 bfloat16"]
        found = canonicalize(
            torch.zeros(BLOCKS, 3, 64, 576, dtype=torch.bfloat16), [KVCacheGroup(["a", "b", "c"], spec)],
            block_dim=0, parallel=parallel,
        )  # fmt: skip
        mappings.append(found.group_data_refs[0][0].mapping)
    local = [np.arange(3 * 73728) + 3 * 73728 * stage for stage in (0, 0, 1, 1)]
    assert [mapping.num_writers for mapping in mappings] == [2] * 4
    for page in filled(mappings, local, 2):
        assert (page == np.arange(6 * 73728)).all()


@pytest.mark.parametrize("back", [{"tp": 4, "dcp": 2}, {"tp": 2, "pcp": 4}, {"tp": 2}], ids=str)
def test_blocks_go_from_eight_context_ranks_to_others_through_canonical_pages(back):
    """DeepSeek's latent: blocks of 8 dealt to 8 ranks become one page of 64 tokens, and the blocks of other ranks."""
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 256, (BLOCKS, 64, 1152), dtype=np.uint8)
    canonical = torch.full((BLOCKS, 64 * 1152), 0xA5, dtype=torch.uint8)
    ids = torch.tensor([[2, 0], [0, 2], [1, 1]])
    sizes = {"tp": 8, "dcp": 8}
    for rank in range(8):
        spec = Latent(8, 576, torch.bfloat16)
        mine = torch.from_numpy(rows[:, tokens_of(place(rank, **sizes).context, 8, 1, 8)]).flatten(1)
        (mapping,) = one(mine.view(torch.bfloat16).view(BLOCKS, 1, 8, 576), spec, Parallel(rank=rank, **sizes))
        turn = torch.tensor([pair for pair in ids.tolist() if mapping.is_writer(pair[0])])
        copy_pages([mine], [canonical], turn, plan_of_mapping(mapping).runs.all)
    wanted = rows[[2, 1, 0]].reshape(BLOCKS, -1)
    assert np.array_equal(canonical.numpy(), wanted)
    contexts = place(0, **back).contexts
    for rank in range(back["tp"] * back.get("pcp", 1)):
        n = 64 // contexts
        spec = Latent(n, 576, torch.bfloat16)
        mine = torch.full((BLOCKS, n * 1152), 0x5A, dtype=torch.uint8)
        cache = mine.view(torch.bfloat16).view(BLOCKS, 1, n, 576)
        (mapping,) = one(cache, spec, Parallel(rank=rank, interleave=n // 2, **back))
        copy_pages([canonical], [mine], torch.tensor([[1, 0]]), plan_of_mapping(mapping).inverse().runs.all)
        tokens = tokens_of(place(rank, **back).context, contexts, n // 2, n)
        assert np.array_equal(mine[0].numpy(), rows[1][tokens].ravel()) and (mine[1:] == 0x5A).all()


def test_a_cell_of_half_an_element_has_no_shape():
    spec = SimpleNamespace(
        block_size=4, num_kv_heads=2, head_size=8, head_size_v=8, dtype=torch.float16, state_content_bytes=15
    )  # fmt: skip
    assert layout_of(torch.zeros(BLOCKS, 2, 4, 7, dtype=torch.float16), spec) is None
    spec.state_content_bytes = 14
    assert layout_of(torch.zeros(BLOCKS, 2, 4, 7, dtype=torch.float16), spec).pattern == "B H N D"


def test_heads_that_nobody_counts_are_opaque_where_they_may_be_cut():
    """One head a rank could be the model's only one, or one of eight."""
    spec, cache = spec_of(4, 1, 8), registered(ORDERS[0], 1, 4, 8)
    assert one(cache, spec, Parallel(tp=8, rank=3)) == [opaque_mapping(256, 3, 8)]
    (whole,) = one(cache, spec, Parallel(pcp=2, rank=1, pcp_deals=False))
    assert (whole.parallelism_agnostic, whole.num_writers, whole.canonical_page_size_bytes) == (True, 2, 256)
