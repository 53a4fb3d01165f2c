"""A copy of the tree in which one edit at a time is built and tested."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mutate import Mutant
from steps import CPU, PYTHON, SIMGPU, STAND_IN, plan_of

# One architecture's PTX, which needs no ptxas; and of the core's own tests those that are quick to build.
PTX_ONLY = "90-virtual"
LEFT_OUT = "not sm_80 and not sm_100 and not core_bytes and not without_races"
BUILD_SECONDS = 900
STEP_SECONDS = 900
TEST_SECONDS = 300  # of one test, the endless ones being what is meant
# torch's libraries find these instead of CUDA's own.
PRELOADED = ("libcuda.so.1", "libcudart.so.13", "libkvkernels_drive.so")


@dataclass
class Outcome:
    mutant: Mutant
    result: str  # killed, survived, stillborn
    by: str = ""
    elapsed_s: float = 0


class Worker:
    """Builds the unchanged tree once; each edit is built on top of it and taken back."""

    def __init__(self, root: Path, number: int) -> None:
        self._root = root
        self._tree = root / "build" / "mutants" / f"worker-{number}"
        self._simgpu = self._tree / "build" / "simgpu"
        self._bin = Path(sys.executable).parent
        self._environment = {
            **os.environ,
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self._tree),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._on_stand_in = {
            **self._environment,
            "PYTHONPATH": str(self._simgpu / "package"),
            "LD_PRELOAD": ":".join(str(self._simgpu / name) for name in PRELOADED),
            "KVKERNELS_STAND_IN": str(self._simgpu),
            "KVKERNELS_FAKE_DEVICES": "2",
            "KVKERNELS_REQUIRE_CUDA": "1",
        }

    def prepare(self, kinds: Collection[str]) -> None:
        """Builds what these kinds of steps need."""
        shutil.rmtree(self._tree, ignore_errors=True)
        self._tree.mkdir(parents=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self._root, capture_output=True, check=True,
        )  # fmt: skip
        for name in listed.stdout.decode().split("\0"):
            if name and (self._root / name).exists():
                (self._tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._root / name, self._tree / name)
        for built in (*self._root.glob("kvkernels/*.so"), *self._root.glob("kvkernels/_build.json")):
            shutil.copy2(built, self._tree / "kvkernels")
        python = f"-DPython_EXECUTABLE={sys.executable}"
        if CPU in kinds:
            self._must(["cmake", "--preset", "release", python, "-DKVKERNELS_CUDA=OFF"])
        if not {SIMGPU, STAND_IN}.isdisjoint(kinds):
            self._must(["cmake", "--preset", "simgpu", python, f"-DCMAKE_CUDA_ARCHITECTURES={PTX_ONLY}"])
        if STAND_IN in kinds:
            for package in ("kvkernels", "kvkernels_cli", "kvkernels_records"):
                ignored = shutil.ignore_patterns("*.so")
                shutil.copytree(self._tree / package, self._simgpu / "package" / package, ignore=ignored)
        for kind in sorted(kinds):
            self._must_build(kind)

    def failing(self, kind: str, tests: Sequence[str]) -> str:
        """Which of the tests fails first, or ""."""
        # Not python -m pytest, which would look for the package in the tree before all else.
        pytest = self._root / ".venv-simgpu" / "bin" / "pytest" if kind == STAND_IN else self._bin / "pytest"
        command = [str(pytest), "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", LEFT_OUT]
        command += ["-o", f"timeout={TEST_SECONDS}", "-o", "timeout_method=thread", *tests]
        if kind == STAND_IN:
            command += ["-m", "cuda"]
        try:
            done = self._run(command, STEP_SECONDS, self._on_stand_in if kind == STAND_IN else self._environment)
        except subprocess.TimeoutExpired:
            return "ran too long"
        if done.returncode == 0:
            return ""
        failed = [line for line in done.stdout.split("\n") if line.startswith(("FAILED", "ERROR"))]
        last = " ".join(done.stdout.split()[-12:])
        return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}: {last}"

    def try_out(self, mutant: Mutant) -> Outcome:
        target = self._tree / mutant.path
        before = target.read_text()
        begin = time.monotonic()
        mutant.apply(self._tree)

        def outcome(result: str, by: str = "") -> Outcome:
            return Outcome(mutant, result, by, time.monotonic() - begin)

        try:
            built: set[str] = set()
            for step in plan_of(mutant.path):
                if step.kind not in built and self._breaks_build(step.kind):
                    return outcome("stillborn")
                built.add(step.kind)
                failed = self.failing(step.kind, step.tests)
                if failed:
                    return outcome("killed", failed)
            return outcome("survived")
        finally:
            target.write_text(before)

    def _run(
        self, command: Sequence[str], limit_s: float, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Leaves no process behind: a broken kernel may never end, and would run beside all later edits. Such a process
        may also hold its output open, so that goes to a file."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, cwd=self._tree, env=environment or self._environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(limit_s)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, output.read())

    def _must(self, command: Sequence[str]) -> None:
        done = self._run(command, BUILD_SECONDS)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")

    def _must_build(self, kind: str) -> None:
        for command in self._build_commands(kind):
            self._must(command)

    def _breaks_build(self, kind: str) -> bool:
        try:
            return any(self._run(command, BUILD_SECONDS).returncode for command in self._build_commands(kind))
        except subprocess.TimeoutExpired:
            return True

    def _build_commands(self, kind: str) -> list[list[str]]:
        return {
            PYTHON: [],
            CPU: [
                ["cmake", "--build", "--preset", "release"],
                ["cmake", "--install", "build/release", "--prefix", "kvkernels"],
            ],
            SIMGPU: [["cmake", "--build", "--preset", "simgpu"]],
            STAND_IN: [
                ["cmake", "--build", "--preset", "simgpu"],
                ["cmake", "--install", "build/simgpu", "--prefix", str(self._simgpu / "package" / "kvkernels")],
            ],
        }[kind]
