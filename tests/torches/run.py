#!/usr/bin/env python3
"""Runs the op tests with the library as it is built here on other torches and Pythons, and writes what came of it.

Each pair of a torch and a Python gets an environment in .venv-torches (5 to 7 GB each where the index has torch's CUDA
build). The op library is the file that lies in kvkernels/: it is not built again. With --headers the sources are also
compiled, without CUDA code, on that torch's own headers, and one test file runs on the result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-torches"
BUILDS = ROOT / "build" / "torches"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

# Every minor version that the library loads in, and every Python for which an interpreter may be had.
PAIRS = (
    ("2.10.0", "3.10"),
    ("2.11.0", "3.12"),
    ("2.12.0", "3.13"),
    ("2.13.0", "3.11"),
    ("2.14.1", "3.13"),
    ("2.14.1", "3.14"),
)
# The ops and what is built on them. Not the C++ core and the simulators, which know no torch.
FILES = (
    *(
        "batch",
        "canonical",
        "compile",
        "concat",
        "convert",
        "copy_groups",
        "copy_pages",
        "docs",
        "errors",
        "examples",
        "explain",
    ),
    *(
        "gather_scatter",
        "info",
        "layout",
        "leaks",
        "names",
        "plan",
        "reference",
        "refusals",
        "refusals_random",
        "slots",
    ),
    *("swap_blocks", "threads", "triton", "triton_interpreter", "vllm_grid"),
)
# What runs on a library that was built on the pair's own headers.
HEADERS_FILES = ("swap_blocks", "info")


@dataclass
class Outcome:
    """A row of the table; ``versions`` is empty where nothing ran, and ``note`` says why."""

    torch: str
    python: str
    versions: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    headers: str = "not asked"
    note: str = ""

    @property
    def is_good(self) -> bool:
        return bool(self.versions) and self.passed > 0 and not self.failed and not self.headers.startswith("failed")


class Failed(RuntimeError):
    """A command that had to work did not."""


def run(command: Sequence[str | Path], log: Path, **environment: str) -> int:
    with log.open("a") as out:
        out.write(f"$ {' '.join(map(str, command))}\n")
        out.flush()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode


def must_run(command: Sequence[str | Path], log: Path, **environment: str) -> None:
    if run(command, log, **environment):
        raise Failed(f"{' '.join(map(str, command[:4]))} ... failed: see {log.relative_to(ROOT)}")


def interpreter(version: str) -> str | None:
    """A Python of this version that starts: this one, or one on the PATH, where a version manager's stub may not."""
    if version == THIS_PYTHON:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    probe = f"import sys; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    return found if subprocess.run([found, "-c", probe], capture_output=True).returncode == 0 else None


def environment_of(torch: str, python: str, log: Path) -> Path:
    """The pair's environment, installed unless it is there already."""
    home = ENVIRONMENTS / f"{torch}-py{python}"
    stamp, wanted = home / ".requirements", f"torch=={torch}\n{REQUIREMENTS.read_text()}"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        must_run([interpreter(python) or python, "-m", "venv", home], log)
        must_run([home / "bin/python", "-m", "pip", "install", f"torch=={torch}", "-r", REQUIREMENTS], log)
        stamp.write_text(wanted)
    return home / "bin"


