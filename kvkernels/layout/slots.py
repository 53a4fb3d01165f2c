"""Single tokens of a paged cache, to and from contiguous buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from kvkernels.common.arguments import dtype_text, has_values, integer, is_traced, shape_text
from kvkernels.common.autograd import check_may_write
from kvkernels.layout.cache import KVCache
from kvkernels.layout.convert import Caches, as_caches, convert_caches
from kvkernels.layout.layout import KVLayout, parts
from kvkernels.layout.memory import bytes_of_storage
from kvkernels.layout.together import all_or_none
from kvkernels.layout.traced import caches_of, register, tensors_and_text

_DIRECTIONS = ("to_buffer", "to_cache")


def copy_slots(
    cache: Caches, slots: Tensor, buffer: Tensor | Sequence[Tensor], *, direction: str, pattern: str = "K L T H D",
    skip_first: int = 0, executor: str = "auto", sm_budget: int = 0,
) -> None:  # fmt: skip
    """Copy token slots of a paged cache to contiguous buffers, or back.

    Parameters
    ----------
    cache : KVCache or sequence of KVCache
        The paged cache, or one a tensor-parallel rank: the buffer then holds all ranks' heads.
    slots : Tensor
        int64 or int32 ``[T]``, on the CPU or the caches' CUDA device: the slot of each token of the buffer, block times
        block size plus the token's place in the block. A negative slot is skipped. Where tokens are dealt out, slots
        count those that the cache holds itself.
    buffer : Tensor or sequence of Tensor
        A chunk of tokens, or several, which take their slots one after the other: together they have ``T`` tokens. A
        cache of several parts, such as values and their scales, has a tensor a chunk for each of them, one part after
        the other; ``k`` and ``v`` that differ in their order alone are one.
    direction : {'to_buffer', 'to_cache'}
        Where the bytes go.
    pattern : str
        The order of a chunk's memory, as in ``KVLayout`` with ``T`` for its tokens, the same for all parts: a letter
        that a part lacks has size 1. By default LMCache's ``[K, L, T,
        H*D]``, which is ``[1, L, T, D]`` for MLA; SGLang's ``[L, T, H, D]``, one buffer for K and one for V, is
        ``"K | L T H D"``.
    skip_first : int
        Tokens at the start that are left alone: the engine has them already.
    executor, sm_budget
        As in ``copy_pages``.

    Raises
    ------
    IndexError
        A slot on the CPU is past the cache.
    ValueError
        The buffers' size is not what the pattern and the slots say; a slot comes twice where the cache is written; what
        ``copy_pages`` refuses; of several chunks, one on another device or in the storage of the cache. All chunks are
        checked before the first is copied.
    RuntimeError
        CUDA failed; the message has CUDA's name for it, and the destination is undefined.

    Notes
    -----
    As in ``copy_pages``, the copy is ordered on the device's current stream and not waited for, a CUDA graph that
    captures it freezes slots on the CPU, and slots on the device are checked there. Chunks that lie evenly spaced in
    one allocation are one call. In a graph that is compiled or exported it is one op.

    Examples
    --------
    >>> import torch
    >>> from kvkernels import KVCache, KVLayout, copy_slots
    >>> layout = KVLayout("L | K B N H D", L=1, K=2, B=2, N=2, D=1, dtype=torch.uint8)
    >>> cache = KVCache(layout, torch.arange(8, dtype=torch.uint8).reshape(2, 2, 2, 1))
    >>> chunk = torch.zeros(2, 1, 3, 1, dtype=torch.uint8)
    >>> copy_slots(cache, torch.tensor([3, -1, 0]), chunk, direction="to_buffer")
    >>> chunk.flatten().tolist()
    [3, 0, 0, 7, 0, 4]
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"copy_slots: direction must be 'to_buffer' or 'to_cache', got {direction!r}")
    kinds = (("slots", slots, Tensor, "Tensor"), ("pattern", pattern, str, "str"))
    for name, value, kind, word in (*kinds, ("skip_first", skip_first, SupportsIndex, "int")):
        if not isinstance(value, kind):
            raise ValueError(f"copy_slots: {name} must be a {word}, got {type(value).__name__}")
    skip_first = integer("copy_slots: skip_first", skip_first)
    caches = as_caches("copy_slots", "cache", cache)
    if torch.compiler.is_compiling():
        tensors, layouts = tensors_and_text(caches)
        op = _slots_to_buffer if direction == "to_buffer" else _slots_to_cache
        op(tensors, slots, _as_list(buffer), layouts, pattern, skip_first, executor, sm_budget)
    else:
        copy_slots_of(caches, slots, buffer, direction, pattern, skip_first, executor, sm_budget)


