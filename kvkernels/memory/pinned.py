"""Host memory for pages, of exactly the size that is asked for."""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvkernels.common.arguments import integer


@dataclass(frozen=True)
class PinnedFacts:
    """What a pool really got.

    Attributes
    ----------
    bytes : int
        Of memory, by whole pages of the system.
    pinned : bool
        Whether it is registered with CUDA.
    why_not_pinned : str
        ``""`` where it is.
    seconds : float
        Until it was ready.
    """

    bytes: int
    pinned: bool
    why_not_pinned: str
    seconds: float


class PinnedPool:
    """Pages on the host: one uint8 tensor ``[pages, page_bytes]``.

    Parameters
    ----------
    pages, page_bytes : int
        How many, and the bytes of each.
    row_bytes : int, optional
        From one page to the next; `page_bytes` where it is not given.

    Examples
    --------
    >>> from kvkernels.memory import PinnedPool
    >>> with PinnedPool(4, 4096) as pool:
    ...     pool.pages.shape, pool.facts.bytes
    (torch.Size([4, 4096]), 16384)
    """

    def __init__(self, pages: int, page_bytes: int, *, row_bytes: int | None = None) -> None:
        started = time.perf_counter()
        pages = integer("PinnedPool: pages", pages, "a positive integer", 1)
        page_bytes = integer("PinnedPool: page_bytes", page_bytes, "a positive integer", 1)
        row_bytes = page_bytes if row_bytes is None else row_bytes
        row_bytes = integer("PinnedPool: row_bytes", row_bytes, "at least page_bytes", page_bytes)
        memory = mmap.mmap(-1, pages * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self._pages: Tensor | None = flat.view(pages, row_bytes)[:, :page_bytes]
        size = -(-pages * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._facts = PinnedFacts(size, False, "not asked for", time.perf_counter() - started)

    @property
    def pages(self) -> Tensor:
        """The tensor; ValueError once the pool is closed."""
        if self._pages is None:
            raise ValueError("PinnedPool: pages must be of an open pool, got one that was closed")
        return self._pages

    @property
    def facts(self) -> PinnedFacts:
        """What was really got, also once the pool is closed."""
        return self._facts

    def close(self) -> None:
        """Give the memory back as soon as no tensor sees it any more. A second call does nothing."""
        self._pages = None

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
