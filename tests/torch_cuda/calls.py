"""A small call of every op, with its tensors anywhere."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

OPS = ("swap_blocks", "swap_blocks_batch", "gather_blocks", "scatter_blocks", "copy_pages", "concat", "split")
PAGE_BYTES = 64
# Parameters of tests: a device, of which there may be only one; an executor, which not every device has.
DEVICES = [0, pytest.param(1, marks=pytest.mark.cuda(devices=2))]
BULK = pytest.param("bulk", marks=pytest.mark.cuda(bulk=True))
# Torch before 2.13 hands out no words of its own errors.
OUT_OF_MEMORY_WORDS = "CUDA out of memory" if torch.__version__ >= (2, 13) else ""
Place = Callable[[Tensor], Tensor]


@dataclass
class Call:
    """``tensors`` are what is read and written; raw addresses keep nothing alive."""

    op: str
    arguments: tuple[Any, ...]
    tensors: list[Tensor]

    def run(self, **options: Any) -> None:
        getattr(torch.ops.kvkernels, self.op)(*self.arguments, **options)

    def bytes(self) -> list[list[int]]:
        return [t.cpu().flatten().tolist() for t in self.tensors]


def on(device: int) -> Place:
    return lambda t: t.to(f"cuda:{device}")


def pageable(t: Tensor) -> Tensor:
    return t.clone()


def pinned(t: Tensor) -> Tensor:
    return t.pin_memory()


def places(direction: str, device: int) -> tuple[Place, Place]:
    """Where the source and the destination go; the host's side is pinned."""
    side = {"h": pinned, "d": on(device)}
    return side[direction[0]], side[direction[-1]]


def make(op: str, src_place: Place, dst_place: Place, page_bytes: int = PAGE_BYTES) -> Call:
    pool = src_place(torch.arange(4 * page_bytes).to(torch.uint8).reshape(4, page_bytes))
    out = dst_place(torch.full((4, page_bytes), 255, dtype=torch.uint8))
    mapping, ids = torch.tensor([[3, 0], [0, 2]]), torch.tensor([3, 0])
    whole_page = torch.tensor([[0, 0, 0, 0, page_bytes, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
    arguments: dict[str, tuple[str, tuple[Any, ...]]] = {
        "swap_blocks": ("swap_blocks", (pool, out, page_bytes, mapping)),
        "swap_blocks_batch": (
            "swap_blocks_batch",
            (
                pool.data_ptr() + page_bytes * mapping[:, 0],
                out.data_ptr() + page_bytes * mapping[:, 1],
                torch.full((2,), page_bytes),
            ),
        ),
        "gather_blocks": ("gather_blocks", ([pool], ids, out[:2])),
        "scatter_blocks": ("scatter_blocks", (pool[:2], ids, [out])),
        "copy_pages": ("copy_pages", ([pool], [out], mapping, whole_page)),
        "concat": ("concat_tp_shards_out", ([pool[:, :16], pool[:, 16:32]], 0, out.view(8, page_bytes // 2)[:, 8:24])),
        "split": ("split_tp_shards", (pool, 0, [out[:1], out[1:]])),
    }
    return Call(*arguments[op], [pool, out])


def other_device(device: int) -> int:
    """Another device than this, if there is one."""
    return (device + 1) % torch.cuda.device_count()


def reads_pageable() -> bool:
    """Whether the device reads memory that nobody pinned, which some tests want to see refused."""
    pageable_memory_access, value = 88, ctypes.c_int()
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")  # torch's, which is loaded
    assert runtime.cudaDeviceGetAttribute(ctypes.byref(value), pageable_memory_access, 0) == 0
    return bool(value.value)


def issued(sim: Any) -> list[dict[str, Any]]:
    """The copies and launches that CUDA was asked for, in order."""
    return [entry for entry in sim.log() if entry["call"] in ("cudaMemcpyAsync", "cuMemcpyBatchAsync", "launch")]
