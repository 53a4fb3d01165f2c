"""Pools of several processes: one owner, any number of attachers, and nothing that a dead owner leaves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvkernels.memory import (
    NoOwnerError,
    OwnedElsewhereError,
    PinnedPool,
    SharedPoolError,
    SharedSizeError,
    StaleSegmentError,
    mapping,
    pinned,
    shared,
)

pytest.importorskip("kvkernels._host")
# Each is a process that is killed, and two that live on.
KILLS = int(os.environ.get("KVKERNELS_KILLS", "50"))


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    """Also where there is a device: processes are forked here."""
    monkeypatch.setattr(pinned, "why_no_cuda", lambda: "this test has none")


@pytest.fixture
def name(request) -> str:
    return f"test-{os.getpid()}-{abs(hash(request.node.name))}"


def in_child(function) -> int:
    """The exit status of a forked process; 1 where the function raises."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = function() or 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pool_named(name: str, pages: int = 3, page_bytes: int = 5000, **options) -> PinnedPool:
    return PinnedPool(pages, page_bytes, pin=False, shared=name, **options)


def is_taken(name: str) -> bool:
    return re.search(rf"@kvkernels:\d+:{name}$", Path("/proc/net/unix").read_text(), re.M) is not None


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_see_every_byte(name):
    with pool_named(name, row_bytes=8192) as pool:
        pool.pages[1].fill_(7)

        def attach():
            with PinnedPool.attach(name, pin=False) as other:
                assert other.pages.shape == (3, 5000) and other.pages.stride() == (8192, 1)
                assert other.facts.bytes == 3 * 8192 and other.facts.touch_seconds > 0
                assert other.pages.sum() == 7 * 5000
                other.pages[2].fill_(9)

        assert in_child(attach) == 0
        assert pool.pages.sum() == (7 + 9) * 5000
        assert pool.owner_lives()


def test_many_attachers(name):
    with pool_named(name) as pool:
        attached = [PinnedPool.attach(name) for _ in range(20)]
        for i, other in enumerate(attached):
            other.pages[0, i] = i + 1
        assert pool.pages[0, :20].tolist() == list(range(1, 21))


def test_the_owner_forgets_attachers_that_have_gone(name):
    with pool_named(name) as pool:
        before = open_files()
        for _ in range(20):
            PinnedPool.attach(name).close()
        deadline = time.monotonic() + 30
        while open_files() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert open_files() == before
        with PinnedPool.attach(name) as other:
            assert other.pages.data_ptr() != pool.pages.data_ptr()


def test_a_second_owner(name):
    with pool_named(name) as pool:
        pool.pages.fill_(1)
        message = f"^PinnedPool: shared must be a name that is free, got '{name}', which process {os.getpid()} has$"
        with pytest.raises(OwnedElsewhereError, match=message):
            pool_named(name)
        assert in_child(lambda: expect(OwnedElsewhereError, lambda: pool_named(name))) == 0
        assert pool.pages.sum() == 15000
        assert PinnedPool.attach(name).pages.sum() == 15000
    with pool_named(name) as pool:
        assert not pool.pages.any()


def expect(error, call) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError


@pytest.mark.parametrize(
    "asked,message",
    [
        ({"pages": 4}, "pages must be that of the pool shared as '{name}', 3, got 4"),
        ({"pages": 3, "page_bytes": 4096}, "page_bytes must be that of the pool shared as '{name}', 5000, got 4096"),
        ({"row_bytes": 5000}, "row_bytes must be that of the pool shared as '{name}', 8192, got 5000"),
    ],
)
def test_another_size(name, asked, message):
    with pool_named(name, row_bytes=8192):
        before = open_files()
        with pytest.raises(SharedSizeError, match=f"^PinnedPool: {message.format(name=name)}$"):
            PinnedPool.attach(name, **asked)
        PinnedPool.attach(name, 3, 5000, row_bytes=8192).close()
        deadline = time.monotonic() + 30
        while open_files() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert open_files() == before


def test_nobody_has_the_name(name):
    with pytest.raises(NoOwnerError, match=f"^PinnedPool: shared must be the name of a pool, got '{name}', which none"):
        PinnedPool.attach(name)


