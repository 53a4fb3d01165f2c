"""Sending and receiving for who wants to wait: a failure is an exception, and counted."""

from __future__ import annotations

from typing import Any, Literal, overload

from kvkernels.transfer.remote.handle import RemoteTransfer, TransferResult
from kvkernels.transfer.remote.peer import Peer
from kvkernels.transfer.remote.pool import Blocks, RemotePool


class KVTransferEngine:
    """A pool's transfers, one call each, that return when they are done and raise when they are not.

    Parameters
    ----------
    pool : RemotePool
        Whoever made it closes it.

    Examples
    --------
    >>> import os, torch
    >>> from kvkernels.transfer.remote import KVTransferEngine, Peer, RemotePool
    >>> os.environ["KVKERNELS_REMOTE_SECRET"] = "only an example's secret"
    >>> mine, theirs = torch.ones(4, 2, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)
    >>> with RemotePool([mine]) as prefill, RemotePool([theirs]) as decode:
    ...     there = KVTransferEngine(decode).receive("request 7", [0, 2], wait=False)
    ...     KVTransferEngine(prefill).send(Peer(*decode.address), "request 7", [3, 1]).pages
    2
    """

    def __init__(self, pool: RemotePool) -> None:
        self.pool = pool

    def send(self, peer: Peer, request: str, block_ids: Blocks, *, timeout_s: float = 30.0) -> TransferResult:
        """Send blocks; they are visible at the peer when this returns.

        Raises
        ------
        RemoteError
            It failed, or its outcome is unknown.
        ValueError, IndexError, RuntimeError
            As `RemotePool.send_blocks` does.
        """
        return _checked(self.pool.send_blocks(peer, request, block_ids, timeout_s=timeout_s))

    @overload
    def receive(
        self, request: str, block_ids: Blocks, *, writers: int = ..., timeout_s: float = ..., wait: Literal[True] = ...
    ) -> TransferResult: ...

    @overload
    def receive(
        self, request: str, block_ids: Blocks, *, writers: int = ..., timeout_s: float = ..., wait: Literal[False]
    ) -> RemoteTransfer: ...

    def receive(
        self, request: str, block_ids: Blocks, *, writers: int = 1, timeout_s: float = 30.0, wait: bool = True
    ) -> TransferResult | RemoteTransfer:
        """Receive a request's pages into blocks; without `wait`, the transfer that will.

        Raises
        ------
        RemoteError
            It was dropped.
        ValueError, IndexError, RuntimeError
            As `RemotePool.receive_blocks` does.
        """
        transfer = self.pool.receive_blocks(request, block_ids, writers=writers, timeout_s=timeout_s)
        return _checked(transfer) if wait else transfer

    def stats(self) -> dict[str, Any]:
        """As `RemotePool.stats`."""
        return self.pool.stats()


def _checked(transfer: RemoteTransfer) -> TransferResult:
    result = transfer.result()
    if result.error is not None:
        raise result.error
    return result
