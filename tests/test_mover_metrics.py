"""What a mover counts, and what Prometheus and Chrome's trace viewer get of it."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from kvkernels.registration import LIBRARY
from kvkernels.transfer import Mover, MoverCollector, SwapJob

pytestmark = pytest.mark.skipif(not LIBRARY.compiled, reason="movers need the compiled library")


def send(mover: Mover, pages: int, page: int, priority: str):
    src, dst = (torch.zeros(pages, page, dtype=torch.uint8) for _ in range(2))
    return mover.submit(SwapJob(src, dst, page, torch.arange(pages).repeat(2, 1).T), priority=priority)


@pytest.fixture
def moved():
    """One failed store, a cancelled load, and transfers from 1 byte to 4 MiB that were done."""
    with Mover(lanes=1, chunk_bytes=1 << 20) as mover:
        doomed = torch.zeros(1, 64, dtype=torch.uint8)
        with mover.held():
            mover.submit(SwapJob(doomed, torch.zeros(1, 64, dtype=torch.uint8), 64, torch.tensor([[0, 0]])),
                         priority="store")  # fmt: skip
            doomed.untyped_storage().resize_(0)
            send(mover, 1, 64, "load").cancel()
            send(mover, 4, 1 << 20, "store")
            send(mover, 1, 4096, "load")
            send(mover, 1, 4097, "load")
            send(mover, 1, 1, "expedited")
        assert mover.drain(timeout=30)
        yield mover


def test_stats_count_by_direction_priority_and_executor(moved):
    said = moved.stats()
    assert (said["queued"], said["running"]) == (0, 0)
    rows = {row["priority"]: row for row in said["transfers"]}
    assert [(row["direction"], row["executor"]) for row in rows.values()] == [("h2h", "cpu")] * 3
    assert [tuple(rows[p][k] for k in ("done", "failed", "cancelled", "bytes", "chunks")) for p in rows] == [
        (1, 0, 0, 1, 1), (2, 0, 1, 8193, 2), (1, 1, 0, 4 << 20, 4),
    ]  # fmt: skip
    assert all(0 < row["seconds"] < 30 and 0 < row["queue_seconds"] < 30 for row in rows.values())


def test_buckets_fit_4_kib_to_1_gib(moved):
    rows = {row["priority"]: row for row in moved.stats()["transfers"]}
    bounds = [bound for bound, _ in rows["load"]["bytes_buckets"]]
    assert bounds == [4096 * 4**i for i in range(10)] + [math.inf] and bounds[-2] == 1 << 30
    counts = {p: [n for _, n in row["bytes_buckets"]] for p, row in rows.items()}
    assert counts["load"] == [1, 1] + [0] * 9 and counts["expedited"] == [1] + [0] * 10
    assert counts["store"] == [0] * 5 + [1] + [0] * 5  # 4 MiB
    for row in rows.values():
        for name in ("seconds_buckets", "queue_seconds_buckets"):
            assert sum(n for _, n in row[name]) == row["done"]
            assert [round(bound * 1e5) for bound, _ in row[name][:-1]] == [4**i for i in range(10)]


def test_queued_and_running_are_transfers():
    with Mover(lanes=1) as mover:
        with mover.held():
            send(mover, 1, 64, "load"), send(mover, 1, 64, "load")
            assert (mover.stats()["queued"], mover.stats()["running"]) == (2, 0)
        assert mover.drain(timeout=30) and mover.stats()["queued"] == 0


def test_a_trace_has_queues_and_copies(moved, tmp_path):
    assert moved.trace(tmp_path / "trace.json") == 7
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    copies = [e for e in events if e["ph"] == "X"]
    queued = {e["id"]: e for e in events if e["ph"] == "b"}
    begun = {e["id"]: e for e in events if e["ph"] == "e"}
    assert names == {(1, 0): "urgent 0", (1, 1): "stores 0"} and len(copies) == 7
    assert queued.keys() == begun.keys() == {e["args"]["transfer"] for e in copies}
    for event in copies:
        is_store = event["name"].startswith("store")
        assert names[event["pid"], event["tid"]] == ("stores 0" if is_store else "urgent 0")
        ticket = event["args"]["transfer"]
        assert queued[ticket]["ts"] <= begun[ticket]["ts"] <= event["ts"] and event["dur"] > 0
        assert queued[ticket]["cat"] == event["name"].split()[0]


def test_a_trace_keeps_the_last_chunks(tmp_path):
    with Mover(lanes=1, chunk_bytes=1) as mover:
        for _ in range(5):
            send(mover, 4096, 1, "load")
        assert mover.drain(timeout=60)
        assert mover.trace(tmp_path / "trace.json") == 1 << 14
        begins = [chunk[6] for chunk in mover._owner.trace()]
        assert begins == sorted(begins) and {chunk[0] for chunk in mover._owner.trace()} == {2, 3, 4, 5}


def test_the_collector_is_what_prometheus_reads(moved):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    registry.register(MoverCollector(moved))
    text = client.generate_latest(registry).decode()
    value = registry.get_sample_value
    labels = {"direction": "h2h", "priority": "load", "executor": "cpu"}
    assert value("kvkernels_transfers_total", {**labels, "state": "done"}) == 2
    assert value("kvkernels_transfers_total", {**labels, "state": "cancelled"}) == 1
    assert value("kvkernels_transfer_chunks_total", {**labels, "priority": "store"}) == 4
    assert value("kvkernels_transfer_bytes_sum", labels) == 8193
    assert value("kvkernels_transfer_bytes_count", labels) == 2
    assert value("kvkernels_transfer_bytes_bucket", {**labels, "le": "4096.0"}) == 1
    assert value("kvkernels_transfer_bytes_bucket", {**labels, "le": "16384.0"}) == 2
    assert value("kvkernels_transfer_seconds_count", labels) == value("kvkernels_transfer_queue_seconds_count", labels)
    assert value("kvkernels_transfer_queued") == 0 and "# TYPE kvkernels_transfer_bytes histogram" in text


def test_the_collector_names_the_extra(moved, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install kvkernels\[metrics\]"):
        MoverCollector(moved)
