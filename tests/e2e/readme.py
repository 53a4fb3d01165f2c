"""The commands of README's section on vLLM, run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from suite import ROOT

HEADING = "## Use it with vLLM\n"


def commands() -> str:
    """The section's indented lines. The run that this is a part of is not run again."""
    section = (ROOT / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ") and not line.startswith("    make ")]
    return "\n".join(lines)


def run() -> dict[str, Any]:
    script = commands()
    print(script, flush=True)
    environment = {**os.environ, "PYTHON_VLLM": sys.executable}
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=environment)
    return {"findings": [f"commands: exit code {done.returncode}"] if done.returncode or not script else []}
