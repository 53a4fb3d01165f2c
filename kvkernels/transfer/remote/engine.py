"""The thread that all of a pool's connections are of: it waits, reads, lets the state machines act, and writes.

Nothing is shared with other threads but a queue of calls.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable

from kvkernels.transfer.remote.errors import PeerLostError, RefusedError, RemoteError
from kvkernels.transfer.remote.hub import Hub

_log = logging.getLogger("kvkernels")
_BUSY_S, _PATIENT_S, _STALLED_S = 0.001, 0.005, 0.1


class Engine:
    """Runs a hub, from now until `close`."""

    def __init__(self, host: str, port: int, hub: Hub) -> None:
        self._hub = hub
        self._listener = socket.create_server((host, port), backlog=128)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        for one in (self._listener, self._woken):
            hub.selector.register(one, selectors.EVENT_READ, None)
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._lock = threading.Lock()
        self._ends = False
        self._last_event = 0.0
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvkernels-remote", daemon=True)
        self._thread.start()
        _ENGINES.add(self)

    def call(self, function: Callable[[], None]) -> None:
        """Have the thread call it soon. From any thread; RuntimeError where there is none to call it."""
        if os.getpid() != self._process:
            raise RuntimeError("RemotePool: the pool must be of this process, got one of its parent's")
        with self._lock:
            if self._ends:
                raise RuntimeError("RemotePool: the pool must be open, got one that was closed")
            self._calls.append(function)
            with contextlib.suppress(BlockingIOError):  # it is awake already
                self._waker.send(b"\0")

    def close(self) -> None:
        """End all links and the thread. From any other thread; a second call does nothing."""
        with contextlib.suppress(RuntimeError):
            self.call(self._stop)
        if os.getpid() == self._process:
            self._thread.join()

    def forget(self) -> None:
        """In a child of a fork: close what it has of the parent's connections, and nothing else."""
        for one in (self._listener, self._woken, self._waker, *(link.socket for link in self._hub.links)):
            one.close()

    def _run(self) -> None:
        while not self._ends:
            try:
                self._turn()
            except Exception:  # a defect; what waits has deadlines, which the next turns keep
                _log.exception("the thread of a RemotePool failed")
                time.sleep(_PATIENT_S)
        self._give_up_all()  # what was called for after the end was
        for link in list(self._hub.links):
            self._hub.end(link, PeerLostError("remote: the pool was closed"))
        self._hub.selector.close()
        for one in (self._listener, self._woken, self._waker):
            one.close()

    def _turn(self) -> None:
        hub, now = self._hub, time.monotonic()
        for key, mask in hub.selector.select(self._timeout(now)):
            now = self._last_event = time.monotonic()
            if key.fileobj is self._listener:
                self._accept(now)
            elif key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:
                hub.serve(key.data, mask, now)
        while self._calls:
            self._calls.popleft()()
        now = time.monotonic()
        hub.tick(now)
        hub.move(now)

    def _timeout(self, now: float) -> float | None:
        times = list(self._hub.times(now))
        if self._hub.wants_polls:
            times.append(now + (_BUSY_S if now - self._last_event < _STALLED_S else _PATIENT_S))
        return max(0.0, min(times) - now) if times else None

    def _accept(self, now: float) -> None:
        with contextlib.suppress(OSError):  # nobody more, or no descriptors for now
            while True:
                self._hub.accept(self._listener.accept()[0], now)

    def _stop(self) -> None:
        self._give_up_all()
        for link in self._hub.links:
            with contextlib.suppress(RemoteError):
                link.write()
        with self._lock:
            self._ends = True

    def _give_up_all(self) -> None:
        error = RefusedError("remote: the pool was closed")
        self._hub.receiver.drop_all(error)
        for route in self._hub.routes():
            for outgoing in list(route.outbox.transfers.values()):
                route.outbox.give_up(outgoing, error)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forget_all() -> None:
    for engine in list(_ENGINES):
        engine.forget()


# A forked child would keep its parent's connections open beyond the parent's end.
os.register_at_fork(after_in_child=_forget_all)
