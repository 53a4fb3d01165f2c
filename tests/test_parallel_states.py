"""States of Mamba and of linear attention in the canonical page: each part of a row cut on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parallel_oracle import BLOCKS, filled, one

from kvkernels.layout import Parallel, opaque_mapping
from kvkernels.layout.specs import Mamba


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
    ("sections", "heads", "inner"),
    [((8192, 1024, 1024), 128, 64), ((2048, 2048, 4096), 32, 128), ((16, 16, 32), 4, 5)],
    ids=["Mamba2 x B C", "GDN q k v", "small"],
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


def test_an_opaque_page_has_a_place_among_the_ranks_of_its_stage():
    """Other stages have other layers, and so pages of their own."""
    cache = [torch.zeros(BLOCKS, 3, 8, dtype=torch.float16)]
    spec = Mamba(shapes=((3, 8),), dtypes=(torch.float16,))
    assert one(cache, spec, Parallel(tp=2, pp=2, rank=3)) == [opaque_mapping(48, 1, 2)]


def test_a_page_of_states_that_is_shown_in_another_order_is_opaque():
    spec = Mamba(shapes=((3, 8),), dtypes=(torch.float16,), cuts=((1, (8, 4, 4)),))
    for shown, is_known in ((torch.zeros(BLOCKS, 6, 8), True), (torch.zeros(BLOCKS, 8, 6).transpose(1, 2), False)):
        (mapping,) = one(shown.to(torch.int8), spec, Parallel(tp=2, rank=1))
        assert mapping.parallelism_agnostic == is_known
