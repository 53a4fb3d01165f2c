"""NIXL as a transport: one agent a link and direction, which knows its own ring and nothing else.

There is no abort, and to deregister memory fences nothing: what was begun still lands. To destroy the agent does, so
that an agent is what ends with its link. Agents have no thread of their own; they work while they are polled.
"""

from __future__ import annotations

import gc
import importlib
import os
import secrets
from typing import Any

import numpy as np

from kvkernels.transfer.remote.errors import LengthError, PeerLostError, ProtocolError
from kvkernels.transfer.remote.link import Link
from kvkernels.transfer.remote.messages import Payload
from kvkernels.transfer.remote.ring import Ring
from kvkernels.transfer.remote.sender import Outlet
from kvkernels.transfer.remote.transports import Inlet, TcpTransport, Transport

_NO_PLACE = 0  # the device of host memory


class NixlTransport:
    """UCX through NIXL, on this machine alone where the pool listens there alone, if the environment says nothing."""

    name = "nixl"
    needs_polls = True

    def __init__(self, host: str) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        # What writes through shared memory writes on after its target has destroyed its agent.
        os.environ.setdefault("UCX_TLS", "^shm")
        if host in ("127.0.0.1", "::1", "localhost"):
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        self._api = _imported()

    def inlet(self, link: Link, ring: Ring) -> Inlet:
        """For a link of whose peer we receive."""
        return _NixlInlet(_Agent(self._api, ring), ring)

    def outlet(self, link: Link, mirror: Ring, metadata: bytes) -> Outlet:
        """For a link to whose peer we send. Only an authenticated peer's metadata come here: NIXL trusts them."""
        return _NixlOutlet(_Agent(self._api, mirror), mirror, metadata)


def _imported() -> Any:
    for name in ("nixl_cu12", "nixl_cu13", "nixl"):
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError:
            continue
    raise ImportError("RemotePool: transport 'nixl' must be installed: pip install kvkernels[nixl]")


class _Agent:
    """An agent with one ring registered."""

    def __init__(self, api: Any, ring: Ring) -> None:
        memory = ring.memory
        self.name = f"kvkernels-{secrets.token_hex(8)}"
        self.agent = api.nixl_agent(self.name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.address = memory.data_ptr()
        self._registered = self.agent.register_memory([(self.address, memory.numel(), _NO_PLACE, "")], "DRAM")
        self._keep = memory

    def poll(self) -> None:
        self.agent.get_new_notifs()

    def close(self) -> None:
        """Destroy it: after this nothing is read from or written to the ring."""
        if self.agent is not None:
            # Its own object is freed with its last reference, wherever that is.
            agent, self.agent = self.agent, None
            agent.agent = None
            del agent
            gc.collect(0)


class _NixlInlet:
    def __init__(self, agent: _Agent, ring: Ring) -> None:
        self._agent = agent
        metadata = agent.agent.get_agent_metadata()
        self.metadata = len(agent.name).to_bytes(1, "big") + agent.name.encode() + agent.address.to_bytes(8, "big")
        self.metadata += metadata

    def room(self, message: Payload) -> memoryview:
        raise ProtocolError("remote: bytes must come by NIXL, got a payload on the connection")

    def landed(self, segment: int) -> int | None:
        return None

    def poll(self) -> None:
        self._agent.poll()

    def close(self) -> None:
        self._agent.close()


class _NixlOutlet:
    def __init__(self, agent: _Agent, mirror: Ring, metadata: bytes) -> None:
        end = 1 + metadata[0] if metadata else 0
        name, address, rest = metadata[1:end], metadata[end : end + 8], metadata[end + 8 :]
        self._agent, self._mirror = agent, mirror
        self._writing: dict[int, Any] = {}
        try:
            if agent.agent.add_remote_agent(rest) != name:
                raise PeerLostError("remote: NIXL's metadata must be of the agent that they name, got another's")
        except PeerLostError:
            agent.close()
            raise
        except Exception as error:  # NIXL has its own classes, of no common base
            agent.close()
            raise PeerLostError(f"remote: NIXL could not reach the peer: {error}") from None
        self._peer, self._there = name.decode(), int.from_bytes(address, "big")

    def write(self, segment: int, length: int) -> None:
        agent = self._agent.agent
        at = segment * self._mirror.segment_bytes
        if length > self._mirror.segment_bytes:
            raise LengthError(f"remote: a write must fit in a segment, got {length} bytes")
        here, there = (
            agent.get_xfer_descs(np.array([[start + at, length, _NO_PLACE]], dtype=np.uint64), "DRAM")
            for start in (self._agent.address, self._there)
        )
        try:
            handle = agent.initialize_xfer("WRITE", here, there, self._peer)
            self._writing[segment] = handle
            state = agent.transfer(handle)
        except Exception as error:
            raise PeerLostError(f"remote: NIXL could not write: {error}") from None
        if state == "ERR":
            raise PeerLostError("remote: NIXL could not write")

    def done(self) -> list[int]:
        agent, done = self._agent.agent, []
        for segment, handle in self._writing.items():
            try:
                state = agent.check_xfer_state(handle)
                if state == "DONE":
                    handle.release()
            except Exception as error:
                raise PeerLostError(f"remote: NIXL's write failed: {error}") from None
            if state == "ERR":
                raise PeerLostError("remote: NIXL's write failed")
            if state == "DONE":
                done.append(segment)
        for segment in done:
            del self._writing[segment]
        return done

    def close(self) -> None:
        # A handle that is not done refuses to be released, and is the agent's to free with itself.
        for handle in self._writing.values():
            handle._released = True
        self._writing.clear()
        self._agent.close()


def make_transport(name: str, host: str) -> Transport:
    """By its name, for a pool that listens at a host."""
    if name == "nixl":
        return NixlTransport(host)
    if name != "tcp":
        raise ValueError(f"RemotePool: transport must be 'tcp' or 'nixl', got {name!r}")
    return TcpTransport()
