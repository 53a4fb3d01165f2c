"""benchmarks/gpu_day.sh keeps to its clock and its order, whatever its parts do; `make gpu-dry-run` has real parts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_day.sh"

# In the place of Python: says what it was asked for, and does of each part what the environment says.
PYTHON = """#!/bin/sh
echo "$@" >>"$FAKE_LOG"
case "$*" in
*pytest.main*) sleep "${TESTS_S:-0}"; exit "${TESTS_STATUS:-0}" ;;
*"-m kvkernels info"*) sleep "${LIBRARY_S:-0}"; exit "${LIBRARY_STATUS:-0}" ;;
*/gpu.py*) echo '{}' >"$FIGURES"; exit "${FIGURES_STATUS:-0}" ;;
*--closing*) echo "the closing table" ;;
esac
"""


@pytest.fixture
def day(tmp_path):
    """Runs the script for so many seconds; gives what it printed, its exit status, its parts and its commands."""
    out, package, log = tmp_path / "out", tmp_path / "package" / "kvkernels", tmp_path / "commands"
    package.mkdir(parents=True)
    for file in ("libkvkernels_ops.so", "_host"):  # whose suffix the Python below leaves out
        (package / file).touch()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(seconds: int, **settings: object):
        environment = {
            **os.environ,
            "PYTHON": str(python),
            "FAKE_LOG": str(log),
            "FIGURES": str(out / "gpu.jsonl"),
            "KVKERNELS_DAY_PACKAGE": str(package),
            "KVKERNELS_DAY_SANITIZER": "/bin/true",
            **{name: str(value) for name, value in settings.items()},
        }
        done = subprocess.run(
            ["bash", str(SCRIPT), str(out), str(seconds)], env=environment, capture_output=True, text=True, timeout=60
        )
        rows = [line.split("\t")[:2] for line in (out / "parts.tsv").read_text().splitlines()[1:]]
        return done, dict(rows), log.read_text().splitlines()

    return run


def test_every_part_runs_in_its_order(day):
    done, parts, commands = day(60, KVKERNELS_DAY_FIGURES="--parts grid")
    assert done.returncode == 0, done.stdout + done.stderr
    # The sanitizer's tool is not here, which is no failure.
    assert list(parts.items()) == [(p, "2" if p == "sanitizer" else "0") for p in parts]
    assert list(parts) == ["library", "tests", "program", "sanitizer", "figures", "report"]
    (figures,) = [command for command in commands if "gpu.py" in command]
    assert figures.endswith("--parts grid") and 0 < int(figures.split("--seconds ")[1].split()[0]) <= 47
    assert "the closing table" in done.stdout.splitlines()[-9:]


def test_parts_that_take_long_are_ended_and_cost_the_sanitizer_first(day):
    done, parts, _ = day(60, LIBRARY_S=7, TESTS_S=59)
    assert parts == {"library": "0", "tests": "124", "sanitizer": "dropped", "figures": "0", "report": "0"}
    assert done.returncode == 1


def test_figures_that_have_no_time_are_dropped_last(day):
    done, parts, _ = day(20)
    assert parts == {"library": "0", "tests": "0", "program": "0", "sanitizer": "2", "figures": "dropped"}
    assert done.returncode == 0 and "figures: dropped" in done.stdout


def test_a_part_that_fails_ends_itself_alone(day):
    done, parts, _ = day(60, TESTS_STATUS=1, FIGURES_STATUS=1)
    assert (parts["tests"], parts["figures"], parts["report"]) == ("1", "1", "0")
    assert done.returncode == 1 and "the closing table" in done.stdout


def test_without_a_library_nothing_else_runs(day):
    done, parts, _ = day(60, LIBRARY_STATUS=1)
    assert parts == {"library": "1"} and done.returncode == 1


def test_it_says_how_it_is_called():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: bash benchmarks/gpu_day.sh OUT [SECONDS]")
