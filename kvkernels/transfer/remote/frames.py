"""Frames: a length, and once peers know each other a counter and a MAC.

::

    before the session   | length u32 | message |
    in a session         | length u32 | counter u64 | message | HMAC-SHA256, 32 bytes |
                           '- of what follows it                 '- over all that is before it
"""

from __future__ import annotations

import hmac
import struct

from kvkernels.transfer.remote.errors import ProtocolError
from kvkernels.transfer.remote.messages import FRAME_BYTES, HELLO_BYTES

_LENGTH = struct.Struct(">I")
_HEAD = struct.Struct(">IQ")
_MAC_BYTES = 32
_COUNTER_BYTES = 8


def plain(body: bytes) -> bytes:
    """A frame of the handshake."""
    return _LENGTH.pack(len(body)) + body


class Session:
    """The frames of one link after the handshake: a key and a counter for each direction."""

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    def seal(self, body: bytes) -> bytes:
        """The next frame to send."""
        length = _COUNTER_BYTES + len(body) + _MAC_BYTES
        if length > FRAME_BYTES:
            raise ValueError(f"remote: a frame must have at most {FRAME_BYTES} bytes, got {length}")
        frame = _HEAD.pack(length, self._sent) + body
        self._sent += 1
        return frame + hmac.digest(self._send_key, frame, "sha256")

    def open(self, frame: bytes) -> bytes:
        """The message in a whole frame that was received; ProtocolError where it is not the next one of the peer's."""
        if len(frame) < _HEAD.size + _MAC_BYTES:
            raise ProtocolError(f"remote: a frame must have a counter and a MAC, got {len(frame)} bytes")
        said, mac = frame[:-_MAC_BYTES], frame[-_MAC_BYTES:]
        if not hmac.compare_digest(hmac.digest(self._receive_key, said, "sha256"), mac):
            raise ProtocolError("remote: a frame's MAC must be of its bytes, got another")
        counter = _HEAD.unpack_from(said)[1]
        if counter != self._received:
            raise ProtocolError(f"remote: a frame's counter must be {self._received}, got {counter}")
        self._received += 1
        return said[_HEAD.size :]


def take_frame(buffer: bytearray, is_session: bool) -> bytes | None:
    """The next whole frame of what was received, length included, taken out; None where it is not yet whole."""
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    limit = FRAME_BYTES if is_session else HELLO_BYTES
    if length > limit:
        raise ProtocolError(f"remote: a frame must have at most {limit} bytes, got {length}")
    end = _LENGTH.size + length
    if len(buffer) < end:
        return None
    frame = bytes(buffer[:end])
    del buffer[:end]
    return frame


def body_of_plain(frame: bytes) -> bytes:
    """The message in a frame of the handshake."""
    return frame[_LENGTH.size :]
