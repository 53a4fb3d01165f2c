"""Staging segments: the only memory that a peer ever writes to, and its mirror at the sender.

::

    sender     | segment 0 | segment 1 | … |     packs into a free one, and has it free again at a receipt
                    │           │
                    ▼           ▼                a segment is written to its twin, and to nothing else
    receiver   | segment 0 | segment 1 | … |     checks and empties one at its commit

A segment is the sender's until its commit is answered, so that no bookkeeping of credits is needed: what is not in
flight is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvkernels.transfer.remote.errors import LengthError


class Ring:
    """Segments of one link, in one direction."""

    def __init__(self, segments: int, segment_bytes: int) -> None:
        self.segments, self.segment_bytes = segments, segment_bytes
        self._memory: Tensor | None = torch.zeros(segments, segment_bytes, dtype=torch.uint8)

    @property
    def memory(self) -> Tensor:
        """uint8 ``[segments, segment_bytes]``."""
        if self._memory is None:
            raise RuntimeError("remote: a ring must be open, got one that was closed")
        return self._memory

    def pages(self, segment: int, count: int, page_bytes: int) -> Tensor:
        """Of the segment's beginning, uint8 ``[count, page_bytes]``; LengthError where it has not as many bytes."""
        if not 0 <= segment < self.segments or not 0 <= count * page_bytes <= self.segment_bytes:
            raise LengthError(
                f"remote: {count} pages of {page_bytes} bytes must fit in one of {self.segments} segments of "
                f"{self.segment_bytes} bytes, got segment {segment}"
            )
        return self.memory[segment, : count * page_bytes].view(count, page_bytes)

    def bytes_of(self, segment: int, length: int) -> memoryview:
        """The first bytes of a segment, to read into or to send."""
        self.pages(segment, 1, length)
        return memoryview(self.memory.numpy()[segment])[:length]

    def close(self) -> None:
        """Let go of the memory; whoever may still write to it was fenced before."""
        self._memory = None
