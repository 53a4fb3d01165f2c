"""The random cases again with every store past the caches, and with each instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvkernels

TESTS = Path(__file__).parent
INSTRUCTION_SETS = ["portable", "avx2", "avx512"]


def _run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env={**os.environ, **variables}, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_random_cases(isa):
    """A process of its own: both variables are read once."""
    widest = kvkernels.info()["cpu"]["instruction_set"]
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(widest):
        pytest.skip(f"this machine has {widest} only")
    environment = {
        **os.environ,
        "KVKERNELS_STREAM_BYTES": "0",
        "KVKERNELS_CPU_ISA": isa,
        "KVKERNELS_EXAMPLES": str(0.2 * float(os.environ.get("KVKERNELS_EXAMPLES", "1"))),
    }
    files = [str(TESTS / name) for name in ("test_swap_blocks.py", "test_copy_pages.py")]
    selected = "(random or lanes) and not device and not one-thread"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", selected, *files]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


_EXPLAIN = """
import torch, kvkernels
t, o = torch.zeros(4, 16), torch.zeros(4, 16)
print(kvkernels.explain("swap_blocks", t, o, 64, torch.tensor([[0, 1]])).streaming)
"""


def test_the_threshold_is_a_variable():
    assert _run(_EXPLAIN, KVKERNELS_STREAM_BYTES="0") == "True"
    assert "KVKERNELS_STREAM_BYTES must be" in _run(_EXPLAIN, KVKERNELS_STREAM_BYTES="many")
