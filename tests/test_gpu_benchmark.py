"""benchmarks/gpu.py on a tiny scale, the check of its bytes, and the report that is made of what it writes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_benchmarks import assert_png_with_a_drawing

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ON_STAND_IN = "KVKERNELS_STAND_IN" in os.environ
PARTS = ("ceilings", "grid", "auto", "budget", "d2d", "calls", "host-memory", "rivals", "beside")
KIB = 1024
LINK_GB_PER_S = 50.0
DEVICE_GB_PER_S = 1300.0

pytest.importorskip("kvkernels._host", reason="the benchmarks need the compiled library")


@pytest.fixture
def modules(monkeypatch):
    """Imports the benchmarks' modules, which the scripts find beside themselves, and forgets them afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            sys.modules.pop(name)


# ---- The run -------------------------------------------------------------------------------------------------------


def run_script(script: str | Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # On one thread: the work is tiny, and several of these tests may run at once.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def run_gpu(out: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    done = run_script("gpu.py", "--scale", 0.001, "--out", out, *arguments)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done, records


def some(records: list[dict], **wanted: object) -> list[dict]:
    return [r for r in records if all(r.get(name) == value for name, value in wanted.items())]


@pytest.mark.cuda
def test_every_part_runs_and_is_reported(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done, records = run_gpu(out, "--fragments", "4096,32768", "--counts", "50000,64")
    assert done.returncode == 0, done.stderr + done.stdout
    assert records[0]["part"] == "machine" and records[0]["attributes"]["MultiProcessorCount"] > 0
    assert records[-1]["part"] == "end" and records[-1]["status"] == "ended"
    assert {r["part"] for r in some(records, status="measured")} >= set(PARTS[:-1])
    assert {r["status"] for r in records[1:-1]} <= {"measured", "not run", "refused"}
    for record in some(records, status="measured"):
        if record["part"] not in ("ceilings", "beside"):
            assert record["checked"] is True
            assert min(map(len, (record["device_us"], record["host_us"], record["elapsed_us"]))) >= 2
        if "explained" in record and "issued" in record:
            assert record["issued"][record["explained"]["executor"]] == record["calls"]
    grid = some(records, part="grid", status="measured")
    expected = {"kernel", "bulk", "dma", "staged"} | (set() if ON_STAND_IN else {"triton"})
    assert {r["executor"] for r in grid} == expected
    assert {(r["direction"], r["host_form"], r["ids"]) for r in grid} == {
        (way, *form) for way in ("h2d", "d2h")
        for form in (("pools", "random"), ("rows", "random"), ("pools", "contiguous"))
    }  # fmt: skip
    assert all(r["auto"]["executor"] in ("kernel", "bulk", "dma", "staged") for r in grid)
    assert {r["sm_budget"] for r in some(records, part="budget", status="measured")} == {1, 2, 3, 4, 6, 8, 12, 16}
    sides = {r["rival"] for r in some(records, part="rivals", status="measured")}
    assert sides >= {"kvkernels", "copy_ loop", "cuMemcpyBatchAsync"}
    assert len(done.stdout.splitlines()) < 60 + 12  # a line a part comes before
    report = run_script("gpu_report.py", out, "--out", tmp_path, "--no-chart")
    assert report.returncode == 0, report.stderr
    (page,) = tmp_path.glob("gpu-*.md")
    text = page.read_text()
    assert "A dry run" in text and "## Cell by cell" in text and "## Calls" in text and "no --lmcache DIR" in text
    assert "Wrong bytes" not in text


@pytest.mark.cuda
def test_one_question_is_asked_alone(tmp_path):
    done, records = run_gpu(
        tmp_path / "gpu.jsonl", "--parts", "grid", "--directions", "d2h", "--executors", "dma", "--fragments", "8192",
        "--counts", "64", "--stream", "default",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = some(records, part="grid")
    assert [(r["direction"], r["executor"], r["fragment_bytes"], r["count"]) for r in cells] == [
        ("d2h", "dma", 8192, 64)
    ] * 2
    assert all(r["explained"]["device"]["legacy_stream"] for r in cells)


@pytest.mark.cuda
def test_what_time_is_too_short_for_is_listed(tmp_path):
    done, records = run_gpu(tmp_path / "gpu.jsonl", "--seconds", 0.001, "--parts", "grid,calls", "--counts", "64")
    assert done.returncode == 0, done.stderr
    assert {r["part"]: r["status"] for r in records[1:-1]} == dict.fromkeys(("ceilings", "grid", "calls"), "dropped")
    assert len(some(records, part="grid")[0]["cells"]) > 100
    assert f"{sum(len(r['cells']) for r in some(records, status='dropped'))} dropped" in done.stdout


@pytest.mark.cuda
def test_cells_larger_than_the_grid_are_skipped_by_name(tmp_path):
    done, records = run_gpu(
        tmp_path / "gpu.jsonl", "--parts", "grid", "--fragments", "2097152", "--counts", "10000", "--directions", "h2d"
    )
    assert done.returncode == 0, done.stderr
    (cell,) = some(records, part="grid")
    assert cell["status"] == "skipped" and cell["error"].startswith("20971520000 bytes of payload are more than")


def run_planted(tmp_path: Path, code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """The script, with something broken before it starts."""
    script, out = tmp_path / "planted.py", tmp_path / "gpu.jsonl"
    start = f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport gpu, kvkernels, torch\n"
    script.write_text(f"{start}{code}\ngpu.main(sys.argv[1:])\n")
    done = run_script(
        script, "--scale", 0.001, "--out", out, "--fragments", 4096, "--counts", 1000, "--directions", "h2d", *arguments
    )
    return done, [json.loads(line) for line in out.read_text().splitlines()]


FORGETS_A_PAIR = """
right = kvkernels.copy_pages
def broken(src, dst, mapping, runs, executor="auto", sm_budget=0):
    if executor == "bulk":
        raise RuntimeError("planted")
    right(src, dst, mapping[:-1] if executor == "dma" else mapping, runs, executor=executor, sm_budget=sm_budget)
kvkernels.copy_pages = broken
def part(bench):
    raise ValueError("planted part")
    yield
gpu.PARTS["auto"] = part
"""


@pytest.mark.cuda
def test_errors_and_wrong_bytes_do_not_end_the_run(tmp_path):
    done, records = run_planted(
        tmp_path, FORGETS_A_PAIR, "--parts", "grid,auto,budget", "--executors", "kernel,bulk,dma"
    )
    assert done.returncode == 1, done.stderr
    statuses = {r["executor"]: r for r in some(records, part="grid", host_form="pools", ids="random")}
    assert statuses["kernel"]["status"] == "measured"
    assert statuses["bulk"]["status"] == "failed" and statuses["bulk"]["error"] == "RuntimeError: planted"
    assert statuses["dma"]["status"] == "wrong bytes" and "device_us" not in statuses["dma"]
    assert "wrote 0xa5 where 0x" in statuses["dma"]["error"] and "pool 0, block " in statuses["dma"]["error"]
    (part,) = some(records, part="auto")
    assert part["status"] == "failed" and part["error"] == "ValueError: planted part"
    assert some(records, part="budget", executor="kernel", status="measured")
    assert records[-1]["status"] == "ended"
    assert "wrong bytes in grid: h2d dma" in done.stdout


AT_RANDOM_TIMES = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from simgpu.sim import Sim
torch.cuda.init()
Sim.of({os.environ.get("KVKERNELS_STAND_IN", "")!r}).adversarial(7)
"""


@pytest.mark.cuda
@pytest.mark.skipif(not ON_STAND_IN, reason="only the stand-in for CUDA lacks kernels")
def test_on_the_stand_in_only_what_it_lacks_is_not_run(tmp_path):
    """Everything else of a part runs there, at random times, so that few lines meet a GPU for the first time."""
    done, records = run_planted(tmp_path, AT_RANDOM_TIMES, "--parts", "d2d,rivals,beside")
    assert done.returncode == 0, done.stderr
    reasons = Counter(r["error"].split(": ")[-1] for r in some(records, status="not run"))
    assert set(reasons) == {
        "the stand-in for CUDA runs none of torch's own kernels",
        "the stand-in for CUDA cannot launch Triton's kernels",
        "no --sglang FILE was given",
        "no --lmcache DIR was given",
    }
    assert len(some(records, part="d2d", status="measured")) == 23
    beside = [r for r in some(records, part="beside", status="not run") if "matmul" in r["error"]]
    assert beside and all(len(r["alone_us"]) == 3 and r["checked"] for r in beside)


RUNS_ANOTHER = """
right = kvkernels.copy_pages
kvkernels.copy_pages = lambda *arguments, **chosen: right(*arguments, executor="kernel")
"""


@pytest.mark.cuda
def test_another_executor_than_the_one_explained_is_an_error(tmp_path):
    done, records = run_planted(tmp_path, RUNS_ANOTHER, "--parts", "grid", "--executors", "kernel,dma")
    assert done.returncode == 1, done.stderr
    statuses = {r["executor"]: r for r in some(records, part="grid", host_form="pools")}
    assert statuses["kernel"]["status"] == "measured"
    assert statuses["dma"]["error"].startswith("RuntimeError: dma was explained, and {'kernel': ")


LOSES_THE_DEVICE = """
right = torch.cuda.synchronize
def broken(*arguments, **chosen):
    def lost():
        raise RuntimeError("CUDA error: gone")
    torch.cuda.synchronize = lost
    raise RuntimeError("illegal access")
kvkernels.copy_pages = broken
"""


@pytest.mark.cuda
def test_a_lost_device_ends_the_run(tmp_path):
    done, records = run_planted(tmp_path, LOSES_THE_DEVICE, "--parts", "grid,calls", "--executors", "kernel")
    assert done.returncode == 1
    assert [(r["part"], r["status"], r["error"]) for r in records[-2:]] == [
        ("grid", "failed", "RuntimeError: illegal access"),
        ("end", "lost", "CUDA error: gone"),
    ]
    assert "The device was lost, and the run with it: CUDA error: gone" in done.stderr


@pytest.mark.cuda
def test_the_clock_tells_the_host_from_the_device(modules):
    """A call that only keeps its caller; where a spin hides it, none of it counts as the device's."""
    clock_module = modules("gpu_clock")
    with torch.cuda.stream(torch.cuda.Stream()):
        clock = clock_module.Clock("no spin" if ON_STAND_IN else "")
        clock.warm(0.01, lambda: None)
        calls: list[int] = []
        turns = [lambda number=number: (calls.append(number), time.sleep(0.005)) for number in range(2)]
        samples = clock.measure(turns, clock_module.Effort(least=3, most=4, seconds=10.0))
    assert calls == [0, 1] * 4
    assert len(samples.host_us) == len(samples.elapsed_us) == len(samples.device_us) == 4
    assert 5_000 < min(samples.host_us) <= min(samples.elapsed_us)
    assert samples.hidden is not ON_STAND_IN
    assert ON_STAND_IN or max(samples.device_us) < 1_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_it_says_so(tmp_path):
    done, records = run_gpu(tmp_path / "gpu.jsonl")
    assert done.returncode == 2 and records == []
    assert "benchmarks/gpu.py needs a CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--parts", "grid,nothing"),
            "must be among grid,auto,budget,d2d,calls,host-memory,rivals,beside, got nothing",
        ),
        (("--fragments", "100"), "--fragments must be multiples of 16 bytes, got [100]"),
        (("--counts", "0"), "must be positive, got 0"),
        (("--scale", "2"), "--scale must be above 0 and at most 1, got 2.0"),
    ],
)
def test_options_that_make_no_sense_are_named(tmp_path, arguments, message):
    done = run_script("gpu.py", "--out", tmp_path / "gpu.jsonl", *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


# ---- The check of the bytes ----------------------------------------------------------------------------------------


def forget_the_last_page(moved, src, dst):
    moved.geometry.form(dst, moved.forms[1])[0][moved.moves.ids(moved.forms[1], "dst")[-1]] = 0xA5


def write_a_guard_byte(moved, src, dst):
    dst[moved.geometry.flat_bytes - 1] = 0


def write_another_block(moved, src, dst):
    free = set(range(moved.geometry.blocks)) - set(moved.moves.dst.tolist())
    moved.geometry.form(dst, "pools")[1][free.pop(), 3] = 0


def change_the_source(moved, src, dst):
    src[5] += 1


@pytest.mark.parametrize("form", ["pools", "rows"])
@pytest.mark.parametrize("ids", ["random", "contiguous"])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_the_check_knows_what_every_form_moves(modules, direction, form, ids):
    """On the CPU: the directions say only which side has the pools."""
    case, checker, moved = a_case(modules, direction, form, ids)
    assert len(case.calls) > 1
    assert torch.equal(moved.moves.src, torch.arange(len(moved.moves.src))) is (ids == "contiguous")
    assert checker.check(case) == ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (forget_the_last_page, "wrote 0xa5 where 0x"),
        (write_a_guard_byte, "wrote 0x00 where 0xa5 belongs: guard byte"),
        (write_another_block, "wrote 0x00 where 0xa5 belongs: pool 1, block "),
        (change_the_source, "changed its source, which has"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1000])
