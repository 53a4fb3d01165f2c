"""Two pools in processes that are killed and stopped in the middle of transfers: a program, since it forks.

    python tests/remote_processes.py ROUNDS SEED TRANSPORT      prints, as JSON, how often what was seen

::

    parent     forks both, waits a random time, kills or stops one, waits for the other's transfers to end,
               starts or continues the one, waits for a transfer to succeed, ends both, compares what they wrote down
      owner    has pages whose bytes their numbers say, and sends them
      reader   fetches them, or tells the owner that it waits for them; looks at every byte at the moment of publishing

Both write each beginning and end into a pipe, from the pool's own thread and before the peer hears of it, so that what
was published before a kill is known after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from pathlib import Path

import torch

from kvkernels.transfer.remote import Peer, RemotePool
from kvkernels.transfer.remote.handle import RemoteTransfer
from kvkernels.transfer.remote.wire import Conversion

BLOCKS, PAGE_BYTES, AT_ONCE, PAGES = 48, 16 << 10, 3, 12
TIMEOUT_S, HANG_S = 1.0, 60.0
POISON = 0xA5


def content(blocks: list[int]) -> torch.Tensor:
    """The bytes of the owner's blocks: no two pages are alike, nor two parts of one."""
    at = torch.arange(PAGE_BYTES)
    return torch.stack([(at * 7 + (at >> 8) * 3 + block * 31) % 251 for block in blocks]).to(torch.uint8)