def copy_slots_of(
    caches: Sequence[KVCache], slots: Tensor, buffer: Tensor | Sequence[Tensor], direction: str, pattern: str,
    skip_first: int, executor: str, sm_budget: int,
) -> None:  # fmt: skip
    """``copy_slots`` where no compiler traces it, or inside the op that the compiler sees."""
    caches = _undealt(caches)
    chunks = _chunks(caches, buffer, pattern)
    has_memory = not any(is_traced(tensor) for one in (*caches, *chunks) for tensor in one.tensors)
    if len(chunks) > 1 and has_memory:
        _check_together(chunks, caches)
    _check_slots(slots, skip_first, chunks, caches, direction)
    if direction == "to_buffer" and has_memory:
        _check_apart(chunks)
    written = chunks if direction == "to_buffer" else caches
    check_may_write(
        "copy_slots", "buffer" if direction == "to_buffer" else "cache", True,
        [tensor for one in written for tensor in one.tensors],
    )  # fmt: skip
    calls, first = [], 0
    for chunk in _neighbours_joined(chunks) if has_memory else chunks:
        tokens = chunk.layout.B * chunk.layout.N
        begin = min(max(skip_first - first, 0), tokens)
        wanted = slots[first + begin : first + tokens]
        mine = torch.arange(begin, tokens, dtype=wanted.dtype, device=wanted.device)
        first += tokens
        if not len(wanted):
            continue
        sides = (list(caches), [chunk]) if direction == "to_buffer" else ([chunk], list(caches))
        mapping = torch.stack((wanted, mine) if direction == "to_buffer" else (mine, wanted), dim=1)
        calls.append(partial(convert_caches, *sides, mapping, None, False, 1, True, executor, sm_budget))
    all_or_none(calls, has_memory)


def _to_buffer(
    cache: Sequence[Tensor], slots: Tensor, buffer: Sequence[Tensor], layouts: str, pattern: str, skip_first: int,
    executor: str, sm_budget: int,
) -> None:  # fmt: skip
    copy_slots_of(caches_of(cache, layouts), slots, buffer, "to_buffer", pattern, skip_first, executor, sm_budget)


def _to_cache(
    cache: Sequence[Tensor], slots: Tensor, buffer: Sequence[Tensor], layouts: str, pattern: str, skip_first: int,
    executor: str, sm_budget: int,
) -> None:  # fmt: skip
    copy_slots_of(caches_of(cache, layouts), slots, buffer, "to_cache", pattern, skip_first, executor, sm_budget)


_slots_to_buffer = register("_slots_to_buffer", _to_buffer)
_slots_to_cache = register("_slots_to_cache", _to_cache)


def _undealt(caches: Sequence[KVCache]) -> list[KVCache]:
    """Slots count a rank's own tokens, wherever these are among all of them."""
    deals = {cache.layout.deal_of_tokens for cache in caches}
    if deals == {None}:
        return list(caches)
    if len(deals) > 1:
        raise ValueError(f"copy_slots: cache must be ranks that hold the same tokens, got the deals {deals}")
    return [KVCache(_of_parts(cache.layout, deal=None), list(cache.tensors)) for cache in caches]


def _of_parts(layout: KVLayout, **changes: Any) -> KVLayout:
    """With the same changes to all parts."""
    scales = None if layout.scales is None else replace(layout.scales, **changes)
    beside = tuple((name, replace(part, **changes)) for name, part in layout.beside)
    return replace(layout, scales=scales, beside=beside, **changes)


