"""Transfers of several groups' blocks between two sides of canonical pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvkernels.common.arguments import dtype_text, has_values, integer, integers, shape_text
from kvkernels.layout.blocks import expand_blocks, whole_page_runs
from kvkernels.layout.canonical import CanonicalKVCaches, CanonicalKVCacheTensor
from kvkernels.layout.together import all_or_none
from kvkernels.ops import copy_pages


def empty_host_caches(
    caches: CanonicalKVCaches, num_blocks: int | Sequence[int], *, blocks_per_host_block: int = 1,
    pin_memory: bool = False,
) -> CanonicalKVCaches:  # fmt: skip
    """Host memory for the pages of canonical caches: the same tensors and references, with other blocks.

    Parameters
    ----------
    caches : CanonicalKVCaches
        The engine's side.
    num_blocks : int or sequence of int
        Host blocks, of all groups or of each; a tensor that several groups use has as many as the largest needs.
    blocks_per_host_block : int
        Engine blocks that a host block holds, one after the other.
    pin_memory : bool
        Page-locked memory, which a GPU copies from and to without waiting.

    Examples
    --------
    >>> import torch
    >>> from kvkernels.layout import canonicalize, empty_host_caches
    >>> from kvkernels.layout.specs import KVCacheGroup, MLA
    >>> spec = MLA(block_size=4, head_size=8, dtype=torch.float16)
    >>> engine = canonicalize({"a": torch.zeros(6, 4, 8, dtype=torch.float16)}, [KVCacheGroup(["a"], spec)])
    >>> empty_host_caches(engine, 2, blocks_per_host_block=3).tensors[0].tensor.shape
    torch.Size([2, 192])
    """
    what, is_each = "empty_host_caches: num_blocks", isinstance(num_blocks, (list, tuple))
    given = integers(what, num_blocks) if is_each else [integer(what, num_blocks)]
    blocks_per_host_block = integer("empty_host_caches: blocks_per_host_block", blocks_per_host_block)
    if blocks_per_host_block < 1 or any(count < 0 for count in given):
        wrong = f"num_blocks {num_blocks} and blocks_per_host_block {blocks_per_host_block}"
        raise ValueError(f"empty_host_caches: blocks must be counted from 0, and from 1 in a host block, got {wrong}")
    counts = _of_each_tensor(caches, given) if is_each else given * len(caches.tensors)
    tensors = []
    for one, count in zip(caches.tensors, counts, strict=True):
        page = one.page_size_bytes * blocks_per_host_block
        tensor = torch.empty(count, page, dtype=torch.int8, device="cpu", pin_memory=pin_memory)
        tensors.append(CanonicalKVCacheTensor(tensor, page))
    return CanonicalKVCaches(tensors, caches.group_data_refs)


def _of_each_tensor(caches: CanonicalKVCaches, of_group: list[int]) -> list[int]:
    groups = len(caches.group_data_refs)
    if len(of_group) != groups:
        raise ValueError(
            f"empty_host_caches: num_blocks must be one number, or one a group of {groups}, got {of_group}"
        )
    counts = [0] * len(caches.tensors)
    for count, refs in zip(of_group, caches.group_data_refs, strict=True):
        for ref in refs:
            counts[ref.tensor_idx] = max(counts[ref.tensor_idx], count)
    return counts


def copy_groups(
    src: CanonicalKVCaches, dst: CanonicalKVCaches, src_block_ids: Tensor, dst_block_ids: Tensor,
    group_sizes: Sequence[int], *, first_blocks: Sequence[int] | None = None, executor: str = "auto",
    sm_budget: int = 0,
) -> int:  # fmt: skip
    """Copy blocks of several groups from one side to the other.

    Parameters
    ----------
    src, dst : CanonicalKVCaches
        The two sides, with the same tensors and references. A side may have larger blocks, whole multiples of the
        other's: a host block of several engine blocks. Groups may have pools of different lengths: an id is below the
        shortest pool of its group.
    src_block_ids, dst_block_ids : Tensor
        int64 or int32 on the CPU: the groups' ids, one group after the other. On the side with larger blocks they name
        those, as many as a group's blocks reach into.
    group_sizes : sequence of int
        Of each group, how many blocks to copy, counted in the smaller blocks; 0 for none.
    first_blocks : sequence of int, optional
        Of each group, how many of the smaller blocks to skip in its first larger block. 0 by default.
    executor, sm_budget
        As in ``copy_pages``.

    Returns
    -------
    int
        Bytes copied: over the groups, their size times their tensors' pages without padding; of layers that share a
        tensor in one group, the largest page.

    Raises
    ------
    IndexError
        A block id is out of range.
    ValueError
        The sides do not match, or the ids are not as many as the sizes say.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and the destination is undefined.

    Notes
    -----
    Everything is checked before the first group is copied. A group is one call of ``copy_pages``, whose notes on
    streams and graph capture hold.

    Examples
    --------
    Engine blocks 4 and 1 go to the end of host block 0 and the beginning of host block 1:

    >>> import torch
    >>> from kvkernels.layout import canonicalize, copy_groups, empty_host_caches
    >>> from kvkernels.layout.specs import KVCacheGroup, MLA
    >>> spec = MLA(block_size=1, head_size=1, dtype=torch.uint8)
    >>> engine = canonicalize({"a": torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1)}, [KVCacheGroup(["a"], spec)])
    >>> host = empty_host_caches(engine, 2, blocks_per_host_block=2)
    >>> _ = host.tensors[0].tensor.zero_()
    >>> copy_groups(engine, host, torch.tensor([4, 1]), torch.tensor([0, 1]), [2], first_blocks=[1])
    2
    >>> host.tensors[0].tensor.tolist()
    [[0, 4], [1, 0]]
    """
    for name, ids in (("src_block_ids", src_block_ids), ("dst_block_ids", dst_block_ids)):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.device.type != "cpu":
            kind = f"{dtype_text(ids.dtype)} on {ids.device}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"copy_groups: {name} must be an int64 or int32 Tensor on the cpu, got {kind}")
    ratios = _ratios(src, dst)
    sizes = integers("copy_groups: group_sizes", group_sizes)
    skips = [0] * len(sizes) if first_blocks is None else integers("copy_groups: first_blocks", first_blocks)
    _check_sizes(len(src.group_data_refs), sizes, skips, max(ratios))
    src_ids = _expanded("src_block_ids", src_block_ids, sizes, skips, ratios[0])
    dst_ids = _expanded("dst_block_ids", dst_block_ids, sizes, skips, ratios[1])
    transfers = [
        _transfer(src, dst, group, torch.stack((src_ids[group], dst_ids[group]), dim=1), ratios)
        for group, size in enumerate(sizes) if size and src.group_data_refs[group]
    ]  # fmt: skip
    calls = [
        partial(copy_pages, t.src, t.dst, t.mapping, t.runs, ratios[0], ratios[1], False, executor, sm_budget)
        for t in transfers
    ]
    ids_are_known = all(map(has_values, (src_block_ids, dst_block_ids)))
    if ids_are_known:
        _check_written_once(transfers, ratios[1])
        _check_not_read(src, dst, transfers, ratios)
    all_or_none(calls, ids_are_known)
    return sum(transfer.bytes for transfer in transfers)


@dataclass(frozen=True)
class _Transfer:
    """One group's call of copy_pages."""

    tensors: list[int]
    src: list[Tensor]
    dst: list[Tensor]
    mapping: Tensor
    runs: Tensor
    bytes: int