def versions(bin: Path) -> str:
    script = (
        "import importlib.metadata as m, platform, torch, numpy\n"
        "triton = [d.version for d in m.distributions() if d.name == 'triton']\n"
        "print(f'torch {torch.__version__}, Python {platform.python_version()}, numpy {numpy.__version__}, '"
        "f'triton {triton[0] if triton else \"none\"}')"
    )
    return subprocess.run([bin / "python", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test(bin: Path, package: Path, files: Sequence[str], report: Path, log: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of ``files`` on the kvkernels that lies in ``package``."""
    report.unlink(missing_ok=True)
    paths = [ROOT / "tests" / f"test_{file}.py" for file in files]
    command = [bin / "pytest", "-n", "auto", "--maxprocesses=8", "--dist", "loadfile", f"--junitxml={report}", *paths]
    code = run(command, log, PYTHONPATH=str(package))
    if not report.exists():
        raise Failed(f"pytest ended with {code} and no report: see {log.relative_to(ROOT)}")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).iter("testsuite"):
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    failed = totals["failures"] + totals["errors"]
    return totals["tests"] - failed - totals["skipped"], failed, totals["skipped"]


def on_own_headers(bin: Path, torch: str, log: Path) -> str:
    """Builds on the headers of this torch, and says how the tests did on that."""
    build, packages = BUILDS / torch / "build", BUILDS / torch / "package"
    shutil.rmtree(packages, ignore_errors=True)
    options = [f"-DPython_EXECUTABLE={bin / 'python'}", "-DKVKERNELS_CUDA=OFF", "-DKVKERNELS_WERROR=OFF"]
    must_run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], log)
    must_run(["cmake", "--build", build], log)
    must_run(["cmake", "--install", build, "--prefix", packages / "kvkernels"], log)
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("kvkernels", "kvkernels_cli", "kvkernels_records"):
        shutil.copytree(ROOT / name, packages / name, ignore=ignored, dirs_exist_ok=True)
    passed, failed, _ = test(bin, packages, HEADERS_FILES, BUILDS / torch / "headers.xml", log)
    return f"failed: {failed} tests" if failed else f"builds; {passed} passed"


def try_pair(torch: str, python: str, with_headers: bool, without: Sequence[str]) -> Outcome:
    outcome = Outcome(torch, python)
    if interpreter(python) is None:
        outcome.note = f"there was no Python {python}"
        return outcome
    BUILDS.mkdir(parents=True, exist_ok=True)
    log = BUILDS / f"{torch}-py{python}.log"
    log.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        bin = environment_of(torch, python, log)
        outcome.versions = versions(bin)
        report = BUILDS / f"{torch}-py{python}.xml"
        files = [file for file in FILES if file not in without]
        outcome.passed, outcome.failed, outcome.skipped = test(bin, ROOT, files, report, log)
        if with_headers:
            outcome.headers = on_own_headers(bin, torch, log)
    except Failed as failure:
        outcome.note = str(failure)
        outcome.failed += 1
    outcome.seconds = time.monotonic() - started
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "# Other torches and Pythons",
        "",
        "`make torches` wrote this: the op tests on one built library (`kvkernels/libkvkernels_ops.so`, torch 2.13's",
        "headers) in an environment of its own for each line, and a build of the CPU code on that torch's own headers.",
        "",
        "| torch | Python | the library as built here | built on its own headers | with |",
        "| --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        ran = f"{o.passed} passed, {o.failed} failed, {o.skipped} skipped" if o.versions else "not run"
        lines.append(f"| {o.torch} | {o.python} | {ran} | {o.headers} | {o.note or o.versions} |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    torches = sorted({torch for torch, _ in PAIRS})
    parser.add_argument("--torch", choices=torches, nargs="+", help="only these (default: all)")
    parser.add_argument("--this-python", action="store_true", help=f"all of them with Python {THIS_PYTHON}")
    parser.add_argument("--headers", action="store_true", help="also build on each torch's own headers")
    parser.add_argument("--without", nargs="+", choices=FILES, default=(), metavar="FILE", help="files to leave out")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    outcomes = []
    pairs = [pair for pair in PAIRS if not options.torch or pair[0] in options.torch]
    if options.this_python:
        pairs = list(dict.fromkeys((torch, THIS_PYTHON) for torch, _ in pairs))
    for torch, python in pairs:
        print(f"torch {torch}, Python {python} ...", flush=True)
        outcome = try_pair(torch, python, options.headers, options.without)
        outcomes.append(outcome)
        print(
            f"  {outcome.versions}: {outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped; "
            f"own headers: {outcome.headers}; {outcome.seconds:.0f} s {outcome.note}",
            flush=True,
        )
    if options.output:
        options.output.write_text(table(outcomes))
    ran = [outcome for outcome in outcomes if outcome.versions]
    if not ran or not all(outcome.is_good for outcome in ran) or any(o.failed for o in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
