"""The reference against loops over bytes in numpy."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from kvkernels import reference
from kvkernels.reference import ledger

U8 = torch.uint8
DTYPES = [
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float4_e2m1fn_x2,
    torch.bool,
    torch.complex128,
    torch.uint3,
    torch.int64,
]


def bytes_of(t: torch.Tensor) -> np.ndarray:
    """All of a tensor's storage, shared."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()


def start_of(t: torch.Tensor) -> int:
    return t.storage_offset() * t.element_size()


def random_pool(blocks: int, page: int, dtype: torch.dtype = U8, pad: int = 0, offset: int = 0) -> torch.Tensor:
    """``[blocks, page]`` elements of random bytes (NaN payloads among them), `pad` elements between rows."""
    storage = torch.randint(0, 256, ((offset + blocks * (page + pad)) * dtype.itemsize,), dtype=torch.uint8)
    shape, strides = (blocks, page), (page + pad, 1)
    return torch.empty(0, dtype=dtype).set_(storage.untyped_storage(), offset, shape, strides)


def copy_by_bytes(src, dst, pairs, runs, src_subblocks=1, dst_subblocks=1):
    """The contents of the destinations' storages after the copy: nothing but loops over bytes."""
    before = [bytes_of(t).copy() for t in src]
    after = [bytes_of(t).copy() for t in dst]

    def page(t, pool_id, subblocks, subblock_stride):
        block, subblock = divmod(pool_id, subblocks)
        return start_of(t) + block * t.stride(0) * t.element_size() + subblock * subblock_stride

    for a, b in pairs:
        for s, d, s_offset, d_offset, size, s_sub, d_sub, *loops in runs:
            loops = [loops[i : i + 3] for i in (0, 3, 6)]
            s_page, d_page = page(src[s], a, src_subblocks, s_sub), page(dst[d], b, dst_subblocks, d_sub)
            for index in itertools.product(*(range(extent) for extent, _, _ in loops)):
                x = s_page + s_offset + sum(i * loop[1] for i, loop in zip(index, loops, strict=True))
                y = d_page + d_offset + sum(i * loop[2] for i, loop in zip(index, loops, strict=True))
                after[d][y : y + size] = before[s][x : x + size]
    return after


def run(src_pool, dst_pool, src_offset, dst_offset, size, *loops, sub=(0, 0)):
    padded = [*loops, *[(1, 0, 0)] * (3 - len(loops))]
    return [src_pool, dst_pool, src_offset, dst_offset, size, *sub, *itertools.chain(*padded)]


def assert_storages(tensors, expected):
    for t, bytes_wanted in zip(tensors, expected, strict=True):
        np.testing.assert_array_equal(bytes_of(t), bytes_wanted)


