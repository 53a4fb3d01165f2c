"""The way to one peer: its link while there is one, what is to be sent through it, and when to try again."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from kvkernels.transfer.remote.arrivals import Reservation
from kvkernels.transfer.remote.errors import PeerLostError, RemoteError
from kvkernels.transfer.remote.link import Link
from kvkernels.transfer.remote.messages import Fetch
from kvkernels.transfer.remote.receiver import Receiver
from kvkernels.transfer.remote.sender import Outbox, backoff_s


class Route:
    """To a peer that we connect to (``address``), or that connects to us and is known by its name and channel."""

    def __init__(self, channel: int, address: tuple[str, int] | None, outbox: Outbox) -> None:
        self.channel, self.address, self.outbox = channel, address, outbox
        self.link: Link | None = None
        self._fetches: dict[str, tuple[Fetch, Reservation]] = {}
        self._failures = 0
        self._next_dial = 0.0

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to be done through it."""
        return bool(self.outbox.transfers or self._fetches)

    def is_due(self, now: float) -> bool:
        """Whether to connect now."""
        return self.address is not None and self.link is None and self.is_wanted and now >= self._next_dial

    def dial(self) -> socket.socket:
        """A socket that is connecting; PeerLostError where that cannot even begin."""
        assert self.address is not None
        connection = None
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(*self.address, type=socket.SOCK_STREAM)[0]
            connection = socket.socket(family, kind, protocol)
            connection.setblocking(False)
            connection.connect(address)
        except BlockingIOError:
            pass
        except OSError as error:
            if connection is not None:
                connection.close()
            raise PeerLostError(f"remote: the peer could not be reached: {error}") from None
        assert connection is not None
        return connection

    def connected(self, link: Link) -> None:
        """There is a link, whose peer knows the secret."""
        self.link = link
        self._failures = 0
        self.outbox.connected(link)
        for message, _ in self._fetches.values():
            link.post(message)

    def lost(self, error: RemoteError, now: float, receiver: Receiver) -> None:
        """The link has ended, or could not be made."""
        self.link = None
        self._next_dial = now + backoff_s(self._failures)
        self._failures += 1
        self.outbox.lost(error)
        if self._failures > self.outbox.most_retries:
            for _, reservation in list(self._fetches.values()):
                receiver.drop(reservation, error)

    def fetch(self, message: Fetch, reservation: Reservation) -> None:
        """Ask the peer for pages, now or when there is a link, until the reservation has ended."""
        self._fetches[message.request] = (message, reservation)
        if self.link is not None:
            self.link.post(message)

    def fetched(self, request: str) -> None:
        """It is no longer asked for."""
        self._fetches.pop(request, None)

    def reservation_of(self, request: str) -> Reservation | None:
        """What a fetch was for."""
        found = self._fetches.get(request)
        return None if found is None else found[1]

    def times(self, now: float) -> Iterator[float]:
        """When there is something to do."""
        yield from self.outbox.times(now)
        if self.address is not None and self.link is None and self.is_wanted:
            yield self._next_dial
