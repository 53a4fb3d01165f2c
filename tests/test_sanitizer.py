"""The program for compute-sanitizer, on the stand-in for CUDA: that it passes, and that it fails where it must."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sanitizer" / "run.sh"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
STAND_IN = ("libcuda.so.1", "libcudart.so.13", "libkvkernels_drive.so")
DIRECTIONS = ("h2d", "d2h", "d2d")
REPORTED = 86  # run.sh's name for compute-sanitizer's exit status where it reports an error


def environment(build: Path, *more: Path, code: bool = True) -> dict[str, str]:
    """The stand-in's; without ``code``, nothing runs the kernels, and each launch is lost."""
    libraries = [build / name for name in STAND_IN if code or name != STAND_IN[2]]
    return {**os.environ, "LD_PRELOAD": ":".join(map(str, [*libraries, *more]))}


def run(build: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(build / "kvkernels_sanitizer"), *arguments]
    return subprocess.run(command, env=env or environment(build), capture_output=True, text=True, timeout=120)


def kernels(build: Path) -> list[str]:
    listed = run(build, "--list")
    assert listed.returncode == 0
    return re.findall(r"^kernel (\w+)$", listed.stdout, re.MULTILINE)


def totals(text: str) -> tuple[int, int, int]:
    """Cases, kernels and wrong bytes of the closing line."""
    found = re.fullmatch(r"(\d+) cases, (\d+) kernels, (\d+) wrong bytes", text.splitlines()[-1])
    assert found, text
    return int(found[1]), int(found[2]), int(found[3])


def settings(folder: Path, calls: str) -> Path:
    """A library that calls the stand-in when it is loaded."""
    source, library = folder / "settings.cpp", folder / "settings.so"
    source.write_text(
        'extern "C" void fake_seed(unsigned long);\n'
        'extern "C" void fake_set(const char*, long);\n'
        f"__attribute__((constructor)) static void set() {{ {calls} }}\n"
    )
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


@pytest.mark.parametrize("seed", range(3))
def test_every_kernel_is_launched_and_every_byte_is_right(simgpu_build: Path, tmp_path: Path, seed: int) -> None:
    """Seed 0 does at once what is asked for; with others the program has to wait for what it reads."""
    done = run(simgpu_build, env=environment(simgpu_build, settings(tmp_path, f"fake_seed({seed});")))
    assert done.returncode == 0, done.stdout + done.stderr
    names = kernels(simgpu_build)
    for variant in ("page", "row", "bytes", "bulk"):
        assert any(name.startswith(f"kvkernels_copy_{variant}_") for name in names)
    cases, launched, wrong_bytes = totals(done.stdout)
    assert cases > 100 and launched == len(names) and wrong_bytes == 0


@pytest.mark.parametrize("plant", ["byte", "gap", "source"])
def test_a_planted_byte_is_found_in_every_case(simgpu_build: Path, plant: str) -> None:
    done = run(simgpu_build, "--plant", plant)
    cases, _, wrong_bytes = totals(done.stdout)
    assert done.returncode == 1 and wrong_bytes == cases
    assert done.stdout.count("WRONG ") == cases


def test_a_read_out_of_bounds_is_found(simgpu_build: Path) -> None:
    done = run(simgpu_build, "--plant", "bounds")
    assert done.returncode == 1
    assert "cudaErrorIllegalAddress" in done.stderr


def test_lost_copies_and_unrecorded_faults_are_found(simgpu_build: Path) -> None:
    done = run(simgpu_build, "row", "staged", env=environment(simgpu_build, code=False))
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG ")]
    assert sum(": the kernels recorded no bad pair, and there was " in line for line in wrong) == 9
    assert sum(" bytes; dst[" in line for line in wrong) == totals(done.stdout)[0] == 22


def test_kernels_that_were_not_launched_are_named(simgpu_build: Path) -> None:
    done = run(simgpu_build, "row")
    missing = [name for name in kernels(simgpu_build) if "_row_" not in name]
    assert done.returncode == 1 and totals(done.stdout)[2] == 0
    assert re.findall(r"^NOT LAUNCHED (\w+), (\w+)$", done.stdout, re.MULTILINE) == [
        (name, direction) for name in missing for direction in DIRECTIONS
    ]


def test_where_bulk_copies_cannot_run_they_are_not_missed(simgpu_build: Path, tmp_path: Path) -> None:
    older = settings(tmp_path, 'fake_set("code_capability", 80);')
    done = run(simgpu_build, env=environment(simgpu_build, older))
    others = [name for name in kernels(simgpu_build) if "_bulk_" not in name]
    assert done.returncode == 0, done.stdout + done.stderr
    assert totals(done.stdout)[1] == len(others)
    assert re.search(r"^bulk-short +not run: it needs code for compute capability 9.0", done.stdout, re.MULTILINE)


