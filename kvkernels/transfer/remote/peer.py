"""Where another pool is."""

from __future__ import annotations

import socket

from kvkernels.common.arguments import integer


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


def check_peer(op: str, peer: object) -> None:
    if not isinstance(peer, Peer):
        raise ValueError(f"{op}: peer must be a Peer, got {peer!r}")


def resolved(peer: Peer) -> tuple[str, int]:
    """Its address by number, asked here, since the pool's thread may not wait for a name server."""
    host, port = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)[0][4][:2]
    return str(host), int(port)


def check_request(op: str, request: object) -> None:
    if not isinstance(request, str) or not 1 <= len(request) <= 256:
        raise ValueError(f"{op}: request must be 1 to 256 characters, got {request!r}")
