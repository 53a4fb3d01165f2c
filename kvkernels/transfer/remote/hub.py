"""Who is connected and what they say: links and routes of one pool, and the state machines that they speak to."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from kvkernels.transfer.remote.arrivals import Port
from kvkernels.transfer.remote.errors import PeerLostError, ProtocolError, RefusedError, RemoteError
from kvkernels.transfer.remote.handshake import Identity
from kvkernels.transfer.remote.link import HANDSHAKE_S, Link
from kvkernels.transfer.remote.messages import (
    Abort,
    Accept,
    Ask,
    Begin,
    Commit,
    Fetch,
    FetchRefused,
    Final,
    Message,
    Nack,
    NoRing,
    Open,
    Payload,
    Receipt,
    short,
)
from kvkernels.transfer.remote.messages import Ring as RingMessage
from kvkernels.transfer.remote.receiver import Receiver
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.routes import Route
from kvkernels.transfer.remote.sender import Outbox, Outlet
from kvkernels.transfer.remote.settings import Settings
from kvkernels.transfer.remote.stats import Stats
from kvkernels.transfer.remote.transports import Inlet, Transport
from kvkernels.transfer.remote.wire import Conversion, layout_of_text, ring_of

_log = logging.getLogger("kvkernels")
MOST_STRANGERS = 16  #: connections whose peers have not shown that they know the secret


class Inbound:
    """What is received through one link: its ring, and how the peer's pages become ours."""

    def __init__(self, ring: Ring, inlet: Inlet, conversion: Conversion) -> None:
        self.ring, self.inlet, self.conversion = ring, inlet, conversion