def test_the_check_finds(modules, monkeypatch, fault, message, chunk_bytes):
    monkeypatch.setattr(modules("gpu_memory"), "CHUNK_BYTES", chunk_bytes)
    case, checker, moved = a_case(modules, "h2d", "pools", "random")
    case.calls = [*case.calls, lambda: fault(moved, case.src, case.dst)]
    assert message in checker.check(case)
    case.calls = case.calls[:-1]
    assert checker.check(case) == ""  # and the source is whole again


def a_case(modules, direction, form, ids):
    transfer, memory = modules("gpu_transfer"), modules("gpu_memory")
    moved = transfer.Transfer(direction, 512, 64, 8, form, ids, spread_bytes=256 << 10)
    nbytes = moved.geometry.flat_bytes + 100
    checker = memory.Checker(nbytes, torch.device("cpu"))
    src, dst = torch.zeros(2, nbytes, dtype=torch.uint8).unbind()
    return moved.case(src, dst, "auto"), checker, moved


def test_the_calls_of_a_case_share_no_page(modules):
    _, _, moved = a_case(modules, "h2d", "pools", "random")
    sets = [moved.set_of(number) for number in range(moved.sets)]
    for side in ("src", "dst"):
        ids = torch.cat([getattr(one, side) for one in sets]).tolist()
        assert len(ids) == len(set(ids)) == moved.sets * moved.pairs


