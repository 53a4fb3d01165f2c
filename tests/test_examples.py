"""The examples of layouts run as they stand; each checks what it has moved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples" / "layouts").glob("*.py"))


def test_there_are_some():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "every value is there" in done.stdout or "came back" in done.stdout