def _chunks(caches: Sequence[KVCache], buffer: Tensor | Sequence[Tensor], pattern: str) -> list[KVCache]:
    """Each chunk as a cache of one block, whose tokens are the chunk's."""
    outside, bar, inside = pattern.rpartition("|")
    if "T" not in inside or set("BN") & set(pattern):
        raise ValueError(f"copy_slots: pattern must have T right of the bar, and neither B nor N, got {pattern!r}")
    of = caches[0].layout
    if of.opaque:
        raise ValueError(f"copy_slots: opaque pages have no token slots, got {of!r}")
    for member in of.members:
        if of.block_tokens > 1 and "N" not in member.layout.letters:
            raise ValueError(
                f"copy_slots: every part of the cache must have tokens, got {member.name} without N, {of!r}"
            )
    order = f"{outside}{bar} B {inside.replace('T', 'N')}"
    one = parts(**dict(_parts_of_chunk(of, order, len(caches) > 1)))
    chunks: list[KVCache] = []
    for i, tensors in enumerate(_tensors_of_chunks(buffer, one.num_tensors)):
        total_bytes = sum(tensor.nbytes for tensor in tensors)
        tokens, rest = divmod(total_bytes, one.block_bytes)
        if rest:
            raise ValueError(
                f"copy_slots: buffer[{i}] must have whole tokens of {one.block_bytes} bytes in {pattern!r}, "
                f"got {total_bytes} bytes"
            )
        if tokens:
            chunks.append(KVCache(_of_parts(one, N=tokens, page_bytes=0), tensors))
    return chunks


def _parts_of_chunk(of: KVLayout, order: str, all_heads: bool) -> Iterator[tuple[str, KVLayout]]:
    """A chunk's parts, of one token; ``k`` and ``v`` become a pair again where nothing but their order differs."""
    members = {member.name: member.layout for member in of.members}
    for name, part in members.items():
        other = members.get("v" + name[1:]) if name == "k" or name.startswith("k_") else None
        pair = other is not None and _is_pair(part, other)
        if name == "v" or name.startswith("v_"):
            first = members.get("k" + name[1:])
            if first is not None and _is_pair(first, part):
                continue
        heads, first_head = (part.total("H"), 0) if all_heads else (part.H, part.first_head)
        named = {"k": "kv"}.get(name, name.removeprefix("k_")) if pair else name
        yield named, KVLayout(
            order, L=part.L, K=2 if pair else part.K, B=1, H=heads, D=part.D, dtype=part.dtype,
            D_v=other.D if pair and other is not None else part.D_v, first_head=first_head,
            total_heads=part.total("H"), first_layer=part.first_layer, total_layers=part.total("L"),
            first_d=part.first_d, total_d=part.total_d,
        )  # fmt: skip


def _is_pair(k: KVLayout, v: KVLayout) -> bool:
    """Whether they may be K and V of one pattern."""
    names = ("L", "K", "H", "dtype", "first_head", "total_heads", "first_layer", "total_layers")
    return all(getattr(k, name) == getattr(v, name) for name in names) and not (k.total_d or v.total_d)


def _tensors_of_chunks(buffer: Tensor | Sequence[Tensor], each: int) -> list[list[Tensor]]:
    tensors = _as_list(buffer)
    if len(tensors) % each:
        raise ValueError(f"copy_slots: buffer must have {each} tensors a chunk, got {len(tensors)}")
    return [tensors[i : i + each] for i in range(0, len(tensors), each)]


def _as_list(buffer: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [buffer] if isinstance(buffer, Tensor) else buffer
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"copy_slots: buffer must be a Tensor or a list of them, got {type(buffer).__name__}")
    return list(tensors)


