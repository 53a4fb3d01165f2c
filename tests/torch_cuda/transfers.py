"""Pools on a device and on the host, and jobs between them, for tests of a mover on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvkernels.transfer import Mover, SwapJob

LONG = 60.0  # seconds that no transfer here takes
BLOCKS, PAGE = 8, 64
# Every block, none at its own place.
PAIRS = torch.tensor([(i, (3 * i + 1) % BLOCKS) for i in range(BLOCKS)])


def host(value: int | None = None, blocks: int = BLOCKS, page: int = PAGE) -> Tensor:
    """Pinned, of one value or random."""
    pool = torch.randint(0, 256, (blocks, page), dtype=torch.uint8).pin_memory()
    return pool if value is None else pool.copy_(torch.full_like(pool, value, pin_memory=False))


def device(value: int | None = None, index: int = 0, blocks: int = BLOCKS, page: int = PAGE) -> Tensor:
    """On a device, complete when this returns."""
    pool = host(value, blocks, page).to(f"cuda:{index}", non_blocking=True)
    torch.cuda.synchronize(index)
    return pool


def filled(pool: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
    """What an engine's kernels would do: ``pool`` becomes what ``source`` is, some time later in the stream."""
    with torch.cuda.stream(stream):
        pool.copy_(source, non_blocking=True)


def swap(src: Tensor, dst: Tensor, pairs: Tensor = PAIRS, executor: str = "auto") -> SwapJob:
    return SwapJob(src, dst, src[0].numel() * src.element_size(), pairs, executor)


def is_moved(src: Tensor, dst: Tensor, pairs: Tensor = PAIRS) -> bool:
    return torch.equal(dst.cpu()[pairs[:, 1]], src.cpu()[pairs[:, 0]])


def is_all(pool: Tensor, value: int) -> bool:
    return bool((pool.cpu() == value).all())


@contextmanager
def on_stream(index: int = 0) -> Iterator[torch.cuda.Stream]:
    """A stream of the engine's, current."""
    stream = torch.cuda.Stream(index)
    with torch.cuda.stream(stream):
        yield stream


def row_of(mover: Mover, direction: str, priority: str) -> dict:
    """What the mover counted, of all executors together."""
    rows = [r for r in mover.stats()["transfers"] if (r["direction"], r["priority"]) == (direction, priority)]
    return {key: sum(row[key] for row in rows) for key in ("done", "failed", "cancelled", "bytes", "chunks")}