@pytest.mark.parametrize("bad", ["", "a b", 3])
def test_names_that_are_none(bad):
    with pytest.raises(ValueError, match=r"^PinnedPool: shared must be 1 to 64 of "):
        PinnedPool.attach(bad)


def test_the_errors_are_of_one_family():
    for error in (OwnedElsewhereError, NoOwnerError, StaleSegmentError, SharedSizeError):
        assert issubclass(error, SharedPoolError) and issubclass(error, RuntimeError)
    assert issubclass(SharedSizeError, ValueError)


def test_what_is_attached_outlives_the_owners_pool(name):
    pool = pool_named(name)
    pool.pages.fill_(5)
    other = PinnedPool.attach(name)
    assert other.owner_lives()
    pool.close()
    assert not is_taken(name)
    assert not other.owner_lives()
    with pool_named(name) as pool:
        assert not other.owner_lives()
        assert not pool.pages.any() and (other.pages == 5).all()
        with pytest.raises(NoOwnerError):
            PinnedPool.attach(f"{name}-other")


def test_a_pool_that_nobody_closes_gives_its_name_back(name):
    before = open_files(), threading.active_count()
    pool = pool_named(name)
    assert is_taken(name)
    del pool
    assert not is_taken(name)
    assert (open_files(), threading.active_count()) == before


def test_a_tensor_holds_the_memory_and_not_the_name(name):
    pool = pool_named(name)
    part = pool.pages[1]
    pool.close()
    part.fill_(1)
    assert not is_taken(name)


def test_the_owner_is_killed(name):
    """The mapping stays, and the name is free when the process has ended."""
    ready, tell = os.pipe()
    owner = os.fork()
    if owner == 0:
        pool = pool_named(name)
        pool.pages.fill_(3)
        os.write(tell, b"x")
        time.sleep(600)
    os.read(ready, 1)
    other = PinnedPool.attach(name)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert not other.owner_lives()
    assert (other.pages == 3).all()
    other.pages.fill_(4)
    with pytest.raises(NoOwnerError):
        PinnedPool.attach(name)
    with pool_named(name, 9, 9) as pool:
        assert pool.pages.shape == (9, 9) and (other.pages == 4).all()
    os.close(ready)
    os.close(tell)


