"""One memory file for several processes, under a name that cannot outlive its owner.

::

    owner                                   attacher
      memory file (no name of its own)
      socket bound to "\\0kvkernels..."  <──  connects, is sent the file's descriptor and what is in it
      ends, however it ends                 its connection ends; the memory stays until it lets go of it

The name is that of a Unix socket in the abstract namespace: no file has it, the kernel takes it back when the owner
ends, and it gives the memory back when the last process that has it mapped ends. So there is nothing to clean up, and
nothing that a killed owner could leave. The namespace is that of the network: containers with networks of their own do
not see one another's names.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import select
import selectors
import socket
import struct
import threading
import weakref
from dataclasses import asdict, dataclass
from typing import NoReturn

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CREDENTIALS = struct.Struct("3i")  # process, user and group
_DESCRIPTOR = struct.Struct("i")
_MESSAGE_BYTES = 4096
_VERSION = 1


class SharedPoolError(RuntimeError):
    """Memory cannot be shared under a name."""


class OwnedElsewhereError(SharedPoolError):
    """A pool that lives has the name."""


class NoOwnerError(SharedPoolError):
    """No process has the name: none shares a pool under it, or the one that did has ended."""


class StaleSegmentError(SharedPoolError):
    """The owner has ended, but a process that it forked still holds the name."""


class SharedSizeError(SharedPoolError, ValueError):
    """The memory that has the name is of another size."""


@dataclass(frozen=True)
class Shape:
    """Pages in memory."""

    pages: int
    page_bytes: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        """Of whole rows."""
        return self.pages * self.row_bytes


@dataclass(frozen=True)
class Segment(Shape):
    """What an attacher must know of memory that is shared."""

    huge_pages: bool
    hugetlb: bool


def checked_name(name: object) -> str:
    """A name that memory can be shared under, or ValueError."""
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", name) is None:
        raise ValueError(f"PinnedPool: shared must be 1 to 64 of A-Z, a-z, 0-9, '.', '_', ':' and '-', got {name!r}")
    return name


class Owner:
    """Holds a name, and hands what it is for to whoever of the same user asks.

    OwnedElsewhereError or StaleSegmentError where the name is taken.
    """

    def __init__(self, name: str) -> None:
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self._file = -1
        self._sockets = {_socket()}
        (self._listener,) = self._sockets
        try:
            self._listener.bind(_address(name))
            # From now on attachers can connect; they wait until `serve`, or see the connection end.
            self._listener.listen(socket.SOMAXCONN)
        except OSError as error:
            self._listener.close()
            _raise_taken(name, error)
        _OWNERS.add(self)

    def serve(self, file: int, segment: Segment) -> None:
        """Answer attachers from now on, in a thread."""
        # Nobody may make it shorter, which would be a fault for all others.
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        self._file = os.dup(file)
        message = json.dumps({"version": _VERSION, **asdict(segment)}).encode()
        thread = threading.Thread(target=self._serve, args=(message,), name="kvkernels-share", daemon=True)
        thread.start()
        self._thread = thread

    def close(self) -> None:
        """Give the name back; who is attached keeps the memory. A second call does nothing."""
        self._ends.set()
        if self._sockets and self._thread is not None and self._thread is not threading.current_thread():
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            self._thread.join()
        self.forget()

    def forget(self) -> None:
        """Close what this process has of it, and nothing that a process it was forked from has."""
        sockets, self._sockets = self._sockets, set()
        for one in sockets:
            one.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _serve(self, message: bytes) -> None:
        with selectors.PollSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._ends.is_set():
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._answer(selector, message)
                    else:  # an attacher is gone; none of them ever sends
                        selector.unregister(key.fileobj)
                        self._sockets.discard(key.data)
                        key.data.close()

    def _answer(self, selector: selectors.BaseSelector, message: bytes) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            self._ends.wait(0.1)  # it was shut down, or there are too many files for now
            return
        try:
            if _peer(connection)[1] != os.geteuid():
                raise PermissionError
            socket.send_fds(connection, [message], [self._file])
        except OSError:
            connection.close()
            return
        # Open as long as the owner lives, by which attachers know.
        self._sockets.add(connection)
        selector.register(connection, selectors.EVENT_READ, connection)


class Attachment:
    """What an attacher has of a shared pool: its file, its segment, and a connection that ends with its owner.

    NoOwnerError or StaleSegmentError where nobody answers, TimeoutError where a living owner does not in time.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._connection = _socket()
        self.file = -1
        try:
            self.owner_process = _connect(self._connection, name, timeout_s)
            self.segment, self.file = _receive(self._connection, name, timeout_s)
            self._connection.setblocking(False)
        except BaseException:
            self.close()
            raise

    def owner_lives(self) -> bool:
        """Whether the owner has neither closed its pool nor ended."""
        try:
            has_ended = self._connection.recv(1) == b""
        except BlockingIOError:
            has_ended = False
        except OSError:
            has_ended = True
        return not has_ended and _lives(self.owner_process)

    def close_file(self) -> None:
        """Its descriptor is not needed once it is mapped."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def close(self) -> None:
        """Leave the owner. A second call does nothing."""
        self._connection.close()
        self.close_file()


_OWNERS: weakref.WeakSet[Owner] = weakref.WeakSet()


def _forget_all() -> None:
    for owner in list(_OWNERS):
        owner.forget()


# A forked child would hold its parent's names when that has ended.
os.register_at_fork(after_in_child=_forget_all)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def _address(name: str) -> str:
    return f"\0kvkernels:{os.geteuid()}:{name}"


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end; process 0 is one that cannot be seen from here."""
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(answer)
    return process, user


