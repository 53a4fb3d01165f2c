"""Every call of CUDA that an op makes fails in turn, under torch: an error that names it, and nothing is left of it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from simgpu.sim import OUT_OF_MEMORY
from torch_cuda.calls import OPS, OUT_OF_MEMORY_WORDS, make, pageable, places

pytestmark = pytest.mark.cuda(devices=2)

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FUNCTIONS = sorted(
    {
        name
        for folder in ("core", "cuda", "ops")
        for path in (CSRC / folder).rglob("*.*")
        for name in re.findall(r"\b(cu(?:da)?[A-Z]\w+)[(\"]", path.read_text())
    }
)
TAKES_DEVICE_IDS = ("gather_blocks", "scatter_blocks", "copy_pages")
TAKES_TENSORS = (*TAKES_DEVICE_IDS, "swap_blocks", "concat", "split")
LINK_EXECUTORS = ("kernel", "bulk", "dma", "staged")
MOVES_BYTES = {"cudaMemcpyAsync", "cuMemcpyBatchAsync", "cudaLaunchKernelExC"}
CALLS = [
    *itertools.product(OPS, ("h2d", "d2h", "d2d"), ("auto",), ("cpu",)),
    *itertools.product(TAKES_TENSORS, ("h2d", "d2h"), LINK_EXECUTORS, ("cpu",)),
    *itertools.product(TAKES_TENSORS, ("d2d",), ("kernel", "bulk"), ("cpu",)),
    *itertools.product(TAKES_DEVICE_IDS, ("d2d",), ("kernel", "bulk"), ("cuda:1",)),
    *itertools.product(("swap_blocks_batch",), ("h2d", "d2h", "d2d"), ("kernel", "bulk", "dma"), ("cpu",)),
]
# Its fragments are too short for bulk copies.
CALLS = [call for call in CALLS if (call[0], call[2]) != ("concat", "bulk")]
PAGE_BYTES = 1024
# Whether CUDA is in use is known from any answer but one; the guards of a context ask, too, and want to know.
GOES_ON_WITHOUT = {("cuCtxGetCurrent", 1)}
# Of raw addresses it is asked once more, to find their device.
GOES_ON_WITHOUT_OF_ADDRESSES = GOES_ON_WITHOUT | {("cuCtxGetCurrent", 2)}
# After its first call an op leaves these to torch's own guards, and to its own, whose destructors tell nobody.
FIRST_ONLY = ("cudaGetDevice", "cuCtxSetCurrent")


def error_of(call, options) -> str:
    """What a call raises; nothing of it is kept, so that what the call held is free again."""
    try:
        call.run(**options)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("op", "direction", "executor", "ids"), CALLS)
def test_every_call(stand_in, op, direction, executor, ids):
    call, wanted = make(op, *places(direction, 1), PAGE_BYTES), make(op, pageable, pageable, PAGE_BYTES)
    poison = wanted.tensors[1].clone()
    wanted.run()
    options = {} if executor == "auto" else {"executor": executor}
    if ids != "cpu":
        at = {"gather_blocks": 1, "scatter_blocks": 1, "copy_pages": 2}[op]
        call.arguments = tuple(a.to(ids) if i == at else a for i, a in enumerate(call.arguments))
    with torch.cuda.stream(torch.cuda.Stream(1)):
        call.run(**options)
        before = [stand_in.calls(function) for function in FUNCTIONS]
        call.run(**options)
        made = {f: stand_in.calls(f) - count for f, count in zip(FUNCTIONS, before, strict=True)}
        for function in FIRST_ONLY:
            made[function] = min(made[function], 1)
        tried = [(f, k) for f, count in made.items() for k in range(1, count + 1)]
        assert len(tried) >= 4
        for function, k in tried:
            call.tensors[1].copy_(poison)
            torch.cuda.synchronize(1)
            held = torch.cuda.memory_allocated(1), stand_in.cuda.fake_streams()
            stand_in.fail(function, k, OUT_OF_MEMORY)
            said = error_of(call, options)
            if (function, k) in (GOES_ON_WITHOUT_OF_ADDRESSES if op == "swap_blocks_batch" else GOES_ON_WITHOUT):
                assert said == ""
            else:
                text = rf"{call.op}: {function}( \(copy 0 of its batch\))? failed: cudaErrorMemoryAllocation \("
                assert re.match(text, said), (function, k, said)
                torch.cuda.synchronize(1)
                # It says where bytes may have moved, and where nothing says so, none have.
                undefined = said.endswith("; the destination is undefined")
                assert undefined or torch.equal(call.tensors[1].cpu(), poison.cpu()), (function, k, said)
                assert undefined or function not in MOVES_BYTES, (function, k, said)
            assert stand_in.cudart.cudaPeekAtLastError() == 0
            assert (torch.cuda.memory_allocated(1), stand_in.cuda.fake_streams()) == held, (function, k)
            call.run(**options)
            assert call.bytes() == wanted.bytes(), (function, k)


def test_torchs_allocator(stand_in):
    """Tables that do not ride in the parameters come from torch, whose error an op passes on with its name."""
    rows = 200_000
    # Padded, so that torch's allocator has no room left beside them.
    pool, out = (torch.zeros(rows, 72, dtype=torch.uint8).to("cuda:1")[:, :16] for _ in range(2))
    mapping = torch.stack((torch.arange(rows), torch.randperm(rows)), 1)
    torch.ops.kvkernels.swap_blocks(pool, out, 16, mapping)
    torch.cuda.synchronize(1)
    torch.cuda.empty_cache()
    stand_in.fail("cudaMalloc", 1, OUT_OF_MEMORY)
    stand_in.fail("cudaMalloc", 2, OUT_OF_MEMORY)
    held = torch.cuda.memory_allocated(1)
    with pytest.raises(RuntimeError, match=f"^swap_blocks: {OUT_OF_MEMORY_WORDS}"):
        torch.ops.kvkernels.swap_blocks(pool, out, 16, mapping)
    assert torch.cuda.memory_allocated(1) == held
    torch.ops.kvkernels.swap_blocks(pool, out, 16, mapping)
