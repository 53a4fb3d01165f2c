"""Memory of every origin: registered in parts, of torch's other allocators, and given back while a stream uses it."""

from __future__ import annotations

import pytest
import torch
from plans import run_row, runs_tensor
from torch_cuda.hardware import (
    EXECUTOR_NAMES,
    EXECUTORS,
    ON_STAND_IN,
    RegisteredMemory,
    on_stream,
    run_script,
    scaled,
    spin,
)

import kvkernels

pytestmark = pytest.mark.cuda(gib=4)

PAGE_BYTES = 100_000
RANGE_BYTES = 3 << 20
RANGES = 3
BLOCKS = RANGES * RANGE_BYTES // PAGE_BYTES


@pytest.fixture
def ranges():
    """Neighbouring registrations of one piece of memory; each of their edges lies inside a page."""
    memory = RegisteredMemory(RANGES * RANGE_BYTES)
    for i in range(RANGES):
        memory.register(i * RANGE_BYTES, (i + 1) * RANGE_BYTES)
    yield memory
    memory.unregister()


@pytest.mark.parametrize("stream", ["side", "default"])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_fragments_across_registrations(ranges, executor, direction, stream):
    host = ranges.bytes[: BLOCKS * PAGE_BYTES].view(BLOCKS, PAGE_BYTES)
    values = torch.randint(0, 256, (2, BLOCKS, PAGE_BYTES), dtype=torch.uint8)
    host.copy_(values[0])
    device = values[1].cuda()
    edges = [i * RANGE_BYTES // PAGE_BYTES for i in range(1, RANGES)]
    far = torch.tensor([*edges, edges[0] - 1, edges[0] + 1, 0, BLOCKS - 1])
    near = torch.arange(len(far))
    runs = runs_tensor(run_row((0, 0), (0, 0), PAGE_BYTES, (0, 0)))
    with torch.cuda.stream(on_stream(stream)):
        if direction == "h2d":
            kvkernels.copy_pages([host], [device], torch.stack((far, near), 1), runs, executor=executor)
            wanted = values[1].clone()
            wanted[near] = values[0][far]
        else:
            kvkernels.copy_pages([device], [host], torch.stack((near, far), 1), runs, executor=executor)
            wanted = values[0].clone()
            wanted[far] = values[1][near]
        torch.cuda.synchronize()
    assert torch.equal((device if direction == "h2d" else host).cpu(), wanted)
    assert torch.equal((host if direction == "h2d" else device).cpu(), values[int(direction == "d2h")])


def test_a_registration_that_ends_inside_a_fragment():
    """Copy engines take it in pieces; kernels refuse what the device cannot reach, or read it where it can."""
    answers = run_script("script_registrations.py")
    assert len(answers) == 6 * (len(EXECUTOR_NAMES) + 2)
    for call, answer in answers.items():
        executor, _, which, _, _, ids_place = call.split()
        if answer == "right":
            continue
        assert executor in ("kernel", "bulk", "triton"), (call, answer)
        assert "cannot serve this call: " in answer, (call, answer)
        if which == "inside" and ids_place == "cpu":
            # But for a device that has no bulk copies.
            assert executor == "bulk" and torch.cuda.get_device_capability()[0] < 9, (call, answer)
        else:
            assert "pageable host memory" in answer or executor == "bulk", (call, answer)


@pytest.mark.parametrize(
    "variables",
    [{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}],
    ids=["expandable segments", "no caching"],
)
def test_other_allocators(variables):
    expands = "PYTORCH_CUDA_ALLOC_CONF" in variables
    if expands and ON_STAND_IN:
        pytest.skip("the stand-in for CUDA has no virtual memory to expand")
    found = run_script("script_allocators.py", **variables)
    assert found["is_expandable"] == expands
    assert {call for call in found["refused"] if not call.startswith("bulk")} == {"staged d2d"}
    assert torch.cuda.get_device_capability()[0] < 9 or len(found["refused"]) == 1


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_a_call_takes_is_its_own_until_its_stream_has_passed(executor):
    """Tables and rings are given back when the call returns. Whoever gets that memory next must come behind."""
    rows, page_bytes = scaled(50_000, 8192), 512
    src = torch.randint(0, 256, (rows, page_bytes), dtype=torch.uint8)
    order = torch.randperm(rows)
    runs = runs_tensor(run_row((0, 0), (0, 0), page_bytes, (0, 0)))
    on_device, other = src.cuda(), torch.cuda.Stream()
    for _ in range(scaled(10, 2)):
        host = torch.zeros_like(src).pin_memory()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            spin(20)
            mapping = torch.stack((torch.arange(rows), order), 1)
            kvkernels.copy_pages([on_device], [host], mapping, runs, executor=executor)
            del mapping
            # As large as tables are, and as a ring is, from torch: for this stream, and for one that waits for nothing.
            for stream in (torch.cuda.current_stream(), other):
                with torch.cuda.stream(stream):
                    for byte_count in (rows * 8, rows * 16, rows * page_bytes):
                        rubbish = torch.full((byte_count,), 255, dtype=torch.uint8)
                        torch.empty(byte_count, dtype=torch.uint8, pin_memory=True).copy_(rubbish)
                        torch.empty(byte_count, dtype=torch.uint8, device="cuda").copy_(rubbish)
        torch.cuda.synchronize()
        assert torch.equal(host[order], src)