def test_real_counts_are_those_of_the_grid(modules):
    transfer, grid = modules("gpu_transfer"), modules("gpu_grid")
    for count in grid.COUNTS:
        moved = transfer.Transfer("h2d", 512, count, transfer.pools_of(count))
        assert moved.payload_bytes == 512 * count
        assert moved.geometry.flat_bytes >= transfer.SPREAD_BYTES


def test_larger_calls_are_repeated_less_often(modules):
    effort = modules("gpu_clock").Effort()
    assert [effort.for_bytes(nbytes).most for nbytes in (1 << 10, 200 << 20, 4 << 30)] == [15, 5, 3]


# ---- The log -------------------------------------------------------------------------------------------------------


def test_a_line_cut_short_costs_only_itself(tmp_path, modules):
    log_module, path = modules("gpu_log"), tmp_path / "gpu.jsonl"
    log = log_module.Log(path)
    log.write({"part": "machine", "gpu": "a"})
    log.close()
    with path.open("a") as file:
        file.write('{"part": "grid", "sta')
    again = log_module.Log(path)
    again.write({"part": "machine", "gpu": "b"})
    again.close()
    assert [(r["gpu"], r["run"]) for r in log_module.read([path])] == [("a", 0), ("b", 1)]


def test_a_file_of_something_else_is_refused(tmp_path, modules):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}\n')
    with pytest.raises(SystemExit, match=r"is not the output of benchmarks/gpu\.py"):
        modules("gpu_log").read([path])