def _transfer(
    src: CanonicalKVCaches, dst: CanonicalKVCaches, group: int, mapping: Tensor, ratios: tuple[int, int]
) -> _Transfer:
    largest: dict[int, int] = {}
    for ref in src.group_data_refs[group]:
        largest[ref.tensor_idx] = max(ref.page_size_bytes, largest.get(ref.tensor_idx, 0))
    tensors, pages = list(largest), list(largest.values())
    pools = [[side.tensors[i].tensor for i in tensors] for side in (src, dst)]
    # A larger block's row is longer than a page: the smaller side's pools have the pages.
    runs = whole_page_runs(pools[ratios[0] > 1], pages)
    for i, (name, side) in enumerate((("src", src), ("dst", dst))):
        if ratios[i] > 1:
            strides = [side.tensors[t].page_size_bytes // ratios[i] for t in tensors]
            runs[:, 5 + i] = torch.tensor(strides, dtype=torch.int64, device="cpu")
        if not has_values(mapping):
            continue
        limit = min(len(pool) for pool in pools[i]) * ratios[i]
        outside = mapping[:, i][(mapping[:, i] < 0) | (mapping[:, i] >= limit)]
        if len(outside):
            bad, blocks = int(outside[0]) // ratios[i], limit // ratios[i]
            raise IndexError(f"copy_groups: {name}_block_ids has {bad} in group {group}, of {blocks} blocks")
    return _Transfer(tensors, pools[0], pools[1], mapping, runs, len(mapping) * sum(pages))


def _check_written_once(transfers: Sequence[_Transfer], ratio: int) -> None:
    """Over all groups: those that share a tensor must not write the same block of it."""
    for tensor, mapping in _mappings(transfers):
        values, counts = torch.unique(mapping[:, 1], return_counts=True)
        if (counts > 1).any():
            twice = int(values[counts > 1][0]) // ratio
            raise ValueError(f"copy_groups: dst_block_ids must name a block once, got {twice} of tensor {tensor} twice")


def _check_not_read(
    src: CanonicalKVCaches, dst: CanonicalKVCaches, transfers: Sequence[_Transfer], ratios: tuple[int, int]
) -> None:
    """Over all groups: what one writes, none reads, whichever of them comes first."""
    read = {src.tensors[t].tensor.untyped_storage().data_ptr() for transfer in transfers for t in transfer.tensors}
    shared = [one for one in dst.tensors if one.tensor.untyped_storage().data_ptr() in read]
    if not shared or not transfers:
        return
    if ratios != (1, 1) or any(
        a.tensor.data_ptr() != b.tensor.data_ptr() for a, b in zip(src.tensors, dst.tensors, strict=True)
    ):
        raise ValueError(
            "copy_groups: src and dst must be the same caches or share no storage, got parts of one storage"
        )
    for tensor, mapping in _mappings(transfers):
        both = np.intersect1d(mapping[:, 0].numpy(), mapping[:, 1].numpy())
        if len(both):
            raise ValueError(f"copy_groups: no block must be read and written, got block {both[0]} of tensor {tensor}")


def _mappings(transfers: Sequence[_Transfer]) -> Iterator[tuple[int, Tensor]]:
    """The pairs of all groups that use a tensor; of tensors that the same groups use, the first stands for all."""
    groups_of_tensor: dict[int, list[int]] = {}
    for group, transfer in enumerate(transfers):
        for tensor in transfer.tensors:
            groups_of_tensor.setdefault(tensor, []).append(group)
    first_of_groups: dict[tuple[int, ...], int] = {}
    for tensor in sorted(groups_of_tensor):
        first_of_groups.setdefault(tuple(groups_of_tensor[tensor]), tensor)
    for groups, tensor in first_of_groups.items():
        yield tensor, torch.cat([transfers[group].mapping for group in groups])


def _ratios(src: CanonicalKVCaches, dst: CanonicalKVCaches) -> tuple[int, int]:
    """Of the smaller blocks, how many make one of each side's."""
    if len(src.tensors) != len(dst.tensors) or _places(src) != _places(dst):
        raise ValueError(
            f"copy_groups: src and dst must have the same tensors and references, got {len(src.tensors)} and "
            f"{len(dst.tensors)} tensors"
        )
    pages = [(a.page_size_bytes, b.page_size_bytes) for a, b in zip(src.tensors, dst.tensors, strict=True)]
    ratios = {(max(a // b, 1), max(b // a, 1)) for a, b in pages}
    exact = all(a % b == 0 or b % a == 0 for a, b in pages)
    if not exact or len(ratios) > 1:
        raise ValueError(f"copy_groups: one side's pages must be one multiple of the other's, got {pages}")
    return ratios.pop() if ratios else (1, 1)


def _places(caches: CanonicalKVCaches) -> list[list[tuple[int, int]]]:
    return [[(ref.tensor_idx, ref.page_size_bytes) for ref in refs] for refs in caches.group_data_refs]


def _check_sizes(groups: int, group_sizes: Sequence[int], skips: Sequence[int], ratio: int) -> None:
    given = (len(group_sizes), len(skips))
    if given != (groups, groups):
        raise ValueError(f"copy_groups: group_sizes and first_blocks must have {groups} groups, got {given}")
    if any(size < 0 for size in group_sizes):
        raise ValueError(f"copy_groups: group_sizes must not be negative, got {list(group_sizes)}")
    if any(not 0 <= skip < ratio for skip in skips):
        raise ValueError(f"copy_groups: first_blocks must lie inside a block of {ratio}, got {list(skips)}")


def _expanded(name: str, ids: Tensor, sizes: Sequence[int], skips: Sequence[int], ratio: int) -> list[Tensor]:
    """Each group's ids in smaller blocks."""
    counts = list(sizes)
    if ratio > 1:
        counts = [-(-(skip + size) // ratio) if size else 0 for size, skip in zip(sizes, skips, strict=True)]
    if ids.dim() != 1 or len(ids) != sum(counts):
        wanted = f"[{sum(counts)}], which the group sizes make {counts}"
        raise ValueError(f"copy_groups: {name} must be {wanted}, got {shape_text(ids.shape)}")
    parts = [part.to(torch.int64) for part in ids.split(counts)]
    if ratio == 1:
        return parts
    return [
        expand_blocks(part, ratio, skip if size else 0, size)
        for part, skip, size in zip(parts, skips, sizes, strict=True)
    ]