class Log:
    """Lines to the parent, each whole."""

    def __init__(self, file: int) -> None:
        self._file = file

    def say(self, *words: object) -> None:
        os.write(self._file, (json.dumps(words) + "\n").encode())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def serve(role: str, port: int, control: int, log: Log, offers: tuple[int, int], transport: str, mode: str, slow: bool,
          seed: int) -> int:  # fmt: skip
    """One side, until the parent says that it is enough."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with its parent
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rng = random.Random(seed)
    pages = (
        content(list(range(BLOCKS))) if role == "owner" else torch.full((BLOCKS, PAGE_BYTES), POISON).to(torch.uint8)
    )
    wanted: dict[str, tuple[list[int], list[int]]] = {}
    ended = RemoteTransfer.end

    def end(self, outcome, count, byte_count, retries, error):
        if outcome == "visible":
            source, target = wanted[self.request]
            if not torch.equal(pages[target], content(source)):
                log.say("torn", self.request)
        log.say("end", self.request, outcome, str(error))
        ended(self, outcome, count, byte_count, retries, error)

    RemoteTransfer.end = end
    if slow:
        unpack = Conversion.unpack
        Conversion.unpack = lambda *given: (time.sleep(0.01), unpack(*given))[1]
    before = descriptors()
    pool = RemotePool(
        [pages], port=port, transport=transport, segments=2, segment_bytes=4 * PAGE_BYTES, allow_fetch=True, name=role,
        silence_s=0.4, rejoin_s=0.3,
    )  # fmt: skip
    log.say("port", pool.address[1])
    poll = select.poll()
    poll.register(control, select.POLLIN | select.POLLHUP)
    peer = Peer("127.0.0.1", int(os.read(control, 16)))
    if role == "owner":
        run_owner(pool, peer, poll, log, offers[0], mode)
    else:
        run_reader(pool, peer, poll, log, offers[1], mode, pages, wanted, rng)
    end_s = time.monotonic() + HANG_S
    while any(pool.stats()[what] for what in ("receiving_blocks", "sending_blocks")) and time.monotonic() < end_s:
        time.sleep(0.01)
    left = {what: pool.stats()[what] for what in ("receiving_blocks", "sending_blocks")}
    pool.close()
    left |= {what: pool.stats()[what] for what in ("links", "rings")}
    left |= {"descriptors": max(0, descriptors() - before), "threads": threading.active_count() - 1}
    if transport == "nixl":
        left["descriptors"] = max(0, left["descriptors"] - 16)  # UCX keeps some of its own for good
    log.say("left", {what: count for what, count in left.items() if count})
    return 0


def run_owner(pool: RemotePool, peer: Peer, poll, log: Log, offers: int, mode: str) -> None:
    """Sends what the reader offers to take; what it fetches goes by itself."""
    poll_offers = select.poll()
    poll_offers.register(offers, select.POLLIN)
    while not poll.poll(0):
        pool.poll()
        if not poll_offers.poll(20) or mode == "fetch":
            continue
        for line in os.read(offers, 1 << 14).decode().splitlines():
            request, blocks = json.loads(line)
            log.say("begin", request)
            pool.send_blocks(peer, request, blocks, timeout_s=TIMEOUT_S)


def run_reader(pool, peer, poll, log, offers, mode, pages, wanted, rng) -> None:
    """Wants some pages after others, a few transfers at a time."""
    live: deque = deque()
    free = list(range(BLOCKS))
    number = 0
    while not poll.poll(5):
        for transfer in pool.poll():
            live.remove(transfer)
            target = wanted[transfer.request][1]
            pages[target] = POISON
            free += target
        if len(live) >= AT_ONCE:
            continue
        rng.shuffle(free)
        target, free = free[:PAGES], free[PAGES:]
        if not (pages[target] == POISON).all():
            log.say("late", number)
        source = rng.sample(range(BLOCKS), PAGES)
        number += 1
        if mode == "fetch":
            # The name is made inside; nothing can end before it is known, for the pool's thread waits for this one.
            ready = threading.Event()
            pool._engine.call(ready.wait)
            transfer = pool.fetch_blocks(peer, source, target, timeout_s=TIMEOUT_S)
            wanted[transfer.request] = (source, target)
            ready.set()
        else:
            request = f"{os.getpid()} {number}"
            wanted[request] = (source, target)
            transfer = pool.receive_blocks(request, target, timeout_s=TIMEOUT_S)
            os.write(offers, (json.dumps([request, source]) + "\n").encode())
        log.say("begin", transfer.request)
        live.append(transfer)


class Side:
    """A process of the parent's, and what it has written down."""

    def __init__(self, role: str, port: int, others: tuple[Side, ...], *rest) -> None:
        reads, writes = os.pipe()
        control, self._control = os.pipe()
        self.role, self.begun, self.ends, self.said = role, set(), {}, []
        self.port, self._buffer, self._reads = port, b"", reads
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for other in others:
                    other.forget()
                os.close(reads)
                os.close(self._control)
                code = serve(role, port, control, Log(writes), *rest)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writes)
        os.close(control)
        self.wait_for(lambda: any(words[0] == "port" for words in self.said))

    def forget(self) -> None:
        for file in (self._reads, self._control):
            with contextlib.suppress(OSError):
                os.close(file)

    def tell(self, port: int) -> None:
        os.write(self._control, str(port).encode())

    def read(self, wait_ms: int = 10) -> bool:
        """Take what it wrote; False once it can write no more."""
        if not select.select([self._reads], [], [], wait_ms / 1000)[0]:
            return True
        some = os.read(self._reads, 1 << 16)
        *lines, self._buffer = (self._buffer + some).split(b"\n")
        for line in lines:
            words = json.loads(line)
            self.said.append(words)
            if words[0] == "port":
                self.port = words[1]
            elif words[0] == "begin":
                self.begun.add(words[1])
            elif words[0] == "end":
                self.ends[words[1]] = words[2]
        return bool(some)

    def wait_for(self, condition) -> bool:
        end = time.monotonic() + HANG_S
        while not condition():
            if time.monotonic() > end or not self.read():
                return bool(condition())
        return True

    def stop(self) -> None:
        os.close(self._control)

    def drain(self) -> int:
        while self.read(1000 * int(HANG_S)) and not (self.said and self.said[-1][0] == "left"):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def drain_pipe(file: int) -> None:
    os.set_blocking(file, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(file, 1 << 16):
            pass
    os.set_blocking(file, True)


def round_(rng: random.Random, transport: str, counts: Counter) -> None:
    mode, slow = rng.choice(("fetch", "push")), rng.random() < 0.3
    victim_role, fault = rng.choice(("owner", "reader")), rng.choice((signal.SIGKILL, signal.SIGSTOP))
    offers = os.pipe()
    rest = (offers, transport, mode, slow)
    sides = {}
    for role in ("owner", "reader"):
        sides[role] = Side(role, 0, tuple(sides.values()), *rest, rng.randrange(1 << 30))
    everyone = list(sides.values())
    owner, reader = sides["owner"], sides["reader"]
    owner.tell(reader.port), reader.tell(owner.port)
    good = {"visible"}
    counts["never began"] += not reader.wait_for(lambda: good & set(reader.ends.values()))
    time.sleep(rng.random() * rng.choice((0.005, 0.3)))
    victim, other = sides[victim_role], next(side for role, side in sides.items() if role != victim_role)
    os.kill(victim.pid, fault)
    counts["kills" if fault == signal.SIGKILL else "stops"] += 1
    other.read(0)
    if fault == signal.SIGKILL:
        os.waitpid(victim.pid, 0)
        while victim.read(1000):
            pass
    begun = set(other.begun)
    counts["hangs"] += not other.wait_for(lambda: begun <= set(other.ends))
    if fault == signal.SIGKILL:
        drain_pipe(offers[0])
        fresh = Side(victim_role, victim.port, (other,), *rest, rng.randrange(1 << 30))
        fresh.tell(other.port)
        victim.forget()
        everyone.append(fresh)
        sides[victim_role] = fresh
    else:
        os.kill(victim.pid, signal.SIGCONT)
    now_reader = sides["reader"]
    while now_reader.read(0) and select.select([now_reader._reads], [], [], 0)[0]:
        pass
    before = set(now_reader.ends)
    later = now_reader.wait_for(lambda: good & {end for name, end in now_reader.ends.items() if name not in before})
    counts["never went on"] += not later
    for side in sides.values():
        side.stop()
    for side in sides.values():
        counts["crashed"] += side.drain() != 0
        side.forget()
    for file in offers:
        os.close(file)
    written: dict[str, dict[str, str]] = {"owner": {}, "reader": {}}
    for side in everyone:
        written[side.role] |= side.ends
        counts.update(side.ends.values())
        counts["torn"] += sum(words[0] == "torn" for words in side.said)
        counts["late"] += sum(words[0] == "late" for words in side.said)
        left = [words[1] for words in side.said if words[0] == "left"]
        if side in sides.values():
            counts["leaks"] += left != [{}]
            if left != [{}]:
                print(side.role, left, file=sys.stderr)
    for request, outcome in written["owner"].items():
        there = written["reader"].get(request)
        if (outcome == "committed" and there != "visible") or (outcome == "failed" and there == "visible"):
            counts["contradictions"] += 1
            print(request, outcome, there, file=sys.stderr)


def main() -> None:
    rounds, seed, transport = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    os.environ["KVKERNELS_REMOTE_SECRET"] = "a secret that only tests share"
    counts: Counter[str] = Counter(dict.fromkeys(
        ("kills", "stops", "committed", "failed", "unknown", "visible", "dropped", "torn", "late", "contradictions",
         "crashed", "hangs", "leaks", "never began", "never went on"), 0,
    ))  # fmt: skip
    before = descriptors()
    for i in range(rounds):
        round_(random.Random(seed * 10_000 + i), transport, counts)
    counts["leaks"] += descriptors() - before
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    main()
