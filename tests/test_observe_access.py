"""Access statistics: exact counts, what is sampled, the JSON, and merging, against a slow model."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import threading
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kvkernels.observe import AccessCollector, AccessStatsCollector, serve_metrics
from kvkernels_records import access
from kvkernels_records.demo import demo_stats
from kvkernels_records.grid import Grid
from kvkernels_records.known import hash_of

START = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class SlowModel:
    """Every access in a list."""

    def __init__(self) -> None:
        self.accesses: list[tuple[object, bool, float]] = []

    def of(self, block: object) -> list[tuple[object, bool, float]]:
        return [one for one in self.accesses if one[0] == block]

    def window(self, now: float, seconds: int) -> tuple[int, int]:
        recent = [one for one in self.accesses if now - seconds < int(one[2]) + 1]
        return sum(one[1] for one in recent), sum(not one[1] for one in recent)

    def intervals(self) -> list[float]:
        times: dict[object, list[float]] = {}
        for block, _, at in self.accesses:
            times.setdefault(block, []).append(at)
        return [after - before for one in times.values() for before, after in itertools.pairwise(one)]


def some_access(draw: random.Random) -> tuple[object, bool]:
    block = draw.choice((draw.randrange(40), f"block {draw.randrange(20)}", bytes([draw.randrange(20)])))
    return block, draw.random() < 0.7


def filled(count: int, seed: int = 0, **options: object) -> tuple[AccessStatsCollector, SlowModel, Clock]:
    draw, clock, model = random.Random(seed), Clock(), SlowModel()
    stats = AccessStatsCollector(clock=clock, **options)
    for _ in range(count):
        clock.now += draw.choice((0.0, 1e-5, 0.01, 0.5, 3.0))
        block, is_hit = some_access(draw)
        stats.record_access(block, is_hit=is_hit)
        model.accesses.append((block, is_hit, clock.now))
    return stats, model, clock


@pytest.mark.parametrize("count", [0, 1, 50, 9000])
def test_the_json_is_that_of_a_slow_model(count):
    stats, model, clock = filled(count)
    found = json.loads(json.dumps(stats.export_stats(details=10**6), allow_nan=False))
    hits = sum(one[1] for one in model.accesses)
    assert (found["total_accesses"], found["total_hits"], found["total_misses"]) == (count, hits, count - hits)
    assert found["hit_rate"] == (hits / count if count else 0.0)
    uses = Counter(one[0] for one in model.accesses)
    assert found["unique_blocks"] == found["tracked_blocks"] == len(uses)
    by_id = {one["block_id"]: one for one in found["blocks"]}
    assert len(by_id) == len(uses)
    for block, number in uses.items():
        said = by_id[block.hex() if isinstance(block, bytes) else block]
        mine = model.of(block)
        assert (said["accesses"], said["hits"]) == (number, sum(one[1] for one in mine))
        assert (said["first_access"], said["last_access"]) == (mine[0][2], mine[-1][2])
    assert [one["accesses"] for one in found["top_blocks"]] == sorted(uses.values(), reverse=True)[:20]
    for name, seconds in access.WINDOWS.items():
        window = found["windows"][name]
        assert (window["hits"], window["misses"]) == model.window(clock.now, seconds)
    cold = {block for block in uses if clock.now - model.of(block)[-1][2] >= 300}
    assert found["cold_blocks"]["count"] == len(cold)
    intervals = model.intervals()
    assert found["mean_interval_s"] == (pytest.approx(sum(intervals) / len(intervals)) if intervals else None)
    assert sum(row["count"] for row in found["intervals"]["histogram"]) == len(intervals)
    for row in found["intervals"]["histogram"]:
        below = row["below_s"]
        low = 0.0 if below < 2e-6 else below / 2
        # Sums of thousands of seconds are rounded; no interval lies on a bucket's edge.
        assert row["count"] == sum(low <= interval < below for interval in intervals)
    assert sum(row["blocks"] for row in found["frequency_histogram"]) == len(uses)
    for row in found["frequency_histogram"]:
        assert row["blocks"] == sum(row["accesses_from"] <= number <= row["accesses_to"] for number in uses.values())
    assert sum(row["blocks"] for row in found["lifetime_histogram"]) == len(uses)
    assert sum(map(sum, found["heatmap"]["counts"])) == count
    assert sum(row["hits"] for row in found["hit_rate_over_time"]) == hits
    assert sum(row["misses"] for row in found["hit_rate_over_time"]) == count - hits


def test_the_schema_describes_what_is_exported():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).resolve().parents[1] / "docs" / "access_stats.schema.json").read_text())
    for found in (filled(0)[0].export_stats(), filled(900)[0].export_stats(), demo_stats(50)):
        jsonschema.validate(found, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**filled(3)[0].export_stats(), "more": 1}, schema)


def test_export_writes_a_file(tmp_path):
    stats, *_ = filled(10)
    found = stats.export_stats(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == found


def test_blocks_are_sampled_by_their_hash_and_totals_are_exact():
    clock = Clock()
    stats = AccessStatsCollector(max_blocks=100, clock=clock)
    draw = random.Random(2)
    uses: Counter[int] = Counter()
    for _ in range(20_000):
        block = draw.randrange(5000)
        uses[block] += 1
        stats.record_access(block, is_hit=True)
    found = stats.export_stats(details=1000)
    assert found["total_accesses"] == 20_000 and found["tracked_blocks"] <= 100
    limit = found["sampling"]["rate"] * (1 << 32)
    assert {one["block_id"] for one in found["blocks"]} == {block for block in uses if hash_of(block) < limit}
    assert all(one["accesses"] == uses[one["block_id"]] for one in found["blocks"])
    assert 0.5 < found["unique_blocks"] / len(uses) < 1.6


def test_memory_is_bounded():
    """A million different blocks over a week: no more is kept than of the first thousands."""
    clock = Clock()
    stats = AccessStatsCollector(max_blocks=1000, clock=clock)
    sizes = []
    for step in range(60_000):
        clock.now += 10.0
        stats.record_access(step * 7919, is_hit=False)
        if step in (20_000, 59_999):
            sizes.append(len(json.dumps(stats.state())))
    assert sizes[1] < 1.3 * sizes[0]
    assert len(stats._seconds) <= 3600 and len(stats._noted) < access._BATCH_ITEMS


def test_collectors_of_other_processes_are_merged():
    parts = [filled(700, seed=seed) for seed in range(3)]
    whole = AccessStatsCollector(clock=max((clock for _, _, clock in parts), key=lambda clock: clock.now))
    model = SlowModel()
    for stats, one, _ in parts:
        state = json.loads(json.dumps(stats.state()))
        assert AccessStatsCollector.from_state(state).state() == stats.state()
        whole.merge(AccessStatsCollector.from_state(state))
        model.accesses += one.accesses
    found = whole.export_stats(details=1000)
    uses = Counter(one[0] for one in model.accesses)
    assert found["total_accesses"] == 2100 and found["total_hits"] == sum(one[1] for one in model.accesses)
    assert sorted(one["accesses"] for one in found["blocks"]) == sorted(uses.values())
    assert sum(row["hits"] for row in found["hit_rate_over_time"]) == found["total_hits"]
    assert sum(map(sum, found["heatmap"]["counts"])) == 2100
    assert found["windows"]["1h"]["accesses"] == sum(sum(model_.window(whole._clock(), 3600)) for _, model_, _ in parts)


def test_merged_samples_are_those_of_the_smaller_share():
    clock = Clock()
    first, second = (AccessStatsCollector(max_blocks=most, clock=clock) for most in (50, 5000))
    for stats in (first, second):
        for block in range(3000):
            stats.record_access(block)
    second.merge(first)
    found = second.export_stats(details=5000)
    assert found["sampling"]["rate"] == first.export_stats()["sampling"]["rate"] < 1
    assert all(one["accesses"] == 2 for one in found["blocks"]) and found["blocks"]


def test_what_is_no_state_is_refused():
    for wrong in ({}, {"format": "other", "limit": 3}, filled(3)[0].export_stats()):
        with pytest.raises(ValueError, match="state must be of kvkernels-access-stats/1"):
            AccessStatsCollector.from_state(wrong)
    for wrong in ({"max_blocks": 0}, {"cold_after_s": 0}, {"cold_after_s": float("nan")}):
        with pytest.raises(ValueError, match="AccessStatsCollector: "):
            AccessStatsCollector(**wrong)


def test_no_access_of_any_thread_is_lost(monkeypatch):
    monkeypatch.setattr(access, "_BATCH_ITEMS", 192)
    stats = AccessStatsCollector()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda: [stats.record_access(i % 50, is_hit=i % 3 > 0) for i in range(6000)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            stats.get_stats_summary()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    found = stats.export_stats()
    assert (found["total_accesses"], found["total_hits"]) == (24_000, 16_000)
    assert sum(one["accesses"] for one in found["blocks"]) == 24_000


@pytest.mark.parametrize("seed", range(5))
def test_grids_lose_nothing_and_agree_with_their_edges(seed):
    draw = np.random.default_rng(seed)
    grid, points = Grid(4, 6), []
    for _ in range(30):
        rows = draw.integers(0, 10 ** draw.integers(1, 4), 20)
        seconds = draw.integers(5000, 5000 + 10 ** draw.integers(1, 5), 20)
        grid.add(rows, seconds)
        points += zip(rows.tolist(), seconds.tolist(), strict=True)
    expected: Counter[tuple[int, int]] = Counter(
        (row // grid.row_width, second // grid.column_s - grid.first_column) for row, second in points
    )
    assert {place: count for place, count in np.ndenumerate(grid.counts) if count} == dict(expected)
    assert Grid.from_state(json.loads(json.dumps(grid.state()))).state() == grid.state()


def test_demo_says_that_it_is_made_up_and_is_seeded():
    first = demo_stats(3000)
    assert first["made_up"] is True and first["total_accesses"] == 3000 and 0 < first["hit_rate"] < 1
    assert demo_stats(3000) == first != demo_stats(3000, seed=1)


def test_prometheus_reads_the_counts_and_listens_on_this_machine_alone():
    pytest.importorskip("prometheus_client")
    stats, model, _ = filled(200)
    port, stop = serve_metrics(AccessCollector(stats))
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
        listening = [
            line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
        ]
    finally:
        stop()
    hits = sum(one[1] for one in model.accesses)
    assert f'kvkernels_cache_accesses_total{{result="hit"}} {float(hits)}' in text
    assert f'kvkernels_cache_accesses_total{{result="miss"}} {200.0 - hits}' in text
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


def test_the_dashboard_asks_for_metrics_that_there_are():
    core = pytest.importorskip("prometheus_client.core")
    from kvkernels.transfer.metrics import MoverCollector, read_stats

    class Mover:
        def stats(self):
            return read_stats(len)  # each row there is, of zeros

    families = [*AccessCollector(filled(5)[0]).collect(), *MoverCollector(Mover()).collect()]
    samples = {sample.name for family in families for sample in family.samples}
    dashboard = json.loads((Path(__file__).resolve().parents[1] / "docs" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) >= 6 and core
    for expression in asked:
        names = re.findall(r"kvkernels_[a-z_]+", expression)
        assert names and set(names) <= samples, expression


def test_a_prefix_cache_tells_of_each_block_that_it_was_asked_for():
    from kvkernels.memory import PrefixCache

    stats = AccessStatsCollector()
    cache = PrefixCache(block_size=4, hash="sha256", on_access=stats.record_access)
    hashes = cache.compute_block_hashes(range(16))
    cache.insert(hashes[:2], [7, 8])
    assert cache.lookup(hashes) == ([7, 8], 8)
    assert cache.lookup(hashes[:1]) == ([7], 4)
    found = stats.export_stats()
    assert {one["block_id"]: (one["hits"], one["misses"]) for one in found["blocks"]} == {
        hashes[0].hex(): (2, 0), hashes[1].hex(): (1, 0), hashes[2].hex(): (0, 1), hashes[3].hex(): (0, 1),
    }  # fmt: skip
    ours, theirs = stats.get_stats_summary(), cache.get_stats()
    assert (ours["total_accesses"], ours["total_hits"]) == (theirs["blocks"], theirs["block_hits"])


@pytest.mark.parametrize("start", range(4))
def test_columns_are_paired_by_their_place_since_the_epoch(start):
    grid, seconds = Grid(2, 6), [start, start + 1, start + 2, start + 3, start + 14]
    for second in seconds:
        grid.add(np.zeros(1, np.int64), np.array([second]))
    expected = Counter(second // grid.column_s - grid.first_column for second in seconds)
    assert {place: count for place, count in enumerate(grid.counts[0].tolist()) if count} == dict(expected)
