"""What peers say to each other: msgpack of fixed shape, with limits that are checked before anything else looks.

::

    sender                                receiver
      Open(layout)                  ──▶
                                    ◀──   Ring(segments, metadata)      once a link
      Begin(transfer, request, …)   ──▶                                 or Ask, on a new link
                                    ◀──   Accept(transfer, have)
      [bytes into segment 3]        ══▶
      Commit(segment 3, sums, …)    ──▶   checks, scatters
                                    ◀──   Receipt(segment 3)            or Nack; the segment is free again
                                    ◀──   Final(transfer, visible)      or dropped

    who fetches   Fetch(request, blocks)  ──▶  who owns: becomes the sender of the above, or FetchRefused
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

try:
    import msgspec
    from msgspec import Meta
except ImportError as error:
    raise ImportError("kvkernels.transfer.remote: msgspec must be installed: pip install kvkernels[remote]") from error

from kvkernels.transfer.remote.errors import ProtocolError

VERSION = 1
HELLO_BYTES = 4096  #: the most that is read of who has not proved anything
FRAME_BYTES = 1 << 20  #: the most that is read of who has
MOST_BLOCKS = 1 << 16  #: of one transfer
MOST_PAGES = 4096  #: of one commit
SUM_BYTES = 8
_TEXT_BYTES = 64 << 10

_Id: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Epoch: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Count: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_Request: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
_Word: TypeAlias = Annotated[str, Meta(max_length=32)]
_Text: TypeAlias = Annotated[str, Meta(max_length=4096)]


class Message(msgspec.Struct, tag=True, array_like=True, forbid_unknown_fields=True):
    """Anything that is said."""


class Hello(Message):
    """The first frame of either side."""

    version: int
    role: Literal["client", "server"]
    nonce: Annotated[bytes, Meta(min_length=32, max_length=32)]
    epoch: _Epoch
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    channel: _Count


class Proof(Message):
    """The second frame of either side."""

    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Open(Message):
    """I want to send pages of this layout."""

    layout: Annotated[str, Meta(max_length=_TEXT_BYTES)]


class Ring(Message):
    """What you may write to, and the layout that the pages become."""

    segments: Annotated[int, Meta(ge=1, le=64)]
    segment_bytes: Annotated[int, Meta(ge=1, le=1 << 28)]
    layout: Annotated[str, Meta(max_length=_TEXT_BYTES)]
    transport: _Word
    metadata: Annotated[bytes, Meta(max_length=_TEXT_BYTES)]


class NoRing(Message):
    """You cannot send to me."""

    cause: _Word
    text: _Text


class Begin(Message):
    """A transfer begins; ``epoch`` is the receiver's, as the sender knows it."""

    transfer: _Id
    request: _Request
    pages: Annotated[int, Meta(ge=1, le=MOST_BLOCKS)]
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    epoch: _Epoch


class Ask(Message):
    """What became of a transfer that began before this link?"""

    transfer: _Id
    epoch: _Epoch


class Accept(Message):
    """Send it, but for the units ``have``, as pairs of first and count."""

    transfer: _Id
    have: Annotated[list[tuple[_Count, _Count]], Meta(max_length=MOST_BLOCKS)]


class Payload(Message):
    """So many bytes follow this frame, for a segment: only where the transport is this connection."""

    segment: _Count
    length: _Count


class Commit(Message):
    """The bytes of these units are in a segment."""

    transfer: _Id
    epoch: _Epoch
    segment: _Count
    first: _Count
    count: Annotated[int, Meta(ge=1, le=MOST_PAGES)]
    length: _Count
    sums: Annotated[bytes, Meta(max_length=MOST_PAGES * SUM_BYTES)]


class Receipt(Message):
    """They were checked and are where they belong; the segment is free."""

    transfer: _Id
    segment: _Count


class Nack(Message):
    """They were not taken; the segment is free."""

    transfer: _Id
    segment: _Count
    cause: _Word
    text: _Text


class Final(Message):
    """What became of a transfer, for good; ``unheard`` where it never began here."""

    transfer: _Id
    outcome: Literal["visible", "dropped", "unheard"]
    cause: _Word = ""
    text: _Text = ""


class Abort(Message):
    """The sender gives a transfer up."""

    transfer: _Id
    cause: _Word
    text: _Text


class Fetch(Message):
    """Send me these blocks of yours, under this request."""

    request: _Request
    blocks: Annotated[list[Annotated[int, Meta(ge=0, le=(1 << 62))]], Meta(min_length=1, max_length=MOST_BLOCKS)]
    seconds: Annotated[float, Meta(gt=0, le=1e9)]


class FetchRefused(Message):
    """No."""

    request: _Request
    cause: _Word
    text: _Text


class Ping(Message):
    """Are you there?"""


class Pong(Message):
    """Yes."""


_Said: TypeAlias = (
    Open | Ring | NoRing | Begin | Ask | Accept | Payload | Commit | Receipt | Nack | Final | Abort | Fetch
    | FetchRefused | Ping | Pong
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_said: msgspec.msgpack.Decoder[_Said] = msgspec.msgpack.Decoder(_Said)
_hello = msgspec.msgpack.Decoder(Hello)
_proof = msgspec.msgpack.Decoder(Proof)
_Kind = TypeVar("_Kind")


def encode(message: Message) -> bytes:
    """As bytes."""
    return _encoder.encode(message)


def decode(body: bytes | memoryview) -> Message:
    """What an authenticated peer says; ProtocolError where it is none of the above."""
    return _decoded(_said, body)


def decode_hello(body: bytes | memoryview) -> Hello:
    """The first frame of anybody."""
    return _decoded(_hello, body)


def decode_proof(body: bytes | memoryview) -> Proof:
    """The second frame of anybody."""
    return _decoded(_proof, body)


def _decoded(decoder: msgspec.msgpack.Decoder[_Kind], body: bytes | memoryview) -> _Kind:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"remote: a frame must be a message of version {VERSION}, got {error}") from None


def short(text: object) -> str:
    """Fit for a message's ``text``."""
    return str(text)[:2000]
