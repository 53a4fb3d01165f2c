"""What a pool has given out: blocks, names of requests, and a handle for each transfer."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from kvkernels.common.arguments import integer
from kvkernels.transfer.remote.arrivals import Reservation, bytes_of
from kvkernels.transfer.remote.claims import Claims, checked_blocks
from kvkernels.transfer.remote.errors import RemoteError
from kvkernels.transfer.remote.handle import RemoteTransfer
from kvkernels.transfer.remote.outgoing import Outgoing
from kvkernels.transfer.remote.peer import check_request
from kvkernels.transfer.remote.settings import check_seconds


class Desk:
    """Makes transfers of valid arguments, and takes back what they had when they end. Thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._claims = Claims(num_blocks)
        self._lock = threading.Lock()
        self._requests: set[str] = set()
        self._ended: dict[int, RemoteTransfer] = {}

    def reservation(
        self, op: str, request: str, block_ids: Tensor | Sequence[int], writers: int, timeout_s: float,
        cancel: Callable[[Reservation], None],
    ) -> tuple[Reservation, RemoteTransfer]:  # fmt: skip
        """For pages that are to come; ValueError or IndexError where they cannot."""
        check_request(op, request)
        blocks = checked_blocks(op, block_ids, self._num_blocks)
        writers = integer(f"{op}: writers", writers, "a positive integer", 1)
        deadline = time.monotonic() + check_seconds(f"{op}: timeout_s", timeout_s)
        with self._lock:
            if request in self._requests:
                raise ValueError(f"{op}: request must be a new one, got {request!r}, which is expected already")
            self._claims.receive(op, blocks)
            self._requests.add(request)
        handle = RemoteTransfer(request, self._ended, lambda _: cancel(reservation))

        def end(outcome: str, error: RemoteError | None) -> None:
            self.unreserve(reservation)
            retries = sum(arrival.rejoined for arrival in reservation.arrivals.values())
            pages = len(blocks) if outcome == "visible" else 0
            handle.end(outcome, pages, bytes_of(reservation), retries, error)

        reservation = Reservation(request, blocks, writers, deadline, end)
        return reservation, handle

    def unreserve(self, reservation: Reservation) -> None:
        """Its blocks and its name are free."""
        self._claims.end_receive(reservation.blocks)
        with self._lock:
            self._requests.discard(reservation.request)

    def outgoing(
        self, op: str, request: str, block_ids: Tensor | Sequence[int], timeout_s: float,
        cancel: Callable[[Outgoing], None],
    ) -> tuple[Outgoing, RemoteTransfer]:  # fmt: skip
        """For pages that are to leave; ValueError or IndexError where they cannot."""
        check_request(op, request)
        blocks = checked_blocks(op, block_ids, self._num_blocks)
        deadline = time.monotonic() + check_seconds(f"{op}: timeout_s", timeout_s)
        self._claims.send(op, blocks)
        handle = RemoteTransfer(request, self._ended, lambda _: cancel(outgoing))

        def end(outcome: str, error: RemoteError | None) -> None:
            self._claims.end_send(blocks)
            pages = len(blocks) if outcome == "committed" else 0
            handle.end(outcome, pages, outgoing.bytes, outgoing.retries, error)

        outgoing = Outgoing(secrets.token_bytes(16), request, blocks, deadline, end)
        return outgoing, handle

    def unsend(self, outgoing: Outgoing) -> None:
        """It never began."""
        self._claims.end_send(outgoing.blocks)

    def poll(self) -> list[RemoteTransfer]:
        """Transfers that ended and that nobody was told of."""
        return [transfer for transfer in list(self._ended.values()) if transfer.tell()]

    def held(self) -> tuple[int, int]:
        """How many blocks are being received, and sent."""
        return self._claims.held()
