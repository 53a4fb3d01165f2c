"""Two sides show each other that they know the secret, without sending it, and agree on a session's keys.

::

    client   Hello(version, role, nonce, epoch, name)  ──▶
                                                       ◀──  Hello(…)            server
             Proof(HMAC over role and both hellos)     ──▶
                                                       ◀──  Proof(…)
    keys     HKDF of the secret, salted with both hellos: one a direction

A hello that is sent back is of the wrong role, and a proof is of its role and of both nonces: none can be used twice.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass

from kvkernels.transfer.remote import keys
from kvkernels.transfer.remote.errors import AuthenticationError, ProtocolError
from kvkernels.transfer.remote.frames import Session, plain
from kvkernels.transfer.remote.messages import VERSION, Hello, Proof, decode_hello, decode_proof, encode


@dataclass(frozen=True)
class Identity:
    """Who is at one end: a name, which process under it (epoch), and which of its connections to us (channel)."""

    name: str
    epoch: int
    channel: int = 0


class Handshake:
    """One side of it, without a socket: ``receive`` takes a frame's body and returns what to send, b"" for nothing."""

    def __init__(self, role: str, secret: bytes, me: Identity) -> None:
        self._role, self._secret = role, secret
        self._other = "server" if role == "client" else "client"
        nonce = secrets.token_bytes(32)
        self._mine = encode(Hello(VERSION, role, nonce, me.epoch, me.name, me.channel))  # type: ignore[arg-type]
        self._transcript = b""
        self.peer: Identity | None = None
        self.session: Session | None = None

    def start(self) -> bytes:
        """What is sent before anything was received."""
        return plain(self._mine) if self._role == "client" else b""

    @property
    def has_proved(self) -> bool:
        """Whether the peer has what it needs to know us."""
        return self._transcript != b""

    def receive(self, body: bytes) -> bytes:
        """The peer's next frame. ProtocolError or AuthenticationError end the connection."""
        if not self._transcript:
            return self._greet(body)
        if self.session is not None:
            raise ProtocolError("remote: a handshake must have two frames a side, got more")
        wanted = keys.proof(self._secret, self._other, self._transcript)
        if not hmac.compare_digest(wanted, decode_proof(body).mac):
            raise AuthenticationError("remote: the peer must know the secret, got a wrong proof")
        self.session = Session(self._key(self._role), self._key(self._other))
        return self._proof() if self._role == "server" else b""

    def _greet(self, body: bytes) -> bytes:
        hello = decode_hello(body)
        if hello.version != VERSION:
            raise ProtocolError(f"remote: the peer's protocol must be version {VERSION}, got {hello.version}")
        if hello.role != self._other:
            raise ProtocolError(f"remote: the peer must be a {self._other}, got a {hello.role}")
        self.peer = Identity(hello.name, hello.epoch, hello.channel)
        both = (self._mine, body) if self._role == "client" else (body, self._mine)
        joined = b"".join(struct.pack(">I", len(one)) + one for one in both)
        self._transcript = hashlib.sha256(joined).digest()
        return self._proof() if self._role == "client" else plain(self._mine)

    def _proof(self) -> bytes:
        return plain(encode(Proof(keys.proof(self._secret, self._role, self._transcript))))

    def _key(self, sender: str) -> bytes:
        return keys.session_key(self._secret, self._transcript, sender)
