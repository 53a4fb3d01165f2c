"""A pool whose pages can be sent to other machines and received from them."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from kvkernels.common.arguments import integer, integers
from kvkernels.layout.cache import KVCache
from kvkernels.transfer.remote.claims import Claims, checked_blocks
from kvkernels.transfer.remote.engine import Engine
from kvkernels.transfer.remote.errors import RemoteError
from kvkernels.transfer.remote.handle import RemoteTransfer
from kvkernels.transfer.remote.handshake import Identity
from kvkernels.transfer.remote.hub import Hub
from kvkernels.transfer.remote.keys import load_secret
from kvkernels.transfer.remote.messages import Fetch, FetchRefused, short
from kvkernels.transfer.remote.messages import Ring as RingMessage
from kvkernels.transfer.remote.nixl import NixlTransport
from kvkernels.transfer.remote.receiver import Port, Receiver, Reservation, bytes_of
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.routes import Route
from kvkernels.transfer.remote.sender import Outbox, Outgoing, Outlet
from kvkernels.transfer.remote.settings import Settings, check_seconds
from kvkernels.transfer.remote.stats import Stats
from kvkernels.transfer.remote.transports import TcpTransport, Transport
from kvkernels.transfer.remote.wire import as_cache

#: Block ids, each in range.
Blocks: TypeAlias = "Tensor | Sequence[int]"
REMEMBERED = 10_000


class Peer:
    """A pool elsewhere, by what its owner's `RemotePool.address` says. Nothing connects before it is used."""

    def __init__(self, host: str, port: int) -> None:
        if not isinstance(host, str) or not host:
            raise ValueError(f"Peer: host must be a name or an address, got {host!r}")
        self.host = host
        self.port = integer("Peer: port", port, "from 1 to 65535", 1)
        if self.port > 65535:
            raise ValueError(f"Peer: port must be from 1 to 65535, got {port}")

    def __repr__(self) -> str:
        return f"Peer({self.host!r}, {self.port})"


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
        self._allow_fetch = allow_fetch
        self._settings, self._stats, self._claims = settings, Stats(), Claims(self._cache.num_blocks)
        self._ended: dict[int, RemoteTransfer] = {}
        self._lock = threading.Lock()
        self._requests: set[str] = set()
        me = Identity(name, secrets.randbits(63))
        self._receiver = Receiver(
            me.epoch, self._cache.pools, self._stats, rejoin_s=rejoin_s, verify_end=verify == "end",
            remembers=REMEMBERED,
        )  # fmt: skip
        self._hub = Hub(
            settings,
            secret,
            me,
            self._receiver,
            _transport(transport, host),
            self._stats,
            self._new_outbox,
            self._fetched,
        )
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
        """
        blocks = self._blocks("send_blocks", block_ids)
        _check_peer("send_blocks", peer)
        _check_request("send_blocks", request)
        deadline = time.monotonic() + check_seconds("send_blocks: timeout_s", timeout_s)
        self._claims.send("send_blocks", blocks)
        outgoing, handle = self._outgoing(request, blocks, deadline)
        address = (peer.host, peer.port)
        self._do(lambda: self._hub.route_to(address).outbox.add(outgoing), lambda: self._claims.end_send(blocks))
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
        _check_request("receive_blocks", request)
        reservation, handle = self._reserve("receive_blocks", request, block_ids, writers, timeout_s)
        self._do(lambda: self._receiver.reserve(reservation), lambda: self._unreserve(reservation))
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
        ValueError, IndexError, RuntimeError
            As `receive_blocks` does.
        """
        owners = [peers] if isinstance(peers, Peer) else list(peers) if isinstance(peers, Sequence) else []
        if not owners:
            raise ValueError(f"fetch_blocks: peers must be a Peer or a list of them, got {peers!r}")
        for peer in owners:
            _check_peer("fetch_blocks", peer)
        given = remote_block_ids.tolist() if isinstance(remote_block_ids, Tensor) else remote_block_ids
        remote = integers("fetch_blocks: remote_block_ids", given)
        if len(remote) != len(block_ids) or min(remote, default=0) < 0:
            raise ValueError(
                f"fetch_blocks: remote_block_ids must be {len(block_ids)} ids from 0 on, got {len(remote)} from "
                f"{min(remote, default=0)} on"
            )
        request = f"fetch {self.name} {secrets.token_hex(8)}"
        reservation, handle = self._reserve("fetch_blocks", request, block_ids, len(owners), timeout_s)
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
            for peer in owners:
                routes.append(self._hub.route_to((peer.host, peer.port)))
                routes[-1].fetch(message, reservation)

        self._do(begin, lambda: self._unreserve(reservation))
        return handle

    def poll(self) -> list[RemoteTransfer]:
        """Transfers that ended and that nobody was told of; calls their callbacks. Never waits."""
        return [transfer for transfer in list(self._ended.values()) if transfer.tell()]

    def stats(self) -> dict[str, Any]:
        """What was sent and received, and what is live.

        ``sent_`` and ``received_transfers``, ``_pages`` and ``_bytes``; ``retried``; ``failed``, by cause;
        ``dropped_pages``; ``refused_segments``, whose pages had not their sums; ``failed_links``, by cause; and as of
        now ``receiving_blocks``, ``sending_blocks``, ``links`` and ``rings``.
        """
        receiving, sending = self._claims.held()
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

    def _blocks(self, op: str, block_ids: Blocks) -> Tensor:
        return checked_blocks(op, block_ids, self._cache.num_blocks)

    def _reserve(
        self, op: str, request: str, block_ids: Blocks, writers: int, timeout_s: float
    ) -> tuple[Reservation, RemoteTransfer]:
        blocks = self._blocks(op, block_ids)
        writers = integer(f"{op}: writers", writers, "a positive integer", 1)
        deadline = time.monotonic() + check_seconds(f"{op}: timeout_s", timeout_s)
        with self._lock:
            if request in self._requests:
                raise ValueError(f"{op}: request must be a new one, got {request!r}, which is expected already")
            self._claims.receive(op, blocks)
            self._requests.add(request)
        handle = RemoteTransfer(
            request, self._ended, lambda _: self._do(lambda: self._receiver.cancel(reservation), lambda: None)
        )

        def end(outcome: str, error: RemoteError | None) -> None:
            self._unreserve(reservation)
            retries = sum(arrival.rejoined for arrival in reservation.arrivals.values())
            pages = len(blocks) if outcome == "visible" else 0
            handle.end(outcome, pages, bytes_of(reservation), retries, error)

        reservation = Reservation(request, blocks, writers, deadline, end)
        return reservation, handle

    def _unreserve(self, reservation: Reservation) -> None:
        self._claims.end_receive(reservation.blocks)
        with self._lock:
            self._requests.discard(reservation.request)

    def _outgoing(self, request: str, blocks: Tensor, deadline: float) -> tuple[Outgoing, RemoteTransfer]:
        handle = RemoteTransfer(request, self._ended, lambda _: self._do(lambda: self._cancel(outgoing), lambda: None))

        def end(outcome: str, error: RemoteError | None) -> None:
            self._claims.end_send(blocks)
            pages = len(blocks) if outcome == "committed" else 0
            handle.end(outcome, pages, outgoing.bytes, outgoing.retries, error)

        outgoing = Outgoing(secrets.token_bytes(16), request, blocks, deadline, end)
        return outgoing, handle

    def _cancel(self, outgoing: Outgoing) -> None:
        for route in self._hub.routes():
            route.outbox.cancel(outgoing)

    def _new_outbox(self, make_outlet: Callable[[Port, Ring, RingMessage], Outlet]) -> Outbox:
        cache = self._cache
        return Outbox(cache.layout, cache.pools, self._stats, self._settings.most_retries, make_outlet)

    def _fetched(self, route: Route, name: str, message: Fetch) -> None:
        """A peer wants blocks."""
        if any(outgoing.request == message.request for outgoing in route.outbox.transfers.values()):
            return  # it asks again on a new link, on which the transfer goes on
        try:
            allowed = self._allow_fetch
            if not (allowed(name, message.blocks) if callable(allowed) else allowed):
                raise ValueError("fetch_blocks: the owner must allow it, got allow_fetch that does not")
            blocks = self._blocks("fetch_blocks", message.blocks)
            self._claims.send("fetch_blocks", blocks)
        except Exception as error:  # whatever the owner's own function raises, too
            self._stats.failed("refused")
            assert route.link is not None
            route.link.post(FetchRefused(message.request, "refused", short(error)))
            return
        deadline = time.monotonic() + message.seconds
        outgoing, handle = self._outgoing(message.request, blocks, deadline)
        outgoing_end = outgoing.end

        def end(outcome: str, error: RemoteError | None) -> None:
            outgoing_end(outcome, error)
            handle.tell()  # nobody here asked for it

        outgoing.end = end
        route.outbox.add(outgoing)


def _transport(name: str, host: str) -> Transport:
    if name == "nixl":
        return NixlTransport(host)
    if name != "tcp":
        raise ValueError(f"RemotePool: transport must be 'tcp' or 'nixl', got {name!r}")
    return TcpTransport()


def _check_peer(op: str, peer: object) -> None:
    if not isinstance(peer, Peer):
        raise ValueError(f"{op}: peer must be a Peer, got {peer!r}")


def _check_request(op: str, request: object) -> None:
    if not isinstance(request, str) or not 1 <= len(request) <= 256:
        raise ValueError(f"{op}: request must be 1 to 256 characters, got {request!r}")
