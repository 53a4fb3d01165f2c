#!/usr/bin/env python3
"""Measures whether the tests notice: builds the library with one edit at a time and runs the fast tests on each.

    make mutants ARGS="--count 160 --workers 2"

Each worker has a copy of the tree under build/mutants. An edit is killed if a test fails or runs far too long,
stillborn if it does not compile, and survives otherwise. Survivors are read by a person: survivors.txt
says why they survive. Those that change nothing anyone could notice are counted apart; those that change how long a
copy takes are survivors, since no test is allowed to depend on time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutate import FOLDERS, Mutant, choose

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ROOT / "build" / "mutants" / "outcomes.jsonl"
SURVIVORS = Path(__file__).with_name("survivors.txt")
TIME_ONLY = "Time only: "


def _files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


CPU_TESTS = _files(
    "errors", "explain", "swap_blocks", "batch", "concat", "gather_scatter", "copy_pages", "refusals", "threads",
    "large_offsets",
)  # fmt: skip
CORE_TESTS = _files("core_cpp")
HOST_TESTS = _files("cuda_host", "staged", "cuda_failures", "kernel_body")
# By path: what is built, and the tests that are run on it, one step after the other: those that kill most edits first.
PLANS = {
    "csrc/core/cuda_driver": [("gpu", HOST_TESTS), ("cpu", CORE_TESTS)],
    "csrc/core/gpu_policy": [("gpu", HOST_TESTS), ("cpu", CORE_TESTS)],
    "csrc/core/staged": [("gpu", HOST_TESTS), ("cpu", CORE_TESTS)],
    "csrc/core": [("cpu", CPU_TESTS), ("gpu", HOST_TESTS), ("cpu", CORE_TESTS)],
    "csrc/cpu": [("cpu", CPU_TESTS), ("cpu", [*CORE_TESTS, *_files("streaming")])],
    "csrc/cuda": [("gpu", HOST_TESTS), ("gpu", _files("cuda_time", "ptx_bulk", "ptx_kernels"))],
    "kvkernels/triton": [("", _files("triton", "triton_ptx"))],
}
# One architecture's PTX, which needs no ptxas; and of the core's own tests those that are quick to build.
PTX_ONLY = "90-virtual"
LEFT_OUT = "not sm_80 and not sm_100 and not core_bytes and not without_races"
BUILD_SECONDS = 900
STEP_SECONDS = 900
TEST_SECONDS = 150  # of one test, the endless ones being what is meant


def plan_of(path: str) -> list[tuple[str, list[str]]]:
    """The steps for a file: those of the longest beginning of its path."""
    return PLANS[max((start for start in PLANS if path.startswith(start)), key=len)]


@dataclass
class Outcome:
    mutant: Mutant
    result: str  # killed, survived, stillborn
    by: str = ""
    elapsed_s: float = 0


class Worker:
    """A copy of the tree, built once; each edit is built on top of it and taken back."""

    def __init__(self, number: int) -> None:
        self.tree = ROOT / "build" / "mutants" / f"worker-{number}"
        self.bin = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def prepare(self) -> None:
        """Builds the unchanged tree."""
        shutil.rmtree(self.tree, ignore_errors=True)
        self.tree.mkdir(parents=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).exists():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        python = f"-DPython_EXECUTABLE={sys.executable}"
        self._must(["cmake", "--preset", "release", python, "-DKVKERNELS_CUDA=OFF"])
        self._must(["cmake", "--preset", "simgpu", python, f"-DCMAKE_CUDA_ARCHITECTURES={PTX_ONLY}"])
        for kind in ("cpu", "gpu"):
            built = self._build(kind)
            if built.returncode:
                raise SystemExit(f"the unchanged tree does not build:\n{built.stdout[-3000:]}")

    def see_tests_pass(self, mutants: list[Mutant]) -> None:
        """Runs the tests of these edits on the unchanged tree."""
        steps = {(kind, tuple(tests)) for mutant in mutants for kind, tests in plan_of(mutant.path)}
        for kind, tests in sorted(steps):
            begin = time.monotonic()
            failed = self._test(kind, list(tests))
            if failed:
                raise SystemExit(f"the tests fail on the unchanged tree: {failed}")
            print(f"{kind or 'Python'}: {len(tests)} files: {time.monotonic() - begin:.0f} s", flush=True)

    def _run(self, command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        """Leaves no process behind: a broken kernel may never end, and would run beside all later edits. Such a process
        may also hold its output open, so that goes to a file."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, cwd=self.tree, env=self.environment, stdout=output, stderr=subprocess.STDOUT,
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

    def _must(self, command: list[str]) -> None:
        done = self._run(command, BUILD_SECONDS)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")

    def _build(self, kind: str) -> subprocess.CompletedProcess[str]:
        preset = "simgpu" if kind == "gpu" else "release"
        done = self._run(["cmake", "--build", "--preset", preset], BUILD_SECONDS)
        if done.returncode or kind == "gpu":
            return done
        return self._run(["cmake", "--install", "build/release", "--prefix", "kvkernels"], 60)

    def _test(self, kind: str, tests: list[str]) -> str:
        """What failed first, or ""."""
        command = [str(self.bin / "pytest"), "-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", LEFT_OUT]
        command += ["-o", f"timeout={TEST_SECONDS}", "-o", "timeout_method=thread", *tests]
        try:
            done = self._run(command, STEP_SECONDS)
        except subprocess.TimeoutExpired:
            return "ran too long"
        if done.returncode == 0:
            return ""
        failed = [line for line in done.stdout.split("\n") if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"

    def try_out(self, mutant: Mutant) -> Outcome:
        target = self.tree / mutant.path
        before = target.read_text()
        begin = time.monotonic()
        mutant.apply(self.tree)

        def outcome(result: str, by: str = "") -> Outcome:
            return Outcome(mutant, result, by, time.monotonic() - begin)

        try:
            built: set[str] = set()
            for kind, tests in plan_of(mutant.path):
                if kind and kind not in built and self._breaks_build(kind):
                    return outcome("stillborn")
                built.add(kind)
                failed = self._test(kind, tests)
                if failed:
                    return outcome("killed", failed)
            return outcome("survived")
        finally:
            target.write_text(before)

    def _breaks_build(self, kind: str) -> bool:
        try:
            return self._build(kind).returncode != 0
        except subprocess.TimeoutExpired:
            return True


PREFACE = """# Whether the tests notice

Printed by `make mutants`: single edits of the sources, chosen by a seed and spread over the files by their length. A
comparison, a constant or an operator is another one, a condition is negated, operands are exchanged, or a check, a
wait or a statement is dropped. Each edit is built, and the fast tests run on it until one fails. A survivor that led
to a test was tried again.

*Stillborn* edits do not compile. *Equivalent* ones change nothing that anyone could notice, for the reason given
below. *Survived* is all else that no test noticed: also edits that change only how long a copy takes, since no test
may depend on time. The share is of those killed and survived.

"""


def known_survivors() -> dict[str, str]:
    """By the edit's text: why no test notices it."""
    known = {}
    for block in SURVIVORS.read_text().split("\n\n") if SURVIVORS.exists() else ():
        lines = [line for line in block.split("\n") if line and not line.startswith("#")]
        if len(lines) >= 2:
            known[lines[0].strip()] = " ".join(line.strip() for line in lines[1:])
    return known


def key(mutant: Mutant) -> str:
    """Does not change when lines above it do."""
    return f"{mutant.path}: {mutant.before.strip()}  ->  {mutant.after.strip()}"


def is_equivalent(reason: str) -> bool:
    return not reason.startswith(TIME_ONLY)


def report(outcomes: list[Outcome], seed: int) -> str:
    reasons = known_survivors()
    rows = ["| folder | edits | stillborn | equivalent | killed | survived | share killed |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    survivors = [o for o in outcomes if o.result == "survived"]
    silent = [o for o in survivors if is_equivalent(reasons.get(key(o.mutant), TIME_ONLY))]
    for folder in (*FOLDERS, ""):
        mine = [o for o in outcomes if o.mutant.path.startswith(folder)]
        count = Counter(o.result for o in mine)
        same = sum(o in silent for o in mine)
        alive = count["survived"] - same
        share = f"{100 * count['killed'] / (count['killed'] + alive):.1f}%" if count["killed"] + alive else "-"
        rows.append(
            f"| {folder or '**all**'} | {len(mine)} | {count['stillborn']} | {same} | {count['killed']} | {alive} "
            f"| {share} |"
        )
    middle_s = statistics.median([o.elapsed_s for o in outcomes] or [0])
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = "\n".join(rows)
    text += f"\n\nSeed {seed}; on {machine}, where half of the edits took over {middle_s:.0f} s each.\n"
    for title, some in (("Survivors", [o for o in survivors if o not in silent]), ("Equivalent", silent)):
        lines = [f"- `{o.mutant}`: {reasons.get(key(o.mutant), 'not looked at yet')}\n" for o in some]
        text += f"\n{title}:\n\n{''.join(lines)}" if lines else ""
    return PREFACE + text


def read_outcomes() -> list[Outcome]:
    lines = OUTCOMES.read_text().splitlines() if OUTCOMES.exists() else []
    return [Outcome(Mutant(**fields.pop("mutant")), **fields) for fields in map(json.loads, lines)]


def still_known(outcomes: list[Outcome], mutants: list[Mutant]) -> list[Outcome]:
    """Outcomes of edits that the sources still allow, as many of a file as are wanted; not of those that survived for
    no known reason, since a test may find them now."""
    reasons = known_survivors()
    wanted = Counter(mutant.path for mutant in mutants)
    kept: dict[str, Outcome] = {}
    for outcome in outcomes:
        mutant = outcome.mutant.moved(ROOT)
        alive = outcome.result == "survived" and key(outcome.mutant) not in reasons
        if mutant is None or alive or wanted[mutant.path] == 0 or str(mutant) in kept:
            continue
        wanted[mutant.path] -= 1
        kept[str(mutant)] = replace(outcome, mutant=mutant)
    return list(kept.values())


def to_try_again(outcomes: list[Outcome]) -> list[Mutant]:
    """Those that survived for no known reason."""
    reasons = known_survivors()
    alive = [o.mutant.moved(ROOT) for o in outcomes if o.result == "survived" and key(o.mutant) not in reasons]
    return [mutant for mutant in alive if mutant is not None]


def not_tried(mutants: list[Mutant], first: list[Mutant], outcomes: list[Outcome]) -> list[Mutant]:
    """What is left to try: as many edits of each file as its outcomes lack, on other lines."""
    lacking = Counter(mutant.path for mutant in mutants)
    lacking.subtract(Counter(outcome.mutant.path for outcome in outcomes))
    tried = {(outcome.mutant.path, outcome.mutant.line) for outcome in outcomes}
    left = []
    for mutant in (*first, *mutants):
        if lacking[mutant.path] > 0 and (mutant.path, mutant.line) not in tried:
            lacking[mutant.path] -= 1
            tried.add((mutant.path, mutant.line))
            left.append(mutant)
    return left


def try_all(mutants: list[Mutant], worker_count: int, outcomes: list[Outcome]) -> None:
    """Adds to the outcomes, and to their file as they come."""
    workers = [Worker(i) for i in range(worker_count)]
    free = list(workers)
    lock = threading.Lock()
    total = len(outcomes) + len(mutants)

    def one(mutant: Mutant) -> None:
        with lock:
            worker = free.pop()
        try:
            outcome = worker.try_out(mutant)
        finally:
            with lock:
                free.append(worker)
        with lock:
            outcomes.append(outcome)
            with OUTCOMES.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            by = f" by {outcome.by}" if outcome.by else ""
            text = f"[{len(outcomes)}/{total}] {outcome.result}{by} ({outcome.elapsed_s:.0f} s): {mutant}"
            print(text, flush=True)

    with ThreadPoolExecutor(worker_count) as pool:
        list(pool.map(Worker.prepare, workers))
        if not outcomes:
            workers[0].see_tests_pass(mutants)
        list(pool.map(one, mutants))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=160, help="edits to try")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="edits of paths that contain this")
    parser.add_argument(
        "--resume", action="store_true", help=f"keep what {OUTCOMES.relative_to(ROOT)} has of them, and the baseline"
    )
    parser.add_argument("--output", type=Path, help="writes the table there as well")
    asked = parser.parse_args()
    mutants = choose(ROOT, asked.count, asked.seed, asked.only)
    earlier = read_outcomes() if asked.resume else []
    outcomes = still_known(earlier, mutants)
    left = not_tried(mutants, to_try_again(earlier), outcomes)
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    OUTCOMES.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))
    baseline = "" if outcomes else " and running the tests on one"
    if left:
        print(f"{len(left)} edits; building {asked.workers} trees{baseline}", flush=True)
        try_all(left, asked.workers, outcomes)
    outcomes.sort(key=lambda o: (o.mutant.path, o.mutant.line))
    text = report(outcomes, asked.seed)
    print(text)
    if asked.output:
        asked.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
