"""Frames, the handshake, strangers and liars: KVKERNELS_REMOTE_FRAMES=10000 for as many frames of each kind."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import time

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("xxhash")

import contextlib

from remote_cases import SECRET, WAIT_S, pair, random_bytes, until

from kvkernels.transfer.remote import AuthenticationError, Peer, PeerLostError, ProtocolError, RemotePool
from kvkernels.transfer.remote import hub as hub_module
from kvkernels.transfer.remote import messages as m
from kvkernels.transfer.remote.frames import Session, body_of_plain, plain, take_frame
from kvkernels.transfer.remote.handshake import Handshake, Identity
from kvkernels.transfer.remote.sums import sums_of
from kvkernels.transfer.remote.wire import Conversion, as_cache

FRAMES = int(os.environ.get("KVKERNELS_REMOTE_FRAMES", "400"))
ME = Identity("impostor", 5, 3)


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("KVKERNELS_REMOTE_SECRET", SECRET.decode())


def sessions() -> tuple[Session, Session]:
    return Session(b"a" * 32, b"b" * 32), Session(b"b" * 32, b"a" * 32)


def test_a_frame_comes_out_as_it_went_in_and_in_order():
    one, other = sessions()
    for body in (b"", b"x", random_bytes(5000).numpy().tobytes()):
        assert other.open(one.seal(body)) == body
    with pytest.raises(ValueError, match="at most 1048576 bytes"):
        one.seal(bytes(m.FRAME_BYTES))


def test_every_byte_of_a_frame_is_under_its_mac():
    frame = sessions()[0].seal(b"message")
    for i in range(len(frame)):
        changed = bytearray(frame)
        changed[i] ^= 1
        with pytest.raises(ProtocolError, match="MAC"):
            sessions()[1].open(bytes(changed))
    with pytest.raises(ProtocolError, match="counter and a MAC"):
        sessions()[1].open(frame[:30])


def test_frames_cannot_be_repeated_left_out_or_sent_back():
    one, other = sessions()
    frames = [one.seal(bytes([i])) for i in range(3)]
    assert other.open(frames[0]) == b"\0"
    for frame in (frames[0], frames[2]):
        with pytest.raises(ProtocolError, match="counter must be 1"):
            other.open(frame)
    with pytest.raises(ProtocolError, match="MAC"):
        one.open(frames[1])


def test_frames_are_taken_whole_and_long_ones_not_waited_for():
    data = plain(b"first") + plain(b"") + plain(b"third")
    buffer, found = bytearray(), []
    for byte in data:
        buffer.append(byte)
        while (frame := take_frame(buffer, False)) is not None:
            found.append(body_of_plain(frame))
    assert found == [b"first", b"", b"third"] and not buffer
    for is_session, limit in ((False, 4096), (True, 1 << 20)):
        assert take_frame(bytearray(struct.pack(">I", limit)), is_session) is None
        with pytest.raises(ProtocolError, match=f"at most {limit} bytes"):
            take_frame(bytearray(struct.pack(">I", limit + 1)), is_session)


def shaken(client: Handshake, server: Handshake) -> None:
    hello = server.receive(client.start()[4:])
    proof = client.receive(hello[4:])
    last = server.receive(proof[4:])
    assert client.receive(last[4:]) == b""


def test_a_handshake_ends_in_a_session_of_two_keys():
    client, server = Handshake("client", SECRET, ME), Handshake("server", SECRET, Identity("there", 9))
    shaken(client, server)
    assert (server.peer, client.peer) == (ME, Identity("there", 9))
    assert server.session.open(client.session.seal(b"up")) == b"up"
    assert client.session.open(server.session.seal(b"down")) == b"down"
    with pytest.raises(ProtocolError, match="MAC"):
        client.session.open(client.session.seal(b"sent back"))
    with pytest.raises(ProtocolError, match="got more"):
        client.receive(b"")
    again = Handshake("client", SECRET, ME), Handshake("server", SECRET, ME)
    shaken(*again)
    with pytest.raises(ProtocolError, match="MAC"):
        again[1].session.open(client.session.seal(b"of another session"))


def test_no_proof_fits_another_secret_or_handshake():
    recorded = Handshake("client", SECRET, ME)
    server = Handshake("server", SECRET, ME)
    proof = recorded.receive(server.receive(recorded.start()[4:])[4:])
    for secret, said in ((b"another secret of 16", None), (SECRET, proof)):
        server, client = Handshake("server", SECRET, ME), Handshake("client", secret, ME)
        mine = client.receive(server.receive(client.start()[4:])[4:])
        with pytest.raises(AuthenticationError):
            server.receive((said or mine)[4:])
        assert server.session is None


def test_a_client_wants_the_servers_proof():
    client, server = Handshake("client", SECRET, ME), Handshake("server", b"another secret of 16", ME)
    mine = client.receive(server.receive(client.start()[4:])[4:])
    with pytest.raises(AuthenticationError):
        client.receive(mine[4:])  # its own, sent back
    assert client.session is None


@pytest.mark.parametrize("change", [dict(version=2), dict(role="server"), dict(nonce=b"short"), dict(name="")])
def test_a_hello_that_is_none(change):
    hello = dict(version=1, role="client", nonce=bytes(32), epoch=1, name="n", channel=0)
    with pytest.raises(ProtocolError):
        Handshake("server", SECRET, ME).receive(m.encode(m.Hello(**{**hello, **change})))


class Impostor:
    """A client that says whatever it wants."""

    def __init__(self, address, secret: bytes | None = SECRET) -> None:
        self.socket = socket.create_connection(address, timeout=WAIT_S)
        self._buffer = bytearray()
        self._session = None
        if secret is not None:
            handshake = Handshake("client", secret, ME)
            self.socket.sendall(handshake.start())
            self.socket.sendall(handshake.receive(body_of_plain(self._frame())))
            handshake.receive(body_of_plain(self._frame()))
            self._session = handshake.session
            self.peer = handshake.peer

    def _frame(self) -> bytes:
        while (frame := take_frame(self._buffer, self._session is not None)) is None:
            some = self.socket.recv(1 << 16)
            if not some:
                raise PeerLostError("closed")
            self._buffer += some
        return frame

    def say(self, message, *raw: bytes) -> None:
        body = message if isinstance(message, bytes) else m.encode(message)
        self.socket.sendall(b"".join([self._session.seal(body), *raw]))

    def hear(self, kind=None):
        while True:
            message = m.decode(self._session.open(self._frame()))
            if kind is None or isinstance(message, kind):
                return message

    def is_closed(self) -> bool:
        """Wait for its end, or for the answer to a ping."""
        try:
            self.say(m.Ping())
            self.hear(m.Pong)
        except (OSError, PeerLostError):
            return True
        return False


def closed_by_peer(connection: socket.socket) -> bool:
    connection.settimeout(WAIT_S)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


def test_strangers_are_heard_out_for_a_moment_and_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(hub_module, "HANDSHAKE_S", 0.5)
    with RemotePool([random_bytes(4, 8)]) as pool:
        waiting = [socket.create_connection(pool.address) for _ in range(40)]
        began = time.monotonic()
        assert all(map(closed_by_peer, waiting))
        until(lambda: pool.stats()["links"] == 0)
        failed = pool.stats()["failed_links"]
        # How many were at the door at once is theirs to say; that more than 16 were not let in is ours.
        assert failed["strangers"] + failed["protocol"] == 40 and failed["protocol"] >= 16
        assert time.monotonic() - began < WAIT_S
        for one in waiting:
            one.close()
        assert not Impostor(pool.address).is_closed()


def test_no_frame_of_a_stranger_is_more_than_noise():
    rng = random.Random(1)
    good = Handshake("client", SECRET, ME).start()
    with RemotePool([random_bytes(4, 8)]) as pool:
        for i in range(FRAMES):
            kind = i % 5
            data = bytearray(good) if kind < 3 else bytearray(rng.randbytes(rng.randint(1, 200)))
            if kind == 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data = data[: rng.randrange(len(data))]
            elif kind == 2:
                data += rng.randbytes(rng.randint(4, 100))
            elif kind == 3:
                data[:0] = struct.pack(">I", len(data))
            with socket.create_connection(pool.address, timeout=WAIT_S) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                closed_by_peer(connection)
        until(lambda: pool.stats()["links"] == 0)
        with RemotePool([torch.zeros(4, 8, dtype=torch.uint8)]) as other:
            there = pool.receive_blocks("r", [0], timeout_s=WAIT_S)
            sent = other.send_blocks(Peer(*pool.address), "r", [0], timeout_s=WAIT_S).result(WAIT_S)
            assert sent.outcome == "committed" and there.result(WAIT_S).outcome == "visible"


def test_who_has_another_secret_gets_nothing_and_both_sides_say_so(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(b"another secret of 16")
    target = random_bytes(4, 8)
    before = target.clone()
    with (
        RemotePool([target]) as pool,
        RemotePool([random_bytes(4, 8, seed=1)], secret_file=file, most_retries=2) as other,
    ):
        there = pool.receive_blocks("r", [0], timeout_s=WAIT_S)
        sent = other.send_blocks(Peer(*pool.address), "r", [0], timeout_s=WAIT_S).result(WAIT_S)
        assert sent.outcome == "failed" and isinstance(sent.error, AuthenticationError) and sent.retries == 3
        assert pool.stats()["failed_links"] == {"authentication": 3} and not there.done()
    assert torch.equal(target, before)


BLOCKS, PAGE = 16, 40


class Liar(Impostor):
    """An authenticated peer that has begun a transfer of all blocks, and lies about it from then on."""

    def __init__(self, pool: RemotePool, cache, request: str) -> None:
        super().__init__(pool.address)
        self.say(m.Open(cache.layout.text))
        ring = self.hear(m.Ring)
        self.ring = ring
        self.digest = Conversion(cache.layout, cache.layout, ring.segment_bytes).digest
        self.transfer = os.urandom(16)
        self.say(m.Begin(self.transfer, request, BLOCKS, self.digest, self.peer.epoch))
        self.hear(m.Accept)

    def commit(self, pages: torch.Tensor, **changes) -> m.Commit:
        sent = pages.flatten().numpy().tobytes()
        fields = dict(transfer=self.transfer, epoch=self.peer.epoch, segment=0, first=0, count=len(pages),
                      length=len(sent), sums=sums_of(pages))  # fmt: skip
        return m.Commit(**{**fields, **changes})


@pytest.fixture
def target():
    pool = random_bytes(BLOCKS, PAGE, seed=7)
    with RemotePool([pool], segments=2, segment_bytes=BLOCKS * PAGE, rejoin_s=0.05) as remote:
        yield pool, remote, as_cache([pool])


def test_an_honest_impostor_is_believed(target):
    """What the other tests change one thing of."""
    pool, remote, cache = target
    there = remote.receive_blocks("r", range(BLOCKS), timeout_s=WAIT_S)
    liar, pages = Liar(remote, cache, "r"), random_bytes(BLOCKS, PAGE, seed=8)
    liar.say(m.Payload(0, pages.numel()), pages.numpy().tobytes())
    liar.say(liar.commit(pages))
    assert liar.hear(m.Final).outcome == "visible" and there.result(WAIT_S).outcome == "visible"
    assert torch.equal(pool, pages)


LIES = {
    "one page too few": dict(count=BLOCKS - 1),
    "fewer bytes": dict(length=PAGE),
    "more bytes": dict(length=BLOCKS * PAGE + PAGE),
    "too few sums": dict(sums=b"\0" * 8),
    "no sums": dict(sums=b""),
    "wrong sums": dict(sums=b"\0" * 8 * BLOCKS),
    "beyond the last block": dict(first=1),
    "far beyond": dict(first=(1 << 31) - 1),
    "another segment": dict(segment=1),
    "no such segment": dict(segment=2),
    "another epoch": dict(epoch=1),
    "another transfer": dict(transfer=bytes(16)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_commit_that_lies_writes_nothing(target, lie):
    pool, remote, cache = target
    before = pool.clone()
    there = remote.receive_blocks("r", range(BLOCKS), timeout_s=WAIT_S)
    liar, pages = Liar(remote, cache, "r"), random_bytes(BLOCKS, PAGE, seed=8)
    liar.say(m.Payload(0, pages.numel()), pages.numpy().tobytes())
    liar.say(liar.commit(pages, **LIES[lie]))
    liar.is_closed()
    assert torch.equal(pool, before)
    liar.socket.close()
    assert there.result(WAIT_S).outcome == "dropped"
    assert torch.equal(pool, before)


def test_fewer_bytes_than_the_commit_says_are_a_length_error_also_where_old_ones_lie_there(target):
    pool, remote, cache = target
    before = pool.clone()
    there = remote.receive_blocks("r", range(BLOCKS), timeout_s=WAIT_S)
    liar, pages = Liar(remote, cache, "r"), random_bytes(BLOCKS, PAGE, seed=8)
    raw = pages.numpy().tobytes()
    liar.say(m.Payload(0, len(raw)), raw)
    liar.say(m.Payload(0, len(raw) - 1), raw[:-1])
    liar.say(liar.commit(pages))
    assert liar.hear(m.Final).cause == "length"
    assert there.result(WAIT_S).error.cause == "length" and torch.equal(pool, before)


def test_payloads_must_have_room(target):
    _, remote, cache = target
    for message in (m.Payload(2, 1), m.Payload(0, BLOCKS * PAGE + 1)):
        there = remote.receive_blocks("r", range(BLOCKS), timeout_s=WAIT_S)
        liar = Liar(remote, cache, "r")
        liar.say(message, b"\0")
        assert liar.is_closed() and there.result(WAIT_S).outcome == "dropped"
    assert remote.stats()["failed_links"] == {"protocol": 2}


def test_a_begin_with_another_digest_is_refused(target):
    _, remote, cache = target
    there = remote.receive_blocks("r", range(BLOCKS), timeout_s=WAIT_S)
    liar = Impostor(remote.address)
    liar.say(m.Open(cache.layout.text))
    liar.hear(m.Ring)
    liar.say(m.Begin(bytes(16), "r", BLOCKS, bytes(32), liar.peer.epoch))
    assert liar.hear(m.Final).cause == "plan" and there.result(WAIT_S).error.cause == "plan"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"pattern": "B", "B": 1}', "{" * 2000, "x" * 60_000])
def test_a_layout_that_is_none_is_no_way_in(target, text):
    _, remote, _ = target
    liar = Impostor(remote.address)
    liar.say(m.Open(text))
    assert liar.hear(m.NoRing).cause == "protocol"
    assert not liar.is_closed()


@pytest.mark.parametrize("change", [("L", 10**9), ("N", 10**12), ("H", 10**15), ("K", 10**9), ("B", 10**18)])
def test_a_layout_of_any_size_costs_nothing(target, change):
    _, remote, cache = target
    liar, values = Impostor(remote.address), json.loads(cache.layout.text)
    began = time.thread_time()
    liar.say(m.Open(json.dumps({**values, "pattern": "L N H | B", change[0]: change[1]})))
    assert isinstance(liar.hear(), (m.NoRing, m.Ring)) and time.thread_time() - began < 5


def random_message(rng: random.Random, liar: Liar):
    def number() -> int:
        return rng.choice((0, 1, 2, rng.randrange(BLOCKS + 2), rng.randrange(1 << 31), (1 << 31) - 1))

    transfer = rng.choice((liar.transfer, bytes(16)))
    epoch = rng.choice((liar.peer.epoch, 3))
    return rng.choice((
        lambda: m.Begin(transfer, rng.choice(("r", "s")), rng.randint(1, BLOCKS + 1),
                        rng.choice((liar.digest, bytes(32))), epoch),
        lambda: m.Ask(transfer, epoch),
        lambda: m.Commit(transfer, epoch, number(), number(), max(1, number() % 4096), number(),
                         rng.randbytes(rng.choice((0, 8, 8 * BLOCKS, 7)))),
        lambda: m.Receipt(transfer, number()), lambda: m.Nack(transfer, number(), "checksum", "no"),
        lambda: m.Final(transfer, rng.choice(("visible", "dropped", "unheard"))),
        lambda: m.Accept(transfer, [(number(), number())]), lambda: m.Ping(), lambda: m.Pong(),
        lambda: m.Ring(1, 1, "{}", "tcp", b""), lambda: m.NoRing("plan", "no"),
        lambda: m.Fetch("f", [number()], 1.0), lambda: m.FetchRefused("f", "refused", "no"),
        lambda: m.Open("{}"), lambda: rng.randbytes(rng.randrange(60)), lambda: m.Payload(number(), number()),
        lambda: m.Abort(bytes(16), "cancelled", "no"),
    ))()  # fmt: skip


def test_well_maced_frames_with_wrong_fields_write_nothing(target):
    """Whatever an authenticated peer says, short of a true commit: no byte of a page changes, and others are served."""
    pool, remote, cache = target
    before, rng, said, rounds = pool.clone(), random.Random(2), 0, 0
    while said < FRAMES:
        rounds += 1
        there = remote.receive_blocks(f"r{rounds}", range(BLOCKS), timeout_s=WAIT_S)
        liar = Liar(remote, cache, f"r{rounds}")
        try:
            for _ in range(50):
                liar.say(random_message(rng, liar))
                said += 1
        except OSError:
            pass
        liar.socket.close()
        there.cancel()
        assert there.result(WAIT_S).outcome == "dropped"
    until(lambda: remote.stats()["links"] == 0)
    assert torch.equal(pool, before)
    with RemotePool([random_bytes(BLOCKS, PAGE, seed=9)]) as other:
        there = remote.receive_blocks("honest", [0], timeout_s=WAIT_S)
        sent = other.send_blocks(Peer(*remote.address), "honest", [1], timeout_s=WAIT_S).result(WAIT_S)
        assert sent.outcome == "committed" and there.result(WAIT_S).outcome == "visible"
    assert len(remote._receiver) == 0


def test_bodies_that_are_no_message():
    rng = random.Random(3)
    whole = m.encode(m.Commit(bytes(16), 1, 0, 0, 1, 8, bytes(8)))
    for _ in range(FRAMES):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        with contextlib.suppress(ProtocolError):
            m.decode(bytes(body[: rng.randint(1, len(body))]))
    for body in (b"", b"\x93", m.encode(m.Hello(1, "client", bytes(32), 1, "n", 0))):
        with pytest.raises(ProtocolError, match="must be a message"):
            m.decode(body)


def test_idle_links_say_nothing():
    with pair([random_bytes(4, 8)], [random_bytes(4, 8)], silence_s=0.05) as (one, other, peer):
        there = other.receive_blocks("r", [0], timeout_s=WAIT_S)
        assert one.send_blocks(peer, "r", [0], timeout_s=WAIT_S).result(WAIT_S).outcome == "committed"
        assert there.result(WAIT_S).outcome == "visible"
        time.sleep(0.3)
        assert one.stats()["links"] == other.stats()["links"] == 1


def test_a_peer_that_says_nothing_any_more_is_given_up():
    """It knows the secret, and then hangs: without a deadline of the transfer's being near."""
    with socket.create_server(("127.0.0.1", 0)) as listener, RemotePool(
        [random_bytes(4, 8)], silence_s=0.1, most_retries=1
    ) as pool:  # fmt: skip
        sent = pool.send_blocks(Peer(*listener.getsockname()), "r", [0], timeout_s=WAIT_S)
        connections = []
        for _ in range(2):
            connection, _ = listener.accept()
            connections.append(connection)
            handshake, buffer = Handshake("server", SECRET, ME), bytearray()
            while handshake.session is None:
                buffer += connection.recv(4096)
                while (frame := take_frame(buffer, False)) is not None and handshake.session is None:
                    connection.sendall(handshake.receive(body_of_plain(frame)))
        result = sent.result(WAIT_S)
        assert (result.outcome, result.retries) == ("failed", 2) and "0.1 s of silence" in str(result.error)
        for connection in connections:
            connection.close()
