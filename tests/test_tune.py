"""``python -m kvkernels tune``: when an answer counts, what is asked of the timers, and what is written."""

from __future__ import annotations

import json
import math
import random
import types

import pytest
import torch

from kvkernels import policy
from kvkernels.cli import main
from kvkernels.policy import rows
from kvkernels.transfer import calibrate
from kvkernels.transfer.calibrate import device, host, settle

KIB, MIB = 1 << 10, 1 << 20
COMPILED_IN = {
    "interleave": 4, "piece_bytes": 4 * KIB, "prefetches_within": True, "writes_rows": True,
    "rows_interleave_from_bytes": 2 * KIB, "prefetches_strips": True, "stream_pool_bytes": 4 * MIB,
    "stream_soon_read_bytes": 10 * MIB, "serial_bytes": 4 * MIB, "lanes": (1 << 31) - 1,
}  # fmt: skip


def always(left: int = 0) -> bool:
    return True


def settled(answers: list[int], step: int, runs: int = 100) -> tuple[settle.Settled, int]:
    """Of six candidates, by these answers, while there is time for so many runs."""
    left = iter(answers)
    asked = iter(range(runs))
    found = settle.settle("it", "abcdef", 5, lambda: next(left), step, lambda: next(asked, None) is not None)
    return found, len(answers) - len(list(left))


@pytest.mark.parametrize(
    ("answers", "step", "value", "is_stable", "runs"),
    [
        ([2, 2, 2], 0, "c", True, 3),
        ([2, 2, 3], 0, "f", False, 3),
        ([2, 3, 3, 3], 0, "d", True, 4),
        ([2, 3, 2], 1, "c", True, 3),
        ([3, 3, 2], 1, "d", True, 3),
        ([1, 2, 3, 3], 1, "d", True, 4),
        ([0, 2, 0, 2, 0, 2], 1, "f", False, 6),
        ([0, 1, 0, 1, 0, 1, 1, 1], 0, "f", False, 6),
        ([4, 4], 1, "f", False, 2),
        ([], 1, "f", False, 0),
    ],
)
def test_three_runs_that_agree_are_an_answer(answers, step, value, is_stable, runs):
    found, made = settled(answers, step, runs=len(answers))
    assert (found.value, found.is_stable, made) == (value, is_stable, runs)
    assert found.answers == ["abcdef"[answer] for answer in answers[:runs]] and found.default == "f"
    assert ("not stable" in found.in_words()) is not is_stable


def test_words_of_an_answer():
    assert settled([2, 2, 2], 0)[0].in_words() == "it: c"
    assert settled([5, 5, 5], 0)[0].in_words() == "it: f, as compiled in"
    assert settled([0, 3], 0, runs=2)[0].in_words() == "it: not stable (a, d), keeps f"
    assert settled([], 0, runs=0)[0].in_words() == "it: not stable (no time to measure), keeps f"


def test_another_candidate_must_beat_the_default_by_the_margin():
    assert settle.best([1.0, 0.98, 1.2], 0) == 0
    assert settle.best([1.0, 0.96, 0.95], 0) == 2
    assert settle.best([0.5, 0.4, 1.0], 2) == 1
    assert settle.best([1.0, math.inf], 0) == 0


def test_turns_are_taken_and_the_lower_quartile_counts():
    order, times = [], {0: iter([9, 3, 1, 2, 4]), 1: iter([5, 5, 5, 5, 1])}

    def contestant(number: int) -> float:
        order.append(number)
        return next(times[number])

    assert settle.in_turns([lambda: contestant(0), lambda: contestant(1)], rounds=5) == [2, 5]
    assert order == [0, 1] * 5


def test_a_threshold_costs_least_over_all_sizes():
    below, from_on = [1.0, 2.0, 4.0, 8.0], [2.0, 2.2, 3.0, 5.0]
    assert settle.best_threshold(below, from_on, 0) == 2
    assert settle.best_threshold([*below[:3], 4.9], from_on, 0) == 2  # one wrong figure is outvoted
    assert settle.best_threshold(below, [9.0] * 4, 1) == 4  # never
    assert settle.best_threshold(below, [size * 0.999 for size in below], 3) == 3  # as good as the default
    assert settle.fewest([2.0, 1.04, 1.0, 0.995]) == 1


