"""Fake kernels: what torch.compile and meta tensors meet. They check what the real ops check, except values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.reference import checks
from kvkernels.registration import schemas
from kvkernels.registration.library import LIBRARY


def swap_blocks(
    src: Tensor,
    dst: Tensor,
    block_size_in_bytes: int,
    block_mapping: Tensor,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    checks.check_swap_blocks(src, dst, block_size_in_bytes, block_mapping, executor, sm_budget)


def swap_blocks_batch(
    src_ptrs: Tensor,
    dst_ptrs: Tensor,
    sizes: Tensor,
    is_src_access_order_any: bool = False,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    checks.check_swap_blocks_batch(src_ptrs, dst_ptrs, sizes, executor, sm_budget)


def gather_blocks(
    pools: Sequence[Tensor], block_ids: Tensor, out: Tensor, executor: str = "auto", sm_budget: int = 0
) -> None:
    checks.check_gather_blocks(pools, block_ids, out, executor, sm_budget)


def scatter_blocks(
    buffer: Tensor, block_ids: Tensor, pools: Sequence[Tensor], executor: str = "auto", sm_budget: int = 0
) -> None:
    checks.check_scatter_blocks(buffer, block_ids, pools, executor, sm_budget)


def copy_pages(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    mapping: Tensor,
    runs: Tensor,
    src_subblocks_per_block: int = 1,
    dst_subblocks_per_block: int = 1,
    skip_negative: bool = False,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    checks.check_copy_pages(
        src, dst, mapping, runs, src_subblocks_per_block, dst_subblocks_per_block, executor, sm_budget
    )


def concat_tp_shards(shards: Sequence[Tensor], dim: int, executor: str = "auto", sm_budget: int = 0) -> Tensor:
    _, shape = checks.check_concat_tp_shards(shards, dim, executor, sm_budget)
    return shards[0].new_empty(shape)


def concat_tp_shards_out(
    shards: Sequence[Tensor], dim: int, out: Tensor, executor: str = "auto", sm_budget: int = 0
) -> None:
    checks.check_concat_tp_shards_out(shards, dim, out, executor, sm_budget)


def split_tp_shards(input: Tensor, dim: int, out: Sequence[Tensor], executor: str = "auto", sm_budget: int = 0) -> None:
    checks.check_split_tp_shards(input, dim, out, executor, sm_budget)


def _copy_pages_reference(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    mapping: Tensor,
    runs: Tensor,
    src_subblocks_per_block: int,
    dst_subblocks_per_block: int,
    skip_negative: bool,
) -> None:
    """Only C++ calls it, after its own checks."""


def _swap_blocks_reference(src: Tensor, dst: Tensor, block_size_in_bytes: int, block_mapping: Tensor) -> None:
    """Only C++ calls it, after its own checks."""


def _swap_blocks_batch_reference(copies: Tensor) -> None:
    """Only C++ calls it, after its own checks."""


def _concat_tp_shards_reference(shards: Sequence[Tensor], dim: int, out: Tensor) -> None:
    """Only C++ calls it, after its own checks."""


def _split_tp_shards_reference(input: Tensor, dim: int, out: Sequence[Tensor]) -> None:
    """Only C++ calls it, after its own checks."""


def _first_requiring_grad(tensors: Sequence[Tensor]) -> int:
    """Only C++ calls it."""
    return -1


def _note_writes(tensors: Sequence[Tensor]) -> None:
    """Only C++ calls it."""


def _peer_refusal(device: int, peer: int, enables: bool) -> Tensor:
    """Only C++ calls it."""
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def _triton_refusal(device: int) -> Tensor:
    """Only C++ calls it."""
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def _triton_copy(table: Tensor, head: Sequence[int]) -> None:
    """Only C++ calls it, after its own checks."""


for _op in (*schemas.PUBLIC, *schemas.PYTHON_KERNELS):
    torch.library.register_fake(f"{schemas.NAMESPACE}::{_op}", globals()[_op], lib=LIBRARY.registrations)
