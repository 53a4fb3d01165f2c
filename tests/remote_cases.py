"""What the tests of remote transfers share: a secret, pools of random bytes, and caches with a slow oracle."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

from kvkernels import KVCache, KVLayout
from kvkernels.transfer.remote import Peer, RemotePool

SECRET = b"a secret that only tests share"
WAIT_S = 120.0  # for what a loaded machine does in its own time; nothing is expected to take it


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    """NaNs and all."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Wait until it holds, and fail where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.002)


@contextmanager
def pair(src, dst, *, sender: dict | None = None, receiver: dict | None = None, **both):
    """Two pools of this process and the way from the first to the second."""
    with RemotePool(src, **both, **(sender or {})) as one, RemotePool(dst, **both, **(receiver or {})) as other:
        yield one, other, Peer(*other.address)


PATTERNS = {"NHD": "L K | B N H D", "HND": "L K | B H N D", "blocks first": "B L K H N D"}


class Sharded:
    """A cache cut into tensor-parallel shards: real tensors, filled from one array ``[L, K, B, N, H, D]``."""

    def __init__(self, pattern: str, shards: int, blocks: int, *, heads: int = 4) -> None:
        sizes = dict(L=2, K=2, B=blocks, N=4, H=heads, D=8, dtype=torch.float16)
        whole = KVLayout(PATTERNS[pattern], **sizes)
        self.layouts = [whole.shard(rank, shards) if shards > 1 else whole for rank in range(shards)]
        self._outer, _, self._inner = PATTERNS[pattern].replace(" ", "").rpartition("|")
        self.caches = [KVCache(layout, self._empty(layout)) for layout in self.layouts]

    def _empty(self, layout: KVLayout) -> list[torch.Tensor]:
        elements = [layout.needed_bytes(i) // 2 for i in range(layout.num_tensors)]
        return [torch.full((n,), -7.0, dtype=torch.float16) for n in elements]

    def set(self, array: torch.Tensor) -> None:
        """Fill every shard."""
        for view, part in self._parts(array):
            view.copy_(part)

    def get(self, like: torch.Tensor) -> torch.Tensor:
        """The array again, from the shards."""
        array = torch.full_like(like, float("nan"))
        for view, part in self._parts(array):
            part.copy_(view)
        return array

    def _parts(self, array: torch.Tensor):
        """What each tensor shows, and what of the array that is."""
        for layout, cache in zip(self.layouts, self.caches, strict=True):
            mine = array[..., layout.first_head : layout.first_head + layout.H, :]
            for i, tensor in enumerate(cache.tensors):
                part = mine[i // 2, i % 2] if self._outer else mine
                letters = "BNHD" if self._outer else "LKBNHD"
                shown = [layout.size(letter) for letter in self._inner]
                yield tensor.view(shown), part.permute([letters.index(letter) for letter in self._inner])
