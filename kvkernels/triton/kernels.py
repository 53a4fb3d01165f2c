"""The kernels of the triton executor, one a shape, and their launch.

Nothing is specialised on an argument's value: there is one binary a kernel, width and device.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvkernels.triton.copy_body import CHUNKS, TILES, copy_chunks, copy_tiles
from kvkernels.triton.table import Head

# A fixed order of operations: nothing here is in floating point, and Triton warns where neither is chosen.
OPTIONS = {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=("table", "fault"))
def page(table, fault: tl.int64, WIDTH: tl.constexpr, CHUNKED: tl.constexpr):
    """Fragments of any size and alignment, without loops."""
    copy_tiles(table, fault, WIDTH, LOOPED=False)


@triton.jit(do_not_specialize=("table", "fault"))
def row(table, fault: tl.int64, WIDTH: tl.constexpr, CHUNKED: tl.constexpr):
    """Small fragments of 16-byte elements, all aligned."""
    copy_chunks(table, fault, WIDTH)


@triton.jit(do_not_specialize=("table", "fault"))
def bytes(table, fault: tl.int64, WIDTH: tl.constexpr, CHUNKED: tl.constexpr):
    """Everything else: narrower elements where fragments are small, tiles with loops where they are not."""
    if CHUNKED:
        copy_chunks(table, fault, WIDTH)
    else:
        copy_tiles(table, fault, WIDTH, LOOPED=True)


# By Head.kernel.
KERNELS = (page, row, bytes)

# Triton decides as it decorates.
INTERPRETED = not isinstance(page, triton.JITFunction)


def units_at_once(call: Head) -> int:
    """Units that a program takes in one round of its loop."""
    return int(CHUNKS.value if call.is_chunked else TILES.value)


def launch(call: Head, table: Tensor, fault: int, programs: int) -> None:
    """Put the kernel on the current stream of the call's device."""
    device = torch.cuda.device(call.device) if call.device >= 0 else contextlib.nullcontext()
    with device:
        KERNELS[call.kernel][(programs,)](table, fault, WIDTH=call.width, CHUNKED=bool(call.is_chunked), **OPTIONS)