@pytest.fixture(params=[None, 7], ids=["whole", "in chunks of 7 bytes"])
def chunked(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(reference.ops, "_BYTES_AT_ONCE", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pad,offset", [(0, 0), (3, 0), (0, 1), (3, 5)])
def test_swap_blocks(dtype, pad, offset, chunked):
    src, dst = random_pool(9, 5, dtype, pad, offset), random_pool(6, 5, dtype, 2 * pad, offset)
    pairs = [(8, 0), (1, 5), (1, 2), (8, 0)]
    page = 5 * dtype.itemsize
    wanted = copy_by_bytes([src], [dst], pairs, [run(0, 0, 0, 0, page)])
    untouched = bytes_of(src).copy()
    reference.swap_blocks(src, dst, page, torch.tensor(pairs))
    assert_storages([dst, src], [*wanted, untouched])


def test_swap_blocks_cuts_a_contiguous_tensor_of_any_shape():
    src, dst = torch.arange(24, dtype=torch.int16).reshape(2, 3, 4), torch.zeros(48, dtype=torch.uint8)
    reference.swap_blocks(src, dst, 6, torch.tensor([[7, 0]], dtype=torch.int32))
    assert dst[:6].view(torch.int16).tolist() == [21, 22, 23]


@pytest.mark.parametrize("seed", range(40))
def test_copy_pages(seed, chunked):
    """Random nests: the axes of a page in another order, some walked backwards, sub-blocks, several pools, offsets."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    fragment = rng.choice([1, 2, 3, 8, 16, 24])
    extents = [rng.randint(1, 4) for _ in range(4)]  # sub-blocks, then three loops
    src_strides, dst_strides = [[0] * 4, [0] * 4]
    for strides in (src_strides, dst_strides):
        step = fragment + rng.choice([0, 0, 5])
        for axis in rng.sample(range(4), 4):
            strides[axis] = step
            step *= extents[axis]
    both = (src_strides, dst_strides)
    page = max(fragment + sum((n - 1) * s for n, s in zip(extents, strides, strict=True)) for strides in both)
    subblocks = extents[0]
    lead = rng.choice([0, 4])
    starts = [lead, lead]
    for side, strides in enumerate((src_strides, dst_strides)):
        for axis in range(4):
            if rng.random() < 0.3:
                starts[side] += (extents[axis] - 1) * strides[axis]
                strides[axis] = -strides[axis]
    loops = [(extents[i], src_strides[i], dst_strides[i]) for i in (1, 2, 3)]
    runs = [run(p, q, *starts, fragment, *loops, sub=(src_strides[0], dst_strides[0])) for p, q in ((0, 1), (1, 0))]
    src = [random_pool(5, page + lead, pad=rng.choice([0, 3]), offset=rng.choice([0, 1, 8])) for _ in range(2)]
    dst = [random_pool(4, page + lead, pad=rng.choice([0, 3]), offset=rng.choice([0, 1, 8])) for _ in range(2)]
    destinations = rng.sample(range(4 * subblocks), rng.randint(1, 4 * subblocks))
    pairs = [(rng.randrange(5 * subblocks), d) for d in destinations]
    wanted = copy_by_bytes(src, dst, pairs, runs, subblocks, subblocks)
    mapping = torch.tensor(pairs, dtype=rng.choice([torch.int32, torch.int64]))
    untouched = [bytes_of(t).copy() for t in src]
    reference.copy_pages(src, dst, mapping, torch.tensor(runs), subblocks, subblocks)
    assert_storages([*dst, *src], [*wanted, *untouched])


def test_copy_pages_converts_block_sizes_by_subblocks():
    src, dst = random_pool(3, 8), random_pool(6, 4)  # blocks of two tokens to blocks of one
    runs = torch.tensor([run(0, 0, 0, 0, 4, sub=(4, 0))])
    reference.copy_pages([src], [dst], torch.tensor([[5, 0], [2, 3]]), runs, 2)
    assert torch.equal(dst[0], src[2, 4:]) and torch.equal(dst[3], src[1, :4])


def test_copy_pages_broadcasts_a_source():
    src, dst = random_pool(1, 3), random_pool(1, 12)
    reference.copy_pages([src], [dst], torch.tensor([[0, 0]]), torch.tensor([run(0, 0, 0, 0, 3, (4, 0, 3))]))
    assert torch.equal(dst.reshape(4, 3), src.expand(4, 3))


def test_skip_negative_skips_pairs_negative_in_either_column():
    src, dst = random_pool(3, 4), random_pool(3, 4)
    wanted = copy_by_bytes([src], [dst], [(2, 1)], [run(0, 0, 0, 0, 4)])
    mapping = torch.tensor([[-1, 0], [2, 1], [0, -7], [-1, -1]])
    reference.copy_pages([src], [dst], mapping, torch.tensor([run(0, 0, 0, 0, 4)]), skip_negative=True)
    assert_storages([dst], wanted)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gather_and_scatter(dtype, chunked):
    pools = [random_pool(7, 5, pad=2), random_pool(9, 2, torch.float32, offset=1), random_pool(8, 1, torch.bool)]
    ids = torch.tensor([6, 9, 0, 9, 6, 9, 3], dtype=dtype)[::2]  # strided: 6, 0, 6, 3
    total = 5 + 8 + 1
    out = random_pool(4, total, pad=3, offset=1)
    offsets = [0, 5, 13]
    runs = [run(t, 0, 0, offsets[t], page) for t, page in enumerate((5, 8, 1))]
    wanted = copy_by_bytes(pools, [out], [(int(b), row) for row, b in enumerate(ids)], runs)
    reference.gather_blocks(pools, ids, out)
    assert_storages([out], wanted)

    back = [torch.zeros(7, 5, dtype=torch.uint8), torch.zeros(9, 2), torch.zeros(8, 1, dtype=torch.bool)]
    reference.scatter_blocks(out[1:], ids[1:], back)
    for pool, copy in zip(pools, back, strict=True):
        for block in range(copy.shape[0]):
            row = pool[block] if block in (0, 6, 3) else torch.zeros_like(pool[block])
            assert torch.equal(copy[block].view(torch.uint8), row.view(torch.uint8))


def test_swap_blocks_batch_copies_each_row_once():
    src, dst = random_pool(1, 64)[0], torch.zeros(64, dtype=torch.uint8)
    rows = [(3, 40, 7), (0, 0, 0), (3, 10, 7), (3, 40, 7)]
    src_ptrs = torch.tensor([src.data_ptr() + s for s, _, _ in rows])
    dst_ptrs = torch.tensor([dst.data_ptr() + d for _, d, _ in rows]).view(torch.uint64)
    reference.swap_blocks_batch(src_ptrs, dst_ptrs, torch.tensor([n for _, _, n in rows], dtype=torch.int32))
    wanted = torch.zeros_like(dst)
    wanted[40:47] = wanted[10:17] = src[3:10]
    assert torch.equal(dst, wanted)


def test_swap_blocks_batch_refuses_addresses_that_may_be_the_devices(monkeypatch):
    dst = torch.zeros(4, dtype=torch.uint8)
    start = dst.data_ptr()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="must be told apart as host or device addresses"):
        reference.swap_blocks_batch(torch.tensor([start]), torch.tensor([start + 2]), torch.tensor([1]))
    assert dst.tolist() == [0] * 4


def as_bytes(t: torch.Tensor) -> np.ndarray:
    """``[*shape, itemsize]`` uint8, through numpy's own strides."""
    size = t.element_size()
    base = bytes_of(t)[start_of(t) :]
    strides = (*(s * size for s in t.stride()), 1)
    return np.lib.stride_tricks.as_strided(base, (*t.shape, size), strides).copy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concat_and_split(dtype, dim):
    shapes = [[3, 4, 2] for _ in range(3)]
    for shape, size in zip(shapes, (1, 0, 3), strict=True):
        shape[dim] = size
    shards = []
    for shape in shapes:  # strided: transposed in memory
        flat = random_pool(1, max(1, int(np.prod(shape))), dtype, offset=1)
        strides = (1, shape[0], shape[0] * shape[1])
        shards.append(torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), 1, shape, strides))
    wanted = np.concatenate([as_bytes(t) for t in shards], axis=dim if dim >= 0 else dim - 1)
    joined = reference.concat_tp_shards(shards, dim)
    assert joined.dtype == dtype and joined.is_contiguous()
    np.testing.assert_array_equal(as_bytes(joined), wanted)

    guarded = random_pool(1, joined.numel() * 2, dtype)
    out = torch.empty(0, dtype=dtype).set_(
        guarded.untyped_storage(), 1, joined.shape, tuple(2 * s for s in joined.stride())
    )
    guards = bytes_of(out).reshape(-1, dtype.itemsize)[::2].copy()
    reference.concat_tp_shards_out(shards, dim, out)
    np.testing.assert_array_equal(as_bytes(out), wanted)
    np.testing.assert_array_equal(bytes_of(out).reshape(-1, dtype.itemsize)[::2], guards)

    parts = [torch.empty(0, dtype=dtype).set_(random_pool(1, 40, dtype).untyped_storage(), 0, s.shape) for s in shards]
    reference.split_tp_shards(out, dim, parts)
    for part, shard in zip(parts, shards, strict=True):
        np.testing.assert_array_equal(as_bytes(part), as_bytes(shard))


