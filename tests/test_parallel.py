"""Ranks in vLLM's order, and their pages in the canonical page: by an oracle that knows the tokens one by one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvkernels.layout import Parallel, TensorParallel, canonicalize, opaque_mapping
from kvkernels.layout.specs import FullAttention, KVCacheGroup, Mamba

BLOCKS = 3


@dataclass(frozen=True)
class Place:
    """Where the oracle finds a rank: by going through the grid of ranks as vLLM makes its groups."""

    tp_rank: int
    pp_rank: int
    context: int
    contexts: int


def place(rank: int, *, tp: int = 1, dcp: int = 1, pcp: int = 1, pp: int = 1, pcp_deals: bool = True) -> Place:
    grid = np.arange(tp * pcp * pp).reshape(pp, pcp, tp)
    ((stage, prefill, tensor),) = np.argwhere(grid == rank).tolist()
    if pcp_deals:
        # Groups of dcp neighbours among the tensor-parallel ranks, side by side for each prefill context.
        group = next(g for g in grid.reshape(-1, dcp).tolist() if rank in g)
        return Place(tensor, stage, prefill * dcp + group.index(rank), dcp * pcp)
    # Groups go through the prefill contexts first.
    group = next(g for g in grid.swapaxes(1, 2).reshape(-1, dcp).tolist() if rank in g)
    return Place(tensor, stage, group.index(rank), dcp)


def tokens_of(context: int, contexts: int, interleave: int, n: int) -> list[int]:
    """Which of a block's tokens a context rank has, in its order: its turn comes every so many."""
    return [t for t in range(n * contexts) if t // interleave % contexts == context]


def replayed(mapping, local: np.ndarray) -> dict[int, int]:
    """Byte by byte of the canonical page, what a rank's page writes there."""
    written = {}
    for run in mapping.runs:
        for i, byte in itertools.product(range(run.num_fragments), range(run.fragment_size)):
            at = run.canonical_offset + i * run.canonical_stride + byte
            assert at not in written
            written[at] = local[run.local_offset + i * run.local_stride + byte]
    return written


def one(cache, spec, parallel, **options):
    found = canonicalize({"layer": cache}, [KVCacheGroup(["layer"], spec)], parallel=parallel, **options)
    return [ref.mapping for ref in found.group_data_refs[0]]


def filled(mappings, pages: list[np.ndarray], blocks: int) -> list[np.ndarray]:
    """The canonical page that the writers of each block fill, every byte once."""
    result = []
    for block in range(blocks):
        size = mappings[0].canonical_page_size_bytes
        page = np.full(size, -1, np.int64)
        for mapping, local in zip(mappings, pages, strict=True):
            assert mapping.canonical_page_size_bytes == size
            if mapping.is_writer(block):
                for at, value in replayed(mapping, local).items():
                    assert page[at] == -1
                    page[at] = value
        assert (page != -1).all()
        result.append(page)
    return result


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


@dataclass(frozen=True)
class Latent:
    """The attributes of vLLM's spec that say where bytes are."""

    block_size: int
    head_size: int
    dtype: torch.dtype
    state_content_bytes: int | None = None
    num_kv_heads: int = 1
    head_size_v: int = 0
    tokens_per_state: int = 1
    page_size_padded: int | None = None

    @property
    def unpadded_page_size_bytes(self) -> int:
        row = self.state_content_bytes or self.head_size * self.dtype.itemsize
        return self.block_size // self.tokens_per_state * row

    @property
    def page_size_bytes(self) -> int:
        return self.page_size_padded or self.unpadded_page_size_bytes


LATENTS = {
    "576 bfloat16": Latent(64, 576, torch.bfloat16),
    "576 fp8": Latent(64, 576, torch.float8_e4m3fn),
    "656 packed": Latent(64, 576, torch.uint8, 656),
    "132 of an indexer": Latent(64, 132, torch.uint8),
    "584 packed, four tokens a row, padded": Latent(
        64, 512, torch.uint8, 584, tokens_per_state=4, page_size_padded=9792
    ),
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
        pages = filled(mappings, [local] * tp, 2 * tp)
        assert all((written == local).all() for written in pages) and len(pages[0]) == page


def test_a_latent_with_scales_inside_is_opaque():
    spec = SimpleNamespace(
        block_size=4, num_kv_heads=1, head_size=8, head_size_v=0, dtype=torch.uint8, page_size_bytes=64,
        state_content_bytes=16, kv_quant_mode=SimpleNamespace(is_per_token_head=True),
    )  # fmt: skip
    (mapping,) = one(torch.zeros(3, 1, 4, 16, dtype=torch.uint8), spec, Parallel(tp=2, rank=1))
    assert mapping == opaque_mapping(64, 1, 2)


# States.


def conv_page(sections, heads, tp: int, rank: int, *, width: int, dim_first: bool, inner: int) -> np.ndarray:
    """A rank's bytes of [x | B | C] and of its heads, cut from the whole model's: numbers that tell the bytes apart."""
    total = sum(sections)
    conv = np.arange(total * width * 2).reshape((total, width, 2) if dim_first else (width, total, 2))
    state = 1_000_000 + np.arange(heads * inner * 4).reshape(heads, inner * 4)
    axis = 0 if dim_first else 1
    parts = np.split(conv, np.cumsum(sections)[:-1], axis=axis)
    mine = np.concatenate([np.split(part, tp, axis=axis)[rank] for part in parts], axis=axis)
    return np.concatenate([mine.ravel(), np.split(state, tp)[rank].ravel()])


@pytest.mark.parametrize("dim_first", [False, True])
@pytest.mark.parametrize("shown", ["states", "one page"])
@pytest.mark.parametrize(
    ("sections", "heads", "inner"), [((64, 16, 16), 8, 6), ((16, 16, 32), 4, 5)], ids=["Mamba2 x B C", "GDN q k v"]
)
def test_states_are_cut_along_each_part_of_them(sections, heads, inner, shown, dim_first):
    """Mamba2 cuts x, B and C each on its own, a flat cut would mix them; GDN q, k and v. The page is the same whatever
    wrote it, and prefill contexts write it in turns."""
    width, wholes = 3, []
    for tp, pcp in ((1, 1), (2, 1), (4, 1), (4, 2)):
        dim = sum(sections) // tp
        shapes = ((dim, width) if dim_first else (width, dim), (heads // tp, inner))
        cuts = ((0 if dim_first else 1, sections), (0, (heads,)))
        spec = Mamba(shapes=shapes, dtypes=(torch.bfloat16, torch.float32), cuts=cuts)
        raw = torch.zeros(BLOCKS, spec.page_size_bytes, dtype=torch.int8)
        states = [
            raw.view(torch.bfloat16).as_strided((BLOCKS, *shapes[0]), (raw.shape[1] // 2, shapes[0][1], 1)),
            raw.view(torch.float32).as_strided(
                (BLOCKS, *shapes[1]), (raw.shape[1] // 4, inner, 1), dim * width * 2 // 4
            ),
        ]
        cache = states if shown == "states" else raw[:, None, None]
        ranks = range(tp * pcp)
        mappings = [one(cache, spec, Parallel(tp=tp, pcp=pcp, rank=rank))[0] for rank in ranks]
        pages = [
            conv_page(sections, heads, tp, rank % tp, width=width, dim_first=dim_first, inner=inner) for rank in ranks
        ]
        assert all(mapping.parallelism_agnostic and mapping.num_writers == pcp for mapping in mappings)
        wholes += filled(mappings, pages, 2 * pcp)
    assert all((whole == wholes[0]).all() for whole in wholes)
    assert (wholes[0] == conv_page(sections, heads, 1, 0, width=width, dim_first=dim_first, inner=inner)).all()


def test_states_in_tensors_of_their_own_are_a_page_each():
    spec = Mamba(shapes=((3, 8), (2, 6)), dtypes=(torch.float16,) * 2, cuts=((1, (8, 4, 4)), (0, (4,))))
    cache = [torch.zeros(BLOCKS, 3, 8, dtype=torch.float16), torch.zeros(BLOCKS, 2, 6, dtype=torch.float16)]
    conv, state = one(cache, spec, Parallel(tp=2, rank=1))
    assert [(m.local_page_size_bytes, m.canonical_page_size_bytes) for m in (conv, state)] == [(48, 96), (24, 48)]
    assert [(run.local_offset, run.canonical_offset, run.fragment_size) for run in conv.runs] == [
        (0, 8, 8), (8, 20, 4), (12, 28, 4)]  # fmt: skip


def test_states_that_every_rank_has_are_written_in_turns():
    spec = Mamba(shapes=((3, 8),), dtypes=(torch.float16,), tp_replicated=True)
    (mapping,) = one([torch.zeros(BLOCKS, 3, 8, dtype=torch.float16)], spec, Parallel(tp=4, pcp=2, rank=5))
    assert (mapping.num_writers, mapping.writer_index, mapping.canonical_page_size_bytes) == (8, 5, 48)
    assert mapping.parallelism_agnostic


@pytest.mark.parametrize(
    ("changes", "cache"),
    [
        ({"cuts": None}, None),
        ({"cuts": ((1, (8, 4, 6)),)}, None),
        ({"cuts": ((1, (8, 3, 5)),)}, None),
        ({}, torch.zeros(BLOCKS, 8, 3, dtype=torch.float16).transpose(1, 2)),
        ({}, torch.zeros(BLOCKS, 4, 6, dtype=torch.float16)),
    ],
    ids=["not said", "other sizes", "not divisible", "dimension first in memory", "another shape"],
)
def test_states_that_cannot_be_proven_are_opaque(changes, cache):
    """One group of B and C on two ranks, say, which both have: what one of them writes, the other does, too."""
    spec = Mamba(**{"shapes": ((3, 8),), "dtypes": (torch.float16,), "cuts": ((1, (8, 4, 4)),), **changes})
    cache = torch.zeros(BLOCKS, 3, 8, dtype=torch.float16) if cache is None else cache
    assert one([cache], spec, Parallel(tp=2, rank=1)) == [opaque_mapping(48, 1, 2)]