def machine_timer(settings, case):
    """Seconds on a machine of which all is known."""
    cost = 1.0
    if case.kind == "pages":
        loops = tuple(settings.get(name, COMPILED_IN[name]) for name in ("interleave", "piece_bytes"))
        cost *= 0.8 if loops == (2, MIB) else 1.0
    if case.kind in ("join", "split"):
        cost *= 0.5 if not settings.get("writes_rows", True) else 1.0
        cost *= 0.7 if settings.get("rows_interleave_from_bytes", 2 * KIB) == KIB else 1.0
    if case.kind == "strips":
        cost *= 1.2 if not settings.get("prefetches_strips", True) else 1.0
    if not case.is_parallel:
        for name, kind, best in (("stream_pool_bytes", "pages", MIB), ("stream_soon_read_bytes", "gather", 32 * MIB)):
            streams = case.total_bytes >= settings.get(name, COMPILED_IN[name])
            if case.kind == kind and streams != (case.total_bytes >= best):
                cost *= 2
        return cost
    threads = min(settings.get("lanes", 8), 3)
    return cost / threads + (threads - 1) * 4 * MIB / case.total_bytes


def test_the_host_s_numbers_are_found():
    told = []
    found = host.tune_host(machine_timer, COMPILED_IN, 8, always, told.append)
    assert found == {
        "interleave": 2, "piece_bytes": MIB, "prefetches_within": False, "writes_rows": False,
        "rows_interleave_from_bytes": KIB, "stream_pool_bytes": MIB, "stream_soon_read_bytes": 32 * MIB, "lanes": 3,
        "serial_bytes": 16 * MIB,
    }  # fmt: skip
    assert len(told) == host.SETTINGS and all(one.is_stable and len(one.answers) == 3 for one in told)
    assert policy.cpu.checked("", found) == found


def test_what_is_as_compiled_in_is_not_written():
    assert host.tune_host(lambda settings, case: 1.0, COMPILED_IN, 1, always, lambda one: None) == {}


def test_timings_that_do_not_repeat_keep_every_default():
    """Each run finds another candidate best."""
    calls, told = random.Random(3), []
    found = host.tune_host(lambda settings, case: math.exp(calls.gauss(0, 2)), COMPILED_IN, 32, always, told.append)
    unstable = {one.name for one in told if not one.is_stable}
    assert {"loops", "lanes"} <= unstable and all(one.value == one.default for one in told if one.name in unstable)
    assert not unstable & found.keys()


def test_without_time_nothing_is_measured():
    def timer(settings, case):
        raise AssertionError("measured")

    told = []
    assert host.tune_host(timer, COMPILED_IN, 8, lambda left: False, told.append) == {}
    assert [one.is_stable for one in told] == [False] * host.SETTINGS


def test_each_setting_has_an_equal_part_of_the_time_that_is_left():
    now, told = 0.0, []

    def timer(settings, case):
        nonlocal now
        now += 0.25
        return 1.0

    table = calibrate.measure(8.0, told.append, timer, clock=lambda: now)
    # A run of the first takes 4 candidates x 4 cases x 5 rounds x 0.25 s: none can begin after it.
    assert [len(one.answers) for one in told[:2]] == [1, 0] and table["cpu"] == {}
    assert {name: one["stable"] for name, one in table["measured"]["settings"].items()} == dict.fromkeys(
        [one.name for one in told], False
    )


GPU_DEFAULT = [
    {"direction": "d2d", "executor": "kernel"}, {"direction": "d2d", "executor": "triton"},
    *({"direction": direction, "copies": copies, "count_at_least": 16, "fragment_bytes_below": size, "executor": name}
      for direction in ("h2d", "d2h") for copies, size in (("batched", 128 * KIB), ("one_by_one", MIB))
      for name in ("kernel", "staged")),
]  # fmt: skip
for _row in GPU_DEFAULT:
    if _row["executor"] == "staged":
        _row["ring_copy_bytes_at_least"] = _row["fragment_bytes_below"]


def recorded(cell: device.Cell) -> float:
    """A card whose kernel passes a link at 8 SMs, and whose copy engine needs 2 us a fragment."""
    if cell.executor == "staged" and cell.direction == "h2d":
        return math.inf
    total = cell.fragment_bytes * cell.count
    link = 20e9 if cell.direction == "d2h" and cell.executor == "kernel" else 25e9
    if cell.executor == "dma":
        return cell.count * 2e-6 + total / 50e9
    if cell.direction == "d2d":
        return total / (1e12 if cell.executor == "bulk" else 8e11) * max(1, 64 / (cell.sm_budget or 64))
    return 1e-5 + total / link * max(1, 8 / (cell.sm_budget or 64))


def test_rows_for_a_gpu_follow_from_recorded_timings():
    told = []
    found = device.tune_device(recorded, "batched", GPU_DEFAULT, always, told.append)
    # By count c and size s: 2e-6 c + cs / 50e9 against cs / 25e9 and 10 us: equal at about 98 KiB.
    assert found[0] == {"direction": "h2d", "executor": "kernel", "sm_budget": 8, "copies": "batched",
                        "count_at_least": 16, "fragment_bytes_below": 128 * KIB}  # fmt: skip
    assert found[1]["direction"] == "d2h" and found[1]["executor"] == "bulk" and found[1]["sm_budget"] == 8
    assert found[2] == {"direction": "d2d", "executor": "bulk", "sm_budget": 64}
    assert found[3:5] == GPU_DEFAULT[:2]  # where bulk does not serve
    assert found[5:] == [row for row in GPU_DEFAULT if row.get("copies") == "one_by_one"]
    assert [rows.checked("", row) for row in found] == found and all(one.is_stable for one in told)


