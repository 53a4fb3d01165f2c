"""What arrives: reservations, who writes to them, and what of it is there. Knows no socket, no thread and no clock.

::

    reserved ──first writer begins──▶ receiving ──every unit of every writer──▶ verified ──▶ visible
        │                                │
        └────────────────────────────────┴── deadline, cancel, abort, a writer lost for good ──▶ dropped

Bytes go from a ring into reserved blocks, which nobody reads, after their lengths and sums were checked; `end` is
called last. What became of the last 10,000 transfers is remembered, for senders who lost the answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor

from kvkernels.layout.plan import compile_plan
from kvkernels.transfer.remote.arrivals import Arrival, Port, Reservation, bytes_of
from kvkernels.transfer.remote.errors import (
    CancelledError,
    ChecksumError,
    DeadlineError,
    LengthError,
    PeerLostError,
    PeerRestartedError,
    PlanError,
    ProtocolError,
    RefusedError,
    RemoteError,
    error_of,
)
from kvkernels.transfer.remote.handshake import Identity
from kvkernels.transfer.remote.messages import (
    SUM_BYTES,
    Abort,
    Accept,
    Ask,
    Begin,
    Commit,
    Final,
    Nack,
    Receipt,
    short,
)
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.stats import Stats
from kvkernels.transfer.remote.wire import Conversion, check_sums, units_in

MOST_WAITING = 1024


class Receiver:
    """All reservations of one pool."""

    def __init__(
        self, epoch: int, pools: Sequence[Tensor], stats: Stats, *, rejoin_s: float, verify_end: bool, remembers: int
    ) -> None:
        self.epoch = epoch
        self._pools, self._stats = pools, stats
        self._rejoin_s, self._verify_end, self._remembers = rejoin_s, verify_end, remembers
        self._reservations: dict[str, Reservation] = {}
        self._live: dict[bytes, Arrival] = {}
        self._waiting: dict[bytes, tuple[Port, Conversion, Begin]] = {}
        self._finals: OrderedDict[bytes, Final] = OrderedDict()

    # What the owner does.

    def reserve(self, reservation: Reservation) -> None:
        """From now on its request may arrive; RefusedError where one of that name is live."""
        if reservation.request in self._reservations:
            raise RefusedError(f"RemotePool: request must be a new one, got {reservation.request!r}, which is expected")
        self._reservations[reservation.request] = reservation
        for port, conversion, message in list(self._waiting.values()):
            if message.request == reservation.request:
                del self._waiting[message.transfer]
                self._arrive(port, conversion, message)

    def drop(self, reservation: Reservation, error: RemoteError) -> None:
        """None of it will be visible; nothing where it has ended."""
        if reservation.state not in ("visible", "dropped"):
            reservation.state = "dropped"
            self._stats.add(dropped_pages=len(reservation.blocks))
            self._finish(reservation, error)

    def cancel(self, reservation: Reservation) -> None:
        """As the owner asks."""
        self.drop(reservation, CancelledError(f"remote: the receiver cancelled request {reservation.request!r}"))

    def drop_all(self, error: RemoteError) -> None:
        """Because the pool is closed."""
        for reservation in list(self._reservations.values()):
            self.drop(reservation, error)

    # What peers say.

    def begin(self, port: Port, conversion: Conversion, message: Begin) -> None:
        """A transfer begins, or begins again after its link was lost."""
        if self._answered(port, message.transfer):
            return
        if message.epoch != self.epoch:
            self._refuse(port, message, PeerRestartedError("remote: the transfer was for a receiver that has ended"))
        elif message.request in self._reservations:
            self._arrive(port, conversion, message)
        elif len(self._waiting) >= MOST_WAITING:
            self._refuse(port, message, RefusedError("remote: too many transfers wait for their request"))
        else:
            self._waiting[message.transfer] = (port, conversion, message)

    def ask(self, port: Port, message: Ask) -> None:
        """A sender that lost its link wants to know."""
        if message.epoch != self.epoch:
            error = PeerRestartedError("remote: the transfer was for a receiver that has ended")
            port.post(Final(message.transfer, "unheard", error.cause, str(error)))
        elif not self._answered(port, message.transfer):
            port.post(Final(message.transfer, "unheard"))

    def commit(self, port: Port, ring: Ring, message: Commit, landed: int | None) -> None:
        """Bytes are in a segment: check them, put them where they belong, answer. ``landed`` is how many, if known."""
        arrival = self._live.get(message.transfer)
        if arrival is None:
            final = self._finals.get(message.transfer, Final(message.transfer, "unheard"))
            port.post(Nack(message.transfer, message.segment, final.cause or "refused", final.text))
            port.post(final)
            return
        if arrival.port is not port or message.epoch != self.epoch:
            raise ProtocolError("remote: a commit must be of a transfer that began on its link, got another's")
        try:
            part, packed, blocks = self._located(arrival, ring, message, landed)
        except LengthError as error:
            port.post(Nack(message.transfer, message.segment, error.cause, short(error)))
            self.drop(arrival.reservation, error)
            return
        units = arrival.have[message.first : message.first + message.count]
        if not units.all():  # otherwise it came twice
            try:
                self._place(arrival.conversion, part, packed, blocks, message.sums)
            except ChecksumError as error:
                self._stats.add(refused_segments=1)
                port.post(Nack(message.transfer, message.segment, error.cause, short(error)))
                return
            units[:] = True
        port.post(Receipt(message.transfer, message.segment))
        if arrival.is_whole:
            self._publish_if_whole(arrival.reservation)

    def abort(self, message: Abort) -> None:
        """A sender gives up."""
        self._waiting.pop(message.transfer, None)
        arrival = self._live.get(message.transfer)
        if arrival is not None:
            self.drop(arrival.reservation, error_of(message.cause, f"remote: the sender gave up: {message.text}"))

    # What happens to links and time.

    def lost(self, port: Port, now: float) -> None:
        """A link has ended; its writers may come back for a while."""
        for arrival in self._live.values():
            if arrival.port is port:
                arrival.port, arrival.lost_at = None, now
        self._waiting = {key: one for key, one in self._waiting.items() if one[0] is not port}

    def came(self, peer: Identity) -> None:
        """A peer has connected: what another process under its name began will never be whole."""
        for arrival in list(self._live.values()):
            if arrival.writer.name == peer.name and arrival.writer.epoch != peer.epoch:
                self.drop(arrival.reservation, PeerRestartedError(f"remote: the writer {peer.name!r} was restarted"))

    def tick(self, now: float) -> None:
        """Drop what is too late."""
        for reservation in list(self._reservations.values()):
            if now >= reservation.deadline:
                self.drop(reservation, DeadlineError(f"remote: request {reservation.request!r} was not there in time"))
                continue
            gone = next((a for a in reservation.arrivals.values() if self._is_gone(a, now)), None)
            if gone is not None:
                self.drop(reservation, PeerLostError(f"remote: the writer {gone.writer.name!r} was lost"))

    def times(self) -> Iterator[float]:
        """When a tick has something to do."""
        for reservation in self._reservations.values():
            yield reservation.deadline
        for arrival in self._live.values():
            if arrival.port is None:
                yield arrival.lost_at + self._rejoin_s

    def expects(self, port: Port) -> bool:
        """Whether bytes may be on their way through a link."""
        return any(arrival.port is port for arrival in self._live.values())

    def __len__(self) -> int:
        return len(self._reservations) + len(self._live) + len(self._waiting)

    # Inside.

    def _is_gone(self, arrival: Arrival, now: float) -> bool:
        return arrival.port is None and now >= arrival.lost_at + self._rejoin_s

    def _answered(self, port: Port, transfer: bytes) -> bool:
        """Whether the transfer is known, which the sender is then told."""
        arrival = self._live.get(transfer)
        if transfer in self._finals:
            port.post(self._finals[transfer])
        elif arrival is not None:
            arrival.port, arrival.rejoined = port, arrival.rejoined + 1
            port.post(Accept(transfer, arrival.ranges()))
        return transfer in self._finals or arrival is not None

    def _arrive(self, port: Port, conversion: Conversion, message: Begin) -> None:
        reservation = self._reservations[message.request]
        before = reservation.arrivals.get(port.peer.name)
        if before is not None or len(reservation.arrivals) >= reservation.writers:
            what = f"a transfer of {port.peer.name!r}" if before is not None else f"{reservation.writers} writers"
            self._refuse(port, message, RefusedError(f"remote: request {message.request!r} has {what} already"))
            return
        arrival = Arrival(message.transfer, port, conversion, reservation)
        reservation.arrivals[port.peer.name] = self._live[message.transfer] = arrival
        error = self._misfit(reservation, conversion, message)
        if error is not None:
            self.drop(reservation, error)
            return
        reservation.state = "receiving"
        port.post(Accept(message.transfer, []))

    def _misfit(self, reservation: Reservation, conversion: Conversion, message: Begin) -> RemoteError | None:
        """Why what a writer brings cannot be right."""
        if message.digest != conversion.digest:
            return PlanError("remote: plans must be the same on both sides, got one with another digest")
        if message.pages != len(reservation.blocks):
            return LengthError(
                f"remote: request {reservation.request!r} must be of {len(reservation.blocks)} pages, got one of "
                f"{message.pages}"
            )
        if len(reservation.arrivals) == reservation.writers:
            sources = [arrival.conversion.src for arrival in reservation.arrivals.values()]
            try:
                compile_plan(sources, conversion.dst)
            except ValueError as error:
                return PlanError(f"remote: the writers must have all that the receiver wants: {error}")
        return None

    def _located(self, arrival: Arrival, ring: Ring, message: Commit, landed: int | None) -> tuple[int, Tensor, Tensor]:
        """The part, the bytes and the blocks that a commit is about."""
        blocks, conversion = arrival.reservation.blocks, arrival.conversion
        part, first = divmod(message.first, len(blocks))
        if part >= len(conversion.parts) or first + message.count > len(blocks):
            raise LengthError(f"remote: units must be of one part, got {message.count} from {message.first} on")
        this = conversion.parts[part]
        if message.count > units_in(this, conversion.segment_bytes):
            raise LengthError(f"remote: a commit must fit in a segment, got {message.count} units")
        wanted = (message.count * this.page_bytes, message.count * SUM_BYTES)
        given = (message.length if landed in (None, message.length) else landed, len(message.sums))
        if given != wanted or message.length != wanted[0]:
            raise LengthError(
                f"remote: {message.count} pages must have {wanted[0]} bytes and {wanted[1]} bytes of sums, got "
                f"{message.length}, of which {landed} came, and {len(message.sums)}"
            )
        packed = ring.pages(message.segment, message.count, this.page_bytes)
        return part, packed, blocks[first : first + message.count]

    def _place(self, conversion: Conversion, part: int, packed: Tensor, blocks: Tensor, sums: bytes) -> None:
        check_sums(packed, sums)
        conversion.unpack(part, packed, blocks, self._pools)
        if self._verify_end:
            conversion.check(part, packed, blocks, self._pools)
            check_sums(packed, sums)

    def _publish_if_whole(self, reservation: Reservation) -> None:
        arrivals = reservation.arrivals.values()
        if len(arrivals) == reservation.writers and all(arrival.is_whole for arrival in arrivals):
            reservation.state = "verified"
            self._stats.add(
                received_transfers=1, received_pages=len(reservation.blocks), received_bytes=bytes_of(reservation)
            )
            reservation.state = "visible"
            self._finish(reservation, None)

    def _finish(self, reservation: Reservation, error: RemoteError | None) -> None:
        """Forget the reservation, publish or report it, and tell its senders, in this order."""
        del self._reservations[reservation.request]
        if error is not None:
            self._stats.failed(error.cause)
        reservation.end(reservation.state, error)
        for arrival in reservation.arrivals.values():
            del self._live[arrival.transfer]
            cause, text = (error.cause, short(error)) if error is not None else ("", "")
            final = Final(arrival.transfer, "visible" if error is None else "dropped", cause, text)
            self._remember(final)
            if arrival.port is not None:
                arrival.port.post(final)

    def _refuse(self, port: Port, message: Begin, error: RemoteError) -> None:
        self._stats.failed(error.cause)
        final = Final(message.transfer, "dropped", error.cause, short(error))
        self._remember(final)
        port.post(final)

    def _remember(self, final: Final) -> None:
        self._finals[final.transfer] = final
        while len(self._finals) > self._remembers:
            self._finals.popitem(last=False)
