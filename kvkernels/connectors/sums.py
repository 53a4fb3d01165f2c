"""A checksum for each row of a host pool: what comes back is what was stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvkernels.connectors.rows import SUM_BYTES


def _xxhash() -> ModuleType:
    try:
        import xxhash
    except ImportError:
        raise ImportError(
            "PageSums: verify=True needs xxhash, which is not installed: pip install kvkernels[vllm]"
        ) from None
    return xxhash


class PageSums:
    """The xxh3 of what a block has in the layers of its group, kept at the end of its row.

    Read are the engine's pages, where those are on the host, so that a copy that went wrong is seen as well as memory
    that changed; and else the pool's.

    Parameters
    ----------
    pages : Tensor
        uint8 ``[rows, row_bytes]``: the pool, of which the last eight bytes of a row are for the checksum.

    Raises
    ------
    ImportError
        xxhash is not installed.

    Examples
    --------
    >>> import numpy as np, torch
    >>> pool, engine = torch.zeros(4, 24, dtype=torch.uint8), torch.arange(32, dtype=torch.uint8).reshape(2, 16)
    >>> sums = PageSums(pool)
    >>> sums.write([engine], np.array([1]), np.array([3]))
    >>> sums.check([engine], np.array([1]), np.array([3]))
    []
    >>> engine[1, 5] = 0
    >>> sums.check([engine], np.array([1]), np.array([3]))
    [3]
    """

    def __init__(self, pages: Tensor) -> None:
        self._new: Callable[[], Any] = _xxhash().xxh3_64
        self._sums = pages.numpy()[:, -SUM_BYTES:]

    def write(self, pages: Sequence[Tensor], ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> None:
        """Keep the checksums of blocks.

        Parameters
        ----------
        pages : sequence of Tensor
            For each layer bytes ``[blocks, page_bytes]`` on the host.
        ids : array of int
            The blocks in them.
        rows : array of int
            The row of each, where its checksum is kept.
        """
        self._sums[rows] = self._of(pages, ids)

    def check(self, pages: Sequence[Tensor], ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> list[int]:
        """The rows whose checksum is another than that of the blocks, with arguments as for ``write``."""
        wrong: list[int] = rows[(self._sums[rows] != self._of(pages, ids)).any(axis=1)].tolist()
        return wrong

    def _of(self, pages: Sequence[Tensor], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        layers = [layer.view(torch.uint8).numpy() for layer in pages]
        sums = bytearray()
        for block in ids.tolist():
            hasher = self._new()
            for layer in layers:
                hasher.update(layer[block])
            sums += hasher.digest()
        return np.frombuffer(sums, np.uint8).reshape(-1, SUM_BYTES)