# ---- The report ----------------------------------------------------------------------------------------------------


def machine_line(stream: str = "side", gpu: str = "NVIDIA H100 80GB HBM3") -> dict:
    return {
        "part": "machine", "status": "described", "gpu": gpu, "compute_capability": "9.0", "sms": 132, "cpu": "a CPU",
        "cores": 16, "driver": "13.0", "runtime": "13.0", "torch": "2.11.0+cu130", "git_commit": "0123456789ab",
        "link": {"pci": "0000:00:00.0"}, "nvidia_smi": {"driver_version": "580.159.04"}, "stand_in": False,
        "attributes": {"PageableMemoryAccess": 0}, "settings": {"stream": stream, "scale": 1.0},
    }  # fmt: skip


def timed(gb_per_s: float, nbytes: int = 100_000_000) -> dict:
    us = nbytes / gb_per_s / 1e3
    samples = {"device_us": [us, us * 0.99, us * 1.01], "host_us": [10.0, 11.0, 12.0], "elapsed_us": [us, us, us]}
    return {"status": "measured", "checked": True, "bytes": nbytes, **samples, "spin_us": 50.0, "hidden": True}


def ceiling_lines(link: float = LINK_GB_PER_S) -> list[dict]:
    speeds = {"h2d": link, "d2h": link, "both": 1.4 * link, "d2d": DEVICE_GB_PER_S}
    return [
        {"part": "ceilings", "direction": way, "name": "memcpy", "when": when, **timed(speed)}
        for way, speed in speeds.items()
        for when in ("first", "last")
    ]


