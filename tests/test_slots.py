"""copy_slots against torch's own indexing, in every shape that connectors keep tokens in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import kvkernels
from kvkernels import KVCache, KVLayout, copy_slots
from kvkernels.layout import parts

L, B, N, H, D = 3, 6, 4, 4, 5
SLOTS = B * N


def _random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 2), dtype=torch.uint8).view(torch.float16).squeeze(-1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _cache(kind: str) -> tuple[list[KVCache], torch.Tensor]:
    """A cache in one of the engines' shapes, and its values as [K, L, slot, H, D]."""
    torch.manual_seed(7)
    sizes = {"L": L, "B": B, "N": N, "D": D, "dtype": torch.float16}
    if kind == "MLA":
        tensors = [_random(B, N, D) for _ in range(L)]
        return [KVCache(KVLayout("L | B N D", **sizes), tensors)], torch.stack(tensors).reshape(1, L, SLOTS, 1, D)
    sizes |= {"K": 2, "H": H}
    if kind == "vLLM NHD":
        tensors = [_random(2, B, N, H, D) for _ in range(L)]
        logical = torch.stack(tensors)
        cache = [KVCache(KVLayout("L | K B N H D", **sizes), tensors)]
    elif kind == "vLLM HND":
        tensors = [_random(B, 2, H, N, D).transpose(2, 3) for _ in range(L)]
        logical = torch.stack([tensor.transpose(0, 1) for tensor in tensors])
        cache = [KVCache(KVLayout("L | B K H N D", **sizes), tensors)]
    elif kind == "packed":
        tensors = [_random(B, H, N, 2 * D) for _ in range(L)]
        logical = torch.stack([t.unflatten(-1, (2, D)).permute(3, 0, 2, 1, 4) for t in tensors])
        cache = [KVCache(KVLayout("L | B H N K D", **sizes), tensors)]
    elif kind == "SGLang":
        k, v = ([_random(SLOTS, H, D) for _ in range(L)] for _ in range(2))
        logical = torch.stack([torch.stack(pair) for pair in zip(k, v, strict=True)])
        cache = [KVCache(KVLayout("K L | B N H D", **sizes), [*k, *v])]
    else:
        whole = KVLayout("L | K B N H D", **sizes)
        shards = [[_random(2, B, N, H // 2, D) for _ in range(L)] for _ in range(2)]
        logical = torch.stack([torch.cat(pair, dim=3) for pair in zip(*shards, strict=True)])
        cache = [KVCache(whole.shard(rank, 2), tensors) for rank, tensors in enumerate(shards)]
    return cache, logical.transpose(0, 1).reshape(2, L, SLOTS, H, D)


KINDS = ("vLLM NHD", "vLLM HND", "packed", "SGLang", "MLA", "two ranks")
# Patterns, and how the logical [K, L, T, H, D] becomes a chunk's tensors.
PATTERNS = {
    "K L T H D": lambda x: [x],
    "K | L T H D": lambda x: list(x),
    "T L K H D": lambda x: [x.permute(2, 1, 0, 3, 4)],
    "K L H T D": lambda x: [x.transpose(2, 3)],
}


def _read(cache: list[KVCache], kind: str) -> torch.Tensor:
    """The cache's values now."""
    if kind == "two ranks":
        parts = [torch.stack(list(rank.tensors)) for rank in cache]
        return torch.cat(parts, dim=4).transpose(0, 1).reshape(2, L, SLOTS, H, D)
    tensors = list(cache[0].tensors)
    if kind == "MLA":
        return torch.stack(tensors).reshape(1, L, SLOTS, 1, D)
    if kind == "vLLM HND":
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    if kind == "packed":
        tensors = [tensor.unflatten(-1, (2, D)).permute(3, 0, 2, 1, 4) for tensor in tensors]
    if kind == "SGLang":
        return torch.stack(tensors).reshape(2, L, SLOTS, H, D)
    return torch.stack(tensors).transpose(0, 1).reshape(2, L, SLOTS, H, D)


def _chunks(tokens: list[int], k: int, heads: int, pattern: str, where: str) -> list[torch.Tensor]:
    """Poisoned chunks, each with memory of its own, or evenly spaced in one slab."""
    shapes = [[tuple(t.shape) for t in PATTERNS[pattern](torch.empty(k, L, n, heads, D))] for n in tokens]
    if where == "apart":
        return [_random(*shape) for chunk in shapes for shape in chunk]
    each = [int(np.prod(shape)) for chunk in shapes for shape in chunk]
    stride = max(each) + 3
    slab = _random(stride * len(each))
    flat = [shape for chunk in shapes for shape in chunk]
    return [slab[i * stride : i * stride + n].view(shape) for i, (n, shape) in enumerate(zip(each, flat, strict=True))]


def _logical(tensors: list[torch.Tensor], pattern: str) -> torch.Tensor:
    if pattern == "K | L T H D":
        return torch.stack(tensors)
    (tensor,) = tensors
    if pattern == "T L K H D":
        return tensor.permute(2, 1, 0, 3, 4)
    return tensor.transpose(2, 3) if pattern == "K L H T D" else tensor


@pytest.mark.parametrize("where", ["apart", "slab"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_first", [0, 1, 6, 11])
def test_there_and_back(kind, pattern, where, skip_first):
    cache, logical = _cache(kind)
    rng = np.random.default_rng(3)
    tokens = [5, 5, 1]
    slots = torch.from_numpy(rng.permutation(SLOTS)[: sum(tokens)])
    slots[[2, 7]] = -1
    taken = torch.tensor([i for i in range(sum(tokens)) if i >= skip_first and slots[i] >= 0], dtype=torch.int64)
    k, heads = logical.shape[0], logical.shape[3]
    buffer = _chunks(tokens, k, heads, pattern, where)
    each = len(buffer) // len(tokens)
    grouped = [buffer[i : i + each] for i in range(0, len(buffer), each)]
    before = torch.cat([_logical(chunk, pattern) for chunk in grouped], dim=2).clone()

    copy_slots(cache, slots, buffer, direction="to_buffer", pattern=pattern, skip_first=skip_first)
    wanted = before.clone()
    wanted[:, :, taken] = logical[:, :, slots[taken]]
    got = torch.cat([_logical(chunk, pattern) for chunk in grouped], dim=2)
    assert torch.equal(_bits(got), _bits(wanted))
    assert torch.equal(_bits(_read(cache, kind)), _bits(logical))

    for tensor in buffer:
        tensor.copy_(_random(*tensor.shape))
    copy_slots(cache, slots, buffer, direction="to_cache", pattern=pattern, skip_first=skip_first)
    got = torch.cat([_logical(chunk, pattern) for chunk in grouped], dim=2)
    wanted = logical.clone()
    wanted[:, :, slots[taken]] = got[:, :, taken]
    assert torch.equal(_bits(_read(cache, kind)), _bits(wanted))


def test_evenly_spaced_chunks_are_one_call():
    cache, _ = _cache("vLLM NHD")
    slab = _random(4, 2, L, 5, H * D)
    kvkernels.reset_counters()
    copy_slots(cache, torch.arange(20), list(slab), direction="to_buffer")
    assert kvkernels.counters()["cpu"]["calls"] == 1
    apart = [chunk.clone() for chunk in slab]
    copy_slots(cache, torch.arange(20), apart, direction="to_buffer")
    assert kvkernels.counters()["cpu"]["calls"] == 5
    assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(apart, slab, strict=True))


def _refused(error, match, cache=None, slots=(0, 1), buffer=None, **options):
    cache = _cache("vLLM NHD")[0] if cache is None else cache
    buffer = _random(2, L, 2, H, D) if buffer is None else buffer
    before = [_bits(tensor).clone() for tensor in ([buffer] if isinstance(buffer, torch.Tensor) else buffer)]
    kept = [_bits(tensor).clone() for tensor in cache[0].tensors]
    options = {"direction": "to_buffer", **options}
    with pytest.raises(error, match=match):
        copy_slots(cache, torch.as_tensor(slots), buffer, **options)
    after = [buffer] if isinstance(buffer, torch.Tensor) else buffer
    assert all(torch.equal(_bits(a), b) for a, b in zip(after, before, strict=True))
    assert all(torch.equal(_bits(a), b) for a, b in zip(cache[0].tensors, kept, strict=True))


def test_refusals():
    _refused(ValueError, "^copy_slots: direction must be 'to_buffer' or 'to_cache', got 'out'$", direction="out")
    _refused(ValueError, r"^copy_slots: pattern must have T right of the bar", pattern="K L H D")
    _refused(ValueError, r"^copy_slots: pattern must have T right of the bar", pattern="K L B T H D")
    _refused(ValueError, r"^copy_slots: slots must be int64 or int32 \[T\], got float32", slots=(0.5, 1.0))
    _refused(ValueError, "^copy_slots: buffer must have as many tokens as slots has, 3, got 2$", slots=(0, 1, 2))
    _refused(ValueError, "^copy_slots: skip_first must be between 0 and the 2 tokens, got 3$", skip_first=3)
    _refused(ValueError, "^copy_slots: buffer must have 2 tensors a chunk, got 1$", pattern="K | L T H D")
    _refused(ValueError, r"^copy_slots: buffer\[0\] must have whole tokens of 240 bytes", buffer=_random(7))
    _refused(ValueError, "the pattern lacks K, whose size is 2", buffer=_random(L, 2, H, D), pattern="L T H D")
    _refused(IndexError, r"^copy_slots: slots\[1\] = 24 is out of range for a cache with 24 slots$", slots=(0, 24))
    twice = "^copy_slots: slots must name a slot once where the cache is written, got 3 twice$"
    _refused(ValueError, twice, slots=(3, 3), direction="to_cache")
    _refused(ValueError, r"^KVCache: tensors\[0\] must be", buffer=_random(L, 2, 2, H, D), slots=range(2))
    chunk = _random(2, L, 1, H, D)
    _refused(ValueError, "^copy_slots: buffer's chunks must not share memory", buffer=[chunk, chunk])
    opaque = KVCache(KVLayout("L | B", L=L, B=B, opaque=True, page_bytes=8), [_random(B, 4) for _ in range(L)])
    _refused(ValueError, "^copy_slots: opaque pages have no token slots", cache=[opaque])


def test_a_slot_past_the_end_in_a_later_chunk_moves_nothing():
    chunks = [_random(2, L, 1, H, D) for _ in range(2)]
    _refused(IndexError, r"^copy_slots: slots\[1\] = 24 is out of range", slots=(0, 24), buffer=chunks)
    _refused(ValueError, "got 3 twice$", slots=(3, 3), buffer=chunks, direction="to_cache")


def test_later_chunks_are_checked_before_the_first_is_copied():
    cache = _cache("vLLM NHD")[0]
    chunk = _random(2, L, 1, H, D)
    with pytest.raises(ValueError, match="on the cpu or on one cuda device, got cpu and meta"):
        copy_slots(cache, torch.tensor([0, 1]), [chunk, chunk.to("meta")], direction="to_cache")
    inside = cache[0].tensors[0].flatten()[: chunk.numel()].view(chunk.shape)
    for direction in ("to_buffer", "to_cache"):
        _refused(ValueError, "storage of their own", cache, buffer=[chunk, inside], direction=direction)


def test_chunks_that_share_k_may_fill_the_cache():
    """The same K for two tokens, V one after the other: not evenly spaced, and not refused."""
    cache, _ = _cache("vLLM NHD")
    k, v = _random(L, 1, H, D), _random(2, L, 1, H, D)
    copy_slots(cache, torch.tensor([5, 2]), [k, v[0], k, v[1]], direction="to_cache", pattern="K | L T H D")
    got = _read(cache, "vLLM NHD")
    for token, slot in enumerate((5, 2)):
        assert torch.equal(_bits(got[0, :, slot]), _bits(k[:, 0]))
        assert torch.equal(_bits(got[1, :, slot]), _bits(v[token, :, 0]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"slots": [0, 1]}, "slots must be a Tensor, got list"),
        ({"pattern": None}, "pattern must be a str, got NoneType"),
        ({"skip_first": 0.5}, "skip_first must be a int, got float"),
        ({"buffer": "x"}, "buffer must be a Tensor or a list"),
    ],
)
def test_wrong_kinds_of_arguments_are_named(options, match):
    arguments = {"slots": torch.tensor([0, 1]), "buffer": _random(2, L, 2, H, D), "direction": "to_buffer", **options}
    with pytest.raises(ValueError, match=f"^copy_slots: {match}"):
        copy_slots(_cache("vLLM NHD")[0], **arguments)


@pytest.mark.cuda(torch_kernels=True)
def test_slots_on_the_device():
    cache, logical = _cache("vLLM NHD")
    on_device = KVCache(cache[0].layout, [tensor.cuda() for tensor in cache[0].tensors])
    slots = torch.tensor([7, 0, -1, 11])
    chunk = torch.zeros(2, L, 4, H * D, dtype=torch.float16).pin_memory()
    copy_slots(on_device, slots.cuda(), chunk, direction="to_buffer")
    torch.cuda.synchronize()
    taken = torch.tensor([0, 1, 3])
    assert torch.equal(_bits(chunk[:, :, taken]), _bits(logical[:, :, slots[taken]].flatten(3)))


# Caches of several parts.


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _quantised(kind: str) -> tuple[KVLayout, list[torch.Tensor], list[torch.Tensor]]:
    """A cache of two layers, its tensors, and of each part of a chunk the bytes as [K, L, slot, bytes]."""
    sizes = {"L": 2, "B": B, "N": N, "H": H}
    f8, f32, f16 = torch.float8_e4m3fn, torch.float32, torch.float16
    if kind == "scales in tensors of their own":
        scales = KVLayout("L | K B H N", K=2, dtype=f32, **sizes)
        layout = KVLayout("L | K B N H D", K=2, D=8, dtype=f8, scales=scales, **sizes)
        values, scale = [_bytes(2, B, N, H, 8) for _ in range(2)], [_bytes(2, B, H, N, 4) for _ in range(2)]
        logical = [torch.stack(values), torch.stack(scale).transpose(3, 4)]
        return layout, values + scale, [part.transpose(0, 1).reshape(2, 2, SLOTS, -1) for part in logical]
    if kind == "scales and zero points beside their values":
        cell = {**sizes, "steps": {"N": 32}}
        named = {}
        for k, at in (("k", 0), ("v", 16)):
            named[k] = KVLayout("L | B H N D", D=8, dtype=f8, offset_bytes=at, **cell)
            named[f"{k}_scales"] = KVLayout("L | B H N", dtype=f32, offset_bytes=at + 8, **cell)
            named[f"{k}_zeros"] = KVLayout("L | B H N", dtype=f16, offset_bytes=at + 12, **cell)
        tensors = [_bytes(B, H, N, 32) for _ in range(2)]
        rows = torch.stack(tensors).transpose(2, 3)  # L B N H 32
        sides = torch.stack((rows[..., :16], rows[..., 16:]))
        parts_of = [sides[..., :8], sides[..., 8:12], sides[..., 12:14]]
        return parts(**named), tensors, [part.reshape(2, 2, SLOTS, -1) for part in parts_of]
    if kind == "three parts of a latent row":
        row = {"L": 2, "B": B, "N": N, "steps": {"N": 656}}
        layout = parts(
            latent=KVLayout("L | B N D", D=512, dtype=f8, **row),
            scales=KVLayout("L | B N D", D=4, dtype=f32, offset_bytes=512, **row),
            rope=KVLayout("L | B N D", D=64, dtype=torch.bfloat16, offset_bytes=528, **row),
        )
        tensors = [_bytes(B, N, 656) for _ in range(2)]
        rows = torch.stack(tensors).reshape(1, 2, SLOTS, 656)
        return layout, tensors, [rows[..., :512], rows[..., 512:528], rows[..., 528:]]
    if kind == "an indexer's page":
        page = {"L": 2, "B": B, "N": N, "row_bytes": N * 132}
        layout = parts(
            keys=KVLayout("L | B N D", D=128, dtype=f8, **page),
            scales=KVLayout("L | B N", dtype=f32, offset_bytes=N * 128, **page),
        )
        tensors = [_bytes(B * N * 132) for _ in range(2)]
        pages = torch.stack(tensors).view(1, 2, B, N * 132)
        return layout, tensors, [
            pages[..., : N * 128].reshape(1, 2, SLOTS, 128), pages[..., N * 128 :].reshape(1, 2, SLOTS, 4)]  # fmt: skip
    layout = parts(k="L | B H D/4 N D%4", v="L | B H D N", D=8, dtype=f16, **sizes)
    k, v = [_bytes(B, H, 2, N, 4, 2) for _ in range(2)], [_bytes(B, H, 8, N, 2) for _ in range(2)]
    logical = torch.stack((
        torch.stack(k).permute(0, 1, 4, 2, 3, 5, 6).reshape(2, SLOTS, -1),
        torch.stack(v).permute(0, 1, 4, 2, 3, 5).reshape(2, SLOTS, -1),
    ))  # fmt: skip
    return layout, [tensor.flatten() for tensor in (*k, *v)], [logical]


QUANTISED = (
    "scales in tensors of their own", "scales and zero points beside their values", "three parts of a latent row",
    "an indexer's page", "K in pieces of its heads, V transposed",
)  # fmt: skip


@pytest.mark.parametrize("where", ["apart", "slab"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_every_part_of_a_token_moves(kind, where):
    """There, and to other slots of a cache that is poisoned, in which nothing else changes."""
    torch.manual_seed(5)
    layout, tensors, logical = _quantised(kind)
    cache = KVCache(layout, tensors)
    slots = torch.from_numpy(np.random.default_rng(4).permutation(SLOTS)[:7])
    slots[2] = -1
    taken, tokens = torch.tensor([0, 1, 3, 4, 5, 6]), (3, 3, 1)
    slabs = [_bytes(3, part.shape[0] * 2 * 3 * part.shape[3] + 8) for part in logical]
    chunks = []
    for i, count in enumerate(tokens):
        for part, slab in zip(logical, slabs, strict=True):
            flat = slab[i, : part.shape[0] * 2 * count * part.shape[3]]
            flat = flat if where == "slab" else flat.clone()
            chunks.append(flat.view(part.shape[0], 2, count, part.shape[3]))
    chunks_of = [chunks[i :: len(logical)] for i in range(len(logical))]
    before = [torch.cat(each, dim=2).clone() for each in chunks_of]
    kvkernels.reset_counters()
    copy_slots(cache, slots, chunks, direction="to_buffer")
    assert kvkernels.counters()["cpu"]["calls"] == (2 if where == "slab" else 3)
    for each, was, part in zip(chunks_of, before, logical, strict=True):
        was[:, :, taken] = part[:, :, slots[taken]]
        assert torch.equal(torch.cat(each, dim=2), was)

    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(0xA5)
    copy_slots(cache, slots, chunks, direction="to_cache", skip_first=1)
    for tensor, was in zip(tensors, kept, strict=True):
        moved = tensor != 0xA5
        assert torch.equal(tensor[moved], was[moved])
    wanted = sum(part[:, :, slots[taken[1:]]].ne(0xA5).sum() for part in logical)
    assert sum((tensor != 0xA5).sum() for tensor in tensors) == wanted


def test_slots_of_dealt_tokens_are_the_ranks_own():
    layout = KVLayout("L | B N D", L=2, B=B, N=N, D=5, dtype=torch.float16)
    tensors = [_random(B, N, 5) for _ in range(2)]
    chunk = _random(1, 2, 3, 5)
    slots = torch.tensor([7, 0, 21])
    copy_slots(KVCache(replace(layout, deal=(1, 4, 2)), tensors), slots, chunk, direction="to_buffer")
    wanted = torch.stack([tensor.view(SLOTS, 5)[slots] for tensor in tensors])
    assert torch.equal(_bits(chunk[0]), _bits(wanted))
    ranks = [KVCache(replace(layout, deal=(rank, 4, 2)), tensors) for rank in range(2)]
    with pytest.raises(ValueError, match=r"^copy_slots: cache must be ranks that hold the same tokens, got the deals"):
        copy_slots(ranks, slots, chunk, direction="to_buffer")


def test_parts_without_tokens_have_no_slots():
    sizes = {"B": B, "H": H}
    layout = parts(
        kv=KVLayout("B N H D", N=N, D=8, dtype=torch.uint8, **sizes),
        scales=KVLayout("B H", dtype=torch.float32, **sizes),
    )
    cache = KVCache(layout, [_bytes(B, N, H, 8), _bytes(B, H * 4)])
    with pytest.raises(ValueError, match=r"^copy_slots: every part of the cache must have tokens, got scales without"):
        copy_slots(cache, torch.tensor([0]), [_bytes(1, 1, 1, H * 8), _bytes(1, 1, 1, H * 4)], direction="to_buffer")
    with pytest.raises(ValueError, match=r"^copy_slots: buffer must have 2 tensors a chunk, got 1"):
        layout, tensors, _ = _quantised(QUANTISED[0])
        copy_slots(KVCache(layout, tensors), torch.tensor([0]), _bytes(2, 2, 1, H * 8), direction="to_buffer")


def test_parts_of_other_sizes_are_one_chunk_of_k_and_then_v():
    sizes = {"L": 2, "B": B, "N": N, "H": H, "dtype": torch.float16}
    layout = parts(k=KVLayout("L | B H D/4 N D%4", D=8, **sizes), v=KVLayout("L | B H D N", D=6, **sizes))
    k, v = [_random(B, H, 2, N, 4) for _ in range(2)], [_random(B, H, 6, N) for _ in range(2)]
    chunk, slots = _random(2 * 3 * H * 14), torch.tensor([9, 23, 4])
    copy_slots(KVCache(layout, [*k, *v]), slots, chunk, direction="to_buffer")
    rows = torch.stack(k).permute(0, 1, 4, 2, 3, 5).reshape(2, SLOTS, -1)[:, slots]
    columns = torch.stack(v).permute(0, 1, 4, 2, 3).reshape(2, SLOTS, -1)[:, slots]
    assert torch.equal(_bits(chunk), _bits(torch.cat((rows.flatten(), columns.flatten()))))
