"""The triton executor in Triton's interpreter, on the same cases as the other executors.

Whether Triton compiles or interprets is settled when the kernels are imported, so these tests run in a process of their
own, which the last one starts.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import check, examples, gather_scatter_cases
from hypothesis import given
from hypothesis import strategies as st
from plans import copy_pages_cases

from kvkernels import triton

TRITON = pytest.importorskip("triton").__version__


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


# It takes arrays of one element for scalars, which NumPy refuses from 2.4 on.
INTERPRETER_IS_TOO_OLD = release(TRITON) < (3, 7) and release(np.__version__) >= (2, 4)

interpreted = pytest.mark.skipif(not triton.interprets(), reason="for the process with TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("op", ["gather_blocks", "scatter_blocks", "copy_pages"])
@examples(6)
@given(st.data())
def test_random_calls(op, data):
    cases = copy_pages_cases() if op == "copy_pages" else gather_scatter_cases(op)
    check(data.draw(cases.filter(lambda case: sum(case.buffer_bytes) < 1 << 17)))


@pytest.mark.skipif(triton.interprets(), reason="this is that process")
@pytest.mark.skipif(INTERPRETER_IS_TOO_OLD, reason="Triton's interpreter before 3.7 does not work with NumPy 2.4")
def test_in_a_process_of_its_own():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-k", "random_calls"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