def cell_line(
    direction: str, fragment: int, count: int, executor: str, gb_per_s: float, auto: str, part: str = "grid",
    ctas: int = 12, sm_budget: int = 0,
) -> dict:  # fmt: skip
    device = {"ctas": ctas} if executor in ("kernel", "bulk") else {}
    return {
        "part": part, "direction": direction, "fragment_bytes": fragment, "count": count, "host_form": "pools",
        "ids": "random", "executor": executor, "sm_budget": sm_budget, "auto": {"executor": auto, "reason": "so"},
        "explained": {"executor": executor, "device": device}, **timed(gb_per_s),
    }  # fmt: skip


def results_of(modules, lines: list[dict], tmp_path: Path):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((_, results),) = modules("gpu_results").by_card(modules("gpu_log").read([path])).items()
    return path, results


def goals_by_name(results) -> dict[str, tuple[bool | None, str]]:
    return {goal.name: (goal.met, goal.got) for goal in results.goals()}


def test_a_cells_best_executor_and_autos_loss(modules, tmp_path):
    lines = [machine_line(), *ceiling_lines()]
    lines += [
        cell_line("h2d", 4 * KIB, 10_000, executor, speed, auto="dma")
        for executor, speed in (("dma", 10.0), ("kernel", 40.0), ("bulk", 38.0))
    ]
    lines += [cell_line("d2h", 4 * KIB, 64, executor, speed, auto="dma") for executor, speed in (("kernel", 9.0),)]
    lines += [cell_line("d2h", 4 * KIB, 64, "auto", 8.1, auto="dma", part="auto")]
    _, results = results_of(modules, lines, tmp_path)
    d2h, h2d = results.cells()
    assert (h2d.best["executor"], h2d.auto_executor) == ("kernel", "dma")
    assert h2d.auto_loss == pytest.approx(0.75)
    assert results.share(h2d.best) == pytest.approx(0.8)
    # Where auto's executor was not measured by name, auto itself was.
    assert d2h.auto_loss == pytest.approx(0.1)
    # Where it was, auto itself is only set beside it.
    lines.append(cell_line("h2d", 4 * KIB, 10_000, "auto", 9.0, auto="dma", part="auto"))
    _, results = results_of(modules, lines, tmp_path)
    assert results.cells()[1].auto_loss == pytest.approx(0.75)
    (line,) = [row for row in modules("gpu_report").auto_itself(results).rows if row[1:3] == ["dma", "9.0"]]
    assert line[3:] == ["10.0", "0.90"]
    met, got = goals_by_name(results)["auto's worst cell"]
    assert met is False and got == "75.0% behind: h2d 4 KiB x 10,000, side stream, dma for kernel"
    text = modules("gpu_report").report("card", results, "")
    assert "| h2d | pools | random | side | 4 KiB | 10,000 | 40.0 | 10.0 | 38.0 | kernel |" in text.replace(
        "9.0 |  |  | ", ""
    )
    assert "kernel 40.0 (0.80); dma -75%" in text


