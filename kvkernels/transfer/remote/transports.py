"""How bytes come into a peer's ring: what a transport is, and the one that every machine has.

The receiver's end says in `metadata` what the sender's needs. A transport that fails raises PeerLostError, which ends
the link, and with it both ends: after `close` nothing is written to the ring any more. There is no other fence.
"""

from __future__ import annotations

from typing import Protocol

from kvkernels.transfer.remote.errors import LengthError, ProtocolError
from kvkernels.transfer.remote.link import Link
from kvkernels.transfer.remote.messages import Payload
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.sender import Outlet


class Inlet(Protocol):
    """The receiver's end of one link."""

    metadata: bytes

    def room(self, message: Payload) -> memoryview:
        """Where a payload that comes through the link goes."""

    def landed(self, segment: int) -> int | None:
        """How many bytes the last write to a segment had; None where the transport does not tell."""

    def poll(self) -> None:
        """Let it work."""

    def close(self) -> None:
        """After this nothing is written to the ring."""


class Transport(Protocol):
    """A way to write into a peer's ring; one object a pool."""

    name: str
    #: Whether it works only while it is asked to.
    needs_polls: bool

    def inlet(self, link: Link, ring: Ring) -> Inlet:
        """For a link of whose peer we receive."""

    def outlet(self, link: Link, mirror: Ring, metadata: bytes) -> Outlet:
        """For a link to whose peer we send."""


class TcpTransport:
    """Segments as bytes of the link's own connection, after a frame that says which."""

    name = "tcp"
    needs_polls = False

    def inlet(self, link: Link, ring: Ring) -> Inlet:
        """For a link of whose peer we receive."""
        return _TcpInlet(ring)

    def outlet(self, link: Link, mirror: Ring, metadata: bytes) -> Outlet:
        """For a link to whose peer we send."""
        return _TcpOutlet(link, mirror)


class _TcpInlet:
    metadata = b""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._landed: dict[int, int] = {}

    def room(self, message: Payload) -> memoryview:
        try:
            room = self._ring.bytes_of(message.segment, message.length)
        except LengthError as error:
            raise ProtocolError(str(error)) from None
        self._landed[message.segment] = message.length
        return room

    def landed(self, segment: int) -> int | None:
        return self._landed.get(segment, 0)

    def poll(self) -> None:
        pass

    def close(self) -> None:
        pass


class _TcpOutlet:
    def __init__(self, link: Link, mirror: Ring) -> None:
        self._link, self._mirror = link, mirror
        self._done: list[int] = []

    def write(self, segment: int, length: int) -> None:
        # A commit comes after the bytes on the same connection, so that to have queued them is to have written them.
        self._link.post(Payload(segment, length))
        self._link.push(self._mirror.bytes_of(segment, length))
        self._done.append(segment)

    def done(self) -> list[int]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        pass