def test_a_gpu_s_timings_that_do_not_repeat_keep_the_default_rows():
    random_ = random.Random(5)
    found = device.tune_device(
        lambda cell: math.exp(random_.gauss(0, 3)), "batched", GPU_DEFAULT, always, lambda one: None
    )
    stable = {(row["direction"], row.get("copies")) for row in found if row not in GPU_DEFAULT}
    assert [row for row in found if row in GPU_DEFAULT] == [
        row for row in GPU_DEFAULT if (row["direction"], row.get("copies")) not in stable or row["direction"] == "d2d"
    ]
    assert found == GPU_DEFAULT or stable
    assert device.tune_device(recorded, "batched", GPU_DEFAULT, lambda left: False, lambda one: None) == GPU_DEFAULT


def options(**changed: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"seconds": 60.0, "dry_run": False, "json": False, **changed})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    monkeypatch.delenv("KVKERNELS_STREAM_BYTES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path / "kvkernels" / "policy.json"


def test_the_command_writes_what_it_found_for_this_machine(cache, capsys):
    threads = torch.get_num_threads()
    before = policy.cpu.in_force()
    assert calibrate.run(options(dry_run=True), host_timer=machine_timer) == 0
    assert not cache.exists() and capsys.readouterr().out.endswith("\nnothing was written\n")
    assert calibrate.run(options(), host_timer=machine_timer) == 0
    assert f"written to {cache}" in capsys.readouterr().out
    table = policy.load(cache)
    assert table["machine"] == policy.machine() and "rows" not in table
    assert table["cpu"]["stream_pool_bytes"] == MIB and table["cpu"]["writes_rows"] is False
    assert table["measured"]["settings"]["loops"]["stable"] is True
    assert calibrate.run(options(json=True), host_timer=machine_timer) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["format"] == 1 and printed["cpu"] == table["cpu"]
    # What served while it measured serves no more.
    assert policy.cpu.in_force() == before and torch.get_num_threads() == threads


def test_the_command_writes_to_the_file_that_the_variable_names(cache, tmp_path, monkeypatch):
    named = tmp_path / "elsewhere" / "mine.json"
    monkeypatch.setenv(policy.VARIABLE, str(named))
    assert calibrate.run(options(), host_timer=machine_timer, device_timer=recorded) == 0
    assert named.exists() and not cache.exists()
    assert policy.load(named)["rows"][0]["sm_budget"] == 8


@pytest.mark.parametrize(("load", "is_busy"), [(2.1, True), (2.0, False)])
def test_a_busy_machine_is_said_to_be_busy(cache, monkeypatch, capsys, load, is_busy):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert calibrate.run(options(dry_run=True), host_timer=machine_timer) == 0
    assert ("the machine is busy (load 2.1, 4 cores): measure again" in capsys.readouterr().err) is is_busy


def test_what_the_command_refuses(cache, monkeypatch, capsys):
    def refused(**changed: object) -> str:
        assert calibrate.run(options(**changed), host_timer=machine_timer) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("kvkernels tune: ")
        return said.err.removeprefix("kvkernels tune: ").strip()

    for seconds in (0.0, -1.0, math.nan, 1e9):
        assert refused(seconds=seconds) == f"--seconds must be from 0 to 86400, got {seconds}"
    cache.parent.write_text("a file where the folder would be")
    assert refused().startswith(f"{cache} must be writable, got ")
    monkeypatch.setenv("KVKERNELS_STREAM_BYTES", "0")
    assert refused() == "KVKERNELS_STREAM_BYTES must not be set, since it replaces what is measured, got '0'"
    with pytest.raises(SystemExit):
        main(["tune", "--seconds", "soon"])


@pytest.mark.parametrize("case", [*host.PAGES, *host.ROWS, *host.STRIPS, host.Case("gather", 32 * KIB)], ids=str)
def test_every_case_can_be_timed_and_copies_so_many_bytes(case, monkeypatch):
    monkeypatch.setattr(host, "POOL_BYTES", 8 * MIB)
    from kvkernels import counters, reset_counters

    timer = host.HostTimer()
    small = host.Case(case.kind, case.page_bytes, MIB)
    with policy.trying():
        reset_counters()
        assert timer({}, small) > 0
        repeats = 8 * MIB // small.total_bytes
        copied = counters()["cpu"]["bytes"] / repeats
    assert copied == pytest.approx(MIB, rel=0.5)
