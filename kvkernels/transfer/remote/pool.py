"""A pool whose pages can be sent to other machines and received from them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from kvkernels.common.arguments import integers
from kvkernels.layout.cache import KVCache
from kvkernels.transfer.remote.arrivals import Port, Reservation
from kvkernels.transfer.remote.desk import Desk
from kvkernels.transfer.remote.engine import Engine
from kvkernels.transfer.remote.errors import RemoteError
from kvkernels.transfer.remote.fetches import Fetches
from kvkernels.transfer.remote.handle import RemoteTransfer
from kvkernels.transfer.remote.handshake import Identity
from kvkernels.transfer.remote.hub import Hub
from kvkernels.transfer.remote.keys import load_secret
from kvkernels.transfer.remote.messages import Fetch
from kvkernels.transfer.remote.messages import Ring as RingMessage
from kvkernels.transfer.remote.nixl import make_transport
from kvkernels.transfer.remote.outgoing import Outgoing
from kvkernels.transfer.remote.peer import Peer, check_peer, resolved
from kvkernels.transfer.remote.receiver import Receiver
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.routes import Route
from kvkernels.transfer.remote.sender import Outbox, Outlet
from kvkernels.transfer.remote.settings import Settings
from kvkernels.transfer.remote.stats import Stats
from kvkernels.transfer.remote.wire import as_cache

#: Block ids, each in range.
Blocks: TypeAlias = "Tensor | Sequence[int]"
REMEMBERED = 10_000


class RemotePool:
    """Pages that go to other machines and come from them, whole or not at all.

    A peer never writes to a page: it writes to staging segments, from where pages are put into their blocks once their
    lengths and sums were found right. A transfer is visible when all its pages are, of all its writers, and not before.

    Parameters
    ----------
    pools : KVCache or sequence of Tensor
        On the host. The two sides' layouts may differ in order, shards and padding; blocks have as many tokens on both.
        Plain tensors are opaque pages, equally many and large on both sides.
    name : str, optional
        Who this is to peers, and to no two of them the same; by default a random one.
    secret_file : path, optional
        With the secret that all peers share, of at least 16 bytes; by default it is in the environment, as
        ``KVKERNELS_REMOTE_SECRET``.
    host, port
        Where peers connect to. Only this machine's by default, at a port that the system chooses.
    transport : str
        ``tcp``, or ``nixl`` (``pip install kvkernels[nixl]``); the same on both sides.
    allow_fetch : bool or callable
        Whether peers may fetch blocks, or ``allow_fetch(name, block_ids)`` that says so, which is called in the pool's
        thread. What may be fetched must be whole and stay as it is meanwhile.
    segments, segment_bytes : int
        The ring that each sender to this pool gets; larger segments where its pages need them, 256 MiB in all.
    verify : {'ring', 'end'}
        ``end`` also reads pages back after they were put into their blocks, and compares.
    most_rings : int
        Senders at a time.
    most_retries : int
        Of a transfer, after which it fails.
    silence_s, rejoin_s : float
        How long a peer that is waited for may say nothing before its connection is given up; how long a writer that
        lost its connection may take to come back before its transfers are dropped.

    Raises
    ------
    ValueError
        An argument is out of its range, or the secret is too short.
    OSError
        The address cannot be listened at.
    ImportError
        What ``kvkernels[remote]`` or ``kvkernels[nixl]`` has is not installed.

    Notes
    -----
    Peers know each other by the secret, and frames have a MAC, but nothing is encrypted, and sums are no defence
    against who can change bytes on their way: networks must be trusted, or tunnels used.

    Safe to use from several threads. `close` it, or use it in a ``with``: its thread keeps it alive.

    Examples
    --------
    >>> import os, torch
    >>> from kvkernels.transfer.remote import Peer, RemotePool
    >>> os.environ["KVKERNELS_REMOTE_SECRET"] = "only an example's secret"
    >>> mine, theirs = torch.arange(8, dtype=torch.uint8).view(4, 2), torch.zeros(4, 2, dtype=torch.uint8)
    >>> with RemotePool([mine]) as prefill, RemotePool([theirs]) as decode:
    ...     there = decode.receive_blocks("request 7", [0, 2])
    ...     here = prefill.send_blocks(Peer(*decode.address), "request 7", [3, 1])
    ...     here.result(timeout=60).outcome, there.result(timeout=60).outcome
    ('committed', 'visible')
    >>> theirs.tolist()
    [[6, 7], [0, 0], [2, 3], [0, 0]]
    """

    def __init__(
        self,
        pools: KVCache | Sequence[Tensor],
        *,
        name: str | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        transport: str = "tcp",
        allow_fetch: bool | Callable[[str, Sequence[int]], bool] = False,
        segments: int = 8,
        segment_bytes: int = 1 << 20,
        verify: str = "ring",
        most_rings: int = 64,
        most_retries: int = 8,
        silence_s: float = 10.0,
        rejoin_s: float = 5.0,
    ) -> None:
        self._cache = as_cache(pools)
        name = secrets.token_hex(8) if name is None else name
        settings = Settings(
            self._cache.layout, name, host, port, segments, segment_bytes, most_rings, most_retries, silence_s, rejoin_s
        )
        if verify not in ("ring", "end"):
            raise ValueError(f"RemotePool: verify must be 'ring' or 'end', got {verify!r}")
        secret = load_secret(secret_file)
        self._settings, self._stats, self._desk = settings, Stats(), Desk(self._cache.num_blocks)
        me = Identity(name, secrets.randbits(63))
        self._receiver = Receiver(
            me.epoch, self._cache.pools, self._stats, rejoin_s=rejoin_s, verify_end=verify == "end",
            remembers=REMEMBERED,
        )  # fmt: skip
        fetches = Fetches(self._desk, self._stats, allow_fetch, self._cancel_sending)
        way = make_transport(transport, host)
        self._hub = Hub(settings, secret, me, self._receiver, way, self._stats, self._new_outbox, fetches.serve)
        self._engine = Engine(host, port, self._hub)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens at."""
        return self._engine.address

    @property
    def name(self) -> str:
        """Who it is to its peers."""
        return self._settings.name

    def send_blocks(self, peer: Peer, request: str, block_ids: Blocks, *, timeout_s: float = 30.0) -> RemoteTransfer:
        """Send blocks to where the peer expects this request.

        Parameters
        ----------
        peer : Peer
        request : str
            What the receiver calls it; the transfer waits until it does. A name is for one try: where that fails, the
            two sides take another.
        block_ids : Tensor or sequence of int
            In the order of the receiver's. They must stay as they are until the transfer has ended.
        timeout_s : float
            After which it has ended in any case.

        Returns
        -------
        RemoteTransfer

        Raises
        ------
        ValueError
            An argument is out of its range, or a block is just being received.
        IndexError
            A block id is out of range.
        RuntimeError
            The pool was closed.
        OSError
            The peer's name has no address.
        """
        check_peer("send_blocks", peer)
        address = resolved(peer)
        outgoing, handle = self._desk.outgoing("send_blocks", request, block_ids, timeout_s, self._cancel_sending)
        self._do(lambda: self._hub.route_to(address).outbox.add(outgoing), lambda: self._desk.unsend(outgoing))
        return handle

    def receive_blocks(
        self, request: str, block_ids: Blocks, *, writers: int = 1, timeout_s: float = 30.0
    ) -> RemoteTransfer:
        """Expect a request's pages in these blocks, which are undefined until it is visible, and if it is dropped.

        Parameters
        ----------
        request : str
            As the senders call it.
        block_ids : Tensor or sequence of int
            Different ones, and of no other transfer.
        writers : int
            How many peers send a part each, such as a tensor-parallel rank; together they have all that the layout has.
        timeout_s : float
            After which it is visible or dropped.

        Returns
        -------
        RemoteTransfer

        Raises
        ------
        ValueError
            An argument is out of its range, a block is in another transfer, or the request is expected already.
        IndexError
            A block id is out of range.
        RuntimeError
            The pool was closed.
        """
        reservation, handle = self._desk.reservation(
            "receive_blocks", request, block_ids, writers, timeout_s, self._cancel_receiving
        )
        self._do(lambda: self._receiver.reserve(reservation), lambda: self._desk.unreserve(reservation))
        return handle

    def fetch_blocks(
        self, peers: Peer | Sequence[Peer], remote_block_ids: Blocks, block_ids: Blocks, *, timeout_s: float = 30.0
    ) -> RemoteTransfer:
        """Have owners pack and send blocks of theirs. Nobody reads another machine's memory.

        Parameters
        ----------
        peers : Peer or sequence of Peer
            Whose blocks; several have a part of each, as writers of `receive_blocks`. They allow it: ``allow_fetch``.
        remote_block_ids : Tensor or sequence of int
            As the owners count them, the same for all.
        block_ids : Tensor or sequence of int
            Where they go, as in `receive_blocks`.
        timeout_s : float
            After which they are visible or dropped.

        Returns
        -------
        RemoteTransfer

        Raises
        ------
        ValueError, IndexError, RuntimeError, OSError
            As `receive_blocks` and `send_blocks` do.
        """
        owners = [peers] if isinstance(peers, Peer) else list(peers) if isinstance(peers, Sequence) else []
        if not owners:
            raise ValueError(f"fetch_blocks: peers must be a Peer or a list of them, got {peers!r}")
        for peer in owners:
            check_peer("fetch_blocks", peer)
        addresses = [resolved(peer) for peer in owners]
        given = remote_block_ids.tolist() if isinstance(remote_block_ids, Tensor) else remote_block_ids
        remote = integers("fetch_blocks: remote_block_ids", given)
        if len(remote) != len(block_ids) or min(remote, default=0) < 0:
            raise ValueError(
                f"fetch_blocks: remote_block_ids must be {len(block_ids)} ids from 0 on, got {len(remote)} from "
                f"{min(remote, default=0)} on"
            )
        request = f"fetch {self.name} {secrets.token_hex(8)}"
        reservation, handle = self._desk.reservation(
            "fetch_blocks", request, block_ids, len(owners), timeout_s, self._cancel_receiving
        )
        message = Fetch(request, remote, timeout_s)
        routes: list[Route] = []
        ended = reservation.end

        def end(outcome: str, error: RemoteError | None) -> None:
            for route in routes:
                route.fetched(request)
            ended(outcome, error)

        def begin() -> None:
            reservation.end = end
            self._receiver.reserve(reservation)
            for address in addresses:
                routes.append(self._hub.route_to(address))
                routes[-1].fetch(message, reservation)

        self._do(begin, lambda: self._desk.unreserve(reservation))
        return handle

    def poll(self) -> list[RemoteTransfer]:
        """Transfers that ended and that nobody was told of; calls their callbacks. Never waits."""
        return self._desk.poll()

    def stats(self) -> dict[str, Any]:
        """What was sent and received, and what is live.

        ``sent_`` and ``received_transfers``, ``_pages`` and ``_bytes``; ``retried``; ``failed``, by cause;
        ``dropped_pages``; ``refused_segments``, whose pages had not their sums; ``failed_links``, by cause; and as of
        now ``receiving_blocks``, ``sending_blocks``, ``links`` and ``rings``.
        """
        receiving, sending = self._desk.held()
        live = {"links": len(self._hub.links), "rings": len(self._hub.inbound)}
        return {**self._stats.read(), "receiving_blocks": receiving, "sending_blocks": sending, **live}

    def close(self) -> None:
        """Give up what is live, and end all connections. A second call does nothing."""
        self._engine.close()

    def __enter__(self) -> RemotePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("RemotePool cannot be pickled or copied: it has this process's connections")

    def __repr__(self) -> str:
        return f"RemotePool({self.name!r} at {self.address[0]}:{self.address[1]}, {self._cache.num_blocks} blocks)"

    # Inside.

    def _do(self, function: Callable[[], None], undo: Callable[[], None]) -> None:
        try:
            self._engine.call(function)
        except RuntimeError:
            undo()
            raise

    def _cancel_receiving(self, reservation: Reservation) -> None:
        self._do(lambda: self._receiver.cancel(reservation), lambda: None)

    def _cancel_sending(self, outgoing: Outgoing) -> None:
        def cancel() -> None:
            for route in self._hub.routes():
                route.outbox.cancel(outgoing)

        self._do(cancel, lambda: None)

    def _new_outbox(self, make_outlet: Callable[[Port, Ring, RingMessage], Outlet]) -> Outbox:
        cache = self._cache
        return Outbox(cache.layout, cache.pools, self._stats, self._settings.most_retries, make_outlet)
