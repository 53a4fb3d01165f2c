"""Which blocks a transfer has a hand on: those that are being received are one transfer's, and nobody's to send."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvkernels.common.arguments import integers
from kvkernels.transfer.remote.messages import MOST_BLOCKS


def checked_blocks(op: str, block_ids: Tensor | Sequence[int], num_blocks: int) -> Tensor:
    """int64 ``[n]`` of its own, or ValueError for what are no ids and IndexError for those of no block."""
    if isinstance(block_ids, Tensor):
        array = block_ids.detach().cpu().numpy()
    else:
        array = np.asarray(block_ids) if isinstance(block_ids, (list, tuple, range)) else np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        given = block_ids.tolist() if isinstance(block_ids, Tensor) else block_ids
        array = np.array(integers(f"{op}: block_ids", given), dtype=np.int64)
    if not 1 <= len(array) <= MOST_BLOCKS:
        raise ValueError(f"{op}: block_ids must be 1 to {MOST_BLOCKS}, got {len(array)}")
    wrong = (array < 0) | (array >= num_blocks)
    if wrong.any():
        raise IndexError(f"{op}: block_ids must be below {num_blocks}, got {array[wrong][0]}")
    return torch.from_numpy(array.astype(np.int64))


class Claims:
    """Thread-safe books of a pool's blocks."""

    def __init__(self, num_blocks: int) -> None:
        self._lock = threading.Lock()
        self._received = np.zeros(num_blocks, dtype=bool)
        self._sent = np.zeros(num_blocks, dtype=np.int64)

    def receive(self, op: str, blocks: Tensor) -> None:
        """For one transfer alone; ValueError where another has one of them."""
        ids = blocks.numpy()
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{op}: blocks must be different ones, got one of them twice")
        with self._lock:
            taken = self._received[ids] | (self._sent[ids] > 0)
            if taken.any():
                raise ValueError(f"{op}: blocks must be in no other transfer, got block {ids[taken][0]}, which is")
            self._received[ids] = True

    def send(self, op: str, blocks: Tensor) -> None:
        """Beside others that send them; ValueError where one of them is being received."""
        ids = blocks.numpy()
        with self._lock:
            taken = self._received[ids]
            if taken.any():
                raise ValueError(f"{op}: blocks must be whole, got block {ids[taken][0]}, which is being received")
            np.add.at(self._sent, ids, 1)

    def end_receive(self, blocks: Tensor) -> None:
        """They are whole, or free for others."""
        with self._lock:
            self._received[blocks.numpy()] = False

    def end_send(self, blocks: Tensor) -> None:
        """They may be written to."""
        with self._lock:
            np.subtract.at(self._sent, blocks.numpy(), 1)

    def held(self) -> tuple[int, int]:
        """How many blocks are being received, and sent."""
        with self._lock:
            return int(self._received.sum()), int((self._sent > 0).sum())
