"""Memory as the system gives it: exact, touched by all cores, and what is said of huge pages and NUMA nodes is so."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvkernels.memory import mapping
from kvkernels.memory.mapping import HUGE_PAGE_BYTES, Wanted, map_file, map_memory, touch_by_all_cores

_host = pytest.importorskip("kvkernels._host")
PAGE = mmap.PAGESIZE
SMALL = Wanted(huge_pages=False)
HUGE = Wanted(huge_pages=True)


def field_of(memory, name: str, path: str = "/proc/self/smaps") -> str:
    """What the kernel says of the mapping that begins where the memory does."""
    text = Path(path).read_text()
    if path.endswith("smaps"):
        (entry,) = re.findall(rf"^{memory.address:x}-.*?(?=^\w+-|\Z)", text, re.M | re.S)
        return re.search(rf"^{name}: +(.*)$", entry, re.M).group(1)
    (line,) = re.findall(rf"^{memory.address:x} .*$", text, re.M)
    return line


def transparent(kind: str) -> bool:
    """Whether the kernel gives huge pages to whom asks for them."""
    path = Path("/sys/kernel/mm/transparent_hugepage") / kind
    return path.exists() and re.search(r"\[(always|madvise|within_size|advise|force)\]", path.read_text()) is not None


class Double:
    """A ``kvkernels._host`` whose calls can be refused, and that has huge pages set aside."""

    def __init__(self, has_set_aside: bool = False, **refusals: int) -> None:
        self.refusals, self.calls, self.has_set_aside = refusals, [], has_set_aside
        self.huge_page_bytes = _host.huge_page_bytes
        double = self

        class HostMemory(_host.HostMemory):
            def __init__(self, byte_count, file=-1, hugetlb=False):
                double.enter("mmap", hugetlb)
                self.hugetlb = hugetlb
                super().__init__(byte_count, file, hugetlb and not double.has_set_aside)

            def advise_huge(self, wanted):
                double.enter("madvise", wanted)
                super().advise_huge(wanted)

            def prefer_node(self, node):
                double.enter("mbind", node)
                super().prefer_node(node)

            def touch(self, begin, end, how):
                double.enter("hugetlb_" + how if self.hugetlb else how, begin, end)
                super().touch(begin, end, how)

        self.HostMemory = HostMemory

    def enter(self, call: str, *arguments) -> None:
        self.calls.append((call, *arguments))
        if call in self.refusals:
            raise OSError(self.refusals[call], os.strerror(self.refusals[call]))


@pytest.fixture
def double(monkeypatch):
    def replace(**options) -> Double:
        made = Double(**options)
        monkeypatch.setattr(mapping, "host_module", lambda: made)
        return made

    return replace


@pytest.mark.parametrize(
    "byte_count", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, HUGE_PAGE_BYTES + 1, 3 * HUGE_PAGE_BYTES]
)
@pytest.mark.parametrize("wanted", [SMALL, HUGE, Wanted(True, file_name="test")], ids=["small", "huge", "file"])
def test_no_more_is_mapped_than_asked_for(byte_count, wanted):
    """Not even a huge page's rest, nor a power of two."""
    mapped = map_memory(byte_count, wanted)
    whole = -(-byte_count // PAGE) * PAGE
    assert len(mapped.memory) == byte_count
    assert mapped.memory.mapped_bytes == whole
    assert field_of(mapped.memory, "Size") == f"{whole // 1024} kB"
    assert mapped.memory.address % HUGE_PAGE_BYTES == 0
    assert not any(memoryview(mapped.memory))
    if mapped.file >= 0:
        assert os.fstat(mapped.file).st_size == whole
        os.close(mapped.file)


@pytest.mark.parametrize("at", ["-1", "memory.mapped_bytes"])
def test_an_access_outside_faults(at):
    script = (
        "import ctypes; from kvkernels._host import HostMemory; memory = HostMemory(5000);"
        f"ctypes.c_char.from_address(memory.address + {at}).value"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV, done.stderr


@pytest.mark.parametrize("refused", [{}, {"populate": errno.EINVAL}], ids=["populated", "written"])
@pytest.mark.parametrize("wanted", [SMALL, HUGE, Wanted(False, file_name="test")], ids=["small", "huge", "file"])
def test_every_page_is_there(double, refused, wanted):
    """Also on a kernel that cannot populate."""
    double(**refused)
    mapped = map_memory(3 * HUGE_PAGE_BYTES + 5, wanted)
    assert field_of(mapped.memory, "Rss") == f"{mapped.memory.mapped_bytes // 1024} kB"
    if mapped.file >= 0:
        os.close(mapped.file)


@pytest.mark.parametrize("refused", [{}, {"populate": errno.EINVAL}], ids=["populated", "read"])
def test_to_map_a_file_leaves_its_bytes(double, refused):
    byte_count = 3 * PAGE
    with open(os.memfd_create("test"), "w+b", buffering=0) as file:
        wanted = os.urandom(byte_count)
        file.write(wanted)
        double(**refused)
        mapped = map_file(byte_count, file.fileno(), huge_pages=False, hugetlb=False, progress=None)
    assert field_of(mapped.memory, "Rss") == f"{byte_count // 1024} kB"
    assert bytes(mapped.memory) == wanted


def test_transparent_huge_pages():
    mapped = map_memory(3 * HUGE_PAGE_BYTES + PAGE, HUGE)
    assert mapped.huge_bytes == 1024 * int(field_of(mapped.memory, "AnonHugePages").split()[0])
    if transparent("enabled"):
        assert (mapped.huge_bytes, mapped.why_not_huge) == (3 * HUGE_PAGE_BYTES, "")  # the tail is shorter than one
    else:
        assert mapped.huge_bytes == 0 and "transparent" in mapped.why_not_huge


def test_a_file_says_why_it_has_no_huge_pages():
    mapped = map_memory(2 * HUGE_PAGE_BYTES, Wanted(True, file_name="test"))
    os.close(mapped.file)
    if not transparent("shmem_enabled") and mapped.huge_bytes == 0:
        assert "shmem_enabled" in mapped.why_not_huge or "no transparent" in mapped.why_not_huge
    else:
        assert (mapped.huge_bytes == 2 * HUGE_PAGE_BYTES) == (mapped.why_not_huge == "")


def test_small_pages_where_none_are_wanted(double):
    made = double()
    mapped = map_memory(2 * HUGE_PAGE_BYTES, SMALL)
    assert (mapped.huge_bytes, mapped.why_not_huge) == (0, "they were not asked for")
    assert made.calls[:2] == [("mmap", False), ("madvise", False)]


def test_huge_pages_that_are_set_aside_come_first(double):
    made = double(has_set_aside=True)
    mapped = map_memory(HUGE_PAGE_BYTES, HUGE)
    assert mapped.hugetlb
    assert [call for call, *_ in made.calls] == ["mmap", "hugetlb_populate", "hugetlb_populate"]


@pytest.mark.parametrize("code", [errno.EFAULT, errno.EINVAL])
def test_huge_pages_that_were_promised_and_are_not_there(double, code):
    """A limit on them is met at the first touch, which would be a signal; a kernel that cannot populate cannot tell."""
    made = double(has_set_aside=True, hugetlb_populate=code)
    mapped = map_memory(HUGE_PAGE_BYTES, HUGE)
    assert not mapped.hugetlb
    assert ("hugetlb_write", 0, HUGE_PAGE_BYTES) not in made.calls
    assert bytes(memoryview(mapped.memory)[:PAGE]) == bytes(PAGE)


@pytest.mark.parametrize("file_name", [None, "test"])
def test_why_none_are_huge(double, file_name, monkeypatch, tmp_path):
    """All reasons, in order."""
    made = double(mmap=errno.EPERM)
    made.huge_page_bytes = lambda memory: 0
    enter, made.enter = made.enter, lambda call, *a: enter(call, *a) if a == (True,) else None
    monkeypatch.setattr(mapping, "_SETTINGS", tmp_path)

    def why() -> str:
        mapped = map_memory(HUGE_PAGE_BYTES, Wanted(True, file_name=file_name))
        if mapped.file >= 0:
            os.close(mapped.file)
        return mapped.why_not_huge

    setting = tmp_path / ("shmem_enabled" if file_name else "enabled")
    aside = "too few are set aside (Operation not permitted); "
    assert why() == aside + "this kernel has no transparent huge pages"
    setting.write_text("always madvise [never]\n")
    assert why() == aside + f"{setting} is never"
    setting.write_text("always [madvise] never\n")
    assert why() == aside + "the kernel found too few to put together"


def test_a_kernel_without_huge_pages_has_small_ones(double):
    double(madvise=errno.EINVAL)
    assert len(map_memory(PAGE, HUGE).memory) == len(map_memory(PAGE, SMALL).memory) == PAGE


def test_the_node_is_preferred_before_the_first_touch(double):
    made = double()
    mapped = map_memory(PAGE, Wanted(False, node=0))
    assert [call for call, *_ in made.calls] == ["mmap", "madvise", "mbind", "populate", "populate"]
    assert " prefer" in field_of(mapped.memory, "", "/proc/self/numa_maps")
    assert mapping.nodes_of(mapped.memory) == {0: 1.0}


def test_an_unknown_node_is_an_error():
    highest = max(int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    with pytest.raises(ValueError, match=f"^PinnedPool: numa_node must be a node .*, got {highest + 1}$"):
        map_memory(PAGE, Wanted(False, node=highest + 1))


def test_a_container_may_not_choose_a_node(double):
    double(mbind=errno.EPERM)
    with pytest.raises(PermissionError, match=r"PinnedPool: numa_node cannot be set: Operation not permitted"):
        map_memory(PAGE, Wanted(True, node=0))


def test_nodes_are_counted(monkeypatch, tmp_path):
    memory = _host.HostMemory(3 * PAGE)
    maps = tmp_path / "numa_maps"
    monkeypatch.setattr(mapping, "_NUMA_MAPS", maps)
    assert mapping.nodes_of(memory) == {}
    maps.write_text(
        f"{memory.address - PAGE:x} default anon=9 N0=9 kernelpagesize_kB=4\n"
        f"{memory.address:x} prefer:1 anon=4 N0=1 N10=1 kernelpagesize_kB=4\n"
        f"{memory.address + 2 * PAGE:x} prefer:1 anon=4 N10=2 kernelpagesize_kB=4\n"
        f"{memory.address + 3 * PAGE:x} default anon=9 N2=9 kernelpagesize_kB=4\n"
    )
    assert mapping.nodes_of(memory) == {0: 0.25, 10: 0.75}


class Recorder:
    """A memory that is only counted."""

    def __init__(self, byte_count: int, fails_at: int | None = None) -> None:
        self.byte_count, self.fails_at, self.parts, self.threads = byte_count, fails_at, [], set()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.byte_count

    def touch(self, begin, end, how):
        with self.lock:
            self.parts.append((begin, end))
            self.threads.add(threading.get_ident())
        if begin == self.fails_at:
            raise OSError(errno.ENOMEM, "no page")


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(mapping, "TOUCH_BYTES", 1000)


@pytest.fixture
def one_core(four_cores, monkeypatch):
    """For what the calling thread does between its parts, of which faster ones may leave it none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})


@pytest.mark.parametrize("byte_count", [1, 999, 1000, 1001, 40_500])
def test_every_byte_is_touched_once(four_cores, byte_count):
    memory = Recorder(byte_count)
    touch_by_all_cores(memory, "write", None)
    parts = sorted(memory.parts)
    assert [0, *(end for _, end in parts)] == [*(begin for begin, _ in parts), byte_count]
    assert all(end - begin <= 1000 for begin, end in parts)
    assert len(memory.threads) <= min(4, len(parts))


def test_all_cores_take_part(four_cores):
    memory = Recorder(4000)
    meeting = threading.Barrier(4)
    record = memory.touch
    memory.touch = lambda *part: (meeting.wait(timeout=30), record(*part))
    touch_by_all_cores(memory, "write", None)
    assert len(memory.threads) == 4


def test_a_failure_in_any_thread_is_raised_and_stops_all(four_cores):
    memory = Recorder(1_000_000, fails_at=5000)
    before = threading.active_count()
    with pytest.raises(OSError, match="no page"):
        touch_by_all_cores(memory, "write", None)
    assert threading.active_count() == before
    assert len(memory.parts) < 1000


def test_without_threads_the_caller_does_it(four_cores, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    memory = Recorder(10_000)
    touch_by_all_cores(memory, "write", None)
    assert len(memory.parts) == 10 and memory.threads == {threading.get_ident()}


def test_progress_is_for_what_takes_long(one_core, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "kvkernels.memory")
    seen = []
    touch_by_all_cores(Recorder(10_000), "write", lambda *numbers: seen.append(numbers))
    assert seen == []
    monkeypatch.setattr(mapping, "QUIET_SECONDS", 0.0)
    touch_by_all_cores(Recorder(10_000), "write", lambda *numbers: seen.append(numbers))
    assert seen and {total for _, total in seen} == {10_000}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert caplog.records == []
    monkeypatch.setattr(mapping, "TOUCH_BYTES", 1 << 30)
    touch_by_all_cores(Recorder(10 << 30), "write", None)
    assert re.fullmatch(r"PinnedPool: \d+\.0 of 10\.0 GiB are touched", caplog.records[0].getMessage())


def test_progress_may_end_it(one_core, monkeypatch):
    monkeypatch.setattr(mapping, "QUIET_SECONDS", 0.0)
    memory = Recorder(100_000)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        touch_by_all_cores(memory, "write", stop)
    assert len(memory.parts) == 1


@pytest.mark.parametrize("bytes_asked", [0, -1])
def test_memory_without_bytes(bytes_asked):
    with pytest.raises(ValueError, match=f"^HostMemory: bytes must be positive, got {bytes_asked}$"):
        _host.HostMemory(bytes_asked)


def test_more_than_there_are_addresses():
    with pytest.raises(MemoryError, match=r"^HostMemory: bytes must be at most 2\^46"):
        _host.HostMemory((1 << 46) + 1)


@pytest.mark.parametrize("begin,end,how", [(-1, 1, "read"), (2, 1, "read"), (0, PAGE + 1, "read"), (0, 1, "look")])
def test_touches_that_are_refused(begin, end, how):
    with pytest.raises(ValueError, match=r"^HostMemory: (begin and end|how) must be "):
        _host.HostMemory(PAGE).touch(begin, end, how)


@pytest.mark.parametrize("node", [-1, 1024])
def test_nodes_that_are_refused(node):
    with pytest.raises(ValueError, match=f"^HostMemory: node must be from 0 to 1023, got {node}$"):
        _host.HostMemory(PAGE).prefer_node(node)


def test_what_precedes_the_unmapping_finds_the_memory_and_cannot_stop_it(monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: unraisable.append(str(found.exc_value)))
    memory = _host.HostMemory(PAGE)
    address, seen = memory.address, []
    view = memoryview(memory)

    def look():
        seen.append(f"{address:x}-" in Path("/proc/self/maps").read_text())
        raise RuntimeError("of no use")

    memory.before_unmap = look
    del memory
    assert seen == []  # the view has it
    del view
    assert seen == [True]
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()
    assert unraisable == ["of no use"]


def test_huge_pages_is_a_buffer_of_the_size_asked_for():
    pages = _host.huge_pages(HUGE_PAGE_BYTES + 1)
    assert len(pages) == HUGE_PAGE_BYTES + 1
    assert _host.huge_page_bytes(pages) == (HUGE_PAGE_BYTES if transparent("enabled") else 0)
    with pytest.raises(MemoryError, match=r"^huge_pages: mmap of \d+ bytes: Cannot allocate memory$"):
        _host.huge_pages(1 << 45)
