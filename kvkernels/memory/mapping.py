"""Memory of the host as the system gives it: huge pages or why not, which NUMA node, touched by all cores."""

from __future__ import annotations

import errno
import importlib
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE_PAGE_BYTES = 2 << 20
#: What one thread touches at a time: tens of milliseconds, after which it can be told to stop.
TOUCH_BYTES = 32 << 20
QUIET_SECONDS = 1.0

_GIB = 1 << 30
_NUMA_MAPS = Path("/proc/self/numa_maps")
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What is asked of the system. With a ``file_name``, which is for people alone, the memory is in a memory file."""

    huge_pages: bool
    node: int | None = None
    file_name: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Mapping:
    """Memory that was touched, and what was refused on the way.

    ``memory`` is a ``kvkernels._host.HostMemory``, ``file`` the descriptor of its file, which is the caller's to close,
    or -1, ``hugetlb`` whether it is of the pages that the administrator set aside, ``huge_bytes`` how much of it is on
    huge pages, and ``why_not_huge`` why more than a tail, shorter than one, is not: ``""`` where it is.
    """

    memory: Any
    file: int
    hugetlb: bool
    huge_bytes: int
    why_not_huge: str


def host_module() -> Any:
    """``kvkernels._host``; RuntimeError where kvkernels was installed without it."""
    try:
        return importlib.import_module("kvkernels._host")
    except ImportError as error:
        raise RuntimeError(f"PinnedPool: the compiled library must be installed, got {error}") from error


def map_memory(byte_count: int, wanted: Wanted) -> Mapping:
    """Zeroed memory that is there: of huge pages set aside, else of ones that the kernel finds, else of small ones.

    OSError where the system has too little, ValueError where it has no such node; nothing is left then.
    """
    why_not = ""
    if wanted.huge_pages:
        try:
            return _map(byte_count, wanted, True, "")
        except OSError as error:
            why_not = f"too few are set aside ({error.strerror})"
    return _map(byte_count, wanted, False, why_not)


def map_file(byte_count: int, file: int, huge_pages: bool, hugetlb: bool, progress: Progress | None) -> Mapping:
    """The memory of a file that another process made. OSError where it cannot be mapped."""
    memory = host_module().HostMemory(byte_count, file, hugetlb)
    if not hugetlb:
        _advise(memory, huge_pages)
    _touch(memory, "read", progress)
    return _mapping(memory, file, hugetlb, huge_pages, "")


def nodes_of(memory: Any) -> dict[int, float]:
    """The share of its pages on each NUMA node; nothing where the kernel does not say."""
    end = memory.address + memory.mapped_bytes
    counts: dict[int, int] = {}
    try:
        with _NUMA_MAPS.open() as lines:
            for line in lines:
                start = int(line[: line.index(" ")], 16)
                if start >= end:  # they are in order, and each costs a walk over its pages
                    break
                if start >= memory.address:
                    for node, count in re.findall(r" N(\d+)=(\d+)", line):
                        counts[int(node)] = counts.get(int(node), 0) + int(count)
    except OSError:
        return {}
    return {node: count / sum(counts.values()) for node, count in sorted(counts.items())}


def _map(byte_count: int, wanted: Wanted, hugetlb: bool, why_not: str) -> Mapping:
    file = -1 if wanted.file_name is None else _memory_file(wanted.file_name, byte_count, hugetlb)
    try:
        memory = host_module().HostMemory(byte_count, file, hugetlb)
        if not hugetlb:
            _advise(memory, wanted.huge_pages)
        if wanted.node is not None:
            _prefer(memory, wanted.node)
        # Of pages set aside there may be fewer than were promised, which only populating says without a signal.
        _touch(memory, None if hugetlb else "write", wanted.progress)
    except BaseException:
        if file >= 0:
            os.close(file)
        raise
    return _mapping(memory, file, hugetlb, wanted.huge_pages, why_not)


def _mapping(memory: Any, file: int, hugetlb: bool, is_asked: bool, why_not: str) -> Mapping:
    huge_bytes = host_module().huge_page_bytes(memory)
    if huge_bytes >= len(memory) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES:
        reason = ""
    elif not is_asked:
        reason = "they were not asked for"
    else:
        reason = "; ".join(filter(None, (why_not, _why_no_transparent(is_file=file >= 0))))
    return Mapping(memory, file, hugetlb, huge_bytes, reason)


def _why_no_transparent(is_file: bool) -> str:
    setting = _SETTINGS / ("shmem_enabled" if is_file else "enabled")
    try:
        words = setting.read_text()
    except OSError:
        return "this kernel has no transparent huge pages"
    chosen = "".join(re.findall(r"\[(\w+)\]", words))
    return f"{setting} is {chosen}" if chosen in ("never", "deny") else "the kernel found too few to put together"


def _memory_file(name: str, byte_count: int, hugetlb: bool) -> int:
    unit = HUGE_PAGE_BYTES if hugetlb else mmap.PAGESIZE
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if hugetlb else 0)
    file = os.memfd_create(name, flags)
    try:
        os.ftruncate(file, -(-byte_count // unit) * unit)
    except BaseException:
        os.close(file)
        raise
    return file


def _advise(memory: Any, huge_pages: bool) -> None:
    # Without transparent huge pages there is nothing to advise; the facts say what came of it.
    with suppress(OSError):
        memory.advise_huge(huge_pages)


def _prefer(memory: Any, node: int) -> None:
    try:
        memory.prefer_node(node)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ValueError(f"PinnedPool: numa_node must be a node of this machine with memory, got {node}") from error
        raise OSError(error.errno, f"PinnedPool: numa_node cannot be set: {error.strerror}") from error


def _touch(memory: Any, without_populate: str | None, progress: Progress | None) -> None:
    """Has all pages come to be; the other way is for a kernel that cannot populate."""
    how = "populate"
    try:
        memory.touch(0, 1, how)
    except OSError as error:
        if error.errno != errno.EINVAL or without_populate is None:
            raise
        how = without_populate
    touch_by_all_cores(memory, how, progress)


def touch_by_all_cores(memory: Any, how: str, progress: Progress | None) -> None:
    """Every page of a ``HostMemory`` touched, by a thread for each core that this process may use.

    Stops early and raises where a thread fails, ``progress`` raises, or a signal's handler does. The calling thread
    is one of them: where no other can be started, it does it all.
    """
    total = len(memory)
    lock = threading.Lock()
    begins = iter(range(0, total, TOUCH_BYTES))
    failures: list[BaseException] = []
    touched = 0

    def next_part() -> bool:
        nonlocal touched
        with lock:
            begin = None if failures else next(begins, None)
        if begin is None:
            return False
        end = min(begin + TOUCH_BYTES, total)
        memory.touch(begin, end, how)
        with lock:
            touched += end - begin
        return True

    def work() -> None:
        try:
            while next_part():
                pass
        except BaseException as error:
            failures.append(error)

    others: list[threading.Thread] = []
    try:
        parts = -(-total // TOUCH_BYTES)
        for _ in range(min(len(os.sched_getaffinity(0)), parts) - 1):
            thread = threading.Thread(target=work, name="kvkernels-touch", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # too many threads, or no memory for its stack
                break
            others.append(thread)
        due = time.monotonic() + QUIET_SECONDS
        while next_part():
            if time.monotonic() >= due:
                due = time.monotonic() + QUIET_SECONDS
                (progress or _log_progress)(touched, total)
    except BaseException as error:
        failures.insert(0, error)
    for thread in others:
        thread.join()
    failure = failures[0] if failures else None
    failures.clear()  # its frames refer to this list, and the memory is to go with it
    try:
        if failure is not None:
            raise failure
    finally:
        del failure


def _log_progress(touched: int, total: int) -> None:
    _LOG.info("PinnedPool: %.1f of %.1f GiB are touched", touched / _GIB, total / _GIB)