def _check_slots(
    slots: Tensor, skip_first: int, chunks: Sequence[KVCache], caches: Sequence[KVCache], direction: str
) -> None:
    """Over all chunks, before the first of them is copied."""
    tokens = sum(chunk.layout.N for chunk in chunks)
    if slots.dim() != 1 or slots.dtype not in (torch.int64, torch.int32):
        kind = f"{dtype_text(slots.dtype)} of shape {shape_text(slots.shape)}"
        raise ValueError(f"copy_slots: slots must be int64 or int32 [T], got {kind}")
    if len(slots) != tokens:
        raise ValueError(f"copy_slots: buffer must have as many tokens as slots has, {len(slots)}, got {tokens}")
    if not 0 <= skip_first <= tokens:
        raise ValueError(f"copy_slots: skip_first must be between 0 and the {tokens} tokens, got {skip_first}")
    if slots.device.type != "cpu" or not has_values(slots):
        return
    used = slots[skip_first:].detach().numpy()
    limit = min(cache.layout.B for cache in caches) * caches[0].layout.block_tokens
    bad = np.flatnonzero(used >= limit)
    if len(bad):
        at = int(bad[0])
        raise IndexError(
            f"copy_slots: slots[{skip_first + at}] = {used[at]} is out of range for a cache with {limit} slots"
        )
    used = np.sort(used[used >= 0])
    if direction == "to_cache" and (used[1:] == used[:-1]).any():
        twice = int(used[1:][used[1:] == used[:-1]][0])
        raise ValueError(f"copy_slots: slots must name a slot once where the cache is written, got {twice} twice")


def _check_together(chunks: Sequence[KVCache], caches: Sequence[KVCache]) -> None:
    """What a call for one chunk would find when chunks before it have been copied."""
    first = chunks[0].device
    for chunk in chunks:
        if chunk.device != first or chunk.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"copy_slots: buffer must be on the cpu or on one cuda device, got {first} and {chunk.device}"
            )
    held = {tensor.untyped_storage().data_ptr() for cache in caches for tensor in cache.tensors}
    if any(tensor.untyped_storage().data_ptr() in held for chunk in chunks for tensor in chunk.tensors):
        raise ValueError("copy_slots: buffer's chunks must have storage of their own, got one in the cache's")


def _check_apart(chunks: Sequence[KVCache]) -> None:
    """Each copies on its own, so that none of them would notice."""
    parts = sorted((pool.data_ptr(), pool.data_ptr() + pool.nbytes) for chunk in chunks for pool in chunk.pools)
    if any(before[1] > after[0] for before, after in pairwise(parts)):
        raise ValueError("copy_slots: buffer's chunks must not share memory where they are written")


def _neighbours_joined(chunks: list[KVCache]) -> Iterator[KVCache]:
    """With chunks that lie evenly spaced in one storage made blocks of one cache."""
    start = 0
    while start < len(chunks):
        first = chunks[start]
        end = start + 1
        spacings = _spacings(first, chunks[end]) if end < len(chunks) else None
        while end < len(chunks) and spacings is not None and _spacings(chunks[end - 1], chunks[end]) == spacings:
            end += 1
        if end - start == 1 or spacings is None:
            yield first
        else:
            rows = [
                (member.name, replace(member.layout, B=end - start, row_bytes=spacing, page_bytes=0))
                for member, spacing in zip(first.layout.members, spacings, strict=True)
            ]
            yield KVCache(parts(**dict(rows)), [_from_here(tensor) for tensor in first.tensors])
        start = end


def _spacings(before: KVCache, after: KVCache) -> list[int] | None:
    """How far behind the one before each part of a chunk lies, if all of its tensors lie so, each in one storage."""
    pairs = list(zip(before.tensors, after.tensors, strict=True))
    one_storage = all(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in pairs)
    if before.layout.N != after.layout.N or not one_storage:
        return None
    spacings = []
    for member in before.layout.members:
        distances = {pairs[i][1].data_ptr() - pairs[i][0].data_ptr() for i in member.tensors}
        spacings.append(distances.pop())
        if distances or spacings[-1] < member.layout.page_bytes:
            return None
    return spacings


def _from_here(tensor: Tensor) -> Tensor:
    """All bytes of its storage from its first on."""
    storage = tensor.untyped_storage()
    start = tensor.storage_offset() * tensor.element_size()
    return bytes_of_storage(tensor, start, (storage.nbytes() - start,), (1,))
