"""Ids and runs by name, where a caller would otherwise count columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.common.arguments import INT64_MAX, RUN_COLUMNS, dtype_text, has_values, integer, integers, shape_text


def expand_blocks(
    chunk_ids: Tensor | Sequence[int], blocks_per_chunk: int, skip: int = 0, count: int | None = None
) -> Tensor:
    """Ids of the blocks that chunks of several blocks are made of.

    Chunk ``c`` is made of blocks ``c * blocks_per_chunk`` to ``c * blocks_per_chunk + blocks_per_chunk - 1``: a host
    block of several device blocks, or a block of 64 tokens in units of 16.

    Parameters
    ----------
    chunk_ids : Tensor or sequence of int
        int64 or int32 ``[n]``, on any device. A negative id stays negative: its blocks are -1.
    blocks_per_chunk : int
        Blocks of a chunk, positive.
    skip : int
        Blocks left out at the start, where a transfer begins inside a chunk.
    count : int, optional
        Blocks wanted after those, where it ends inside a chunk; all by default.

    Returns
    -------
    Tensor
        int64 ``[count]`` on the ids' device.

    Raises
    ------
    ValueError
        An argument is of another kind, ``blocks_per_chunk`` is not positive, an id is too large, or there are fewer
        blocks than ``skip`` and ``count`` name.

    Examples
    --------
    >>> from kvkernels import expand_blocks
    >>> expand_blocks([7, 2], 4, skip=1, count=5).tolist()
    [29, 30, 31, 8, 9]
    """
    blocks_per_chunk = integer("expand_blocks: blocks_per_chunk", blocks_per_chunk, "a positive integer", least=1)
    skip = integer("expand_blocks: skip", skip)
    if isinstance(chunk_ids, Tensor):
        given = chunk_ids
    else:
        given = torch.tensor(integers("expand_blocks: chunk_ids", chunk_ids), dtype=torch.int64, device="cpu")
    if given.dim() != 1 or given.dtype not in (torch.int64, torch.int32):
        kind = f"{dtype_text(given.dtype)} of shape {shape_text(given.shape)}"
        raise ValueError(f"expand_blocks: chunk_ids must be int64 or int32 [n], got {kind}")
    is_known = given.device.type == "cpu" and has_values(given) and len(given) > 0
    if is_known and int(given.max()) > (INT64_MAX // blocks_per_chunk) - 1:
        raise ValueError(f"expand_blocks: chunk_ids must leave their blocks in int64, got {int(given.max())}")
    ids = given.to(torch.int64).reshape(-1, 1)
    blocks = ids * blocks_per_chunk + torch.arange(blocks_per_chunk, device=ids.device)
    blocks = torch.where(ids < 0, -1, blocks).flatten()
    wanted = len(blocks) - skip if count is None else integer("expand_blocks: count", count)
    if skip < 0 or wanted < 0 or skip + wanted > len(blocks):
        raise ValueError(
            f"expand_blocks: skip and count must name some of {len(blocks)} blocks, got skip {skip} and count {count}"
        )
    return blocks[skip : skip + wanted]


def whole_page_runs(pools: Sequence[Tensor], page_bytes: Sequence[int] | None = None) -> Tensor:
    """Runs for copy_pages that copy each pool's page whole, to the pool with the same index.

    Parameters
    ----------
    pools : sequence of Tensor
        The pools of one side: dimension 0 is the block id.
    page_bytes : sequence of int, optional
        Bytes to copy of each page, from its start, where rows are padded; the whole row by default.

    Returns
    -------
    Tensor
        int64 ``[len(pools), 16]``.

    Raises
    ------
    ValueError
        ``page_bytes`` has another length, or more bytes than a page.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import copy_pages, whole_page_runs
    >>> src = [torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)]
    >>> dst = [torch.zeros(2, 2, dtype=torch.uint8)]
    >>> copy_pages(src, dst, torch.tensor([[1, 0]]), whole_page_runs(src))
    >>> dst[0].tolist()
    [[3, 4], [0, 0]]
    """
    rows = [math.prod(pool.shape[1:]) * pool.element_size() for pool in pools]
    wanted = rows if page_bytes is None else integers("whole_page_runs: page_bytes", page_bytes)
    if len(wanted) != len(rows) or any(not 0 <= n <= row for n, row in zip(wanted, rows, strict=True)):
        raise ValueError(f"whole_page_runs: page_bytes must be at most the pools' {rows} bytes each, got {wanted}")
    runs = torch.zeros(len(rows), RUN_COLUMNS, dtype=torch.int64, device="cpu")
    runs[:, 0] = runs[:, 1] = torch.arange(len(rows), device="cpu")
    runs[:, 4] = torch.tensor(wanted, dtype=torch.int64, device="cpu")
    runs[:, 7::3] = 1
    return runs
