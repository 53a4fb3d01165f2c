"""Which blocks a transfer has a hand on: those that are being received are one transfer's, and nobody's to send."""

from __future__ import annotations

import threading
from collections import Counter

from torch import Tensor


class Claims:
    """Thread-safe books of a pool's blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received: set[int] = set()
        self._sent: Counter[int] = Counter()

    def receive(self, op: str, blocks: Tensor) -> None:
        """For one transfer alone; ValueError where another has one of them."""
        ids = blocks.tolist()
        if len(set(ids)) != len(ids):
            raise ValueError(f"{op}: blocks must be different ones, got one of them twice")
        with self._lock:
            taken = next((one for one in ids if one in self._received or one in self._sent), None)
            if taken is not None:
                raise ValueError(f"{op}: blocks must be in no other transfer, got block {taken}, which is")
            self._received.update(ids)

    def send(self, op: str, blocks: Tensor) -> None:
        """Beside others that send them; ValueError where one of them is being received."""
        ids = blocks.tolist()
        with self._lock:
            taken = next((one for one in ids if one in self._received), None)
            if taken is not None:
                raise ValueError(f"{op}: blocks must be whole, got block {taken}, which is being received")
            self._sent.update(ids)

    def end_receive(self, blocks: Tensor) -> None:
        """They are whole, or free for others."""
        with self._lock:
            self._received.difference_update(blocks.tolist())

    def end_send(self, blocks: Tensor) -> None:
        """They may be written to."""
        with self._lock:
            for block in blocks.tolist():
                self._sent[block] -= 1
                if self._sent[block] == 0:
                    del self._sent[block]

    def held(self) -> tuple[int, int]:
        """How many blocks are being received, and sent."""
        with self._lock:
            return len(self._received), len(self._sent)