class Hub:
    """All links and routes of one pool; the engine's thread calls it."""

    def __init__(
        self, settings: Settings, secret: bytes, me: Identity, receiver: Receiver, transport: Transport, stats: Stats,
        new_outbox: Callable[[Callable[[Port, Ring, RingMessage], Outlet]], Outbox],
        on_fetch: Callable[[Route, str, Fetch], None],
    ) -> None:  # fmt: skip
        self._settings, self._secret, self._me = settings, secret, me
        self.receiver, self._transport, self._stats = receiver, transport, stats
        self._new_outbox, self._on_fetch = new_outbox, on_fetch
        self.selector = selectors.DefaultSelector()
        self.links: list[Link] = []
        self.inbound: dict[Link, Inbound] = {}
        self._dialled: list[Route] = []
        self._visiting: dict[tuple[str, int], Route] = {}
        self._route_of: dict[Link, Route] = {}

    # What the engine's thread does.

    def route_to(self, address: tuple[str, int]) -> Route:
        """To a peer that we connect to."""
        for route in self._dialled:
            if route.address == address:
                return route
        route = Route(len(self._dialled), address, self._new_outbox(self._outlet))
        self._dialled.append(route)
        return route

    def routes(self) -> list[Route]:
        """All of them."""
        return [*self._dialled, *self._visiting.values()]

    def accept(self, connection: socket.socket, now: float) -> None:
        """Somebody has connected."""
        if sum(not link.is_established for link in self.links) >= MOST_STRANGERS:
            self._stats.link_failed("strangers")
            connection.close()
        else:
            self._add(Link(connection, "server", self._secret, self._me, self, now))

    def serve(self, link: Link, mask: int, now: float) -> None:
        """Its socket is ready."""
        self._guarded(link, self._serve, link, mask, now)

    def tick(self, now: float) -> None:
        """Keep deadlines, and try again what is due."""
        self.receiver.tick(now)
        for link in list(self.links):
            if link.is_established:
                silence_s = self._settings.silence_s if self._is_waiting(link) else None
                self._guarded(link, link.keep_alive, now, silence_s)
            elif now - link.opened_at >= HANDSHAKE_S:
                self.end(link, ProtocolError(f"remote: a handshake must be done in {HANDSHAKE_S} s"))
        for route in self.routes():
            route.outbox.tick(now)
            if route.is_due(now):
                self._dial(route, now)
        for key, route in list(self._visiting.items()):
            if route.link is None and not route.is_wanted:
                del self._visiting[key]

    def move(self, now: float) -> None:
        """Fill segments, let the transport work, and write what is queued."""
        for route in self.routes():
            if route.link is not None:
                self._guarded(route.link, route.outbox.fill, now)
        if self._transport.needs_polls:
            for link, inbound in list(self.inbound.items()):
                self._guarded(link, inbound.inlet.poll)
        for link in list(self.links):
            self._guarded(link, self._write_some, link)

    def times(self, now: float) -> Iterator[float]:
        """When a tick has something to do."""
        yield from self.receiver.times()
        for route in self.routes():
            yield from route.times(now)
        for link in self.links:
            if not link.is_established:
                yield link.opened_at + HANDSHAKE_S
            elif self._is_waiting(link):
                yield now + self._settings.silence_s / 8

    @property
    def wants_polls(self) -> bool:
        """Whether the transport has something on its way and works only while it is asked to."""
        if not self._transport.needs_polls:
            return False
        writing = any(route.outbox.is_writing for route in self.routes())
        return writing or any(self.receiver.expects(link) for link in self.inbound)

    def end(self, link: Link, error: RemoteError) -> None:
        """Fence first: the transport's ends are closed before anything learns that the link is gone."""
        if not link.is_open:
            return
        if error.cause == ProtocolError.cause or not link.is_established:
            self._stats.link_failed(error.cause)
        self.selector.unregister(link.socket)
        self.links.remove(link)
        route = self._route_of.pop(link, None)
        if route is not None and route.link is link:
            route.outbox.disconnect()
        inbound = self.inbound.pop(link, None)
        if inbound is not None:
            inbound.inlet.close()
            inbound.ring.close()
        link.close(error)
        now = time.monotonic()
        self.receiver.lost(link, now)
        if route is not None and route.link is link:
            route.lost(error, now, self.receiver)

    # What links tell of.

    def established(self, link: Link) -> None:
        """A peer has shown that it knows the secret."""
        self.receiver.came(link.peer)
        if link.role == "client":
            self._route_of[link].connected(link)
            return
        key = (link.peer.name, link.peer.channel)
        if key not in self._visiting:
            self._visiting[key] = Route(link.peer.channel, None, self._new_outbox(self._outlet))
        route = self._visiting[key]
        if route.link is not None:  # what it still brings would come after what we are about to answer
            self.end(route.link, PeerLostError("remote: the peer has connected anew"))
        self._route_of[link] = route
        route.connected(link)

    def room(self, link: Link, message: Payload) -> memoryview:
        """Where a payload goes."""
        return self._inbound_of(link).inlet.room(message)

    def heard(self, link: Link, message: Message) -> None:
        """Hand a message to whom it is for."""
        route, receiver = self._route_of[link], self.receiver
        match message:
            case Commit():
                inbound = self._inbound_of(link)
                receiver.commit(link, inbound.ring, message, inbound.inlet.landed(message.segment))
            case Receipt():
                route.outbox.receipt(message)
            case Begin():
                receiver.begin(link, self._inbound_of(link).conversion, message)
            case Ask():
                receiver.ask(link, message)
            case Abort():
                receiver.abort(message)
            case Accept():
                route.outbox.accepted(message)
            case Nack():
                route.outbox.nack(message, time.monotonic())
            case Final():
                route.outbox.final(message)
            case Open():
                self._open(link, message)
            case RingMessage():
                route.outbox.opened(message)
            case NoRing():
                route.outbox.refused(message)
            case Fetch():
                self._on_fetch(route, link.peer.name, message)
            case FetchRefused():
                reservation = route.reservation_of(message.request)
                if reservation is not None:
                    receiver.drop(reservation, RefusedError(f"remote: the owner refused: {message.text}"))
            case _:
                raise ProtocolError(f"remote: {type(message).__name__} must not come in a session")

    # Inside.

    def _guarded(self, link: Link, function: Callable[..., None], *arguments: Any) -> None:
        """What fails on a link's behalf ends that link."""
        if not link.is_open:
            return
        try:
            function(*arguments)
        except RemoteError as error:
            self.end(link, error)
        except Exception as error:  # a defect, or memory that ran out: the peer may try again
            _log.exception("a link of a RemotePool failed")
            self.end(link, PeerLostError(f"remote: the link failed: {error!r}"))

    def _is_waiting(self, link: Link) -> bool:
        """Whether something of ours depends on the peer."""
        route = self._route_of.get(link)
        return self.receiver.expects(link) or (route is not None and route.is_wanted)

    def _dial(self, route: Route, now: float) -> None:
        try:
            connection = route.dial()
        except PeerLostError as error:
            route.lost(error, now, self.receiver)
            return
        me = Identity(self._me.name, self._me.epoch, route.channel)
        link = Link(connection, "client", self._secret, me, self, now, is_connecting=True)
        route.link = link
        self._route_of[link] = route
        self._add(link)

    def _add(self, link: Link) -> None:
        self.links.append(link)
        self.selector.register(link.socket, selectors.EVENT_READ, link)

    def _serve(self, link: Link, mask: int, now: float) -> None:
        if mask & selectors.EVENT_WRITE:
            link.write()
        if mask & selectors.EVENT_READ and not link.is_connecting:
            link.read(now)

    def _write_some(self, link: Link) -> None:
        if not link.is_connecting:
            link.write()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_to_write else 0)
        if self.selector.get_key(link.socket).events != events:
            self.selector.modify(link.socket, events, link)

    def _open(self, link: Link, message: Open) -> None:
        if link in self.inbound:
            raise ProtocolError("remote: a link must be opened once, got a second time")
        settings, mine = self._settings, self._settings.layout
        try:
            theirs = layout_of_text(message.layout)
            segments, segment_bytes = ring_of(theirs, settings.segments, settings.segment_bytes)
            conversion = Conversion(theirs, mine, segment_bytes)
            if len(self.inbound) >= settings.most_rings:
                raise RefusedError(f"remote: there must be at most {settings.most_rings} senders")
        except RemoteError as error:
            link.post(NoRing(error.cause, short(error)))
            return
        ring = Ring(segments, segment_bytes)
        inlet = self._transport.inlet(link, ring)
        self.inbound[link] = Inbound(ring, inlet, conversion)
        name = self._transport.name
        link.post(RingMessage(segments, segment_bytes, mine.text, name, inlet.metadata))

    def _inbound_of(self, link: Link) -> Inbound:
        if link not in self.inbound:
            raise ProtocolError("remote: a link must be opened before anything is sent through it")
        return self.inbound[link]

    def _outlet(self, port: Port, mirror: Ring, message: RingMessage) -> Outlet:
        assert isinstance(port, Link)
        if message.transport != self._transport.name:
            raise RefusedError(f"remote: both sides must use {self._transport.name}, got {message.transport}")
        return self._transport.outlet(port, mirror, message.metadata)
