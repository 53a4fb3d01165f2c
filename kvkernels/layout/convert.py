"""Blocks of one cache become blocks of another, whatever the two layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvkernels.common.autograd import check_may_write
from kvkernels.layout.cache import KVCache
from kvkernels.layout.plan import plan_of
from kvkernels.layout.traced import caches_of, register, tensors_and_text
from kvkernels.ops import copy_pages

#: A cache, or one a rank.
Caches: TypeAlias = "KVCache | Sequence[KVCache]"


def convert_blocks(
    src: Caches, dst: Caches, mapping: Tensor, *, layer: int | None = None, allow_partial: bool = False,
    unit_tokens: int | None = None, skip_negative: bool = False, executor: str = "auto", sm_budget: int = 0,
) -> None:  # fmt: skip
    """Copy blocks between caches of any two layouts, shards of any parallelism included, in one call.

    Parameters
    ----------
    src, dst : KVCache or sequence of KVCache
        The two sides, each on one device. A sequence is one cache a rank; all ranks of a side use the same block ids.
    mapping : Tensor
        int64 or int32 ``[n, 2]``, on the CPU or the caches' CUDA device: (source id, destination id). Where the sides'
        block sizes differ, an id counts units of as many tokens as divide both: with blocks of 16 and 64 tokens, block
        5 of the latter has the ids 20 to 23 (``expand_blocks``).
    layer : int, optional
        Copy this layer alone, counted over all pipeline stages; by default all.
    allow_partial : bool
        Leave bytes of the destination untouched that no source holds, as where each rank writes its own heads.
    unit_tokens : int, optional
        Tokens that an id stands for; by default as many as divide both block sizes.
    skip_negative : bool
        Skip a pair with a negative id; otherwise it is out of range.
    executor, sm_budget
        As in ``copy_pages``.

    Raises
    ------
    IndexError
        An id on the CPU is out of range.
    ValueError
        The layouts do not hold the same cache, a destination requires a gradient where gradients are recorded, or what
        ``copy_pages`` refuses.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and the destination is undefined.

    Notes
    -----
    Checks, streams, graph capture and ids on a device are as in ``copy_pages``, which carries it out as one launch or
    one batch. The plan is compiled once for a pair of layouts and cached, a layer's runs when that layer is copied. In
    a graph that is compiled or exported it is one op, for which the caches may be made inside the graph or outside.

    Examples
    --------
    Two heads of two tokens, from token-first to head-first:

    >>> import torch
    >>> from kvkernels import KVCache, KVLayout, convert_blocks
    >>> sizes = dict(B=1, N=2, H=2, D=1, dtype=torch.uint8)
    >>> nhd = KVCache(KVLayout("B N H D", **sizes), torch.tensor([[[[1], [2]], [[3], [4]]]], dtype=torch.uint8))
    >>> hnd = KVCache(KVLayout("B H N D", **sizes), torch.zeros(1, 2, 2, 1, dtype=torch.uint8))
    >>> convert_blocks(nhd, hnd, torch.tensor([[0, 0]]))
    >>> hnd.tensors[0].flatten().tolist()
    [1, 3, 2, 4]
    """
    if not isinstance(mapping, Tensor):
        raise ValueError(f"convert_blocks: mapping must be a Tensor, got {type(mapping).__name__}")
    src_caches, dst_caches = as_caches("convert_blocks", "src", src), as_caches("convert_blocks", "dst", dst)
    if torch.compiler.is_compiling():
        (src_tensors, src_layouts), (dst_tensors, dst_layouts) = map(tensors_and_text, (src_caches, dst_caches))
        _convert_blocks(
            src_tensors, dst_tensors, mapping, src_layouts, dst_layouts, layer, allow_partial, unit_tokens,
            skip_negative, executor, sm_budget,
        )  # fmt: skip
    else:
        convert_caches(
            src_caches, dst_caches, mapping, layer, allow_partial, unit_tokens, skip_negative, executor, sm_budget
        )


def convert_caches(
    src_caches: Sequence[KVCache], dst_caches: Sequence[KVCache], mapping: Tensor, layer: int | None,
    allow_partial: bool, unit_tokens: int | None, skip_negative: bool, executor: str, sm_budget: int,
) -> None:  # fmt: skip
    """``convert_blocks`` where no compiler traces it, or inside the op that the compiler sees."""
    check_may_write("convert_blocks", "dst", True, [tensor for cache in dst_caches for tensor in cache.tensors])
    plan = plan_of(
        [cache.layout for cache in src_caches], [cache.layout for cache in dst_caches],
        allow_partial=allow_partial, unit_tokens=unit_tokens,
    )  # fmt: skip
    copy_pages(
        [pool for cache in src_caches for pool in cache.pools],
        [pool for cache in dst_caches for pool in cache.pools],
        mapping, plan.runs.of(layer), plan.src_subblocks, plan.dst_subblocks, skip_negative, executor, sm_budget,
    )  # fmt: skip


def _convert_op(
    src: Sequence[Tensor], dst: Sequence[Tensor], mapping: Tensor, src_layouts: str, dst_layouts: str,
    layer: int | None, allow_partial: bool, unit_tokens: int | None, skip_negative: bool, executor: str, sm_budget: int,
) -> None:  # fmt: skip
    convert_caches(
        caches_of(src, src_layouts), caches_of(dst, dst_layouts), mapping, layer, allow_partial, unit_tokens,
        skip_negative, executor, sm_budget,
    )  # fmt: skip


_convert_blocks = register("_convert_blocks", _convert_op)


def as_caches(op: str, name: str, caches: Caches) -> tuple[KVCache, ...]:
    """A list of at least one, or ValueError."""
    result = (caches,) if isinstance(caches, KVCache) else tuple(caches) if isinstance(caches, Sequence) else ()
    if not result or not all(isinstance(cache, KVCache) for cache in result):
        raise ValueError(f"{op}: {name} must be a KVCache or a list of them, got {caches!r}")
    return result