def test_a_forked_process_has_the_memory_and_not_the_name(name):
    pool = pool_named(name)
    go, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go, 1)
        pool.pages.fill_(6)
        pool.close()
        os._exit(0)
    other = PinnedPool.attach(name)
    pool.close()
    assert not is_taken(name) and not other.owner_lives()
    os.write(tell, b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert (other.pages == 6).all()
    os.close(go)
    os.close(tell)


def test_to_close_it_in_a_forked_process_leaves_the_owner_alone(name):
    with pool_named(name) as pool:
        assert in_child(pool.close) == 0
        assert in_child(lambda: PinnedPool.attach(name).close()) == 0
        assert PinnedPool.attach(name).owner_lives()


STALE = """
import ctypes, os, sys, time
from kvkernels.memory import PinnedPool
pool = PinnedPool(3, 5000, pin=False, shared=sys.argv[1])
child = ctypes.PyDLL(None).fork()  # as a library might, of which Python hears nothing
if child:
    print(child, flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_a_dead_owner_whose_name_is_held(name):
    """Told from one that lives, by owners and by attachers; it ends with the last process that holds it."""
    owner = subprocess.Popen([sys.executable, "-c", STALE, name], stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    other = PinnedPool.attach(name)
    assert other.owner_lives()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    try:
        assert is_taken(name)
        assert not other.owner_lives()
        message = f"^PinnedPool: '{name}' was shared by process {owner.pid}, which has ended"
        with pytest.raises(StaleSegmentError, match=message):
            PinnedPool.attach(name)
        with pytest.raises(StaleSegmentError, match=message):
            pool_named(name)
    finally:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_taken(name) and time.monotonic() < deadline:
        time.sleep(0.01)
    pool_named(name).close()


def test_attachers_wait_until_the_owner_is_ready(name, monkeypatch):
    map_memory = mapping.map_memory
    waiting = []

    def slow(*arguments):
        waiting.append(threading.Thread(target=lambda: found.append(PinnedPool.attach(name))))
        waiting[0].start()
        time.sleep(0.2)
        assert found == []
        return map_memory(*arguments)

    found: list[PinnedPool] = []
    monkeypatch.setattr(mapping, "map_memory", slow)
    with pool_named(name):
        waiting[0].join(30)
        assert found[0].owner_lives()


def test_an_owner_that_never_is_ready(name, monkeypatch):
    raised = []

    def attach():
        try:
            PinnedPool.attach(name)
        except NoOwnerError as error:
            raised.append(str(error))

    def fail(*_):
        thread.start()
        time.sleep(0.2)
        raise OSError(12, "no memory")

    thread = threading.Thread(target=attach)
    monkeypatch.setattr(mapping, "map_memory", fail)
    with pytest.raises(MemoryError):
        pool_named(name)
    thread.join(30)
    assert raised == [f"PinnedPool: the owner of '{name}' ended before it answered"]


def test_an_owner_that_is_not_ready_in_time(name):
    owner = shared.Owner(name)
    before = open_files()
    with pytest.raises(TimeoutError, match=f"^PinnedPool: the owner of '{name}' did not answer in 0.1 seconds$"):
        PinnedPool.attach(name, timeout_s=0.1)
    assert open_files() == before
    owner.close()


def test_nobody_can_shorten_the_file(name):
    """That would be a signal for whoever reads the rest."""
    with pool_named(name):
        attachment = shared.Attachment(name, 10.0)
        for size in (0, 4096, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(attachment.file, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(attachment.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(attachment.file)
        attachment.close()


def test_another_users_process_gets_nothing(name, monkeypatch):
    with pool_named(name):
        address = shared._address(name)
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        monkeypatch.setattr(shared, "_address", lambda name: address)
        # The attacher refuses the owner...
        with pytest.raises(PermissionError, match=r"is shared by user \d+, who is another$"):
            PinnedPool.attach(name)
        # ... and the owner the attacher.
        with shared._socket() as connection:
            connection.settimeout(30)
            connection.connect(address)
            assert connection.recv(100) == b""


class Impostor:
    """Answers under a name with what it likes."""

    def __init__(self, name: str, message: bytes, file: int) -> None:
        self._listener = shared._socket()
        self._listener.bind(shared._address(name))
        self._listener.listen()
        self._thread = threading.Thread(target=self._answer, args=(message, file))
        self._thread.start()

    def _answer(self, message: bytes, file: int) -> None:
        connection, _ = self._listener.accept()
        with connection:
            socket.send_fds(connection, [message], [file])

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


SEGMENT = {"version": 1, "pages": 2, "page_bytes": 10, "row_bytes": 4096, "huge_pages": False, "hugetlb": False}


@pytest.mark.parametrize(
    "change,size,is_sealed,message",
    [
        ({}, 8191, True, "with a file that is too short"),
        ({}, 8192, False, "with a file that could be made shorter"),
        ({"version": 2}, 8192, True, "by another version of kvkernels"),
    ],
)
def test_what_an_owner_hands_out_is_looked_at(name, change, size, is_sealed, message):
    file = os.memfd_create("impostor", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    if is_sealed:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    impostor = Impostor(name, json.dumps(SEGMENT | change).encode(), file)
    before = open_files()
    with pytest.raises(SharedPoolError, match=f"^PinnedPool: '{name}' is shared {message}$"):
        PinnedPool.attach(name)
    impostor.close()
    os.close(file)
    assert open_files() <= before


def test_a_process_of_another_namespace_is_taken_to_live():
    assert shared._lives(0) and shared._lives(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not shared._lives(child)  # a zombie
    os.waitpid(child, 0)
    assert not shared._lives(child)


def test_killed_owners_leave_nothing_behind():
    """At random times, from before the name is taken to long after attachers work with the memory."""
    script = Path(__file__).parent / "pool_processes.py"
    before = sorted(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else []
    command = [sys.executable, str(script), str(KILLS), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == KILLS
    assert counts["failed"] == counts["names left"] == counts["mappings left"] == 0, done.stderr
    assert counts["lived on"] + counts["never attached"] == 2 * KILLS
    assert min(counts["lived on"], counts["never attached"]) > KILLS // 10, counts
    assert [file for file in sorted(os.listdir("/dev/shm")) if "kvkernels" in file and file not in before] == []
