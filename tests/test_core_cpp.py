"""The C++ core and the CPU executor under sanitizers, compiled from the sources beside these tests."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CPP = ROOT / "tests" / "cpp"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)

CORE = sorted(CSRC.glob("core/*.cpp"))
CPU = sorted(CSRC.glob("cpu/*.cpp"))
TRANSFER = sorted(CSRC.glob("transfer/*.cpp"))
# The programs that run one test by its name, and what they are linked with.
PROGRAMS = {
    "test_batch": [CSRC / "core" / "batch.cpp"],
    "test_core": CORE,
    "test_core_bytes": [*CORE, *CPU],
    "test_cut": CORE,
    "test_dispatch": TRANSFER,
    "test_staged": CORE,
    "test_stretch": [CSRC / "cpu" / "stretch.cpp"],
    "test_stores": [CSRC / "cpu" / f"{name}.cpp" for name in ("isa", "loops", "tuning")],
    "test_transfer": TRANSFER,
}
# What test_core.cpp calls: its build for races need not wait for the rest.
READING = [CSRC / "core" / "pairs.cpp", CSRC / "core" / "verify.cpp"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler was found")


def names_of_tests(source: Path) -> list[str]:
    """Every ``void name() {`` is a test; the program's --list must name the same."""
    return sorted(re.findall(r"^void (\w+)\(\) \{$", source.read_text(), re.MULTILINE))


def run(command: Sequence[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    if done.returncode:
        output = (done.stdout + done.stderr)[-6000:]
        pytest.fail(f"{Path(str(command[0])).name} exited with {done.returncode}:\n{output}", pytrace=False)
    return done.stdout


class Build:
    """Object files of one set of sanitizers, each compiled once."""

    def __init__(self, folder: Path, sanitizers: Sequence[str]) -> None:
        self._folder = folder
        self._sanitizers = sanitizers

    def program(self, name: str, sources: Sequence[Path]) -> Path:
        program = self._folder / name
        if program.exists():
            return program
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(self._compiled, [CPP / f"{name}.cpp", *sources]))
        run([COMPILER, *self._sanitizers, *objects, "-o", program, "-pthread"])
        return program

    def _compiled(self, source: Path) -> Path:
        target = self._folder / f"{source.parent.name}_{source.name}.o"
        if not target.exists():
            # The models are compiled once and run for a second: optimising them takes longer than it saves.
            level = "-O0" if source.parent == CPP else "-O1"
            run([COMPILER, "-std=c++20", level, "-g1", *self._sanitizers, f"-I{CSRC}", "-c", source, "-o", target])
        return target


@pytest.fixture(scope="module")
def memory_build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("memory"), MEMORY)


@pytest.mark.parametrize(
    ("program", "name"), [(program, name) for program in PROGRAMS for name in names_of_tests(CPP / f"{program}.cpp")]
)
def test_program(memory_build: Build, program: str, name: str) -> None:
    if program == "test_stores" and platform.machine() != "x86_64":
        pytest.skip("it reads x86-64 instructions")
    run([memory_build.program(program, PROGRAMS[program]), name])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_test_of_a_program_is_listed(memory_build: Build, program: str) -> None:
    listed = run([memory_build.program(program, PROGRAMS[program]), "--list"]).split()
    assert listed == names_of_tests(CPP / f"{program}.cpp")


def test_core_without_races(tmp_path: Path) -> None:
    program = Build(tmp_path, RACES).program("test_core", READING)
    run([program, "threads_share_the_cache_of_plans"])


def test_the_movers_queue_without_races(tmp_path: Path) -> None:
    program = Build(tmp_path, RACES).program("test_transfer", TRANSFER)
    run([program, "threads_submit_and_the_last_writer_is_the_last_submitted"])
    run([program, "a_queue_that_is_closed_while_it_is_used_ends_everything"])


def test_the_movers_thread_for_a_device_without_races(tmp_path: Path) -> None:
    program = Build(tmp_path, RACES).program("test_dispatch", TRANSFER)
    for name in names_of_tests(CPP / "test_dispatch.cpp"):
        run([program, name])


def test_cpu_copy(memory_build: Build) -> None:
    seed, seconds = 1, 5
    run([memory_build.program("test_cpu_copy", [*CORE, *CPU]), seed, seconds])


def test_policy(memory_build: Build) -> None:
    run([memory_build.program("test_policy", CORE)])
