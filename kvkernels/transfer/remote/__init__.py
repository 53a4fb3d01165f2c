"""KV pages to other machines and from them: a transfer is visible as a whole, checked, or not at all."""

from kvkernels.transfer.remote.errors import (
    AuthenticationError,
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
)
from kvkernels.transfer.remote.files import FileTier
from kvkernels.transfer.remote.handle import RemoteTransfer, TransferResult
from kvkernels.transfer.remote.peer import Peer
from kvkernels.transfer.remote.pool import RemotePool
from kvkernels.transfer.remote.service import KVTransferEngine

__all__ = [
    "AuthenticationError",
    "CancelledError",
    "ChecksumError",
    "DeadlineError",
    "FileTier",
    "KVTransferEngine",
    "LengthError",
    "Peer",
    "PeerLostError",
    "PeerRestartedError",
    "PlanError",
    "ProtocolError",
    "RefusedError",
    "RemoteError",
    "RemotePool",
    "RemoteTransfer",
    "TransferResult",
]
