"""What can become of a transfer between machines, each with the word by which it is counted and told to the peer."""

from __future__ import annotations


class RemoteError(RuntimeError):
    """A transfer between machines came to nothing; ``cause`` is the word that ``stats()`` counts it under."""

    cause = "other"


class AuthenticationError(RemoteError, PermissionError):
    """The peer does not know the secret."""

    cause = "authentication"


class ProtocolError(RemoteError):
    """The peer said what it must not say."""

    cause = "protocol"


class ChecksumError(RemoteError):
    """A page's bytes are not those that its sum is of."""

    cause = "checksum"


class LengthError(RemoteError, ValueError):
    """There are more bytes, or fewer, than the pages have."""

    cause = "length"


class PlanError(RemoteError, ValueError):
    """The two sides' layouts or plans do not go together."""

    cause = "plan"


class PeerLostError(RemoteError, ConnectionError):
    """The connection ended, or could not be made."""

    cause = "peer_lost"


class PeerRestartedError(PeerLostError):
    """The peer is another process than the one that the transfer began with, and knows nothing of it."""

    cause = "restarted"


class DeadlineError(RemoteError, TimeoutError):
    """It was not done in time."""

    cause = "deadline"


class RefusedError(RemoteError):
    """The peer's owner does not want it."""

    cause = "refused"


class CancelledError(RemoteError):
    """It was cancelled, on this side or on the other."""

    cause = "cancelled"


_KINDS = {kind.cause: kind for kind in (
    RemoteError, AuthenticationError, ProtocolError, ChecksumError, LengthError, PlanError, PeerLostError,
    PeerRestartedError, DeadlineError, RefusedError, CancelledError,
)}  # fmt: skip


def error_of(cause: str, text: str) -> RemoteError:
    """The error that a peer spoke of."""
    return _KINDS.get(cause, RemoteError)(text)