def test_one_shard_is_copied():
    shard = torch.arange(6)
    joined = reference.concat_tp_shards([shard], 0)
    assert torch.equal(joined, shard) and joined.data_ptr() != shard.data_ptr()


def test_offsets_beyond_32_bits(tmp_path):
    far = 5 << 32  # of a sparse file: only the pages touched exist
    pool = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 8, dtype=U8).as_strided((2, 8), (far, 1))
    pool[1] = torch.arange(8, dtype=torch.uint8)
    out = torch.zeros(1, 8, dtype=torch.uint8)
    reference.gather_blocks([pool], torch.tensor([1]), out)
    assert out.tolist() == [list(range(8))]


def test_the_interleaved_k_and_v_of_one_tensor_are_fine():
    cache = random_pool(4, 2 * 6).reshape(4, 2, 6)
    k, v = cache[:, 0], cache[:, 1]
    wanted = cache.clone()
    for a, b in ((0, 1), (2, 3)):
        wanted[b, 1], wanted[b, 0] = cache[a, 0], cache[a, 1]
    runs = torch.tensor([run(0, 0, 0, 0, 6), run(1, 1, 0, 0, 6)])
    reference.copy_pages([k, v], [v, k], torch.tensor([[0, 1], [2, 3]]), runs)
    assert torch.equal(cache, wanted)


