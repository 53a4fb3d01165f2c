"""NIXL as a transport, on this machine's loopback; what the state machines do is tested elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("xxhash")

from remote_cases import SECRET, WAIT_S, Sharded, pair, random_bytes, until

from kvkernels.transfer.remote import Peer, PeerLostError, ProtocolError, RefusedError, RemotePool
from kvkernels.transfer.remote.messages import Payload
from kvkernels.transfer.remote.nixl import NixlTransport
from kvkernels.transfer.remote.ring import Ring

HAS_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl"))
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="nixl must be installed: pip install kvkernels[nixl]")
BLOCKS, PAGE = 64, 96


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("KVKERNELS_REMOTE_SECRET", SECRET.decode())
    for name in ("UCX_TLS", "UCX_NET_DEVICES", "NIXL_LOG_LEVEL"):  # what the transport sets is undone with them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.skipif(HAS_NIXL, reason="nixl is installed")
def test_without_nixl_the_error_names_the_extra():
    with pytest.raises(ImportError, match=r"pip install kvkernels\[nixl\]"):
        RemotePool([random_bytes(4, 8)], transport="nixl")


def ends():
    transport = NixlTransport("127.0.0.1")
    ring, mirror = Ring(2, 1 << 20), Ring(2, 1 << 20)
    mirror.memory.copy_(random_bytes(2, 1 << 20))
    inlet = transport.inlet(None, ring)
    return ring, mirror, inlet, transport.outlet(None, mirror, inlet.metadata)


@needs_nixl
@pytest.mark.parametrize("sizes", [(1,), (1 << 20,), (777, 1 << 20), (1 << 19, 3)])
def test_a_write_changes_its_segments_beginning_and_nothing_else(sizes):
    ring, mirror, inlet, outlet = ends()
    for segment, size in enumerate(sizes):
        outlet.write(segment, size)
    done: list[int] = []

    def step() -> bool:
        inlet.poll()
        done.extend(outlet.done())
        return len(done) == len(sizes)

    until(step)
    expected = torch.zeros_like(ring.memory)
    for segment, size in enumerate(sizes):
        expected[segment, :size] = mirror.memory[segment, :size]
    assert sorted(done) == list(range(len(sizes))) and torch.equal(ring.memory, expected)
    assert inlet.landed(0) is None
    with pytest.raises(ProtocolError, match="must come by NIXL"):
        inlet.room(Payload(0, 1))
    outlet.close()
    inlet.close()
    inlet.close()


@needs_nixl
def test_nothing_lands_once_the_receivers_end_is_closed():
    """Whatever the sender has under way: its write fails, and the ring stays as it was."""
    ring, _, inlet, outlet = ends()
    memory = ring.memory
    outlet.write(0, 1 << 20)
    outlet.write(1, 1 << 20)
    before = memory.clone()
    inlet.close()

    def done() -> bool:
        if inlet._agent.agent is not None:  # it is polled, if it can be
            inlet.poll()
        return len(outlet.done()) == 2

    with pytest.raises(PeerLostError):
        until(done)
    outlet.close()
    assert torch.equal(memory, before)


@needs_nixl
def test_metadata_of_another_are_refused():
    ring, mirror = Ring(1, 4096), Ring(1, 4096)
    transport = NixlTransport("127.0.0.1")
    inlet = transport.inlet(None, ring)
    with pytest.raises(PeerLostError, match="of the agent that they name"):
        transport.outlet(None, mirror, b"\x03abc" + inlet.metadata[1 + inlet.metadata[0] :])
    with pytest.raises(PeerLostError, match="could not reach"):
        transport.outlet(None, mirror, b"")
    inlet.close()


@needs_nixl
def test_pages_of_shards_arrive():
    blocks = 6
    src, dst = Sharded("NHD", 2, blocks), Sharded("HND", 1, blocks)
    array = torch.randn(2, 2, blocks, 4, 4, 8).to(torch.float16)
    src.set(array)
    with (
        RemotePool(src.caches[0], transport="nixl", segment_bytes=2048) as a,
        RemotePool(src.caches[1], transport="nixl", allow_fetch=True) as b,
        RemotePool(dst.caches[0], transport="nixl", verify="end", segment_bytes=2048, segments=2) as target,
    ):
        there = target.receive_blocks("r", [5, 0, 3], writers=2, timeout_s=WAIT_S)
        sent = [one.send_blocks(Peer(*target.address), "r", [1, 2, 4], timeout_s=WAIT_S) for one in (a, b)]
        assert [one.result(WAIT_S).outcome for one in sent] == ["committed", "committed"]
        assert there.result(WAIT_S).outcome == "visible"
    assert torch.equal(dst.get(array)[:, :, [5, 0, 3]], array[:, :, [1, 2, 4]])


@needs_nixl
def test_fetch_and_peers_that_come_again():
    pages, target = random_bytes(BLOCKS, PAGE), random_bytes(BLOCKS, PAGE, seed=1)
    with RemotePool([target], transport="nixl") as other:
        for i in range(3):
            with RemotePool([pages], transport="nixl", allow_fetch=True) as owner:
                got = other.fetch_blocks(Peer(*owner.address), [3 + i, 4], [i, 10 + i], timeout_s=WAIT_S).result(WAIT_S)
                assert got.outcome == "visible", got
                assert torch.equal(target[[i, 10 + i]], pages[[3 + i, 4]])
            until(lambda: other.stats()["links"] == other.stats()["rings"] == 0)


@needs_nixl
def test_both_sides_must_use_it():
    with pair([random_bytes(4, 8)], [random_bytes(4, 8)], receiver={"transport": "nixl"}) as (one, other, peer):
        other.receive_blocks("r", [0])
        sent = one.send_blocks(peer, "r", [0], timeout_s=WAIT_S).result(WAIT_S)
        assert isinstance(sent.error, RefusedError) and "both sides must use tcp, got nixl" in str(sent.error)


@needs_nixl
def test_a_pool_with_nothing_to_do_polls_nothing():
    pages, target = random_bytes(BLOCKS, PAGE), random_bytes(BLOCKS, PAGE, seed=1)
    with pair([pages], [target], transport="nixl") as (one, other, peer):
        there = other.receive_blocks("r", [0], timeout_s=WAIT_S)
        assert one.send_blocks(peer, "r", [0], timeout_s=WAIT_S).result(WAIT_S).outcome == "committed"
        assert there.result(WAIT_S).outcome == "visible"
        until(lambda: not (one._hub.wants_polls or other._hub.wants_polls))
        turns = []
        for pool in (one, other):
            move = pool._hub.move
            pool._hub.move = lambda now, move=move: (turns.append(now), move(now))
        time.sleep(0.2)
        assert len(turns) <= 4  # polls would be 80 and more


@needs_nixl
def test_ucx_listens_on_this_machine_alone():
    """Unless the environment or the pool's host says otherwise; asked of the system, in a process of its own."""
    program = (
        "import os, torch\n"
        "os.environ.pop('UCX_NET_DEVICES', None)\n"
        "from kvkernels.transfer.remote.nixl import NixlTransport\n"
        "from kvkernels.transfer.remote.ring import Ring\n"
        "def listening():\n"
        "    files = [f'/proc/self/fd/{f}' for f in os.listdir('/proc/self/fd')]\n"
        "    own = {os.readlink(file) for file in files if os.path.islink(file)}\n"
        "    rows = [line.split() for line in open('/proc/net/tcp').readlines()[1:]]\n"
        "    return [row[1] for row in rows if row[3] == '0A' and f'socket:[{row[9]}]' in own]\n"
        "inlet = NixlTransport('127.0.0.1').inlet(None, Ring(1, 4096))\n"
        "assert os.environ['UCX_NET_DEVICES'] == 'lo'\n"
        "found = listening()\n"
        "print(found)\n"
        "assert found and all(one.startswith('0100007F:') for one in found), found\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
