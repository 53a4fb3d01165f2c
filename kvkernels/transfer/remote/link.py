"""One connection: bytes to frames and back, the handshake, and segments that come as bytes of the connection itself."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from typing import Protocol

from kvkernels.transfer.remote.errors import AuthenticationError, PeerLostError, ProtocolError, RemoteError
from kvkernels.transfer.remote.frames import Session, body_of_plain, take_frame
from kvkernels.transfer.remote.handshake import Handshake, Identity
from kvkernels.transfer.remote.messages import Message, Payload, Ping, Pong, decode, encode

_RECEIVE_BYTES = 64 << 10
_TURN_BYTES = 1 << 20  # read of one link before others have their turn
HANDSHAKE_S = 2.0


class Handler(Protocol):
    """What a link tells of."""

    def established(self, link: Link) -> None:
        """The peer knows the secret."""

    def heard(self, link: Link, message: Message) -> None:
        """The peer said something."""

    def room(self, link: Link, message: Payload) -> memoryview:
        """Where a payload is to be read into; ProtocolError where it must not come."""


class Link:
    """One end of a connection. It is one thread's; `post` and `push` queue, and the loop writes."""

    def __init__(
        self, connection: socket.socket, role: str, secret: bytes, me: Identity, handler: Handler, now: float,
        is_connecting: bool = False,
    ) -> None:  # fmt: skip
        self.role, self.socket, self.is_connecting = role, connection, is_connecting
        self.peer = Identity("", 0)
        self.opened_at = self.heard_at = self.pinged_at = now
        self.error: RemoteError | None = None
        self._is_awaited = False
        self._handler = handler
        self._handshake = Handshake(role, secret, me)
        self._session: Session | None = None
        self._received = bytearray()
        self._room: memoryview | None = None
        self._out: deque[memoryview] = deque()
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._queue(self._handshake.start())

    @property
    def is_established(self) -> bool:
        """Whether both sides know each other."""
        return self._session is not None

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.error is None

    @property
    def wants_to_write(self) -> bool:
        """Whether something is queued."""
        return self.is_connecting or bool(self._out)

    def post(self, message: Message) -> None:
        """Queue a message; nothing where the link has ended."""
        if self._session is not None and self.is_open:
            self._queue(self._session.seal(encode(message)))

    def push(self, memory: memoryview) -> None:
        """Queue bytes as they are, which stay as they are until they are sent."""
        if self.is_open:
            self._queue(memory)

    def write(self) -> None:
        """Send what the socket takes."""
        if self.is_connecting:
            code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise PeerLostError(f"remote: the peer could not be reached: {os.strerror(code)}")
            self.is_connecting = False
        while self._out:
            try:
                sent = self.socket.send(self._out[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerLostError(f"remote: the connection ended: {error}") from None
            if sent < len(self._out[0]):
                self._out[0] = self._out[0][sent:]
            else:
                self._out.popleft()

    def read(self, now: float) -> None:
        """Take what the socket has, and tell of what is whole."""
        taken = 0
        while taken < _TURN_BYTES and self.is_open:
            direct = self._room is not None and not self._received
            try:
                if direct:
                    assert self._room is not None
                    count = self.socket.recv_into(self._room)
                else:
                    some = self.socket.recv(_RECEIVE_BYTES)
                    count = len(some)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._ended(str(error)) from None
            if count == 0:
                raise self._ended("the peer closed it")
            taken += count
            self.heard_at = now
            if direct:
                self._fill_room(count)
            else:
                self._received += some
            self._consume()

    def close(self, error: RemoteError) -> None:
        """End it, once."""
        if self.error is None:
            self.error = error
            self._out.clear()
            self._room = None
            with contextlib.suppress(OSError):
                self.socket.close()

    def keep_alive(self, now: float, silence_s: float | None) -> None:
        """Ask a silent peer whether it is there; PeerLostError where it does not answer. None: nothing is awaited."""
        if silence_s is None or not self._is_awaited:
            self._is_awaited = silence_s is not None
            self.heard_at = self.pinged_at = now
            return
        if now - self.heard_at > silence_s:
            raise PeerLostError(f"remote: the peer must answer, got {silence_s} s of silence")
        if now - max(self.heard_at, self.pinged_at) > silence_s / 4:
            self.pinged_at = now
            self.post(Ping())

    def _ended(self, why: str) -> RemoteError:
        if self.role == "client" and self._handshake.has_proved and not self.is_established:
            return AuthenticationError("remote: the peer closed the connection at our proof; is the secret the same?")
        return PeerLostError(f"remote: the connection ended: {why}")

    def _queue(self, data: bytes | memoryview) -> None:
        if len(data):
            self._out.append(memoryview(data))

    def _consume(self) -> None:
        while self.is_open:
            if self._room is not None:
                count = min(len(self._room), len(self._received))
                if count == 0:
                    return
                self._room[:count] = self._received[:count]
                del self._received[:count]
                self._fill_room(count)
                continue
            frame = take_frame(self._received, self.is_established)
            if frame is None:
                return
            self._take(frame)

    def _take(self, frame: bytes) -> None:
        if self._session is None:
            self._queue(self._handshake.receive(body_of_plain(frame)))
            if self._handshake.session is not None:
                assert self._handshake.peer is not None
                self._session, self.peer = self._handshake.session, self._handshake.peer
                self._handler.established(self)
            return
        message = decode(self._session.open(frame))
        if isinstance(message, Payload):
            room = self._handler.room(self, message)
            if len(room) != message.length:
                raise ProtocolError(f"remote: a payload must have room, got {message.length} bytes for {len(room)}")
            self._room = room or None
        elif isinstance(message, Ping):
            self.post(Pong())
        elif not isinstance(message, Pong):
            self._handler.heard(self, message)

    def _fill_room(self, count: int) -> None:
        assert self._room is not None
        self._room = self._room[count:] or None
