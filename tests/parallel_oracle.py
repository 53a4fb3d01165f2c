"""Where ranks are, which tokens they hold, and what their pages fill: by going through them one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvkernels.layout import canonicalize
from kvkernels.layout.specs import KVCacheGroup

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


def replayed(mapping) -> tuple[np.ndarray, np.ndarray]:
    """Byte by byte, where in the rank's page and in the canonical page the runs are."""
    sides = []
    for side in ("local", "canonical"):
        places = [
            getattr(run, f"{side}_offset") + i * getattr(run, f"{side}_stride") + np.arange(run.fragment_size)
            for run in mapping.runs for i in range(run.num_fragments)
        ]  # fmt: skip
        sides.append(np.concatenate(places))
    return sides[0], sides[1]


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
                mine, at = replayed(mapping)
                assert (np.sort(mine) == np.arange(len(local))).all() and (page[at] == -1).all()
                page[at] = local[mine]
        assert (page != -1).all()
        result.append(page)
    return result


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