def test_one_tensor_as_both_sides_is_fine_where_no_byte_is_read_and_written():
    pool = random_pool(4, 6)
    rows = pool.clone()
    reference.swap_blocks(pool, pool, 6, torch.tensor([[0, 1], [0, 2]]))
    assert torch.equal(pool, rows[[0, 0, 0, 3]])
    # The halves of one block: read the first, write the second.
    reference.copy_pages([pool], [pool], torch.tensor([[3, 3]]), torch.tensor([run(0, 0, 0, 3, 3)]))
    assert torch.equal(pool[3, 3:], rows[3, :3])


def test_bytes_walked_backwards_are_judged_where_they_lie():
    pool = random_pool(2, 8)
    rows = pool.clone()
    backwards = torch.tensor([run(0, 0, 0, 7, 1, (4, 1, -1))])  # the first half, reversed, over the second
    reference.copy_pages([pool], [pool], torch.tensor([[0, 0], [1, 1]]), backwards)
    assert torch.equal(pool, torch.cat((rows[:, :4], rows[:, :4].flip(1)), 1))


def test_a_repeated_pair_is_issued_once():
    ledger.reset_counters()
    reference.swap_blocks(random_pool(4, 6), random_pool(4, 6), 6, torch.tensor([[0, 1], [2, 3], [0, 1], [0, 1]]))
    assert json.loads(ledger.counters())["reference"] == {"calls": 1, "launches": 0, "descriptors": 2, "bytes": 12}


@pytest.mark.parametrize("n,r", [(0, 1), (1, 0), (0, 0)])
def test_nothing_to_do_still_checks_the_arguments(n, r):
    src, dst = random_pool(3, 4), random_pool(3, 4)
    before = bytes_of(dst).copy()
    mapping = torch.zeros(n, 2, dtype=torch.int64)
    runs = torch.tensor([run(0, 0, 0, 0, 4)] * r, dtype=torch.int64).reshape(r, 16)
    reference.copy_pages([src], [dst], mapping, runs)
    assert_storages([dst], [before])
    with pytest.raises(ValueError, match="dst_subblocks_per_block must be positive, got -1"):
        reference.copy_pages([src], [dst], mapping, runs, 1, -1)


@pytest.mark.parametrize("executor", ["cpu", "kernel", "bulk", "dma", "staged"])
def test_the_reference_runs_no_other_executor(executor):
    with pytest.raises(ValueError, match=f"gather_blocks: executor '{executor}' cannot serve this call: "):
        reference.gather_blocks([random_pool(2, 2)], torch.tensor([0]), random_pool(1, 2), executor)
