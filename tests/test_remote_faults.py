"""Peers that are killed and stopped at random points: KVKERNELS_REMOTE_ROUNDS=200 for as many, of each transport."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("msgspec")
pytest.importorskip("xxhash")

ROUNDS = int(os.environ.get("KVKERNELS_REMOTE_ROUNDS", "20"))
HAS_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl"))
WITHOUT_NIXL = "nixl must be installed: pip install kvkernels[nixl]"
PROGRAM = Path(__file__).parent / "remote_processes.py"


@pytest.mark.parametrize(
    "transport", ["tcp", pytest.param("nixl", marks=pytest.mark.skipif(not HAS_NIXL, reason=WITHOUT_NIXL))]
)
@pytest.mark.timeout(60 + 30 * ROUNDS)
def test_a_peer_that_is_killed_or_stopped_tears_no_page_and_hangs_nobody(transport):
    """None that is published is torn, none is written to late, every transfer ends, and what both say goes together."""
    command = [sys.executable, str(PROGRAM), str(ROUNDS), "7", transport]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=60 + 25 * ROUNDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its children, too
            process.wait()
    assert process.returncode == 0, errors
    counts = json.loads(out.splitlines()[-1])  # UCX writes there, too
    print(f"{transport}: {counts}")
    for bad in ("torn", "late", "contradictions", "hangs", "leaks", "crashed", "never began", "never went on"):
        assert counts[bad] == 0, (counts, errors)
    assert counts["kills"] + counts["stops"] == ROUNDS
    assert counts["visible"] >= 2 * ROUNDS and counts["committed"] > 0
