"""Host memory for pages: of exactly the size that is asked for, pinned where there is CUDA, shared by a name."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvkernels.common.arguments import integer
from kvkernels.memory import mapping
from kvkernels.memory.registration import Registration, RegistrationError, why_no_cuda
from kvkernels.memory.shared import Attachment, Owner, Segment, Shape, SharedSizeError, checked_name


@dataclass(frozen=True)
class PinnedFacts:
    """What a pool really got; asked of the system once it was ready.

    Attributes
    ----------
    bytes : int
        Mapped: whole pages of the system, huge ones only where they were set aside for that.
    huge_page_share : float
        The part of it that is on huge pages.
    why_not_huge : str
        Why it is not all of it; ``""`` where at most the tail that is shorter than a huge page is on small ones.
    nodes : mapping of int to float
        The part of its pages on each NUMA node; empty where the kernel does not say.
    pinned : bool
        Whether it is registered with CUDA.
    why_not_pinned : str
        ``""`` where it is.
    touch_seconds, pin_seconds, seconds : float
        For mapping and the first touch, for CUDA, and for everything.
    """

    bytes: int
    huge_page_share: float
    why_not_huge: str
    nodes: Mapping[int, float]
    pinned: bool
    why_not_pinned: str
    touch_seconds: float
    pin_seconds: float
    seconds: float


class PinnedPool:
    """Pages on the host: one uint8 tensor ``[pages, page_bytes]``, zeroed.

    ::

        | page 0 ....... | unused | page 1 ....... | unused | ...
        '- page_bytes ---'
        '- row_bytes -------------'

    Parameters
    ----------
    pages, page_bytes : int
        How many, and the bytes of each.
    row_bytes : int, optional
        From one page to the next; `page_bytes` where it is not given.
    pin : bool or "auto"
        Whether to register the memory with CUDA, so that devices copy from and to it by themselves. "auto" does where
        there is a device and says in the facts why not, True raises. The context of the current device is made for it.
    huge_pages : bool or "auto"
        "auto" takes huge pages that were set aside (hugetlbfs) where there are enough, else asks the kernel for what it
        has (madvise), True raises where these are not all of it but a tail that is shorter than one, False has none.
    numa_node : int, optional
        Where the pages are to be; they are elsewhere where it is full. Without, the process's own policy holds.
    shared : str, optional
        A name under which other processes of this user can `attach` while the pool is open: 1 to 64 letters, digits and
        ``._:-``. See the notes.
    progress : callable, optional
        Called about once a second with the bytes touched and all bytes, where the first touch takes longer than that.
        What it raises ends the construction. Without, it is logged, as "kvkernels.memory", at INFO.

    Raises
    ------
    ValueError
        An argument is out of its range, or `numa_node` is no node of this machine.
    MemoryError
        The system has too little, or too few huge pages.
    RegistrationError
        With ``pin=True``: CUDA refuses, or there is none.
    OwnedElsewhereError
        With `shared`: another pool that is open has the name.
    StaleSegmentError
        With `shared`: the process that had the name ended, and a process that it forked without Python still holds it.
    RuntimeError
        kvkernels was installed without its compiled library.

    Notes
    -----
    Tensors that were made of `pages` keep the memory, and its registration, alive beyond `close`. With the last of them
    it is unregistered, then unmapped, and whatever CUDA still does with it has to be done by then.

    Registrations are of 64 GiB at most and end between pages. The ops copy across their edges; one copy by torch of
    pages on both sides of an edge is an error of CUDA's. What CUDA has a part in was run on a stand-in for CUDA alone:
    on a GPU it is unverified.

    A shared pool leaves nothing behind, however its owner ends: the name and the memory are the kernel's, and no file
    has them. Names are apart for users and for network namespaces, and processes that share must be in one of each. A
    process that the owner forks loses the name, not the memory; of a pool without a name it has a copy.

    Thread-safe.

    Examples
    --------
    >>> from kvkernels.memory import PinnedPool
    >>> with PinnedPool(4, 4096, pin=False, huge_pages=False) as pool:
    ...     pool.pages.shape, pool.facts.bytes, pool.facts.why_not_pinned
    (torch.Size([4, 4096]), 16384, 'it was not asked for')
    """

    def __init__(
        self,
        pages: int,
        page_bytes: int,
        *,
        row_bytes: int | None = None,
        pin: bool | Literal["auto"] = "auto",
        huge_pages: bool | Literal["auto"] = "auto",
        numa_node: int | None = None,
        shared: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        started = time.perf_counter()
        shape = _checked_shape(pages, page_bytes, row_bytes)
        _check_choice("pin", pin)
        _check_choice("huge_pages", huge_pages)
        if numa_node is not None:
            numa_node = integer("PinnedPool: numa_node", numa_node, "a node of this machine", 0)
        owner = None if shared is None else Owner(checked_name(shared))
        try:
            wanted = mapping.Wanted(huge_pages is not False, numa_node, shared, progress)
            mapped = _mapped(shape.bytes, wanted)
            try:
                if huge_pages is True and mapped.why_not_huge:
                    raise MemoryError(f"PinnedPool: huge_pages=True must have them all, got {mapped.why_not_huge}")
                self._take(mapped, shape, pin, started)
                if owner is not None:
                    segment = Segment(shape.pages, shape.page_bytes, shape.row_bytes, wanted.huge_pages, mapped.hugetlb)
                    owner.serve(mapped.file, segment)
            finally:
                if mapped.file >= 0:
                    os.close(mapped.file)
        except BaseException:
            if owner is not None:
                owner.close()
            raise
        self._hold(owner)

    @classmethod
    def attach(
        cls,
        name: str,
        pages: int | None = None,
        page_bytes: int | None = None,
        *,
        row_bytes: int | None = None,
        pin: bool | Literal["auto"] = "auto",
        progress: Callable[[int, int], None] | None = None,
        timeout_s: float = 60.0,
    ) -> PinnedPool:
        """The pool that another process shares under a name: the same memory, as a pool of this process.

        Parameters
        ----------
        name : str
            What the owner gave as `shared`.
        pages, page_bytes, row_bytes : int, optional
            What the pool must be, where they are given.
        pin, progress
            As for a pool of one's own. Each process registers the memory for itself.
        timeout_s : float
            How long the owner may take to have its pool ready.

        Returns
        -------
        PinnedPool
            Its memory stays when the owner ends or closes its pool, which `owner_lives` tells.

        Raises
        ------
        NoOwnerError
            No pool has the name, or its owner ended before it was ready.
        SharedSizeError
            The pool is of another size.
        StaleSegmentError
            The owner ended, and a process that it forked without Python still holds the name.
        PermissionError
            The pool is another user's.
        TimeoutError
            The owner lives and is not ready in time.
        MemoryError, RegistrationError
            As for a pool of one's own.

        Examples
        --------
        >>> from kvkernels.memory import PinnedPool
        >>> with PinnedPool(4, 4096, pin=False, shared="example") as pool:
        ...     with PinnedPool.attach("example", 4, 4096, pin=False) as other:
        ...         other.pages[3] = 7
        ...     int(pool.pages[3, 0])
        7
        """
        started = time.perf_counter()
        _check_choice("pin", pin)
        asked = {"pages": pages, "page_bytes": page_bytes, "row_bytes": row_bytes}
        attachment = Attachment(checked_name(name), timeout_s)
        try:
            segment = attachment.segment
            for what, value in asked.items():
                if value is not None and value != getattr(segment, what):
                    raise SharedSizeError(
                        f"PinnedPool: {what} must be that of the pool shared as {name!r}, {getattr(segment, what)}, "
                        f"got {value!r}"
                    )
            try:
                mapped = mapping.map_file(segment.bytes, attachment.file, segment.huge_pages, segment.hugetlb, progress)
            except OSError as error:
                raise _memory_error(segment.bytes, error) from error
            pool = cls.__new__(cls)
            pool._take(mapped, segment, pin, started)
            attachment.close_file()
        except BaseException:
            attachment.close()
            raise
        pool._hold(attachment)
        return pool

    def _take(self, mapped: mapping.Mapping, shape: Shape, pin: bool | str, started: float) -> None:
        """Pins memory and makes the tensor of it."""
        memory = mapped.memory
        touched = time.perf_counter()
        why_not_pinned = _pin(memory, shape.row_bytes, pin)
        pinned = time.perf_counter()
        # An ordinary tensor, whatever the mode that the pool is made under.
        with torch.inference_mode(False), _disable_current_modes():
            flat = torch.frombuffer(memory, dtype=torch.uint8)
            self._pages: Tensor | None = flat.view(shape.pages, shape.row_bytes)[:, : shape.page_bytes]
        self._facts = PinnedFacts(
            bytes=memory.mapped_bytes,
            huge_page_share=mapped.huge_bytes / memory.mapped_bytes,
            why_not_huge=mapped.why_not_huge,
            nodes=mapping.nodes_of(memory),
            pinned=not why_not_pinned,
            why_not_pinned=why_not_pinned,
            touch_seconds=touched - started,
            pin_seconds=pinned - touched,
            seconds=time.perf_counter() - started,
        )

    def _hold(self, link: Owner | Attachment | None) -> None:
        """What connects the pool to other processes ends with it, also where nobody closes it."""
        self._link = link
        self._unlink = None if link is None else weakref.finalize(self, link.close)

    @property
    def pages(self) -> Tensor:
        """The tensor; ValueError once the pool is closed."""
        pages = self._pages
        if pages is None:
            raise ValueError("PinnedPool: pages must be of an open pool, got one that was closed")
        return pages

    @property
    def facts(self) -> PinnedFacts:
        """What was really got, also once the pool is closed."""
        return self._facts

    def owner_lives(self) -> bool:
        """Whether an attached pool's owner still has it open; True for a pool of one's own.

        Where it has not, another process may own the name by now, with memory of its own.
        """
        return not isinstance(self._link, Attachment) or self._link.owner_lives()

    def close(self) -> None:
        """Give the name back now, and the memory as soon as no tensor sees it. A second call does nothing."""
        self._pages = None
        if self._unlink is not None:
            self._unlink()

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._pages is None:
            return "<PinnedPool, closed>"
        pages, page_bytes = self._pages.shape
        facts = self._facts
        return (
            f"<PinnedPool of {pages} pages of {page_bytes} bytes, {'pinned' if facts.pinned else 'pageable'}, "
            f"{facts.huge_page_share:.0%} on huge pages>"
        )


def _checked_shape(pages: Any, page_bytes: Any, row_bytes: Any) -> Shape:
    pages = integer("PinnedPool: pages", pages, "a positive integer", 1)
    page_bytes = integer("PinnedPool: page_bytes", page_bytes, "a positive integer", 1)
    if row_bytes is None:
        row_bytes = page_bytes
    return Shape(pages, page_bytes, integer("PinnedPool: row_bytes", row_bytes, "at least page_bytes", page_bytes))


def _check_choice(what: str, value: Any) -> None:
    if value is not True and value is not False and value != "auto":
        raise ValueError(f"PinnedPool: {what} must be True, False or 'auto', got {value!r}")


def _mapped(byte_count: int, wanted: mapping.Wanted) -> mapping.Mapping:
    try:
        return mapping.map_memory(byte_count, wanted)
    except PermissionError:
        raise
    except OSError as error:
        raise _memory_error(byte_count, error) from error


def _memory_error(byte_count: int, error: OSError) -> MemoryError:
    return MemoryError(f"PinnedPool: the system must have {byte_count} bytes to give, got {error.strerror}")


def _pin(memory: Any, row_bytes: int, pin: bool | str) -> str:
    """Why it is not pinned, or "" where it is."""
    if pin is False:
        return "it was not asked for"
    why_not = why_no_cuda()
    if not why_not:
        try:
            memory.before_unmap = Registration(memory.address, memory.mapped_bytes, row_bytes).undo
        except RuntimeError as error:  # of CUDA that cannot be initialised, too
            why_not = str(error)
    if why_not and pin is True:
        raise RegistrationError(f"PinnedPool: pin=True must have memory that CUDA can pin, got {why_not}")
    return why_not