def test_a_device_without_code_is_an_error(simgpu_build: Path, tmp_path: Path) -> None:
    without = settings(tmp_path, 'fake_set("no_image", 1);')
    done = run(simgpu_build, env=environment(simgpu_build, without))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "kvkernels_sanitizer: this program has no code for compute capability 9.0\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--plant", "nothing"], "--plant must be byte, gap, source or bounds, got 'nothing'"),
        (["--plant"], "--plant must be byte, gap, source or bounds, got ''"),
        (["rows"], "GROUP must be one that --list names, got 'rows'"),
    ],
)
def test_arguments_are_checked(simgpu_build: Path, arguments: list[str], problem: str) -> None:
    done = run(simgpu_build, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"kvkernels_sanitizer: {problem}\nusage: ")


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def sanitize(program: Path, folder: Path, tool: str = "") -> subprocess.CompletedProcess[str]:
    """run.sh with a script that stands for compute-sanitizer; ``tool`` runs before the program, with its name in $2."""
    if tool:
        text = f"{tool}\n\"${{@:5}}\" && echo '========= ERROR SUMMARY: 0 errors' || exit {REPORTED}\n"
        executable(folder / "compute-sanitizer", text)
    path = f"{folder}:/usr/bin:/bin"
    command = ["bash", str(SCRIPT), str(program), str(folder / "out")]
    environ = {"PATH": path, "HOME": str(folder)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A program in whose place the real one would take its time."""
    return executable(tmp_path / "quick", "echo 1 cases, 1 kernels, 0 wrong bytes\n")


def test_the_script_runs_each_tool(simgpu_build: Path, tmp_path: Path) -> None:
    preload = environment(simgpu_build)["LD_PRELOAD"]
    program = executable(
        tmp_path / "program", f'LD_PRELOAD={preload} exec {simgpu_build / "kvkernels_sanitizer"} "$@"\n'
    )
    done = sanitize(program, tmp_path, 'echo "$*" >>"$(dirname "$0")/calls"')
    assert done.returncode == 0, done.stdout + done.stderr
    steps = ["plain", "control", "memcheck", "racecheck", "synccheck"]
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[step, "ok"] for step in steps]
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(steps)
    for line in done.stdout.splitlines()[2:]:
        assert line.endswith(" wrong bytes; ERROR SUMMARY: 0 errors")
    calls = (tmp_path / "calls").read_text().splitlines()
    options = f"--error-exitcode {REPORTED} {program}"
    assert calls == [f"--tool memcheck {options} --plant bounds"] + [f"--tool {t} {options}" for t in steps[2:]]


def test_the_script_fails_where_one_tool_reports(quick: Path, tmp_path: Path) -> None:
    control = f'[ "${{@: -1}}" != bounds ] || exit {REPORTED}'
    report = f'{control}; [ "$2" != racecheck ] || {{ echo "========= RACECHECK SUMMARY: 1 hazard"; exit {REPORTED}; }}'
    done = sanitize(quick, tmp_path, report)
    assert done.returncode == 1
    words = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}
    assert [step for step, word in words.items() if word == "FAILED"] == ["racecheck"]
    assert "RACECHECK SUMMARY: 1 hazard" in done.stdout


def test_the_script_does_not_believe_a_blind_tool(quick: Path, tmp_path: Path) -> None:
    done = sanitize(quick, tmp_path, '[ "${@: -1}" != bounds ] || exit 1')
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if " FAILED " in line] == ["control"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["PROGRAM"], "usage: bash run.sh PROGRAM OUT_DIR"),
        (["/nowhere/program", "out"], "PROGRAM must be an executable file, got '/nowhere/program'"),
    ],
)
def test_the_script_checks_its_arguments(arguments: list[str], problem: str) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"sanitizer: {problem}\n")


def test_without_the_tool_the_script_ends_in_a_sentence(quick: Path, tmp_path: Path) -> None:
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists() or shutil.which(
        "compute-sanitizer", path="/usr/bin:/bin"
    ):
        pytest.skip("compute-sanitizer is installed")
    done = sanitize(quick, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("sanitizer: compute-sanitizer, which is part of the CUDA toolkit, is neither")


def test_without_a_device_the_script_ends_in_a_sentence(simgpu_build: Path, tmp_path: Path) -> None:
    program = executable(
        tmp_path / "program", f'CUDA_VISIBLE_DEVICES= exec {simgpu_build / "kvkernels_sanitizer"} "$@"\n'
    )
    done = sanitize(program, tmp_path, ":")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("kvkernels_sanitizer: there is no CUDA device: ")