def test_auto_in_most_cells_but_not_in_enough(modules, tmp_path):
    fragments = [512 * (i + 1) for i in range(20)]
    for slow, met in ((1, True), (2, False)):
        lines = [machine_line(), *ceiling_lines()]
        for i, fragment in enumerate(fragments):
            lines.append(cell_line("h2d", fragment, 64, "kernel", 40.0, auto="dma"))
            lines.append(cell_line("h2d", fragment, 64, "dma", 36.0 if i < slow else 38.5, auto="dma"))
        _, results = results_of(modules, lines, tmp_path)
        goals = goals_by_name(results)
        assert goals["auto within 5% of the best executor"] == (met, f"in {1 - slow / 20:.1%} of 20")
        assert goals["auto's worst cell"][0] is True


def test_the_links_goals_take_the_worst_count_and_at_most_12_sms(modules, tmp_path):
    lines = [machine_line(), *ceiling_lines()]
    lines += [
        cell_line("h2d", 16 * KIB, 1_000, "kernel", 45.0, "kernel"),
        cell_line("h2d", 16 * KIB, 10_000, "kernel", 49.0, "dma", ctas=132),
        cell_line("h2d", 16 * KIB, 10_000, "dma", 42.0, "dma"),
        cell_line("h2d", 16 * KIB, 64, "kernel", 1.0, "kernel"),
        cell_line("h2d", 64 * KIB, 1_000, "kernel", 46.0, "kernel"),
    ]
    _, results = results_of(modules, lines, tmp_path)
    goals = goals_by_name(results)
    name = "h2d {} KiB from 1,000 fragments on, at most 12 SMs"
    assert goals[name.format(16)] == (False, "0.84 (dma, 0 SMs, 10,000 fragments; auto 0.84)")
    assert goals[name.format(64)] == (True, "0.92 (kernel, 12 SMs, 1,000 fragments; auto 0.92)")
    assert goals[name.format(4)] == (None, "")
    # A budget by name counts, too.
    lines.append(cell_line("h2d", 16 * KIB, 10_000, "kernel", 44.0, "dma", "budget", ctas=8, sm_budget=8))
    _, results = results_of(modules, lines, tmp_path)
    assert goals_by_name(results)[name.format(16)] == (True, "0.88 (kernel, 8 SMs, 10,000 fragments; auto 0.84)")
    # One that was measured on the default stream does not: there copies are not batched.
    lines += [machine_line("default"), *ceiling_lines()]
    lines.append(cell_line("h2d", 16 * KIB, 10_000, "kernel", 49.0, "dma", "budget", ctas=8, sm_budget=8))
    _, results = results_of(modules, lines, tmp_path)
    assert goals_by_name(results)[name.format(16)] == (True, "0.88 (kernel, 8 SMs, 10,000 fragments; auto 0.84)")
    page = modules("gpu_report").report("card", results, "")
    assert "| 0.90 of the link | 0.92 (kernel, 12 SMs, 1,000 fragments; auto 0.92) | met |" in page
    assert "0.70 of the link |  | not measured |" in page


def device_line(kind: str, gb_per_s: float, executor: str = "kernel", sm_budget: int = 0) -> dict:
    return {
        "part": "d2d", "direction": "d2d", "kind": kind, "executor": executor, "sm_budget": sm_budget,
        "explained": {"executor": executor, "device": {"ctas": 132}}, **timed(gb_per_s),
    }  # fmt: skip


