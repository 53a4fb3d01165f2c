"""What the tests for a GPU at full size share: their scale, time on a stream, pools in buffers, and the comparison.

KVKERNELS_HARDWARE_SCALE makes all of them smaller: 1 on a GPU, and on the stand-in for CUDA, which copies on one
thread, so little that a mistake in the tests themselves is found without hardware.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TRITON_ON_GPU
from plans import run_row, runs_tensor
from torch import Tensor
from torch_cuda.calls import BULK

ON_STAND_IN = "KVKERNELS_STAND_IN" in os.environ
SCALE = float(os.environ.get("KVKERNELS_HARDWARE_SCALE", "0.001" if ON_STAND_IN else "1"))
# Where bytes are made and compared: by torch's kernels, of which the stand-in has none.
WORKSHOP = "cpu" if ON_STAND_IN else "cuda"

DIRECTIONS = ("h2d", "d2h", "d2d")
KERNEL_NAMES = ("kernel", "bulk", *TRITON_ON_GPU)  # those that read ids on the device
EXECUTOR_NAMES = ("auto", *KERNEL_NAMES, "dma", "staged")
# As parameters of tests.
KERNELS = [BULK if name == "bulk" else name for name in KERNEL_NAMES]
EXECUTORS = [BULK if name == "bulk" else name for name in EXECUTOR_NAMES]
POISON = 0xA5
GUARD_BYTES = 256
_CHUNK_BYTES = 64 << 20
_MAP_NORESERVE = 0x4000  # Python's mmap module names it from 3.13 on
_CYCLES_A_MS = 2_000_000  # at the highest clocks; a spin lasts longer at lower ones


def scaled(full: int, least: int) -> int:
    """A count or size at this scale, but never less than what still takes the path that a test is for."""
    return max(least, round(full * SCALE))


def spin(milliseconds: float) -> None:
    """Keeps the current stream busy, so that what comes behind is late. On the stand-in everything is, by itself."""
    if not ON_STAND_IN:
        torch.cuda._sleep(int(milliseconds * _CYCLES_A_MS))


def on_stream(kind: str) -> torch.cuda.Stream:
    """The default stream, which is the legacy one and takes no batches, or another."""
    return torch.cuda.default_stream() if kind == "default" else torch.cuda.Stream()


def random_bytes(count: int) -> Tensor:
    """In the workshop."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=WORKSHOP)


def fill(out: Tensor, tile: Tensor | None = None) -> None:
    """Repeats a tile, or poison, over bytes that no stream has work for: on the stand-in the host's are set at once."""
    if tile is None:
        tile = torch.full((min(out.numel(), _CHUNK_BYTES),), POISON, dtype=torch.uint8, device=WORKSHOP)
    for chunk in out.view(-1).split(tile.numel()):
        chunk.copy_(tile[: chunk.numel()], non_blocking=True)


def are_same(got: Tensor, wanted: Tensor) -> bool:
    """Whether two flat tensors of bytes, anywhere, are equal; they are brought to the workshop piece by piece."""
    chunks = zip(got.split(_CHUNK_BYTES), wanted.split(_CHUNK_BYTES), strict=True)
    return got.shape == wanted.shape and all(torch.equal(a.to(WORKSHOP), b.to(WORKSHOP)) for a, b in chunks)


