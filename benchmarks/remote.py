"""Bytes a second to a pool in another process, by page size: the tables of benchmarks/results/remote.md.

Both sides are on this machine's loopback. Contestants take turns in a pair of processes each; a figure is the upper
quartile of the rounds. Where NIXL is not installed (pip install kvkernels[nixl]), its rows are left out.
"""

import argparse
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import machine
from kvkernels.transfer.remote import Peer, RemotePool
from publish import publish

KIB, MIB = 1 << 10, 1 << 20
PAGES = (1 * KIB, 4 * KIB, 16 * KIB, 64 * KIB)
SEGMENT = MIB
#: What packed pages with checksums are to be, in per-page writes without any.
GOALS = {1 * KIB: 5.0, 4 * KIB: 2.0, 16 * KIB: 0.9, 64 * KIB: 0.9}


def high(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[2] if len(values) > 1 else values[0]


class Far:
    """The other process: it does what it is told by a line, and answers with one."""

    def __init__(self, serve: Callable[[Any, Any], None]) -> None:
        mine, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            mine.close()
            code = 1
            try:
                file = theirs.makefile("rw")
                serve(lambda: file.readline().strip(), lambda *words: print(*words, file=file, flush=True))
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        self._file = mine.makefile("rw")

    def tell(self, *words: object) -> None:
        print(*words, file=self._file, flush=True)

    def hear(self) -> str:
        line = self._file.readline()
        if not line:
            raise RuntimeError("the other process has ended")
        return line.strip()

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def raw_socket(payload: int) -> tuple[Far, Callable[[], float]]:
    """As many bytes in segments through a connection, into one buffer."""

    def serve(hear: Callable[[], str], say: Callable[..., None]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            say(listener.getsockname()[1])
            connection, _ = listener.accept()
            buffer = memoryview(bytearray(payload))
            while True:
                at = 0
                while at < payload:
                    at += connection.recv_into(buffer[at:])
                connection.sendall(b"!")

    far = Far(serve)
    connection = socket.create_connection(("127.0.0.1", int(far.hear())))
    data = memoryview(bytes(payload))

    def send() -> float:
        began = time.perf_counter()
        for at in range(0, payload, SEGMENT):
            connection.sendall(data[at : at + SEGMENT])
        connection.recv(1)
        return time.perf_counter() - began

    return far, send


def agent_of(api: Any, memory: np.ndarray) -> Any:
    agent = api.nixl_agent(f"bench-{os.getpid()}", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    return agent


def nixl_pages(payload: int, order: np.ndarray, page: int) -> tuple[Far, Callable[[], float]]:
    """Each page by a write of its own into the other pool, unchecked, in one request."""
    api = nixl_api()
    count = payload // page

    def rows(start: int, ids: np.ndarray) -> np.ndarray:
        return np.stack([start + ids * page, np.full(len(ids), page), np.zeros(len(ids))], 1).astype(np.uint64)

    def serve(hear: Callable[[], str], say: Callable[..., None]) -> None:
        memory = np.zeros(payload, dtype=np.uint8)
        agent = agent_of(api, memory)
        say(agent.get_agent_metadata().hex(), memory.ctypes.data)
        while True:
            agent.get_new_notifs()
            time.sleep(0)

    far = Far(serve)
    metadata, address = far.hear().split()
    memory = np.ones(payload, dtype=np.uint8)
    agent = agent_of(api, memory)
    name = agent.add_remote_agent(bytes.fromhex(metadata)).decode()

    def send() -> float:
        began = time.perf_counter()
        here = agent.get_xfer_descs(rows(memory.ctypes.data, order[:count]), "DRAM")
        there = agent.get_xfer_descs(rows(int(address), order[::-1][:count].copy()), "DRAM")
        handle = agent.initialize_xfer("WRITE", here, there, name)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        assert state == "DONE"
        handle.release()
        return seconds

    return far, send


def nixl_api() -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_TLS", "^shm")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    name = next(name for name in ("nixl_cu12", "nixl_cu13", "nixl") if importlib.util.find_spec(name))
    return importlib.import_module(f"{name}._api")


def remote_pool(payload: int, order: np.ndarray, page: int, transport: str) -> tuple[Far, Callable[[], float]]:
    """A transfer: packed, with sums on both sides, scattered, published, and its sender told."""
    count = payload // page
    target = order[::-1][:count].copy()

    def serve(hear: Callable[[], str], say: Callable[..., None]) -> None:
        torch.set_num_threads(1)
        pages = torch.zeros(count, page, dtype=torch.uint8)
        with RemotePool([pages], transport=transport, segment_bytes=SEGMENT) as pool:
            say(pool.address[1])
            while True:
                request = hear()
                received = pool.receive_blocks(request, torch.from_numpy(target), timeout_s=600)
                say("ready")
                assert received.result().outcome == "visible"

    far = Far(serve)
    peer = Peer("127.0.0.1", int(far.hear()))
    pool = RemotePool([torch.ones(count, page, dtype=torch.uint8)], transport=transport)
    numbers = iter(range(1 << 30))

    def send() -> float:
        request = f"r{next(numbers)}"
        far.tell(request)
        far.hear()
        ids = torch.from_numpy(order[:count].copy())
        began = time.perf_counter()
        result = pool.send_blocks(peer, request, ids, timeout_s=600).result()
        assert result.outcome == "committed", result
        return time.perf_counter() - began

    return far, send


def rates(given: argparse.Namespace) -> list[dict[str, Any]]:
    """GB/s by page size, each measured by a process of its own: what UCX has begun does not survive a fork."""
    rows = []
    for page in PAGES:
        command = [
            sys.executable,
            __file__,
            "--rounds",
            str(given.rounds),
            "--mib",
            str(given.mib),
            "--page",
            str(page),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def row_of(page: int, rounds: int, payload: int, has_nixl: bool) -> dict[str, Any]:
    """GB/s of one page size, and the ratio of rounds that follow each other."""
    order = np.random.default_rng(1).permutation(payload // page)
    made = {"a raw socket": raw_socket(payload), "packed, TCP": remote_pool(payload, order, page, "tcp")}
    if has_nixl:
        made["packed, NIXL"] = remote_pool(payload, order, page, "nixl")
        made["a write a page, NIXL"] = nixl_pages(payload, order, page)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _, send in made.values():
        send()
    for _ in range(rounds):
        for name, (_, send) in made.items():
            times[name].append(send())
    for far, _ in made.values():
        far.close()
    row: dict[str, Any] = {"page": page}
    row |= {name: high([payload / one / 1e9 for one in of]) for name, of in times.items()}
    if has_nixl:
        pairs = zip(times["a write a page, NIXL"], times["packed, NIXL"], strict=True)
        row["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return row


def cores_used(transport: str, seconds: float) -> dict[str, float]:
    """Of a core, by a process with both pools: with a link and nothing to do, and with a transfer that stands still."""

    def share() -> float:
        def used() -> float:
            now = resource.getrusage(resource.RUSAGE_SELF)
            return now.ru_utime + now.ru_stime

        before, began = used(), time.perf_counter()
        select.select([], [], [], seconds)
        return (used() - before) / (time.perf_counter() - began)

    pages = [torch.zeros(64, 4096, dtype=torch.uint8) for _ in range(2)]
    with RemotePool([pages[0]], transport=transport) as one, RemotePool([pages[1]], transport=transport) as other:
        peer = Peer(*other.address)
        waits = [other.receive_blocks("r", [0]), one.send_blocks(peer, "r", [0])]
        assert all(wait.result().outcome in ("visible", "committed") for wait in waits)
        idle = share()
        # A second writer that never comes: the first one's pages are there, and both wait for its.
        other.receive_blocks("s", [0], writers=2, timeout_s=600)
        one.send_blocks(peer, "s", [0], timeout_s=600)
        time.sleep(1)
        return {"idle": idle, "waiting": share()}


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# To another process", "",
        f"Measured by `python benchmarks/remote.py` on {found['machine']}; load {found['load']:.1f}, {found['rounds']} "
        f"rounds in turns of {found['payload'] // MIB} MiB in random order, upper quartiles. Loopback, two processes.",
        "Where the load is more than this program's own, the rates are what was left of two cores.", "",
        "Packed: gathered into segments of 1 MiB, XXH3 of every page on both sides, scattered, published, and the "
        "sender told. A write a page: one request of NIXL's with a descriptor a page, no sums. The ratio is the median "
        "of both NIXL columns' rounds.", "",
        "## GB/s", "",
    ]  # fmt: skip
    names = [name for name in found["rates"][0] if name not in ("page", "ratio")]
    lines += [f"| page | {' | '.join(names)} | ratio | goal |", f"| --- |{' ---: |' * (len(names) + 2)}"]
    for row in found["rates"]:
        cells = " | ".join(f"{row[name]:.2f}" for name in names)
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"| {row['page'] // KIB} KiB | {cells} | {ratio} | {GOALS[row['page']]} |")
    lines += ["", "## Part of a core, of one process with both ends", "",
              "| | linked and idle | a transfer that waits |", "| --- | ---: | ---: |"]  # fmt: skip
    for name, row in found["cores"].items():
        lines.append(f"| {name} | {row['idle']:.2%} | {row['waiting']:.2%} |")
    return "\n".join([*lines, "", "Goal: below 2 % idle.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    parser.add_argument("--page", type=int, help="bytes: print this page size's row alone, as JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    os.environ.setdefault("KVKERNELS_REMOTE_SECRET", os.urandom(16).hex())
    torch.set_num_threads(1)
    has_nixl = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl"))
    if given.page:
        print(json.dumps(row_of(given.page, given.rounds, given.mib * MIB, has_nixl)))
        return
    load = os.getloadavg()[0]
    found = {
        "machine": machine.in_words(machine.describe(torch.device("cpu"), None)),
        "load": load,
        "rounds": given.rounds,
        "payload": given.mib * MIB,
        "rates": rates(given),
        "cores": {name: cores_used(name, given.idle_seconds) for name in ("tcp", *(("nixl",) if has_nixl else ()))},
    }
    publish(given.out, "remote", found, markdown(found))


if __name__ == "__main__":
    main()