def test_the_devices_goals(modules, tmp_path):
    lines = [machine_line(), *ceiling_lines()]
    lines += [device_line("pages 4 KiB", 1200.0), device_line("pages 4 KiB", 900.0, "bulk")]
    lines += [device_line("pages 4 KiB", 1290.0, sm_budget=12), device_line("pages 32 KiB", 1250.0)]
    lines += [device_line("concat TP2", 1250.0, "auto"), device_line("concat TP8", 1000.0, "auto")]
    _, results = results_of(modules, lines, tmp_path)
    goals = goals_by_name(results)
    assert goals["d2d pages"] == (True, "0.92 (pages 4 KiB, kernel)")
    assert goals["d2d concat"] == (False, "0.77 (concat TP8, auto)")
    assert "MISSED" in modules("gpu_report").goals(results).text()


def test_wrong_bytes_and_errors_stand_above_the_figures(modules, tmp_path):
    line = cell_line("h2d", 4 * KIB, 10_000, "kernel", 40.0, auto="kernel")
    wrong = {**line, "status": "wrong bytes", "error": "wrote 0x00 where 0xa5 belongs: guard byte 7"}
    failed = {**line, "executor": "bulk", "status": "failed", "error": "RuntimeError: no"}
    path, results = results_of(modules, [machine_line(), *ceiling_lines(), wrong, failed], tmp_path)
    report = modules("gpu_report")
    page = report.report("card", results, "")
    assert (
        "- **wrong bytes** in grid: h2d kernel 4 KiB count 10000: wrote 0x00 where 0xa5 belongs: guard byte 7" in page
    )
    assert page.index("wrong bytes**") < page.index("## What was not measured")
    assert "- **failed** in grid: h2d bulk 4 KiB count 10000: RuntimeError: no" in page
    assert results.cells() == []
    assert "wrong bytes in grid: h2d kernel" in report.closing([path])
    assert "1 wrong bytes, 1 failed" in report.closing([path])


def test_each_run_is_judged_by_its_own_ceilings(modules, tmp_path):
    """Of two runs of one cell the later counts, with the ceiling that it was measured with."""
    cell = cell_line("h2d", 4 * KIB, 10_000, "kernel", 30.0, auto="kernel")
    lines = [machine_line(), *ceiling_lines(), cell, machine_line(), *ceiling_lines(25.0)]
    lines.append(cell_line("h2d", 4 * KIB, 10_000, "kernel", 20.0, auto="kernel"))
    lines += [
        machine_line("default"),
        *ceiling_lines(),
        cell_line("h2d", 4 * KIB, 10_000, "kernel", 5.0, auto="kernel"),
    ]
    _, results = results_of(modules, lines, tmp_path)
    by_stream = {cell.place.stream: cell for cell in results.cells()}
    assert results.share(by_stream["side"].best) == pytest.approx(0.8)
    assert results.share(by_stream["default"].best) == pytest.approx(0.1)


def call_line(direction: str, executor: str, **what: object) -> dict:
    explained = {"executor": "kernel", "device": {"ctas": 12}}
    return {
        "part": "calls", "direction": direction, "executor": executor, "fragment_bytes": 32 * KIB, **what,
        "explained": explained, **timed(40.0),
    }  # fmt: skip


