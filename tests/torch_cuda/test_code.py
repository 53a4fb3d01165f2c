"""Devices that the library has no code for, or none for bulk copies, or too little shared memory for them.

What a device has is asked for once, so each case is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("stand_in")]

SCRIPT = """
import json, os, sys
sys.path.append({tests!r})
import torch, kvkernels
from simgpu.sim import Sim
from torch_cuda.calls import make, places
sim = Sim.of(os.environ["KVKERNELS_STAND_IN"])
for name, value in {settings!r}.items():
    sim.set(name, value)
answers = []
for op, direction, ids, executor in {calls!r}:
    call = make(op, *places(direction, 0), 8192)
    arguments = [a.cuda() if ids == "cuda" and i == 1 else a for i, a in enumerate(call.arguments)]
    options = dict(executor=executor) if executor else dict()
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            explained = kvkernels.explain(op, *arguments, **options)
            answers.append([explained.executor, explained.reason])
        except (RuntimeError, ValueError) as error:
            answers.append([type(error).__name__, str(error)])
        if answers[-1][0] in ("dma", "kernel", "bulk"):
            getattr(torch.ops.kvkernels, op)(*arguments, **options)
            torch.cuda.synchronize()
            wanted = make(op, *places("h2h", 0), 8192)
            wanted.run()
            assert call.bytes() == wanted.bytes()
print(json.dumps(answers))
"""


def answers(settings: dict[str, int], calls: list[tuple[str, str, str, str]]) -> list[list[str]]:
    """What each call (op, direction, ids, executor) is explained as, or raises; those of compiled code are run, too."""
    script = SCRIPT.format(tests=str(Path(__file__).resolve().parents[1]), settings=settings, calls=calls)
    # From elsewhere: the repository's own package would come first.
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_code_at_all():
    """The copy engine needs none; between places on a device, and for ids there, Triton compiles its own."""
    why = "the library has no code for compute capability 9.0"
    link, inside, named, ids, refused, batch = answers(
        {"no_image": 1},
        [
            ("gather_blocks", "d2h", "cpu", ""),
            ("gather_blocks", "d2d", "cpu", ""),
            ("gather_blocks", "d2d", "cpu", "dma"),
            ("gather_blocks", "d2d", "cuda", ""),
            ("gather_blocks", "d2d", "cpu", "kernel"),
            ("swap_blocks_batch", "d2d", "cpu", ""),
        ],
    )
    assert link[0] == "dma"
    for executor, reason in (inside, ids):
        assert (executor, reason.endswith(f"triton by rows[1] of the default policy; kernel cannot: {why}")) == (
            "triton",
            True,
        )
    assert named[0] == "dma"
    assert refused == ["ValueError", f"gather_blocks: executor 'kernel' cannot serve this call: {why}"]
    assert (batch[0], f"; kernel cannot: {why}; triton cannot: it takes tensors" in batch[1]) == ("dma", True)
    for executor in ("bulk", "staged"):
        (found,) = answers({"no_image": 1}, [("gather_blocks", "d2h", "cpu", executor)])
        assert found == ["ValueError", f"gather_blocks: executor '{executor}' cannot serve this call: {why}"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"code_capability": 80},
            "it needs code for compute capability 9.0 or later, and the library's for this device is for 8.0",
        ),
        ({"shared_bytes": 99 << 10}, "it needs 196704 bytes of shared memory a CTA, and the device has 101376"),
    ],
    ids=["older code", "less shared memory"],
)
def test_no_bulk_copies(settings, why):
    """Translated from older code the bulk kernel would do nothing; auto does not take it, and a name is refused."""
    auto, plain, named, ids = answers(
        settings,
        [
            ("gather_blocks", "h2d", "cpu", ""),
            ("gather_blocks", "h2d", "cpu", "kernel"),
            ("gather_blocks", "h2d", "cpu", "bulk"),
            ("gather_blocks", "d2d", "cuda", "bulk"),
        ],
    )
    assert auto[0] != "bulk"
    assert plain[0] == "kernel"
    assert named == ids == ["ValueError", f"gather_blocks: executor 'bulk' cannot serve this call: {why}"]
