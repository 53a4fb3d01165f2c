"""How a host pool is cut: a row for each block, a chunk for several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvkernels.common.arguments import integer

#: Of a page's checksum.
SUM_BYTES = 8


def num_chunks(
    cpu_bytes: int, block_bytes: int, blocks_per_chunk: int, copies: int = 1, *, verify: bool = False
) -> int:
    """Chunks that fit into so much host memory.

    Parameters
    ----------
    cpu_bytes : int
        Of all ranks together.
    block_bytes : int
        That a rank stores of one block, over all layers.
    blocks_per_chunk : int
    copies : int
        Ranks that have a pool of their own.
    verify : bool
        Whether each row has a checksum.

    Returns
    -------
    int
        The most that fit: less than one chunk is left over.

    Raises
    ------
    ValueError
        Not even one does, or a number is not positive.

    Examples
    --------
    >>> num_chunks(1 << 20, 4096, 2, 4)
    32
    """
    cpu_bytes = integer("num_chunks: cpu_bytes_to_use", cpu_bytes, "positive", least=1)
    block_bytes = integer("num_chunks: block_bytes", block_bytes, "positive", least=1)
    chunk_bytes = (block_bytes + SUM_BYTES * verify) * blocks_per_chunk * copies
    chunks = cpu_bytes // chunk_bytes
    if chunks == 0:
        raise ValueError(f"num_chunks: cpu_bytes_to_use must hold a chunk of {chunk_bytes} bytes, got {cpu_bytes}")
    return chunks


@dataclass(frozen=True)
class Rows:
    """Where in a row each tensor's page is.

    ::

        row = block    | tensor 0's page | tensor 1's page | ... | sum |     chunk c has rows
                       '- offsets[0]     '- offsets[1]           '- with verify: 8 bytes
                                                                            c * blocks_per_chunk + 0, 1, ...

    A group uses the pages of its layers, and of each the first ``page_bytes``, which are those without padding. So rows
    serve all groups, as an engine's blocks do.

    Attributes
    ----------
    page_bytes : tuple of int
        Of each tensor's blocks.
    verify : bool
        Whether there is room for a checksum.
    """

    page_bytes: tuple[int, ...]
    verify: bool = False

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return sum(self.page_bytes) + SUM_BYTES * self.verify

    def views(self, pages: Tensor) -> list[Tensor]:
        """For each tensor the ``[rows, page]`` part of the pool that keeps it."""
        views, offset = [], 0
        for page_bytes in self.page_bytes:
            views.append(pages[:, offset : offset + page_bytes])
            offset += page_bytes
        return views


def group_mappings(
    device_ids: npt.NDArray[np.integer], chunk_ids: npt.NDArray[np.integer], group_sizes: Sequence[int],
    first_blocks: Sequence[int], blocks_per_chunk: int,
) -> list[npt.NDArray[np.int64] | None]:  # fmt: skip
    """The rows of a job's blocks, for each group.

    Parameters
    ----------
    device_ids : array of int
        The groups' blocks on the device, one group after the other.
    chunk_ids : array of int
        The chunks that they are in, likewise.
    group_sizes : sequence of int
        Blocks of each group.
    first_blocks : sequence of int
        For each group the place of its first block in the request, which says where in the first chunk it is.
    blocks_per_chunk : int

    Returns
    -------
    list of array or None
        int64 ``[n, 2]``, (device block, host row); None for a group without blocks.

    Raises
    ------
    ValueError
        The ids are not as many as the sizes say.

    Examples
    --------
    Three blocks, the first of which is the second of its chunk:

    >>> import numpy as np
    >>> group_mappings(np.array([7, 4, 9]), np.array([2, 5]), [3], [1], 2)[0].tolist()
    [[7, 5], [4, 10], [9, 11]]
    """
    mappings: list[npt.NDArray[np.int64] | None] = []
    block = chunk = 0
    for size, first in zip(group_sizes, first_blocks, strict=True):
        if not size:
            mappings.append(None)
            continue
        skip = first % blocks_per_chunk
        chunks = -(-(skip + size) // blocks_per_chunk)
        ids, rows = device_ids[block : block + size], chunk_ids[chunk : chunk + chunks]
        if len(ids) == size and len(rows) == chunks:
            mapping = np.empty((size, 2), np.int64)
            mapping[:, 0] = ids
            if blocks_per_chunk == 1:
                mapping[:, 1] = rows
            else:
                all_rows = rows[:, None].astype(np.int64) * blocks_per_chunk + np.arange(blocks_per_chunk)
                mapping[:, 1] = all_rows.ravel()[skip : skip + size]
            mappings.append(mapping)
        block, chunk = block + size, chunk + chunks
    if (block, chunk) != (len(device_ids), len(chunk_ids)):
        raise ValueError(
            f"group_mappings: group_sizes must make {len(device_ids)} blocks in {len(chunk_ids)} chunks, "
            f"got {block} in {chunk}"
        )
    return mappings
