"""Memory for the rings of ``staged``: kept, missed, and not asked for again and again.

Rings live as long as their process, so each case has its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cuda

HEAD = """
import json, os, sys
sys.path.append({tests!r})
import torch, kvkernels
from simgpu.sim import OUT_OF_MEMORY, Sim
sim = Sim.of(os.environ["KVKERNELS_STAND_IN"])
pools = [torch.randint(256, (32, 16384), dtype=torch.uint8) for _ in range(8)]
ids, out = torch.randperm(32)[:24], torch.zeros(24, 8 * 16384, dtype=torch.uint8).pin_memory()
arguments = ([pool.cuda() for pool in pools], ids, out)
wanted = torch.cat([pool[ids] for pool in pools], 1)
torch.cuda.set_stream(torch.cuda.Stream())


def took(**options):
    # The executor that a call took, whose bytes are right.
    out.zero_()
    kvkernels.reset_counters()
    explained = kvkernels.explain("gather_blocks", *arguments, **options).executor
    kvkernels.gather_blocks(*arguments, **options)
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
    (executor,) = [name for name, counted in kvkernels.counters().items() if counted["calls"]]
    return explained, executor


found = None
"""


def answer(body: str) -> Any:
    """What the script sets ``found`` to."""
    script = HEAD.format(tests=str(Path(__file__).resolve().parents[1])) + body + "\nprint(json.dumps(found))\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_call_asks_for_no_memory_once_its_stream_has_a_ring(stand_in):
    calls, held, frees = answer("""
first = took()
assert first == ("staged", "staged")
torch.cuda.empty_cache()
before = sim.calls("cudaMalloc"), torch.cuda.memory_reserved(), sim.calls("cudaFree")
for _ in range(5):
    assert took() == ("staged", "staged")
    torch.cuda.empty_cache()
after = sim.calls("cudaMalloc"), torch.cuda.memory_reserved(), sim.calls("cudaFree")
found = [now - then for now, then in zip(after, before)]
""")
    assert (calls, held, frees) == (0, 0, 0)


def test_without_memory_auto_takes_something_else_and_does_not_ask_each_time(stand_in):
    """Torch's cache, which another allocation may want, is left alone."""
    first, second, calls, frees, after, explained = answer("""
spare = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
del spare  # in torch's cache, now
frees = sim.calls("cudaFree")
sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
first = took()
before = sim.calls("cudaMalloc")
second = took()
for _ in range(254):
    kvkernels.gather_blocks(*arguments)
calls = sim.calls("cudaMalloc") - before
frees = sim.calls("cudaFree") - frees
explained = kvkernels.explain("gather_blocks", *arguments).executor
kvkernels.gather_blocks(*arguments)
found = [first, second, calls, frees, took(), explained]
""")
    assert first == ["staged", "kernel"]
    assert second == ["kernel", "kernel"]
    assert (calls, frees) == (0, 0)
    assert explained == "kernel"
    # There may be memory again, 256 calls later.
    assert after == ["staged", "staged"]


def test_who_names_staged_gets_the_error_and_the_next_try(stand_in):
    message, after, auto = answer("""
message = ""
sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
try:
    kvkernels.gather_blocks(*arguments, executor="staged")
except RuntimeError as error:
    message = str(error)
assert not out.any()
found = [message, took(executor="staged"), took()]
""")
    assert message.startswith("gather_blocks: cudaMalloc failed: cudaErrorMemoryAllocation (")
    assert after == auto == ["staged", "staged"]


def test_a_missing_second_ring_is_the_first(stand_in):
    assert answer("""
took()
with torch.cuda.stream(torch.cuda.Stream()):
    sim.fail("cudaMalloc", 1, OUT_OF_MEMORY)
    found = took()
""") == ["staged", "staged"]
