"""``auto`` by a file's table: which row a call is for, what is said of it, and that it is what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cuda

SCRIPT = """
import json, sys
sys.path.append({tests!r})
import torch, kvkernels
from torch_cuda.calls import make, on, pinned, places
answers = []
for op, direction, page_bytes, ids in {calls!r}:
    with torch.cuda.stream(torch.cuda.Stream()):
        call = make(op, *places(direction, 0), page_bytes)
        arguments = [a.cuda() if ids == "cuda" and i == 1 else a for i, a in enumerate(call.arguments)]
        explained = kvkernels.explain(call.op, *arguments)
        kvkernels.reset_counters()
        getattr(torch.ops.kvkernels, call.op)(*arguments)
        torch.cuda.synchronize()
    (ran,) = [name for name, counted in kvkernels.counters().items() if counted["calls"]]
    wanted = make(op, *places("h2h", 0), page_bytes)
    wanted.run()
    assert call.bytes() == wanted.bytes()
    answers.append([ran, explained.executor, explained.reason])
print(json.dumps(answers))
"""


def answers(tmp_path: Path, rows: list[dict[str, Any]], calls: list[tuple[str, str, int, str]]) -> list[list[str]]:
    """What carried each call (op, direction, bytes of a page, where ids are) out, and what explain() said of it."""
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"rows": rows}))
    script = SCRIPT.format(tests=str(Path(__file__).resolve().parents[1]), calls=calls)
    environment = os.environ | {"KVKERNELS_POLICY": str(path)}
    # From elsewhere: the repository's own package would come first.
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_first_row_that_fits_and_is_not_refused(tmp_path):
    """Of pages, of ids on the device and of raw addresses."""
    rows = [
        {"executor": "staged", "direction": "d2h", "count_below": 2},
        {"executor": "dma", "direction": "d2d"},
        {"executor": "kernel", "copies": "one_by_one"},
        {"executor": "staged", "direction": "d2h", "fragment_bytes_below": 100},
        {"executor": "dma", "direction": "h2d", "fragment_bytes_below": 100},
        {"executor": "kernel"},
    ]
    found = answers(
        tmp_path,
        rows,
        [
            ("gather_blocks", "d2h", 64, "cpu"),
            ("gather_blocks", "d2h", 64, "cuda"),
            ("gather_blocks", "h2d", 64, "cpu"),
            ("gather_blocks", "h2d", 64, "cuda"),
            ("gather_blocks", "h2d", 128, "cpu"),
            ("gather_blocks", "d2d", 64, "cpu"),
            ("gather_blocks", "d2d", 64, "cuda"),
            ("swap_blocks_batch", "d2h", 64, "cpu"),
            ("swap_blocks_batch", "h2d", 64, "cpu"),
            ("swap_blocks_batch", "d2d", 64, "cpu"),
        ],
    )
    assert all(ran == explained for ran, explained, _ in found)
    assert [ran for ran, _, _ in found] == [
        "staged", "kernel", "dma", "kernel", "kernel", "dma", "kernel", "kernel", "dma", "dma"
    ]  # fmt: skip
    said = f" of the policy of {tmp_path / 'policy.json'}"
    assert f": staged by rows[3]{said} (below 100 bytes)" in found[0][2]
    assert f": kernel by rows[5]{said}; staged cannot: the ids are on the device" in found[1][2]
    assert f": kernel by rows[5]{said}; dma cannot: the ids are on the device" in found[3][2]
    assert f": kernel by rows[5]{said}; staged cannot: it takes tensors, and got addresses" in found[7][2]


@pytest.mark.cuda(bulk=True)
def test_bulk_may_be_a_rows(tmp_path):
    rows = [{"executor": "bulk", "capability_at_least": "9.0"}, {"executor": "kernel", "direction": "h2d"}]
    long, short = answers(tmp_path, rows, [("gather_blocks", "h2d", 512, "cpu"), ("gather_blocks", "h2d", 496, "cpu")])
    assert long[0] == "bulk"
    assert short[0] == "kernel"
    assert "; bulk cannot: its fragments must have at least 512 bytes, and one has 496" in short[2]


def test_where_no_row_serves(tmp_path):
    """The copy engine, and where the ids are on the device the kernel."""
    host_ids, device_ids = answers(tmp_path, [], [("gather_blocks", "h2d", 64, place) for place in ("cpu", "cuda")])
    said = f" because no row of the policy of {tmp_path / 'policy.json'} serves them"
    assert host_ids[0] == "dma" and host_ids[2].endswith(f": dma{said}")
    assert device_ids[0] == "kernel" and f": kernel{said}; dma cannot: the ids are on the device" in device_ids[2]
