"""KVLayout and KVCache: what a pattern says of memory, and tensors that do not fit it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvkernels import KVCache, KVLayout

SIZES = {"L": 2, "K": 2, "B": 5, "N": 4, "H": 3, "D": 8, "dtype": torch.float16}
PAGE = 4 * 3 * 8 * 2

# Pattern: tensors, pools, page bytes; of the first and last pool: tensor, offset, row.
PATTERNS = {
    "L | K B N H D": (2, 4, PAGE, (0, 0, PAGE), (1, 5 * PAGE, PAGE)),
    "L | B K N H D": (2, 2, 2 * PAGE, (0, 0, 2 * PAGE), (1, 0, 2 * PAGE)),
    "L | B H N K D": (2, 2, 2 * PAGE, (0, 0, 2 * PAGE), (1, 0, 2 * PAGE)),
    "L K | B N H D": (4, 4, PAGE, (0, 0, PAGE), (3, 0, PAGE)),
    "K L | B N H D": (4, 4, PAGE, (0, 0, PAGE), (3, 0, PAGE)),
    "L K B N H D": (1, 4, PAGE, (0, 0, PAGE), (0, 15 * PAGE, PAGE)),
    "B L K N H D": (1, 1, 4 * PAGE, (0, 0, 4 * PAGE), (0, 0, 4 * PAGE)),
    "B|LKNHD": None,
    "L | B N K H D": (2, 2, 2 * PAGE, (0, 0, 2 * PAGE), (1, 0, 2 * PAGE)),
    "L | H B N K D": (2, 6, 128, (0, 0, 128), (1, 2 * 5 * 128, 128)),
}


@pytest.mark.parametrize("pattern", [pattern for pattern, wanted in PATTERNS.items() if wanted])
def test_pools(pattern):
    tensors, pools, page, first, last = PATTERNS[pattern]
    layout = KVLayout(pattern, **SIZES)
    assert (layout.num_tensors, layout.num_pools, layout.page_bytes) == (tensors, pools, page)
    assert layout.block_bytes == 4 * PAGE
    places = [(place.tensor, place.offset_bytes, place.row_bytes) for place in layout.places]
    assert places[0] == first and places[-1] == last
    letters = pattern.replace(" ", "").rpartition("|")[2]
    cache = KVCache(layout, [torch.zeros([SIZES[c] for c in letters], dtype=torch.float16) for _ in range(tensors)])
    for pool, place in zip(cache.pools, layout.places, strict=True):
        assert pool.shape == (5, page) and pool.stride() == (place.row_bytes, 1) and pool.dtype == torch.uint8
        assert pool.data_ptr() == cache.tensors[place.tensor].data_ptr() + place.offset_bytes


def test_patterns_are_read_loosely_and_printed_in_one_way():
    assert KVLayout("L|KBNHD", **SIZES) == KVLayout("  L |  K B N   H D ", **SIZES)
    assert hash(KVLayout("L|KBNHD", **SIZES)) == hash(KVLayout("L | K B N H D", **SIZES))
    assert KVLayout("L|KBNHD", **SIZES) != KVLayout("L|BKNHD", **SIZES)
    assert repr(KVLayout("L|KBNHD", **SIZES)) == 'KVLayout("L | K B N H D", L=2, K=2, B=5, N=4, H=3, D=8, float16)'
    padded = KVLayout("L|KBNHD", D_v=4, row_bytes=512, offset_bytes=3, **SIZES)
    assert repr(padded).endswith("D=8, D_v=4, float16, row_bytes=512, offset_bytes=3)")
    scaled = KVLayout(
        "BNHD", B=5, N=4, H=3, D=8, dtype=torch.uint8, scales=KVLayout("BN", B=5, N=4, dtype=torch.float32)
    )
    assert repr(scaled).endswith('uint8, scales=KVLayout("B N", B=5, N=4, float32))')
    assert (scaled.num_tensors, scaled.num_pools, scaled.block_bytes) == (2, 2, 96 + 16)
    assert (
        repr(KVLayout("L|B", L=2, B=5, opaque=True, page_bytes=7))
        == 'KVLayout("L | B", L=2, B=5, opaque, page_bytes=7)'
    )
    assert KVLayout("BND", B=1, N=2, D=3, D_v=None, dtype=torch.uint8).D_v is None


@pytest.mark.parametrize(
    ("pattern", "changes", "match"),
    [
        ("L | K B N H X", {}, "each of L, K, B, N, H, D at most once"),
        ("L | K B N H D D", {}, "at most once"),
        ("L | L K B N H D", {}, "at most once"),
        ("L | K | B N H D", {}, "at most one bar"),
        ("L | K N H D", {}, "must have B, and not left of the bar"),
        ("L B | K N H D", {}, "must have B, and not left of the bar"),
        ("", {}, "must have B"),
        ("L | B N H D", {}, "the pattern lacks K, whose size is 2"),
        ("L | K B N H D", {"H": 0}, "H must be a positive integer, got 0"),
        ("L | K B N H D", {"N": 2.0}, "N must be an integer, got 2.0"),
        ("L | K B N H D", {"B": -1}, "B must be a positive integer, got -1"),
        ("L | K B N H D", {"L": True}, "L must be an integer, got True"),
        ("L | K B N H D", {"K": 3}, "K must be 1 or 2, got 3"),
        ("L | K B N H D", {"dtype": None}, "dtype must be given"),
        (
            "L | K B N H D",
            {"row_bytes": PAGE - 1},
            f"at least the page's {PAGE} bytes, got {PAGE - 1}",
        ),
        ("L | K B N H D", {"offset_bytes": -1}, "offset_bytes must not be negative, got -1"),
        ("L | K B N H D", {"row_bytes": 999.0}, "row_bytes must be an integer, got 999.0"),
        ("L | K B N H D", {"dtype": "float16"}, "dtype must be a dtype, got 'float16'"),
        (None, {}, "pattern must be a str, got None"),
        ("L | K B N H D", {"page_bytes": 5}, f"page_bytes must be {PAGE} or left out, got 5"),
        ("L | K B N H D", {"D_v": 0}, "D_v must be positive"),
        ("L | D B K N H", {"D_v": 4}, "in the page, right of K; got 4"),
        ("L | B D K N H", {"D_v": 4}, "in the page, right of K; got 4"),
        ("L | K B N H D", {"opaque": True, "page_bytes": 8}, "an opaque layout's pattern must end with B"),
        ("L K H N D | B", {"opaque": True}, "an opaque layout needs a positive page_bytes, got 0"),
        ("L | K B N H D", {"first_head": 2, "total_heads": 4}, "heads 2 to 4 must be of 4"),
        ("L | K B N H D", {"replica": 2, "replicas": 2}, "replica must be below replicas"),
        (
            "L | K B N H D",
            {"scales": KVLayout("B N", B=5, N=2, dtype=torch.float32)},
            "scales must have the same layers",
        ),
    ],
)
def test_refused_layouts(pattern, changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        KVLayout(pattern, **{**SIZES, **changes})
    assert str(caught.value).startswith("KVLayout")


def test_shards():
    whole = KVLayout("L | K B N H D", **{**SIZES, "H": 8}, row_bytes=4096, offset_bytes=64)
    heads = lambda size: [(s.first_head, s.H) for s in (whole.shard(rank, size) for rank in range(size))]  # noqa: E731
    assert heads(1) == [(0, 8)] and heads(2) == [(0, 4), (4, 4)]
    assert heads(3) == [(0, 3), (3, 3), (6, 2)]
    assert heads(8) == [(i, 1) for i in range(8)] and heads(16) == [(i // 2, 1) for i in range(16)]
    shard = whole.shard(5, 16)
    assert (shard.replica, shard.replicas, shard.row_bytes, shard.offset_bytes) == (1, 2, None, 0)
    assert repr(shard).endswith("float16, head 2 of 8, replica 1 of 2)")
    few = KVLayout("B H D", B=1, H=2, D=1, dtype=torch.uint8)
    assert [(s.first_head, s.replica, s.replicas) for s in (few.shard(r, 3) for r in range(3))] == [
        (0, 0, 2), (0, 1, 2), (1, 0, 1)]  # fmt: skip
    for rank, size in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank must be below size and not negative, got rank {rank} of {size}"):
            whole.shard(rank, size)
    mla = KVLayout("L | B N D", L=2, B=3, N=4, D=8, dtype=torch.uint8, row_bytes=64).shard(2, 3)
    assert (mla.H, mla.replica, mla.replicas, mla.row_bytes, mla.page_bytes) == (1, 2, 3, None, 32)
    with pytest.raises(ValueError, match="a shard cannot be sharded again"):
        shard.shard(0, 1)
    with pytest.raises(ValueError, match="opaque pages cannot be sharded"):
        KVLayout("B", B=2, opaque=True, page_bytes=3).shard(0, 2)


def test_the_picture():
    picture = KVLayout("L | B H N K D", **SIZES).draw().split("\n")
    assert picture[0] == "L | B H N K D   2 tensors, 2 pools of 5 pages"
    assert picture[1].split() == ["L", "2", "tensors"]
    assert picture[2].split() == ["B", "5", "x", str(2 * PAGE), "bytes", "blocks"]
    assert picture[-1].split() == ["D", "8", "x", "2", "bytes", "|"]
    assert sum(f"one page: {2 * PAGE} bytes" in line for line in picture) == 1
    assert KVLayout("B", B=1, opaque=True, page_bytes=8).draw().startswith("B   1 tensor, 1 pool of 1 pages")


# Tensors.

NHD = KVLayout("L | B K N H D", **{**SIZES, "L": 1})


def _zeros(*shape, dtype=torch.float16):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    "tensor",
    [
        _zeros(5, 2, 4, 3, 8),
        _zeros(5, 2, 4, 24),
        _zeros(5, 2 * PAGE // 2),
        _zeros(5 * PAGE),
        _zeros(5, 2, 4, 3, 16, dtype=torch.uint8),
        _zeros(5, 2 * PAGE, dtype=torch.int8),
        _zeros(5, 2, 4, 3, 8).permute(1, 0, 3, 2, 4),
        _zeros(1, 5, 2, 4, 3, 8),
        _zeros(10 * PAGE + 99, dtype=torch.uint8),
    ],
    ids=lambda t: f"{list(t.shape)} {t.dtype}",
)
def test_tensors_that_are_the_layout(tensor):
    (pool,) = KVCache(NHD, tensor).pools
    assert pool.data_ptr() == tensor.data_ptr() and pool.shape == (5, 2 * PAGE)


@pytest.mark.parametrize(
    "tensor",
    [
        _zeros(2, 5, 4, 3, 8),
        _zeros(5, 2, 3, 4, 8),
        _zeros(5, 2, 3, 4, 8).transpose(2, 3),
        _zeros(5, 2, 4, 3, 9)[..., :8],
        _zeros(6, 2, 4, 3, 8),
        _zeros(4, 2, 4, 3, 8),
        _zeros(5, 2, 4, 3, 1).expand(5, 2, 4, 3, 8),
        _zeros(5 * PAGE - 1),
        _zeros(2, 5 * PAGE, dtype=torch.uint8),
        _zeros(5, 3 * PAGE, dtype=torch.uint8),
    ],
    ids=lambda t: f"{list(t.shape)} {list(t.stride())}",
)
def test_tensors_that_are_not(tensor):
    with pytest.raises(
        ValueError, match=r"tensors\[0\] must be \[5, 2, 4, 3, 8\] with strides of \[384, 192, 48, 16, 2\]"
    ):
        KVCache(NHD, tensor)


def test_refused_caches():
    with pytest.raises(ValueError, match="has 1 tensors, got 2"):
        KVCache(NHD, [_zeros(5, 2, 4, 3, 8)] * 2)
    with pytest.raises(ValueError, match=r"tensors\[0\] must be float16 or raw uint8, got float32"):
        KVCache(NHD, _zeros(5, 2, 4, 3, 8, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"tensors\[1\] must be on cpu like the first, got meta"):
        KVCache(
            replace(NHD, L=2), [_zeros(5, 2, 4, 3, 8), torch.zeros(5, 2, 4, 3, 8, dtype=torch.float16, device="meta")]
        )
    with pytest.raises(ValueError, match=r"must be a strided tensor, got layout torch\.sparse_coo"):
        KVCache(NHD, _zeros(5, 2, 4, 3, 8).to_sparse())
    with pytest.raises(ValueError, match="must be a Tensor or a list of them, got ndarray"):
        KVCache(NHD, _zeros(5, 2, 4, 3, 8).numpy())
    with pytest.raises(ValueError, match="layout must be a KVLayout, got 'B'"):
        KVCache("B", _zeros(5))
    complex_layout = KVLayout("B D", B=2, D=3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="must hold its values as they are"):
        KVCache(complex_layout, torch.zeros(2, 3, dtype=torch.complex64).conj())
    short = _zeros(5, 2, 4, 3, 8)
    short.untyped_storage().resize_(100)
    with pytest.raises(ValueError, match=rf"tensors\[0\] must have {10 * PAGE} bytes of storage behind it"):
        KVCache(NHD, short)


def test_rows_padded_to_the_larger_of_k_and_v_are_not_those_of_v():
    layout = KVLayout("K | B N D", K=2, B=4, N=2, D=4, D_v=2, dtype=torch.uint8)
    k, v = _zeros(4, 8, dtype=torch.uint8), _zeros(4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"tensors\[1\] must be \[4, 2, 2\] with strides of \[4, 2, 1\] bytes"):
        KVCache(layout, [k, v])
    assert KVCache(layout, [k, v[:, :4].contiguous()]).pools[1].stride() == (4, 1)


def test_offsets_and_padding():
    padded = replace(NHD, row_bytes=500, offset_bytes=7, page_bytes=0)
    flat = _zeros(7 + 4 * 500 + 2 * PAGE, dtype=torch.uint8)
    (pool,) = KVCache(padded, flat).pools
    assert pool.data_ptr() == flat.data_ptr() + 7 and pool.stride() == (500, 1)
    with pytest.raises(ValueError, match=f"must be a flat buffer of {len(flat)} bytes"):
        KVCache(padded, flat[:-1])
    rows = replace(NHD, row_bytes=500, page_bytes=0)
    shown, strided = _zeros(5, 500, dtype=torch.uint8), _zeros(5, 250)[:, : 2 * PAGE // 2]
    assert KVCache(rows, shown).pools[0].stride() == KVCache(rows, strided).pools[0].stride() == (500, 1)
    assert KVCache(rows, strided.unflatten(1, (2, 4, 3, 8))).pools[0].shape == (5, 2 * PAGE)


def test_scales_come_last():
    layout = KVLayout(
        "L | B N H D", L=2, B=3, N=4, H=2, D=8, dtype=torch.float8_e4m3fn,
        scales=KVLayout("L | B N H", L=2, B=3, N=4, H=2, dtype=torch.float32),
    )  # fmt: skip
    values, scales = [_zeros(3, 4, 2, 8, dtype=torch.uint8)] * 2, [_zeros(3, 4, 2, dtype=torch.float32)] * 2
    assert [pool.shape[1] for pool in KVCache(layout, [*values, *scales]).pools] == [64, 64, 32, 32]
    with pytest.raises(ValueError, match=r"tensors\[2\] must be float32 or raw uint8, got float16"):
        KVCache(layout, [*values, _zeros(3, 4, 2), scales[1]])


def test_no_blocks_is_a_cache():
    layout = replace(NHD, B=0)
    assert KVCache(layout, _zeros(0, 2, 4, 3, 8)).pools[0].shape == (0, 2 * PAGE)


def test_a_padded_whole_leaves_no_doubt_about_a_shards_buffer():
    """Its rows would be read where they are not: the shard does not know the padding of its own buffer."""
    sizes = {"B": 3, "N": 2, "H": 2, "D": 4, "dtype": torch.uint8}
    for whole in (KVLayout("B N H D", **sizes, row_bytes=20), KVLayout("B N H D", **sizes, offset_bytes=4)):
        shard = whole.shard(1, 2)
        assert KVCache(shard, torch.zeros(24, dtype=torch.uint8)).pools[0].stride() == (8, 1)
        assert KVCache(shard, torch.zeros(3, 2, 1, 4, dtype=torch.uint8)).pools[0].stride() == (8, 1)
        with pytest.raises(ValueError, match=r"must be of 24 bytes for .*, or the shard must say its own row_bytes"):
            KVCache(shard, torch.zeros(30, dtype=torch.uint8))
        for said, step in ((replace(shard, row_bytes=10), 10), (replace(shard, row_bytes=8), 8)):
            assert KVCache(said, torch.zeros(30, dtype=torch.uint8)).pools[0].stride() == (step, 1)
    scales = KVLayout("B N H", B=3, N=2, H=2, dtype=torch.uint8, row_bytes=6)
    shard = KVLayout("B N H D", **sizes, scales=scales).shard(0, 2)
    with pytest.raises(ValueError, match=r"tensors\[1\] must be of 6 bytes"):
        KVCache(shard, [torch.zeros(24, dtype=torch.uint8), torch.zeros(18, dtype=torch.uint8)])


OPAQUE = KVLayout("B", B=5, opaque=True, page_bytes=20)


@pytest.mark.parametrize(
    "tensor",
    [
        _zeros(5, 2, 5),
        _zeros(5, 2, 5).transpose(1, 2),
        _zeros(5, 10).t(),
        _zeros(5, 5, 1, dtype=torch.float32),
        _zeros(5, 2, 2, 5, dtype=torch.uint8),
        _zeros(1, 5, 10),
        _zeros(50),
    ],
    ids=lambda t: f"{list(t.shape)} {t.dtype}",
)
def test_an_opaque_page_may_be_seen_as_anything_without_a_gap(tensor):
    (pool,) = KVCache(OPAQUE, tensor).pools
    assert pool.data_ptr() == tensor.data_ptr() and (pool.shape, pool.stride()) == ((5, 20), (20, 1))


@pytest.mark.parametrize(
    "tensor",
    [
        _zeros(5, 2, 6)[..., :5],
        _zeros(5, 3, 5)[:, :2],
        _zeros(5, 2, 4),
        _zeros(5, 2, 6),
        _zeros(6, 2, 5),
        _zeros(2, 5, 5),
        _zeros(5, 1, 5).expand(5, 2, 5),
        _zeros(49),
    ],
    ids=lambda t: f"{list(t.shape)} {list(t.stride())}",
)
def test_an_opaque_page_has_no_gap_and_no_other_size(tensor):
    shape, strides = (", ".join(map(str, numbers)) for numbers in (tensor.shape, [2 * n for n in tensor.stride()]))
    got = rf"got shape \[{shape}\] with strides of \[{strides}\] bytes$"
    with pytest.raises(ValueError, match=rf"a flat buffer of 100 bytes for KVLayout\(\"B\", .*{got}"):
        KVCache(OPAQUE, tensor)


def test_rows_of_opaque_pages_may_be_longer():
    padded = replace(OPAQUE, row_bytes=32)
    for tensor in (_zeros(5, 16), _zeros(5, 2, 8)[..., :5].as_strided((5, 2, 5), (16, 5, 1))):
        assert KVCache(padded, tensor).pools[0].stride() == (32, 1)


def test_memory_is_counted_from_a_tensors_own_begin():
    """Behind a tensor that begins inside its storage there must be enough of it."""
    for dtype in (torch.float16, torch.uint8):
        whole = torch.zeros(7 * 16 + 5 * 2 * PAGE, dtype=torch.uint8).view(dtype)
        tensor = whole[7 * 16 // dtype.itemsize :]
        assert KVCache(NHD, tensor).pools[0].data_ptr() == tensor.data_ptr()
        whole.untyped_storage().resize_(7 * 16 + 5 * 2 * PAGE - 1)
        have = 5 * 2 * PAGE - 1
        with pytest.raises(ValueError, match=f"must have {have + 1} bytes of storage behind it for .*, got {have}$"):
            KVCache(NHD, tensor)


def test_what_has_an_offset_or_other_sizes_in_k_and_v_is_a_flat_buffer():
    shifted = replace(NHD, offset_bytes=8)
    with pytest.raises(ValueError, match=rf"tensors\[0\] must be a flat buffer of {8 + 10 * PAGE} bytes for"):
        KVCache(shifted, _zeros(5, 2, 4, 3, 8))
    uneven = KVLayout("B K N D", K=2, B=3, N=2, D=4, D_v=2, dtype=torch.uint8)
    assert KVCache(uneven, torch.zeros(3 * 12, dtype=torch.uint8)).pools[0].shape == (3, 12)
    assert KVCache(uneven, torch.zeros(3, 12, dtype=torch.uint8)).pools[0].shape == (3, 12)
    with pytest.raises(ValueError, match=r"tensors\[0\] must be a flat buffer of 36 bytes for"):
        KVCache(uneven, torch.zeros(3, 2, 6, dtype=torch.uint8))


def test_tensors_come_in_a_list():
    tensor = _zeros(5, 2, 4, 3, 8)
    for tensors, kind in (({tensor}, "set"), ([tensor, 1], "list"), ((None,), "tuple"), (iter([tensor]), "list_it")):
        with pytest.raises(ValueError, match=f"tensors must be a Tensor or a list of them, got {kind}"):
            KVCache(NHD, tensors)
    with pytest.raises(ValueError, match="has 1 tensors, got 0"):
        KVCache(NHD, [])
    assert KVCache(NHD, (tensor,)).num_blocks == 5
