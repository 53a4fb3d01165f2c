"""What leaves: the transfers to one peer. Knows no socket, no thread and no clock.

::

    planned ──begun──▶ sending ──the receiver says visible──▶ committed
       │                  │  └──the receiver says dropped───▶ failed
       └──────────────────┴── given up ──┬── a unit's commit was never sent ──▶ failed
                                         └── all were: it may be visible ─────▶ unknown

A link that is lost costs a retry. On the next one the sender asks by transfer and epoch: it goes on with what is
missing, hears the end, or begins again where nothing was heard of it; and where the receiver is another process, gives
up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from kvkernels.layout.layout import KVLayout
from kvkernels.transfer.remote.arrivals import Port
from kvkernels.transfer.remote.errors import (
    CancelledError,
    ChecksumError,
    DeadlineError,
    PeerRestartedError,
    RemoteError,
    error_of,
)
from kvkernels.transfer.remote.messages import (
    Abort,
    Accept,
    Ask,
    Begin,
    Commit,
    Final,
    Nack,
    NoRing,
    Open,
    Receipt,
    short,
)
from kvkernels.transfer.remote.messages import Ring as RingMessage
from kvkernels.transfer.remote.outgoing import Flight, Outgoing
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.stats import Stats
from kvkernels.transfer.remote.wire import MOST_RING_BYTES, Conversion, layout_of_text, pack, units_in

_BACKOFF_S, _MOST_BACKOFF_S = 0.05, 1.0


def backoff_s(retries: int) -> float:
    """How long to wait before the next try."""
    return float(min(_BACKOFF_S * 2 ** min(retries, 10), _MOST_BACKOFF_S))


class Outlet(Protocol):
    """What writes segments of the mirror to their twins."""

    def write(self, segment: int, length: int) -> None:
        """Begin to."""

    def done(self) -> list[int]:
        """Segments that are written since the last call."""

    def close(self) -> None:
        """After this nothing more is written."""


class Outbox:
    """All transfers to one peer. ``make_outlet(port, mirror, message)`` gives what writes."""

    def __init__(
        self, layout: KVLayout, pools: Sequence[Tensor], stats: Stats, most_retries: int,
        make_outlet: Callable[[Port, Ring, RingMessage], Outlet],
    ) -> None:  # fmt: skip
        self._layout, self._pools, self._stats = layout, pools, stats
        self.most_retries, self._make_outlet = most_retries, make_outlet
        self.transfers: dict[bytes, Outgoing] = {}
        self._port: Port | None = None
        self._is_opening = False
        self._mirror: Ring | None = None
        self._outlet: Outlet | None = None
        self._conversion: Conversion | None = None
        self._free: list[int] = []
        self._flights: dict[int, Flight] = {}

    # What the owner does.

    def add(self, outgoing: Outgoing) -> None:
        """Send it as soon as there is a link."""
        self.transfers[outgoing.transfer] = outgoing
        self._open()
        if self._outlet is not None:
            self._begin(outgoing)

    def cancel(self, outgoing: Outgoing) -> None:
        """Give it up; the receiver has the last word where it knows of it."""
        if outgoing.transfer not in self.transfers:
            return
        error = CancelledError(f"remote: the sender cancelled request {outgoing.request!r}")
        if self._port is not None and outgoing.is_accepted:
            self._port.post(Abort(outgoing.transfer, error.cause, str(error)))
            outgoing.todo.clear()
            outgoing.is_cancelled = True
        else:
            self.give_up(outgoing, error)

    def give_up(self, outgoing: Outgoing, error: RemoteError) -> None:
        """End it without the receiver's word."""
        if self._port is not None and outgoing.epoch is not None:
            self._port.post(Abort(outgoing.transfer, error.cause, short(error)))
        self._end(outgoing, "unknown" if outgoing.may_be_visible else "failed", error)

    # What happens to links and time.

    def connected(self, port: Port) -> None:
        """There is a link."""
        self._port = port
        self._open()

    def lost(self, error: RemoteError) -> None:
        """The link has ended, or could not be made."""
        self.disconnect()
        for outgoing in list(self.transfers.values()):
            self._retry(outgoing, error)

    def disconnect(self) -> None:
        """Let go of the link and of all that was for it: nothing is written once this returns."""
        if self._outlet is not None:
            self._outlet.close()
        if self._mirror is not None:
            self._mirror.close()
        self._port = self._outlet = self._mirror = self._conversion = None
        self._is_opening = False
        self._flights.clear()
        self._free.clear()
        for outgoing in self.transfers.values():
            outgoing.is_accepted = False

    def tick(self, now: float) -> None:
        """Give up what is too late."""
        for outgoing in list(self.transfers.values()):
            if now >= outgoing.deadline:
                why = "" if outgoing.error is None else f"; last: {outgoing.error}"
                text = f"remote: request {outgoing.request!r} was not sent in time{why}"
                self.give_up(outgoing, DeadlineError(text))

    def times(self, now: float) -> Iterator[float]:
        """When a tick or a fill has something to do."""
        for outgoing in self.transfers.values():
            yield outgoing.deadline
            if outgoing.todo and outgoing.not_before > now:
                yield outgoing.not_before

    @property
    def is_writing(self) -> bool:
        """Whether a segment is in flight."""
        return bool(self._flights)

    # What the peer says.

    def opened(self, message: RingMessage) -> None:
        """Where to write to, and what the pages become there."""
        if self._port is None or not self._is_opening or self._outlet is not None:
            return
        if message.segments * message.segment_bytes > MOST_RING_BYTES:
            self.refused(NoRing("length", f"remote: a ring must have at most {MOST_RING_BYTES} bytes"))
            return
        try:
            self._conversion = Conversion(self._layout, layout_of_text(message.layout), message.segment_bytes)
            mirror = Ring(message.segments, message.segment_bytes)
            self._outlet = self._make_outlet(self._port, mirror, message)
        except RemoteError as error:
            self.refused(NoRing(error.cause, short(error)))
            return
        self._mirror, self._free = mirror, list(range(message.segments))
        for outgoing in list(self.transfers.values()):
            self._begin(outgoing)

    def refused(self, message: NoRing) -> None:
        """This peer takes nothing from us."""
        self._is_opening = False
        for outgoing in list(self.transfers.values()):
            self.give_up(outgoing, error_of(message.cause, message.text))

    def accepted(self, message: Accept) -> None:
        """Send what is missing."""
        outgoing, conversion = self.transfers.get(message.transfer), self._conversion
        if outgoing is None or conversion is None or outgoing.is_accepted:
            return
        outgoing.acked = np.zeros(len(conversion.parts) * len(outgoing.blocks), dtype=bool)
        for first, count in message.have:
            outgoing.acked[first : first + count] = True
        outgoing.posted = outgoing.acked.copy()
        missing = np.flatnonzero(~outgoing.acked)
        breaks = np.flatnonzero(np.diff(missing) > 1) + 1
        outgoing.todo = deque((int(run[0]), len(run)) for run in np.split(missing, breaks) if len(run))
        outgoing.is_accepted = outgoing.was_accepted = True
        outgoing.state = "sending"
        if outgoing.is_cancelled:
            self.cancel(outgoing)

    def receipt(self, message: Receipt) -> None:
        """A segment's pages are in their place."""
        flight = self._landed(message.segment, message.transfer)
        if flight is not None:
            flight.outgoing.acked[flight.first : flight.first + flight.count] = True

    def nack(self, message: Nack, now: float) -> None:
        """A segment's pages were not taken."""
        flight = self._landed(message.segment, message.transfer)
        if flight is None or message.cause != ChecksumError.cause or message.transfer not in self.transfers:
            return  # otherwise the transfer has ended, which a Final says
        outgoing = flight.outgoing
        outgoing.posted[flight.first : flight.first + flight.count] = False
        outgoing.todo.appendleft((flight.first, flight.count))
        outgoing.not_before = now + backoff_s(outgoing.retries)
        self._retry(outgoing, ChecksumError(message.text))

    def final(self, message: Final) -> None:
        """The receiver's last word."""
        outgoing = self.transfers.get(message.transfer)
        if outgoing is None:
            return
        if message.outcome == "visible":
            self._end(outgoing, "committed", None)
        elif message.outcome == "dropped":
            self._end(outgoing, "failed", error_of(message.cause, message.text))
        elif outgoing.was_accepted or message.cause:
            text = message.text or "remote: the receiver has forgotten the transfer"
            self.give_up(outgoing, PeerRestartedError(text))
        elif self._port is not None:
            self._post_begin(self._port, outgoing)

    # Bytes.

    def fill(self, now: float) -> None:
        """Write what there is room for, a segment of each transfer in turn, and commit what was written."""
        if self._outlet is None:
            return
        self._commit_written()
        while self._free:
            ready = [one for one in self.transfers.values() if one.is_accepted and one.todo and now >= one.not_before]
            if not ready:
                break
            for outgoing in ready[: len(self._free)]:
                self._write(outgoing)
        self._commit_written()

    def _write(self, outgoing: Outgoing) -> None:
        assert self._conversion is not None and self._mirror is not None and self._outlet is not None
        first, count = outgoing.todo.popleft()
        index, block = divmod(first, len(outgoing.blocks))
        part = self._conversion.parts[index]
        taken = min(count, units_in(part, self._conversion.segment_bytes), len(outgoing.blocks) - block)
        if taken < count:
            outgoing.todo.appendleft((first + taken, count - taken))
        segment = self._free.pop()
        packed = self._mirror.pages(segment, taken, part.page_bytes)
        try:
            sums = pack(self._pools, part, outgoing.blocks[block : block + taken], packed)
        except (ValueError, IndexError, RuntimeError) as error:  # a pool that was resized or freed
            self._free.append(segment)
            self.give_up(outgoing, RemoteError(f"remote: the sender's pages could not be read: {error}"))
            return
        length = taken * part.page_bytes
        self._flights[segment] = Flight(outgoing, first, taken, length, sums)
        self._outlet.write(segment, length)

    def _commit_written(self) -> None:
        assert self._outlet is not None and self._port is not None
        for segment in self._outlet.done():
            flight = self._flights[segment]
            outgoing = flight.outgoing
            outgoing.posted[flight.first : flight.first + flight.count] = True
            outgoing.bytes += flight.length
            # Also where the transfer has ended: the answer frees the segment.
            epoch = 0 if outgoing.epoch is None else outgoing.epoch
            self._port.post(
                Commit(outgoing.transfer, epoch, segment, flight.first, flight.count, flight.length, flight.sums)
            )

    # Inside.

    def _open(self) -> None:
        if self._port is not None and self.transfers and not self._is_opening:
            self._is_opening = True
            self._port.post(Open(self._layout.text))

    def _begin(self, outgoing: Outgoing) -> None:
        assert self._port is not None
        if outgoing.epoch is None:
            self._post_begin(self._port, outgoing)
        elif outgoing.epoch != self._port.peer.epoch:
            text = f"remote: the receiver {self._port.peer.name!r} is another process than the transfer began with"
            self.give_up(outgoing, PeerRestartedError(text))
        else:
            self._port.post(Ask(outgoing.transfer, outgoing.epoch))

    def _post_begin(self, port: Port, outgoing: Outgoing) -> None:
        assert self._conversion is not None
        outgoing.epoch = port.peer.epoch
        digest, pages = self._conversion.digest, len(outgoing.blocks)
        port.post(Begin(outgoing.transfer, outgoing.request, pages, digest, outgoing.epoch))

    def _landed(self, segment: int, transfer: bytes) -> Flight | None:
        flight = self._flights.get(segment)
        if flight is None or flight.outgoing.transfer != transfer:
            return None
        del self._flights[segment]
        self._free.append(segment)
        return flight

    def _retry(self, outgoing: Outgoing, error: RemoteError) -> None:
        outgoing.retries += 1
        outgoing.error = error
        self._stats.add(retried=1)
        if outgoing.retries > self.most_retries:
            self.give_up(outgoing, error)

    def _end(self, outgoing: Outgoing, outcome: str, error: RemoteError | None) -> None:
        del self.transfers[outgoing.transfer]
        outgoing.state = outcome
        outgoing.todo.clear()
        if error is None:
            self._stats.add(sent_transfers=1, sent_pages=len(outgoing.blocks), sent_bytes=outgoing.bytes)
        else:
            self._stats.failed("unknown" if outcome == "unknown" else error.cause)
        outgoing.end(outcome, error)
