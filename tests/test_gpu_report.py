"""The file that a GPU run leaves, and the report that is made of it, from made-up records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_scripts import KIB, benchmark_modules, run_script
from test_benchmarks import assert_png_with_a_drawing

LINK_GB_PER_S = 50.0
DEVICE_GB_PER_S = 1300.0

pytest.importorskip("kvkernels._host", reason="the benchmarks need the compiled library")


@pytest.fixture
def modules(monkeypatch):
    with benchmark_modules(monkeypatch) as importer:
        yield importer


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