@dataclass(frozen=True)
class Shape:
    """Pools of equal blocks, one behind the other in a buffer, with guard bytes round each.

        | guard | block 0 | block 1 | ... | block n - 1 | guard, pool 1's | block 0 | ...

    ``shift_bytes`` moves all blocks off their alignment, ``padding_bytes`` follow each.
    """

    pools: int
    blocks: int
    page_bytes: int
    padding_bytes: int = 0
    shift_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        return self.page_bytes + self.padding_bytes

    @property
    def pool_bytes(self) -> int:
        """From one pool's guard bytes to the next pool's."""
        return -(-(self.blocks * self.block_bytes + self.shift_bytes) // GUARD_BYTES) * GUARD_BYTES + GUARD_BYTES

    @property
    def bytes(self) -> int:
        return self.pools * self.pool_bytes + GUARD_BYTES

    def on(self, flat: Tensor) -> list[Tensor]:
        """The pools, [block, byte]."""
        begins = (pool * self.pool_bytes + GUARD_BYTES + self.shift_bytes for pool in range(self.pools))
        blocks = (flat[begin : begin + self.blocks * self.block_bytes] for begin in begins)
        return [block.view(self.blocks, self.block_bytes)[:, : self.page_bytes] for block in blocks]


def whole_pages(shape: Shape) -> Tensor:
    """The runs that copy each pool's pages to the pool of the same number."""
    return runs_tensor(*(run_row((t, t), (0, 0), shape.page_bytes, (0, 0)) for t in range(shape.pools)))


def random_mapping(pairs: int, src_blocks: int, dst_blocks: int) -> Tensor:
    """Any sources, each destination once."""
    return torch.stack((torch.randint(0, src_blocks, (pairs,)), torch.randperm(dst_blocks)[:pairs]), 1)


def assert_copied(
    got: Tensor, shapes: tuple[Shape, Shape], pristine: Tensor, mapping: Tensor, label: object = ""
) -> None:
    """Each byte of the destination's buffer is the source's of its pair, or poison where no pair has one."""
    src, dst = shapes
    src_ids, dst_ids = mapping.to(pristine.device).unbind(1)
    one = replace(dst, pools=1)
    for pool in range(dst.pools):
        wanted = torch.full((one.bytes,), POISON, dtype=torch.uint8, device=pristine.device)
        one.on(wanted)[0][dst_ids] = src.on(pristine)[pool][src_ids]
        begin = pool * dst.pool_bytes
        assert are_same(got[begin : begin + one.bytes], wanted), (label, f"pool {pool}")


class Buffers:
    """Buffers of bytes that the tests of a file share: allocating and pinning gigabytes takes longer than copying."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, place: str, role: str, count: int) -> Tensor:
        """``count`` bytes on the host ("h"), pinned, or on the device ("d"); those of another role are others."""
        name = place + role
        held = self._held.pop(name, None)
        if held is None or held.numel() < count:
            del held
            torch.cuda.empty_cache()  # the smaller one
            options = {"device": "cuda"} if place == "d" else {"pin_memory": True}
            held = torch.empty(count, dtype=torch.uint8, **options)
        self._held[name] = held
        return held[:count]

    def pristine(self, count: int) -> Tensor:
        """Random bytes in the workshop, the same ones all the time."""
        held = self._held.get("pristine")
        if held is None or held.numel() < count:
            self._held["pristine"] = held = random_bytes(count)
        return held[:count]

    def sides(self, direction: str, shapes: tuple[Shape, Shape]) -> tuple[Tensor, Tensor, Tensor]:
        """A filled source, a poisoned destination, and what the source holds; no stream may have work for them."""
        src = self.take(direction[0], "source", shapes[0].bytes)
        dst = self.take(direction[-1], "destination", shapes[1].bytes)
        pristine = self.pristine(shapes[0].bytes)
        src.copy_(pristine, non_blocking=True)
        fill(dst)
        return src, dst, pristine


def shared_buffers() -> Iterator[Buffers]:
    """The body of a fixture that a file's tests share."""
    buffers = Buffers()
    yield buffers
    torch.cuda.synchronize()
    buffers._held.clear()
    torch.cuda.empty_cache()


class RegisteredMemory:
    """Host memory that begins on a page and becomes pinned range by range; untouched, it takes no room."""

    def __init__(self, byte_count: int) -> None:
        self._pages = mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        with contextlib.suppress(OSError):  # only faster to register, and not every kernel has huge pages
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._begins: list[int] = []

    def register(self, begin: int, end: int) -> None:
        address = self.bytes.data_ptr() + begin
        code = int(torch.cuda.cudart().cudaHostRegister(address, end - begin, 0))
        assert code == 0, f"cudaHostRegister of bytes {begin} to {end} failed: {code}"
        self._begins.append(address)

    def unregister(self) -> None:
        """All ranges, when nothing uses them any more."""
        torch.cuda.synchronize()
        for address in self._begins:
            assert int(torch.cuda.cudart().cudaHostUnregister(address)) == 0
        self._begins.clear()


def run_script(name: str, **variables: str) -> Any:
    """What a script beside the tests printed as JSON, in a process of its own with these environment variables."""
    path = Path(__file__).parent / name
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def refusal_of(call: Callable[[], object]) -> str:
    """Why a named executor cannot serve the call; it must refuse."""
    with pytest.raises(ValueError, match=r"executor '\w+' cannot serve this call: ") as caught:
        call()
    return str(caught.value).partition("cannot serve this call: ")[2]
