"""What is expected, and what each of its writers has brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from kvkernels.transfer.remote.errors import RemoteError
from kvkernels.transfer.remote.handshake import Identity
from kvkernels.transfer.remote.messages import Message
from kvkernels.transfer.remote.wire import Conversion


class Port(Protocol):
    """The link that a peer speaks through."""

    peer: Identity

    def post(self, message: Message) -> None:
        """Say something; nothing where the link has ended."""


class Arrival:
    """What one writer has brought of a reservation."""

    def __init__(self, transfer: bytes, port: Port, conversion: Conversion, reservation: Reservation) -> None:
        self.transfer, self.conversion, self.reservation = transfer, conversion, reservation
        self.writer = port.peer
        self.port: Port | None = port
        self.lost_at, self.rejoined = 0.0, 0
        self.have = np.zeros(len(conversion.parts) * len(reservation.blocks), dtype=bool)

    @property
    def is_whole(self) -> bool:
        """Whether every unit is in its place."""
        return bool(self.have.all())

    def ranges(self) -> list[tuple[int, int]]:
        """What is there, as first and count."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self.have, [False])).astype(np.int8)))
        return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


class Reservation:
    """Blocks that a request's pages are to arrive in; ``end(outcome, error)`` is called once."""

    def __init__(
        self, request: str, blocks: Tensor, writers: int, deadline: float,
        end: Callable[[str, RemoteError | None], None],
    ) -> None:  # fmt: skip
        self.request, self.blocks, self.writers, self.deadline, self.end = request, blocks, writers, deadline, end
        self.arrivals: dict[str, Arrival] = {}
        self.state = "reserved"


def bytes_of(reservation: Reservation) -> int:
    """That its writers sent, packed."""
    whole = (sum(part.page_bytes for part in a.conversion.parts) for a in reservation.arrivals.values())
    return sum(whole) * len(reservation.blocks)
