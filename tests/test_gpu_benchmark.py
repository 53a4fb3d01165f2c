"""benchmarks/gpu.py on a tiny scale, and the check of its bytes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from benchmark_scripts import BENCHMARKS, benchmark_modules, run_script

ON_STAND_IN = "KVKERNELS_STAND_IN" in os.environ
PARTS = ("ceilings", "grid", "auto", "budget", "d2d", "calls", "host-memory", "rivals", "beside")

pytest.importorskip("kvkernels._host", reason="the benchmarks need the compiled library")


@pytest.fixture
def modules(monkeypatch):
    with benchmark_modules(monkeypatch) as importer:
        yield importer


# ---- The run -------------------------------------------------------------------------------------------------------


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
    assert calls == [0, 1] * 3
    assert (len(samples.host_us), len(samples.elapsed_us), len(samples.device_us)) == (2, 2, 4)
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
