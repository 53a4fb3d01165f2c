"""Triton's kernels on the simulator: compiled for a target, executed from their PTX on the process's own memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kvkernels.triton import kernels
from kvkernels.triton.table import Head

from .ptx import Buffer, LoadedModule, Report, load
from .ptx.memory import Area

CUDA_TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
HIP_TARGETS = {name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}
# Each kernel with the element widths that C++ asks for, and whether fragments are chunked.
VARIANTS = [
    *(("page", width, False) for width in (16, 8, 4, 2, 1)),
    ("row", 16, True),
    *(("bytes", width, True) for width in (8, 4, 2, 1)),
    *(("bytes", width, False) for width in (16, 8, 4, 2, 1)),
]


@functools.cache
def compiled(kernel: str, width: int, is_chunked: bool, target: str) -> CompiledKernel:
    """What a launch would compile. Arguments are as ``do_not_specialize`` leaves them."""
    signature = {"table": "*i64", "fault": "i64", "WIDTH": "constexpr", "CHUNKED": "constexpr"}
    source = ASTSource(getattr(kernels, kernel), signature, {"WIDTH": width, "CHUNKED": is_chunked})
    return compile_kernel(source, target={**CUDA_TARGETS, **HIP_TARGETS}[target], options=kernels.OPTIONS)


@functools.cache
def _loaded(kernel: str, width: int, is_chunked: bool, target: str) -> LoadedModule:
    return load(compiled(kernel, width, is_chunked, target).asm["ptx"])


class SimulatedLaunch:
    """Takes the place of ``kernels.launch``: ``buffers`` are what the kernel may reach besides its table."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.buffers: Sequence[Buffer] = ()
        self.counts_sectors = False
        self.reports: list[Report] = []
        self.heads: list[Head] = []

    def __call__(self, call: Head, table: Tensor, fault: int, programs: int) -> None:
        name = kernels.KERNELS[call.kernel].__name__
        key = name, call.width, bool(call.is_chunked), self.target
        kernel = _loaded(*key)[name]
        metadata = compiled(*key).metadata
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        scratch = [0] * (len(kernel.kernel.parameters) - 2)
        report = kernel.launch_raw(
            programs,
            32 * metadata.num_warps,
            kernel.pack([table.data_ptr(), fault, *scratch]),
            self.areas(table),
            dynamic_shared_bytes=metadata.shared,
            counts_sectors=self.counts_sectors,
            equal_writes_race=False,
        )
        self.heads.append(call)
        self.reports.append(report)
        report.check()

    def areas(self, table: Tensor) -> list[Area]:
        """The memory that the kernel may reach."""
        rows = Buffer("table", table.numpy().view(np.uint8), writable=False)
        return [buffer.area() for buffer in (*self.buffers, rows)]


def buffers_of(tensors: Sequence[Tensor], sides: Sequence[str]) -> list[Buffer]:
    """Flat tensors of bytes on the CPU; a ``src`` may only be read, and nobody may rely on what a ``dst`` holds."""
    return [
        Buffer(f"{side} {i}", t.numpy(), writable=side != "src", written=side != "dst")
        for i, (t, side) in enumerate(zip(tensors, sides, strict=True))
    ]
