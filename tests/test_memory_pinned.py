"""PinnedPool: its tensor, its facts, what it raises, and that memory lives as long as it is seen and no longer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvkernels.memory import PinnedPool, RegistrationError, mapping, pinned, registration
from kvkernels.memory.registration import Registration

_host = pytest.importorskip("kvkernels._host")
PAGE = mmap.PAGESIZE
HUGE_PAGE_BYTES = mapping.HUGE_PAGE_BYTES
NO_MEMORY = 2
ROWS = 40  # of the memory that faults are injected into


def is_mapped(address: int) -> bool:
    return re.search(rf"^{address:x}-", Path("/proc/self/maps").read_text(), re.M) is not None


class Cuda:
    """What torch hands out of its CUDA runtime, for memory of this process."""

    cudaError = int

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[int, int, int]] = []
        self.unregistered: list[int] = []
        self.fails_at, self.errors_forgotten = 0, 0

    def cudaHostRegister(self, address: int, byte_count: int, flags: int) -> int:
        assert is_mapped_range(address, byte_count)
        assert not any(a < address + byte_count and address < a + n for a, n in self.registered.items())
        self.calls.append((address, byte_count, flags))
        if len(self.calls) == self.fails_at:
            return NO_MEMORY
        self.registered[address] = byte_count
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert is_mapped_range(address, self.registered.pop(address))
        self.unregistered.append(address)
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


def is_mapped_range(address: int, byte_count: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.partition(" ")[0].split("-"))
        if begin <= address and address + byte_count <= end:
            return " rw" in line
    return False


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    """Also where there is a device: what it does is for tests/torch_cuda."""
    monkeypatch.setattr(pinned, "why_no_cuda", lambda: "this test has none")


@pytest.fixture
def cuda(no_cuda, monkeypatch):
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(pinned, "why_no_cuda", lambda: "")

    def forget() -> None:
        made.errors_forgotten += 1

    monkeypatch.setattr(registration, "_forget_error", forget)
    return made


@pytest.mark.parametrize("row_bytes", [None, 5000, 8192])
@pytest.mark.parametrize("page_bytes", [1, 4096, 5000])
def test_the_tensor(page_bytes, row_bytes):
    with PinnedPool(7, page_bytes, row_bytes=row_bytes) as pool:
        row_bytes = row_bytes or page_bytes
        assert pool.pages.dtype == torch.uint8 and pool.pages.device.type == "cpu"
        assert pool.pages.shape == (7, page_bytes) and pool.pages.stride() == (row_bytes, 1)
        assert pool.pages.data_ptr() % PAGE == 0
        assert pool.pages.untyped_storage().nbytes() == 7 * row_bytes
        assert pool.facts.bytes == -(-7 * row_bytes // PAGE) * PAGE
        assert not pool.pages.any()
        pool.pages.fill_(3)
        assert bool((pool.pages == 3).all())


def test_numbers_as_numpy_has_them():
    with PinnedPool(torch.tensor(3), torch.tensor(5).numpy()) as pool:
        assert pool.pages.shape == (3, 5)


@pytest.mark.parametrize(
    "arguments,options,message",
    [
        ((0, 1), {}, "pages must be a positive integer, got 0"),
        ((1, 0), {}, "page_bytes must be a positive integer, got 0"),
        ((1.5, 1), {}, "pages must be a positive integer, got 1.5"),
        ((True, 1), {}, "pages must be a positive integer, got True"),
        ((1 << 70, 1), {}, "pages must fit in int64, got a number of 71 bits"),
        ((1, 2), {"row_bytes": 1}, "row_bytes must be at least page_bytes, got 1"),
        ((1, 1), {"pin": 1}, "pin must be True, False or 'auto', got 1"),
        ((1, 1), {"pin": "yes"}, "pin must be True, False or 'auto', got 'yes'"),
        ((1, 1), {"huge_pages": None}, "huge_pages must be True, False or 'auto', got None"),
        ((1, 1), {"numa_node": -1}, "numa_node must be a node of this machine, got -1"),
        ((1, 1), {"shared": ""}, "shared must be 1 to 64 of A-Z, a-z, 0-9, '.', '_', ':' and '-', got ''"),
        ((1, 1), {"shared": "a/b"}, "shared must be 1 to 64 of"),
        ((1, 1), {"shared": "a\n"}, "shared must be 1 to 64 of"),
        ((1, 1), {"shared": 65 * "a"}, "shared must be 1 to 64 of"),
        ((1, 1), {"shared": 5}, "shared must be 1 to 64 of"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=f"^PinnedPool: {re.escape(message)}"):
        PinnedPool(*arguments, **options)


def test_facts_of_huge_pages():
    with PinnedPool(3, HUGE_PAGE_BYTES) as pool:
        huge = _host.huge_page_bytes(pool.pages.numpy())
        assert pool.facts.huge_page_share == huge / (3 * HUGE_PAGE_BYTES)
        assert (pool.facts.huge_page_share == 1.0) == (pool.facts.why_not_huge == "")
    with PinnedPool(3, HUGE_PAGE_BYTES, huge_pages=False) as pool:
        assert pool.facts.huge_page_share == 0.0
        assert pool.facts.why_not_huge == "they were not asked for"


def test_other_facts():
    with PinnedPool(3, PAGE, numa_node=0) as pool:
        facts = pool.facts
        assert sum(facts.nodes.values()) == pytest.approx(1.0) and 0 in facts.nodes
        assert facts.touch_seconds + facts.pin_seconds <= facts.seconds < 60
        with pytest.raises(AttributeError):
            facts.bytes = 0
    assert pool.facts is facts


@pytest.mark.parametrize("huge_bytes", [0, HUGE_PAGE_BYTES])
def test_huge_pages_that_must_be_and_are_not(monkeypatch, huge_bytes):
    monkeypatch.setattr(_host, "huge_page_bytes", lambda memory: huge_bytes)
    assert "the kernel found too few" in PinnedPool(2, HUGE_PAGE_BYTES).facts.why_not_huge
    with pytest.raises(
        MemoryError, match=r"^PinnedPool: huge_pages=True must have them all, got too few are set aside"
    ):
        PinnedPool(2, HUGE_PAGE_BYTES, huge_pages=True)


def test_more_than_the_system_has():
    with pytest.raises(
        MemoryError, match=r"^PinnedPool: the system must have \d+ bytes to give, got mmap of .*memory$"
    ):
        PinnedPool(1 << 20, 1 << 25)


def test_an_install_without_the_compiled_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvkernels._host", None)
    with pytest.raises(RuntimeError, match=r"^PinnedPool: the compiled library must be installed, got "):
        PinnedPool(1, 1)


def test_memory_goes_with_the_last_that_sees_it():
    pool = PinnedPool(4, PAGE)
    address, part = pool.pages.data_ptr(), pool.pages[2, 5:]
    part.fill_(9)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match=r"^PinnedPool: pages must be of an open pool, got one that was closed$"):
        pool.pages  # noqa: B018
    assert repr(pool) == "<PinnedPool, closed>"
    view = part.numpy()[10:]
    del part
    assert is_mapped(address) and (view == 9).all()
    del view
    assert not is_mapped(address)


def test_a_pool_that_nobody_closes():
    pool = PinnedPool(4, PAGE)
    address = pool.pages.data_ptr()
    assert repr(pool).startswith("<PinnedPool of 4 pages of 4096 bytes, pageable, 0% on huge pages>")
    del pool
    assert not is_mapped(address)


def test_leaving_the_context_closes():
    with contextlib.suppress(KeyError), PinnedPool(4, PAGE) as pool:
        address = pool.pages.data_ptr()
        raise KeyError
    assert not is_mapped(address)


def test_modes_that_it_is_made_under():
    """The tensor is an ordinary one."""
    with torch.inference_mode():
        inferred = PinnedPool(2, 8)
    with FakeTensorMode():
        faked = PinnedPool(2, 8)
    with torch.device("meta"):
        elsewhere = PinnedPool(2, 8)
    for pool in (inferred, faked, elsewhere):
        assert type(pool.pages) is torch.Tensor and pool.pages.device.type == "cpu"
        assert not pool.pages.is_inference()
        pool.pages[1].fill_(1)
        assert pool.pages.sum() == 8


@pytest.mark.parametrize(
    "version,why", [(None, "this torch was built without CUDA"), ("13.0", "torch finds no CUDA device")]
)
def test_without_cuda(monkeypatch, version, why):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pinned, "why_no_cuda", registration.why_no_cuda)
    with PinnedPool(1, 1) as pool:
        assert (pool.facts.pinned, pool.facts.why_not_pinned) == (False, why)
    with PinnedPool(1, 1, pin=False) as pool:
        assert (pool.facts.pinned, pool.facts.why_not_pinned) == (False, "it was not asked for")
    with pytest.raises(
        RegistrationError, match=f"^PinnedPool: pin=True must have memory that CUDA can pin, got {why}$"
    ):
        PinnedPool(1, 1, pin=True)


@pytest.mark.parametrize(
    "rows,row_bytes,chunks",
    [
        (10, PAGE, [4, 4, 2]),
        (2, 3 * PAGE, [3, 3]),  # whole rows
        (4, 2 * PAGE, [4, 4]),
        (16, PAGE // 2, [4, 4]),
        (3, 5 * PAGE, [4, 4, 4, 3]),  # rows longer than a chunk
        (3, 2 * PAGE + 1, [4, 3]),  # rows that end on no page's boundary within a chunk
        (1, 1, [1]),
    ],
)
def test_chunks(cuda, monkeypatch, rows, row_bytes, chunks):
    monkeypatch.setattr(registration, "CHUNK_BYTES", 5 * PAGE - 1)
    pool = PinnedPool(rows, row_bytes, pin=True)
    address = pool.pages.data_ptr()
    begins = [address + PAGE * sum(chunks[:i]) for i in range(len(chunks))]
    assert cuda.calls == [(begin, PAGE * count, 1) for begin, count in zip(begins, chunks, strict=True)]
    assert (pool.facts.pinned, pool.facts.why_not_pinned) == (True, "")
    assert "pinned" in repr(pool)
    pool.close()
    assert not cuda.registered and not is_mapped(address)
    assert cuda.unregistered == begins[::-1]


def test_a_chunk_is_at_most_64_gib():
    assert registration.CHUNK_BYTES == 64 << 30
    assert registration._chunk_bytes(PAGE) == 64 << 30
    assert registration._chunk_bytes(3 << 20) == (64 << 30) // (3 << 20) * (3 << 20)


def test_it_is_unregistered_when_the_last_tensor_goes_and_before_the_memory(cuda):
    """The double looks at the mapping when it is asked to unregister."""
    pool = PinnedPool(4, PAGE)
    part = pool.pages[1]
    pool.close()
    assert len(cuda.registered) == 1
    del part
    assert cuda.registered == {}


@pytest.mark.parametrize("pin", ["auto", True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_registration_that_fails_leaves_none(cuda, monkeypatch, k, pin):
    monkeypatch.setattr(registration, "CHUNK_BYTES", 2 * PAGE)
    cuda.fails_at = k
    why = f"cudaHostRegister of bytes {2 * (k - 1) * PAGE} to {min(2 * k, 5) * PAGE} of {5 * PAGE} failed: error 2 (2)"
    if pin is True:
        with pytest.raises(RegistrationError, match=re.escape(why) + "$"):
            PinnedPool(5, PAGE, pin=True)
    else:
        with PinnedPool(5, PAGE) as pool:
            assert (pool.facts.pinned, pool.facts.why_not_pinned) == (False, why)
            pool.pages.fill_(1)
            assert cuda.registered == {}
    assert cuda.registered == {} and len(cuda.unregistered) == k - 1
    assert cuda.errors_forgotten == 1


def test_what_cannot_be_unregistered_stops_nothing(cuda, monkeypatch):
    monkeypatch.setattr(registration, "CHUNK_BYTES", PAGE)
    unregister = cuda.cudaHostUnregister
    monkeypatch.setattr(Cuda, "cudaHostUnregister", lambda self, address: unregister(address) or 1)
    pool = PinnedPool(3, PAGE)
    address = pool.pages.data_ptr()
    assert len(cuda.registered) == 3
    del pool
    assert not is_mapped(address) and cuda.registered == {}
    assert cuda.errors_forgotten == 3


def test_a_forked_process_has_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert registration.why_no_cuda() == "CUDA cannot be used in a forked process"
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    assert registration.why_no_cuda() == ""


def test_cuda_that_cannot_be_initialised(cuda, monkeypatch):
    def fail():
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "cudart", fail)
    assert PinnedPool(1, 1).facts.why_not_pinned == "no driver"
    with pytest.raises(RegistrationError, match=r"got no driver$"):
        PinnedPool(1, 1, pin=True)


def test_a_forked_process_unregisters_nothing(cuda):
    pool = PinnedPool(1, PAGE)
    child = os.fork()
    if child == 0:
        del pool
        os._exit(len(cuda.unregistered))
    assert os.waitpid(child, 0)[1] == 0
    del pool
    assert len(cuda.unregistered) == 1


def test_registrations_are_undone_once(cuda):
    memory = _host.HostMemory(PAGE)
    one = Registration(memory.address, PAGE, PAGE)
    one.undo()
    one.undo()
    assert len(cuda.unregistered) == 1


class Faults:
    """Has the k-th call of a function that takes something from the system fail."""

    def __init__(self, monkeypatch) -> None:
        self.names: list[str] = []
        self.chosen, self.k, self.count = "", 0, 0
        for owner, name, error in (
            (os, "memfd_create", OSError(errno.EMFILE, "too many files")),
            (os, "ftruncate", OSError(errno.ENOMEM, "no memory")),
            (os, "dup", OSError(errno.EMFILE, "too many files")),
            (fcntl, "fcntl", OSError(errno.EPERM, "not permitted")),
            (socket.socket, "bind", OSError(errno.EACCES, "not allowed")),
            (socket.socket, "listen", OSError(errno.EACCES, "not allowed")),
            (socket.socket, "connect", OSError(errno.EACCES, "not allowed")),
            (socket.socket, "recvmsg", OSError(errno.ENOBUFS, "no buffers")),
            (socket.socket, "getsockopt", OSError(errno.ENOBUFS, "no buffers")),
            (threading.Thread, "start", RuntimeError("can't start new thread")),
            (torch, "frombuffer", MemoryError("no memory")),
        ):
            self.replace(monkeypatch, owner, name, error)
        self.memories: weakref.WeakSet[Any] = weakref.WeakSet()
        made = self.memories

        class HostMemory(_host.HostMemory):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                made.add(self)

        for name in ("__init__", "advise_huge", "prefer_node", "touch"):
            self.replace(monkeypatch, HostMemory, name, OSError(errno.ENOMEM, "no memory"))
        monkeypatch.setattr(_host, "HostMemory", HostMemory)

    def replace(self, monkeypatch, owner, name, error) -> None:
        real = getattr(owner, name)
        self.names.append(name)

        def call(*arguments, **options):
            self.count += name == self.chosen
            if name == self.chosen and self.count == self.k:
                raise type(error)(*error.args)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def run(self, name: str, k: int, call) -> str:
        """What is raised where the k-th fails, without the error, whose frames hold what the pool had."""
        self.chosen, self.k, self.count = name, k, 0
        try:
            call()
        except (OSError, MemoryError, RuntimeError) as error:
            return repr(error)
        finally:
            self.chosen = ""
        return ""


def held() -> tuple[object, ...]:
    """What a process has of the system that has to do with pools."""
    files = re.findall(r"/memfd:\S*", Path("/proc/self/maps").read_text())
    # Not those of tests in another process.
    names = re.findall(rf"@kvkernels\S*-{os.getpid()}\b", Path("/proc/net/unix").read_text())
    return files, names, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("huge_pages", ["auto", False])
def test_a_fault_at_every_call_leaves_nothing_behind(cuda, monkeypatch, is_shared, huge_pages):
    """Either the pool is there, by another way, or nothing of it is, and that without a collection of garbage."""
    shared = f"faults-{os.getpid()}" if is_shared else None
    monkeypatch.setattr(registration, "CHUNK_BYTES", 16 * PAGE)
    faults = Faults(monkeypatch)

    def make() -> None:
        with PinnedPool(ROWS, PAGE, shared=shared, huge_pages=huge_pages, numa_node=0) as pool:
            pool.pages.fill_(1)
            if shared is not None:
                with PinnedPool.attach(shared, ROWS) as other:
                    assert other.pages.sum() == ROWS * PAGE

    make()
    before = held()
    failed = set()
    for name in faults.names:
        for k in range(1, 100):
            error = faults.run(name, k, make)
            if faults.count < k:
                break
            failed.add(name)
            assert held() == before, (name, k, error)
            assert len(faults.memories) == 0 and cuda.registered == {}, (name, k, error)
    of_one_process = {"__init__", "advise_huge", "prefer_node", "touch", "frombuffer"}
    assert failed == (of_one_process if shared is None else set(faults.names))


def test_a_mapping_that_is_refused_leaves_no_address_space():
    """Of a reservation that is made before it."""
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(100):
        with contextlib.suppress(OSError):
            _host.HostMemory(PAGE, 10_000)  # no such file
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 50


SCRIPT = """
import resource
from pathlib import Path
import torch
from kvkernels.memory import PinnedPool
torch.set_num_threads(1)
PinnedPool(1, 1, pin=False)
size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
refused = 0
for room in range(0, 160 << 20, 8 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
    try:
        pool = PinnedPool(64, 1 << 20, pin=False)
    except MemoryError:
        refused += 1
        continue
    pool.pages.fill_(1)
    del pool
print(refused)
"""


def test_a_limit_on_the_address_space():
    """Of real refusals by the system; where there is room for the memory and not for threads, there is a pool."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 8 <= int(done.stdout) < 20
