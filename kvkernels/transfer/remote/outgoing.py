"""One transfer as its sender has it, and what of it is in a segment."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvkernels.transfer.remote.errors import RemoteError


class Outgoing:
    """One transfer; ``end(outcome, error)`` is called once."""

    def __init__(
        self, transfer: bytes, request: str, blocks: Tensor, deadline: float,
        end: Callable[[str, RemoteError | None], None],
    ) -> None:  # fmt: skip
        self.transfer, self.request, self.blocks, self.deadline, self.end = transfer, request, blocks, deadline, end
        self.state = "planned"
        self.epoch: int | None = None  # of the receiver that it was begun with
        self.is_accepted = self.was_accepted = False  # on this link; on any
        self.is_cancelled = False  # which the receiver may not have heard
        self.retries = 0
        self.not_before = 0.0
        self.bytes = 0
        self.error: RemoteError | None = None
        self.acked = self.posted = np.zeros(0, dtype=bool)
        self.todo: deque[tuple[int, int]] = deque()

    @property
    def may_be_visible(self) -> bool:
        """Whether the receiver may have every unit."""
        return len(self.posted) > 0 and bool((self.posted | self.acked).all())


@dataclass(frozen=True)
class Flight:
    """What is in a segment."""

    outgoing: Outgoing
    first: int
    count: int
    length: int
    sums: bytes
