"""Argument checks that need no data: the reference and the fake kernels share them, sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvkernels.common.arguments import INT64_MAX, RUN_COLUMNS, dtype_text, shape_text

EXECUTORS = ("auto", "cpu", "kernel", "bulk", "dma", "staged", "triton", "reference")

_ID_DTYPES = (torch.int64, torch.int32)
_POINTER_DTYPES = (torch.int64, torch.uint64)


@dataclass(frozen=True)
class Pool:
    """A tensor as blocks: block ``i`` is the ``page_bytes`` at ``i * block_stride`` bytes from its data pointer."""

    name: str
    tensor: Tensor
    blocks: int
    block_stride: int
    page_bytes: int


def _geometry_text(t: Tensor) -> str:
    return f"shape {shape_text(t.shape)} and strides {shape_text(t.stride())}"


def require(condition: Any, message: Callable[[], str]) -> None:
    """Raise ValueError unless the condition, which may be symbolic, holds."""
    torch._check_value(condition, message)


def check_executor(op: str, executor: str, sm_budget: int) -> None:
    names = ", ".join(f"'{name}'" for name in EXECUTORS)
    require(executor in EXECUTORS, lambda: f"{op}: executor must be one of {names}, got '{executor}'")
    require(sm_budget >= 0, lambda: f"{op}: sm_budget must not be negative, got {sm_budget}")


def check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    require(len(tensors) > 0, lambda: f"{op}: {name} must not be empty")


def check_tensor(op: str, name: str, t: Tensor) -> None:
    """Device, layout, and memory behind every element."""
    require(
        t.device.type in ("cpu", "cuda"),
        lambda: f"{op}: {name} must be on the cpu or a cuda device, got {t.device}",
    )
    require(
        t.layout == torch.strided,
        lambda: f"{op}: {name} must be a strided tensor, got layout {t.layout}",
    )
    require(
        _memory_is_there(t),
        lambda: f"{op}: {name} must lie inside its storage, got {_geometry_text(t)} on a smaller storage",
    )


def _memory_is_there(t: Tensor) -> bool:
    # A storage may have been resized under its tensor, and some packed dtypes have less than a byte an element.
    if hasattr(t, "fake_mode") or t.numel() == 0:
        return True
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return bool((last + 1) * t.element_size() <= t.untyped_storage().nbytes())


def check_dimensioned(op: str, name: str, t: Tensor) -> None:
    require(
        t.dim() > 0,
        lambda: f"{op}: {name} must have at least one dimension, got shape {shape_text(t.shape)}",
    )


def check_one_cuda_device(op: str, tensors: Sequence[Tensor]) -> None:
    devices = list(dict.fromkeys(t.device for t in tensors if t.device.type == "cuda"))
    require(
        len(devices) <= 1,
        lambda: f"{op}: tensors must be on one cuda device, got {devices[0]} and {devices[1]}",
    )


def _check_one_place(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    check_one_cuda_device(op, tensors)
    devices = list(dict.fromkeys(t.device for t in tensors))
    require(
        len(devices) == 1,
        lambda: f"{op}: {name} must be on one device, got {devices[0]} and {devices[1]}",
    )


def check_dtype(op: str, name: str, t: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    wanted = " or ".join(dtype_text(d) for d in dtypes)
    require(t.dtype in dtypes, lambda: f"{op}: {name} must be {wanted}, got {dtype_text(t.dtype)}")


def _check_on_host(op: str, name: str, t: Tensor) -> None:
    require(t.device.type == "cpu", lambda: f"{op}: {name} must be on the cpu, got {t.device}")


def check_ids(op: str, name: str, t: Tensor, columns: int, sides: tuple[Tensor, Tensor] | None) -> None:
    """Ids of shape ``[n]`` (columns 1) or ``[n, 2]``; ``sides``: a tensor of each, or None for ids on the CPU alone."""
    check_tensor(op, name, t)
    check_dtype(op, name, t, _ID_DTYPES)
    wanted = "[n]" if columns == 1 else f"[n, {columns}]"
    require(
        t.dim() == 1 if columns == 1 else t.dim() == 2 and t.shape[1] == columns,
        lambda: f"{op}: {name} must have shape {wanted}, got {shape_text(t.shape)}",
    )
    if sides is None:
        _check_on_host(op, name, t)
        return
    src, dst = (side.device for side in sides)
    whose = "pools'" if "cpu" in (src.type, dst.type) or src == dst else "source's"
    require(
        t.device.type == "cpu" or t.device == (dst if src.type == "cpu" else src),
        lambda: f"{op}: {name} must be on the cpu or on the {whose} cuda device, got {t.device}",
    )


def _rows_are_contiguous(t: Tensor) -> Any:
    expected: Any = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def _is_dense(shape: Sequence[Any], strides: Sequence[Any]) -> Any:
    """Whether the elements lie without a gap, in whatever order the dimensions are shown."""
    if any(size == 0 for size in shape):
        return True
    expected: Any = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != expected:
            return False
        expected = expected * size
    return True


def _row_elements(t: Tensor) -> Any:
    elements: Any = 1
    for size in t.shape[1:]:
        elements = elements * size
    return elements


def _may_exceed_one(size: Any) -> bool:
    if isinstance(size, int):
        return size > 1
    # A compiled graph may not know how many rows a data-dependent tensor has.
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(size > 1)


def pool_of(op: str, name: str, t: Tensor) -> Pool:
    """A tensor whose dimension 0 is the block id; its rows must be contiguous and not overlap."""
    page_bytes = _row_elements(t) * t.element_size()
    require(
        page_bytes == 0 or _rows_are_contiguous(t),
        lambda: f"{op}: {name} must have contiguous rows, got {_geometry_text(t)}",
    )
    require(
        page_bytes > 0,
        lambda: f"{op}: {name} must have pages of at least one byte, got shape {shape_text(t.shape)}",
    )
    # A single block is never stepped from, so its stride says nothing.
    stride_bytes = t.stride(0) * t.element_size() if _may_exceed_one(t.shape[0]) else page_bytes
    require(
        stride_bytes >= page_bytes,
        lambda: (
            f"{op}: {name} must have a row stride of at least its page of {page_bytes} bytes, got {stride_bytes} bytes"
        ),
    )
    return Pool(name, t, t.shape[0], stride_bytes, page_bytes)


def pools_of(op: str, name: str, tensors: Sequence[Tensor]) -> list[Pool]:
    """A list of pools on one device."""
    pools = []
    for i, t in enumerate(tensors):
        check_tensor(op, f"{name}[{i}]", t)
        check_dimensioned(op, f"{name}[{i}]", t)
        pools.append(pool_of(op, f"{name}[{i}]", t))
    _check_one_place(op, name, tensors)
    return pools


def blocks_of_bytes(op: str, name: str, t: Tensor, block_bytes: int) -> Pool:
    """swap_blocks' view of a tensor: a row of blocks where contiguous, one block a padded row otherwise."""
    row_bytes = _row_elements(t) * t.element_size()
    # Head-first memory is often shown as token-first: what counts inside a row is that its bytes are dense.
    has_dense_rows = t.dim() > 0 and _is_dense(t.shape[1:], t.stride()[1:])
    if t.is_contiguous() or (has_dense_rows and t.stride(0) * t.element_size() == row_bytes):
        total_bytes = t.numel() * t.element_size()
        require(
            total_bytes % block_bytes == 0,
            lambda: f"{op}: {name} must hold a whole number of blocks of {block_bytes} bytes, got {total_bytes} bytes",
        )
        return Pool(name, t, total_bytes // block_bytes, block_bytes, block_bytes)
    stride_bytes = t.stride(0) * t.element_size()
    require(
        has_dense_rows and row_bytes == block_bytes and stride_bytes > block_bytes,
        lambda: (
            f"{op}: {name} must be contiguous or have rows of {block_bytes} bytes at a larger stride, "
            f"got {_geometry_text(t)}"
        ),
    )
    return Pool(name, t, t.shape[0], stride_bytes, block_bytes)


def check_swap_blocks(
    src: Tensor, dst: Tensor, block_size_in_bytes: int, block_mapping: Tensor, executor: str, sm_budget: int
) -> tuple[Pool, Pool]:
    op = "swap_blocks"
    check_executor(op, executor, sm_budget)
    require(
        block_size_in_bytes > 0,
        lambda: f"{op}: block_size_in_bytes must be positive, got {block_size_in_bytes}",
    )
    check_tensor(op, "src", src)
    check_tensor(op, "dst", dst)
    check_ids(op, "block_mapping", block_mapping, 2, None)
    return blocks_of_bytes(op, "src", src, block_size_in_bytes), blocks_of_bytes(op, "dst", dst, block_size_in_bytes)


def check_swap_blocks_batch(src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor, executor: str, sm_budget: int) -> None:
    op = "swap_blocks_batch"
    check_executor(op, executor, sm_budget)
    check_tensor(op, "src_ptrs", src_ptrs)
    check_dtype(op, "src_ptrs", src_ptrs, _POINTER_DTYPES)
    require(
        src_ptrs.dim() == 1,
        lambda: f"{op}: src_ptrs must have shape [n], got {shape_text(src_ptrs.shape)}",
    )
    _check_on_host(op, "src_ptrs", src_ptrs)
    for name, t, dtypes in (("dst_ptrs", dst_ptrs, _POINTER_DTYPES), ("sizes", sizes, _ID_DTYPES)):
        check_tensor(op, name, t)
        check_dtype(op, name, t, dtypes)
        _check_exact_shape(op, name, t, src_ptrs.shape)
        _check_on_host(op, name, t)


def _check_exact_shape(op: str, name: str, t: Tensor, shape: Sequence[int]) -> None:
    require(
        t.dim() == len(shape) and _all_equal(t.shape, shape),
        lambda: f"{op}: {name} must have shape {shape_text(shape)}, got {shape_text(t.shape)}",
    )


def _all_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(x == y for x, y in zip(a, b, strict=True))


def _check_pools_and_buffer(
    op: str, pools: Sequence[Tensor], block_ids: Tensor, name: str, buffer: Tensor
) -> tuple[list[Pool], Pool]:
    check_list(op, "pools", pools)
    parts = pools_of(op, "pools", pools)
    check_ids(op, "block_ids", block_ids, 1, (pools[0], buffer) if name == "out" else (buffer, pools[0]))
    check_tensor(op, name, buffer)
    row_bytes = sum(p.page_bytes for p in parts)
    shape = (block_ids.shape[0], row_bytes)
    require(
        buffer.dtype == torch.uint8 and buffer.dim() == 2 and _all_equal(buffer.shape, shape),
        lambda: (
            f"{op}: {name} must be uint8 of shape {shape_text(shape)}, "
            f"got {dtype_text(buffer.dtype)} of shape {shape_text(buffer.shape)}"
        ),
    )
    return parts, pool_of(op, name, buffer)


def check_gather_blocks(
    pools: Sequence[Tensor], block_ids: Tensor, out: Tensor, executor: str, sm_budget: int
) -> tuple[list[Pool], Pool]:
    check_executor("gather_blocks", executor, sm_budget)
    return _check_pools_and_buffer("gather_blocks", pools, block_ids, "out", out)


def check_scatter_blocks(
    buffer: Tensor, block_ids: Tensor, pools: Sequence[Tensor], executor: str, sm_budget: int
) -> tuple[list[Pool], Pool]:
    check_executor("scatter_blocks", executor, sm_budget)
    return _check_pools_and_buffer("scatter_blocks", pools, block_ids, "buffer", buffer)


def check_copy_pages(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    mapping: Tensor | None,
    runs: Tensor,
    src_subblocks_per_block: int,
    dst_subblocks_per_block: int,
    executor: str,
    sm_budget: int,
    op: str = "copy_pages",
) -> tuple[list[Pool], list[Pool]]:
    """``mapping`` is None where it comes later."""
    check_executor(op, executor, sm_budget)
    check_list(op, "src", src)
    check_list(op, "dst", dst)
    src_pools, dst_pools = pools_of(op, "src", src), pools_of(op, "dst", dst)
    if mapping is not None:
        check_ids(op, "mapping", mapping, 2, (src[0], dst[0]))
    _check_subblocks(op, "src", src_subblocks_per_block, src_pools)
    _check_subblocks(op, "dst", dst_subblocks_per_block, dst_pools)
    require(
        runs.dtype == torch.int64 and runs.dim() == 2 and runs.shape[1] == RUN_COLUMNS and runs.device.type == "cpu",
        lambda: (
            f"{op}: runs must be int64 of shape [r, {RUN_COLUMNS}] on the cpu, "
            f"got {dtype_text(runs.dtype)} of shape {shape_text(runs.shape)} on {runs.device}"
        ),
    )
    check_tensor(op, "runs", runs)
    return src_pools, dst_pools


def _check_subblocks(op: str, side: str, subblocks: int, pools: Sequence[Pool]) -> None:
    name = f"{side}_subblocks_per_block"
    require(subblocks > 0, lambda: f"{op}: {name} must be positive, got {subblocks}")
    most = max(pool.blocks for pool in pools)
    require(
        most * subblocks <= INT64_MAX,
        lambda: f"{op}: {name} must leave {side}'s ids in int64, got {subblocks} for {most} blocks",
    )


def _check_dim(op: str, dim: int, ndim: int) -> int:
    require(-ndim <= dim < ndim, lambda: f"{op}: dim must be in [{-ndim}, {ndim}), got {dim}")
    return dim % ndim


def _check_like(op: str, name: str, t: Tensor, model: Tensor, dim: int) -> None:
    """The dtype of ``model`` and its sizes, but for ``dim``."""
    require(
        t.dim() == model.dim(),
        lambda: f"{op}: {name} must have {model.dim()} dimensions, got {t.dim()}",
    )
    for i, wanted in enumerate(model.shape):
        if i != dim:
            _check_size(op, name, t, i, wanted)
    check_dtype(op, name, t, (model.dtype,))


def _check_size(op: str, name: str, t: Tensor, dim: int, wanted: int) -> None:
    require(
        t.shape[dim] == wanted,
        lambda: f"{op}: {name} must have size {wanted} in dimension {dim}, got {t.shape[dim]}",
    )


def _check_on(op: str, name: str, t: Tensor, device: torch.device) -> None:
    require(t.device == device, lambda: f"{op}: {name} must be on {device}, got {t.device}")


def is_expanded(t: Tensor) -> bool:
    """The self-overlap that strides alone give away; the reference looks at the rest exactly."""
    steps = zip(t.shape, t.stride(), strict=True)
    return any(stride == 0 and size != 1 for size, stride in steps) and t.numel() != 0


def self_overlap_text(op: str, t: Tensor) -> str:
    if op == "split_tp_shards":
        return f"{op}: out must not overlap themselves, got a tensor that writes a byte twice"
    return f"{op}: out must not overlap itself, got {_geometry_text(t)}"


def _check_shards(op: str, name: str, shards: Sequence[Tensor], dim: int) -> tuple[int, tuple[int, ...]]:
    """Shards that fit together along ``dim``: the normalised dim and the shape they make."""
    check_list(op, name, shards)
    for i, t in enumerate(shards):
        check_tensor(op, f"{name}[{i}]", t)
        if i == 0:
            check_dimensioned(op, f"{name}[0]", t)
            dim = _check_dim(op, dim, t.dim())
        _check_like(op, f"{name}[{i}]", t, shards[0], dim)
        _check_on(op, f"{name}[{i}]", t, shards[0].device)
    shape = list(shards[0].shape)
    shape[dim] = sum(t.shape[dim] for t in shards)
    return dim, tuple(shape)


def check_concat_tp_shards(
    shards: Sequence[Tensor], dim: int, executor: str, sm_budget: int
) -> tuple[int, tuple[int, ...]]:
    op = "concat_tp_shards"
    check_executor(op, executor, sm_budget)
    result = _check_shards(op, "shards", shards, dim)
    require(
        not shards[0].is_quantized,
        lambda: (
            f"{op}: shards must not be quantized, since a new tensor would lack their scale, "
            f"got {dtype_text(shards[0].dtype)}; concat_tp_shards_out takes a tensor that has one"
        ),
    )
    return result


def check_concat_tp_shards_out(shards: Sequence[Tensor], dim: int, out: Tensor, executor: str, sm_budget: int) -> int:
    op = "concat_tp_shards_out"
    check_executor(op, executor, sm_budget)
    dim, shape = _check_shards(op, "shards", shards, dim)
    check_tensor(op, "out", out)
    _check_exact_shape(op, "out", out, shape)
    check_dtype(op, "out", out, (shards[0].dtype,))
    _check_not_expanded(op, out)
    return dim


def check_split_tp_shards(input: Tensor, dim: int, out: Sequence[Tensor], executor: str, sm_budget: int) -> int:
    op = "split_tp_shards"
    check_executor(op, executor, sm_budget)
    dim, shape = _check_shards(op, "out", out, dim)
    check_tensor(op, "input", input)
    _check_like(op, "input", input, out[0], dim)
    require(
        shape[dim] == input.shape[dim],
        lambda: f"{op}: out must add up to size {input.shape[dim]} in dimension {dim}, got {shape[dim]}",
    )
    for t in out:
        _check_not_expanded(op, t)
    return dim


def _check_not_expanded(op: str, t: Tensor) -> None:
    require(not is_expanded(t), lambda: self_overlap_text(op, t))