def a_whole_run(modules) -> list[dict]:
    """A line for every cell that the script has, or many of them."""
    grid = modules("gpu_grid")
    lines = [machine_line(), *ceiling_lines()]
    for direction in grid.DIRECTIONS:
        for executor in grid.EXECUTORS:
            for fragment in grid.FRAGMENTS:
                speed = 45.0 if executor == "kernel" else 30.0
                lines += [cell_line(direction, fragment, count, executor, speed, "kernel") for count in grid.COUNTS]
            if executor in grid.BUDGET_EXECUTORS:
                lines += [
                    cell_line(direction, fragment, 10_000, executor, 3.0 * budget, "kernel", "budget", budget, budget)
                    for fragment in grid.BUDGET_FRAGMENTS
                    for budget in grid.BUDGETS
                ]
        for blocks in (1, 64):
            for pools in (1, 64, 160):
                lines += [
                    call_line(direction, "auto", op=op, blocks=blocks, pools=pools)
                    for op in ("copy_pages", "gather_blocks")
                ]
        lines += [call_line(direction, "auto", op="swap_blocks_batch", rows=rows) for rows in (1_000, 10_000, 64_000)]
        lines += [
            {**cell_line(direction, 32 * KIB, 10_000, "kernel", 40.0, "kernel", "rivals"), "rival": rival}
            for rival in ("kvkernels", "copy_ loop", "cuMemcpyBatchAsync")
        ]
        lines += [
            {**cell_line(direction, 4 * KIB, 10_000, "dma", 9.0, "dma", "host-memory"), "memory": memory}
            for memory in ("torch-pinned", "pageable")
        ]
        lines.append(
            {
                **cell_line(direction, 16 * KIB, 10_000, "kernel", 9.0, "dma", "beside"),
                "alone_us": [100.0, 102.0], "beside_us": [150.0, 160.0],
                "product_alone_us": [1400.0], "product_beside_us": [1442.0, 1450.0],
                "product_side": 8192,
            }
        )  # fmt: skip
    kinds = [f"pages {size} KiB" for size in (4, 32, 256)] + ["rows 256 B, NHD to HND", "reshard TP 8 to 1"]
    lines += [
        device_line(kind, 1200.0) for kind in [*kinds, *(f"{op} TP{n}" for op in ("concat", "split") for n in (2, 8))]
    ]
    lines.append({"part": "rivals", "direction": "d2d", "kind": "concat TP2", "rival": "torch.cat", **timed(600.0)})
    lines.append({"part": "beside", "status": "dropped", "cells": [{"direction": "h2d"}] * 3, "error": "no time"})
    lines += [
        {**lines[20], "status": status, "error": "so"} for status in ("wrong bytes", "failed", "failed", "skipped")
    ]
    return [*lines, {"part": "end", "status": "ended", "error": "", "seconds": 1.0}]


def test_the_closing_tables_stay_under_60_lines(modules, tmp_path):
    path, _ = results_of(modules, a_whole_run(modules), tmp_path)
    text = modules("gpu_report").closing([path])
    assert 40 < len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 200
    assert "4 KiB  10,000  kernel" in " ".join(text.split("\n")) and "3 dropped" in text


def test_the_report_of_a_whole_run(modules, tmp_path):
    path, _ = results_of(modules, a_whole_run(modules), tmp_path)
    pytest.importorskip("matplotlib")
    done = run_script("gpu_report.py", path, "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "results" / "gpu-nvidia-h100-80gb-hbm3.md").read_text()
    assert "A dry run" not in page
    for title in ("Goals", "Ceilings", "Cell by cell", "Share of the link by SMs", "Copies inside the device", "Calls",
                  "Kinds of host memory", "Others", "Beside a model", "What was not measured"):  # fmt: skip
        assert f"## {title}" in page
    assert "| h2d | kernel | default | kernel | 12 | 1000.0 | 1.50x | 785 | 1.030x |" in page
    # torch.cat is set against the part d2d's own figure of the same copy.
    assert "| d2d concat TP2 | torch.cat | 600.0 | 0.46 | 2.00 |" in page
    assert "- beside, dropped: no time (h2d; h2d; h2d)" in page
    assert_png_with_a_drawing(tmp_path / "results" / "gpu-nvidia-h100-80gb-hbm3.png")


def test_a_report_of_nothing_measured_has_no_chart(modules, tmp_path):
    path, _ = results_of(modules, [machine_line()], tmp_path)
    done = run_script("gpu_report.py", path, "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "results").iterdir()
    assert page.suffix == ".md" and page.read_text().count("not measured |") == 12


def test_a_missing_file_is_named(tmp_path):
    done = run_script("gpu_report.py", tmp_path / "nothing.jsonl")
    assert done.returncode == 2 and "there is no " in done.stderr and "nothing.jsonl" in done.stderr