def _lives(process: int) -> bool:
    """Whether a process runs, as far as can be known from here."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return False
    except OSError:  # of another namespace, or an old kernel
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(handle)


def _raise_taken(name: str, error: OSError) -> NoReturn:
    """Says who has the name that could not be bound."""
    if error.errno != errno.EADDRINUSE:
        raise error
    owner = "another process"
    with _socket() as probe:
        try:
            process = _connect(probe, name, 0.0)
            owner = f"process {process}"
        except (NoOwnerError, BlockingIOError):  # just begins or ends, or is asked by very many
            pass
    raise OwnedElsewhereError(f"PinnedPool: shared must be a name that is free, got {name!r}, which {owner} has")


def _connect(connection: socket.socket, name: str, timeout_s: float) -> int:
    """Connects, and returns the owner's process."""
    connection.settimeout(timeout_s)
    try:
        connection.connect(_address(name))
    except ConnectionError as error:
        raise NoOwnerError(f"PinnedPool: shared must be the name of a pool, got {name!r}, which none has") from error
    process, user = _peer(connection)
    if user != os.geteuid():
        raise PermissionError(f"PinnedPool: {name!r} is shared by user {user}, who is another")
    if not _lives(process):
        raise StaleSegmentError(
            f"PinnedPool: {name!r} was shared by process {process}, which has ended; a process that it forked still "
            "holds the name, and must end or start another program"
        )
    return process


def _receive(connection: socket.socket, name: str, timeout_s: float) -> tuple[Segment, int]:
    try:
        # socket.recv_fds ignores the flag, without which a program that is started meanwhile would inherit the file.
        room = socket.CMSG_SPACE(_DESCRIPTOR.size)
        data, ancillary, _, _ = connection.recvmsg(_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as error:
        raise TimeoutError(f"PinnedPool: the owner of {name!r} did not answer in {timeout_s} seconds") from error
    except ConnectionError:
        ancillary = []
    if not ancillary:
        raise NoOwnerError(f"PinnedPool: the owner of {name!r} ended before it answered")
    (file,) = _DESCRIPTOR.unpack(ancillary[0][2])
    try:
        message = json.loads(data)
        if message.pop("version") != _VERSION:
            raise SharedPoolError(f"PinnedPool: {name!r} is shared by another version of kvkernels")
        segment = Segment(**message)
        if os.fstat(file).st_size < segment.bytes:
            raise SharedPoolError(f"PinnedPool: {name!r} is shared with a file that is too short")
        if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise SharedPoolError(f"PinnedPool: {name!r} is shared with a file that could be made shorter")
    except BaseException:
        os.close(file)
        raise
    return segment, file
