"""What can be said of a layout beyond an order of letters, how it is printed and read again, and what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from layout_cases import random_sides

from kvkernels import KVCache, KVLayout
from kvkernels.layout import parts

U8, F8, BF16, F32 = torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32
CELL = {"B": 8, "N": 16, "H": 4, "steps": {"N": 132}}
CELLS = parts(
    kv=KVLayout("B H N D", D=128, dtype=F8, **CELL), scales=KVLayout("B H N", dtype=F32, offset_bytes=128, **CELL)
)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_printed_is_read_again(seed):
    rng = np.random.default_rng([11, seed])
    for _ in range(20):
        for layout in (layout for side in random_sides(rng) for layout in side.layouts):
            for again in (
                KVLayout.from_text(repr(layout)), KVLayout.from_text(layout.text), pickle.loads(pickle.dumps(layout)),
                copy.deepcopy(layout), replace(layout),
            ):  # fmt: skip
                assert again == layout and hash(again) == hash(layout) and repr(again) == repr(layout)
                assert again.pools == layout.pools and again.num_tensors == layout.num_tensors


def test_what_is_not_printed_so_is_not_read():
    right = repr(KVLayout("B N D", B=2, N=4, D=8, dtype=U8))
    changed = [right.replace(a, b) for a, b in (("uint8", "uint9"), ("N=4", "N=x"), ("N=4", "O=4"), ("B=2, ", ""))]
    for text in ("", "KVLayout", right[:-1], *changed, "parts(k=3)"):
        with pytest.raises(ValueError, match=r"KVLayout.from_text: text must be what a layout is printed as|parts: k"):
            KVLayout.from_text(text)


def test_what_goes_without_saying_is_not_kept():
    dense = KVLayout("B H N D", B=2, N=4, H=2, D=8, dtype=BF16)
    said = replace(dense, steps={"B": 128, "H": 64, "N": 16, "D": 2}, total_layers=1, total_d=8)
    assert said == dense and not said.steps and said.row_bytes is None and repr(said) == repr(dense)
    assert replace(dense, steps={"B": 150}) == replace(dense, row_bytes=150)
    padded = replace(dense, steps={"N": 20}, page_bytes=0)
    assert (padded.page_bytes, padded.needed_bytes(0), padded.block_bytes) == (156, 160 + 156, 128)
    assert [n for n, _ in padded.dimensions(0)] == [2, 2, 4, 8]
    assert [step for _, step in padded.dimensions(0)] == [160, 80, 20, 2]
    assert KVLayout("B N D", B=2, N=4, D=8, dtype=U8, deal=(0, 1, 1)).deal is None


def test_a_layouts_steps_cannot_be_changed():
    with pytest.raises(TypeError):
        CELLS.steps["N"] = 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("pattern", "options", "match"),
    [
        ("B N D", {"steps": {"N": 7}}, r"steps\['N'\] must be at least the 8 bytes that lie inside, got 7"),
        ("B N D", {"steps": {"D": 0}}, r"steps\['D'\] must be a positive number of bytes, got 0"),
        ("B N D", {"steps": {"H": 8}}, "steps must be of B, N, D, got 'H'"),
        ("N | B D", {"steps": {"N": 8}}, "steps must be of B, D, got 'N'"),
        ("B N D/2 D%2", {"steps": {"D": 8}}, "steps must be of B, N, D/2, D%2, got 'D'"),
        ("B N D", {"steps": [8]}, r"steps must be a mapping of letters to bytes, got \[8\]"),
        ("B N D", {"steps": {"B": 40}, "row_bytes": 44}, r"row_bytes must be steps\['B'\], which is 40, got 44"),
        ("B N D", {"steps": {"B": 31}}, "row_bytes must be at least the page's 32 bytes, got 31"),
        ("B N D/3 D%3", {}, "D must be a multiple of 3, as D/3 says, got 8"),
        ("B N D/2", {}, "a letter but K and B may be cut in two, as D/8 and D%8"),
        ("B N D/2 D%4", {}, "may be cut in two"),
        ("B N D/2 D%2 D", {}, "at most once"),
        ("B/2 B%2 N D", {}, "may be cut in two"),
        ("B N D#2", {}, "at most once"),
        ("B N D", {"deal": (4, 4, 1)}, r"deal must be a rank below of, and an interleave that divides N=4, got \(4, 4"),
        ("B N D", {"deal": (0, 2, 3)}, "an interleave that divides N=4"),
        ("B N D", {"deal": (0, 2)}, r"deal must be \(rank, of, interleave\), got \(0, 2\)"),
        ("B N D", {"deal": (0, 2, 1.0)}, "deal must be an integer, got 1.0"),
        ("B N D", {"first_layer": 1}, "layers 1 to 1 must be of 1"),
        ("B N D", {"first_d": 4, "total_d": 11}, "elements 4 to 11 must be of 11"),
        ("B N D", {"tensor": -1}, "tensor must not be negative, got -1"),
        ("B N D", {"W": 3}, "the pattern lacks W, whose size is 3"),
        ("K B N D", {"K": 2, "D_v": 4, "total_d": 16}, "first_d and total_d must be left out where K and V differ"),
    ],
)  # fmt: skip
def test_refused(pattern, options, match):
    with pytest.raises(ValueError, match=match) as caught:
        KVLayout(pattern, B=2, N=4, D=8, dtype=U8, **options)
    assert str(caught.value).startswith(f'KVLayout("{pattern}"): ') or "#" in pattern


B_N_D = KVLayout("B N D", B=2, N=4, D=8, dtype=U8)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "parts: a part must be given, got nothing"),
        ({"B": 3}, "parts: a part must be given, got B"),
        ({"k": 3}, "parts: k must be a pattern or a KVLayout without further parts, got 3"),
        ({"k": CELLS}, "parts: k must be a pattern or a KVLayout without further parts, got parts"),
        ({"a": B_N_D, "b": replace(B_N_D, B=3)}, "B of part b must be 2, got 3"),
        ({"a": B_N_D, "b": KVLayout("L B N D", L=2, B=2, N=4, D=8, dtype=U8)}, "L of part b must be 1, got 2"),
        ({"a": B_N_D, "b": replace(B_N_D, N=2, page_bytes=0)}, "part b must have 4 tokens of a block, dealt out alike"),
        ({"a": B_N_D, "b": replace(B_N_D, deal=(0, 2, 1))}, "part b must have 4 tokens of a block, dealt out alike"),
        (
            {"a": replace(B_N_D, deal=(0, 2, 1)), "b": KVLayout("B D", B=2, D=8, dtype=U8)},
            "part b must have 4 tokens of a block, dealt out alike",
        ),
        ({"a": B_N_D, "b": KVLayout("B", B=2, opaque=True, page_bytes=8)}, "part b must not be opaque"),
        (
            {"kv": KVLayout("K B N D", K=2, B=2, N=4, D=8, dtype=U8), "k": B_N_D},
            "parts must have names of their own, got k, v, k",
        ),
        (
            {"a": replace(B_N_D, steps={"N": 12}, page_bytes=0),
             "b": KVLayout("B N D", B=2, N=4, D=4, dtype=U8, steps={"N": 12}, offset_bytes=7)},
            "parts a and b must not have a byte in common, got byte 7 of a page twice",
        ),
        (
            # In the same rows of the first layer, elsewhere in those of the second.
            {"a": KVLayout("L B D", L=2, B=2, D=1, dtype=U8, steps={"L": 20, "B": 4}),
             "b": KVLayout("L B D", L=2, B=2, D=1, dtype=U8, steps={"L": 22, "B": 4}, offset_bytes=1)},
            "parts a and b must lie in one row of a block or apart",
        ),
        (
            {"a": B_N_D, "b": replace(B_N_D, offset_bytes=40)},
            "parts a and b must lie in one row of a block or apart, got both in tensor 0 from byte 40 on",
        ),
    ],
)  # fmt: skip
def test_refused_parts(given, match):
    with pytest.raises(ValueError, match=match):
        parts(**given)


def test_parts_take_the_sizes_that_their_letters_have():
    one = parts(k="L | B N H D", v="L | B H D N", scale="L | B H", L=2, B=3, N=4, H=5, D=6, dtype=F32)
    members = {member.name: member.layout for member in one.members}
    assert (members["scale"].N, members["scale"].D, members["v"].D) == (1, 1, 6)
    assert [member.tensor for member in one.members] == [0, 2, 4] and one.num_tensors == 6
    assert one.block_tokens == one.span_tokens == 4
    lone = parts(kv="B N D", B=2, N=4, D=8, dtype=U8)
    assert lone == B_N_D != parts(latent=B_N_D) == KVLayout.from_text(repr(parts(latent=B_N_D)))
    moved = parts(a=B_N_D, b=replace(B_N_D, offset_bytes=64), c=replace(B_N_D, tensor=2), d=B_N_D)
    assert [member.tensor for member in moved.members] == [0, 0, 2, 3]
    assert [place.tensor for place in moved.pools] == [0, 0, 2, 3]


def test_parts_that_differ_in_size_and_kind_are_short_too():
    """The page of DeepSeek V3.2 in three lines, and the same from layouts of their own."""
    row = {"B": 4, "N": 64, "steps": {"N": 656}}
    short = parts(latent=("B N D", 512, F8), scale=("B N D", 4, F32, 512), rope=("B N D", 64, BF16, 528), **row)
    long = parts(
        latent=KVLayout("B N D", D=512, dtype=F8, **row),
        scale=KVLayout("B N D", D=4, dtype=F32, offset_bytes=512, **row),
        rope=KVLayout("B N D", D=64, dtype=BF16, offset_bytes=528, **row),
    )
    assert short == long and short.num_pools == 1
    ranks = parts(kv=("B N H D", 8, F8), scales=("B H", 1, F32), B=2, N=4, H=2, first_head=2, total_heads=4)
    assert [member.layout.first_head for member in ranks.members] == [2, 2]
    for wrong in (("B N D",), ("B N D", 8), (B_N_D, 8, U8), ("B N D", 8, U8, 0, 0)):
        with pytest.raises(ValueError, match="parts: k must be a pattern or a KVLayout without further parts, got"):
            parts(k=wrong, B=2, N=4)


def test_a_part_that_goes_unsaid_is_one_that_is_named():
    """K=2 is k and v, a latent is kv, scales are a part; each by the same name whichever way it is written."""
    sizes = {"B": 2, "N": 4, "D": 8, "dtype": U8}
    pair = KVLayout("K B N D", K=2, **sizes, scales=KVLayout("K B N", K=2, B=2, N=4, dtype=F32))
    names = [name for member in pair.members for name in member.names]
    assert names == ["k", "v", "k_scales", "v_scales"] and B_N_D.members[0].names == ("kv",)


# Shards.


def test_shards_along_other_letters():
    whole = KVLayout("L | B W D", L=5, B=2, W=3, D=8, dtype=U8)
    stages = [whole.shard(rank, 2, "L") for rank in range(2)]
    assert [(s.first_layer, s.L, s.total("L")) for s in stages] == [(0, 3, 5), (3, 2, 5)]
    assert repr(stages[1]) == 'KVLayout("L | B W D", L=2, B=2, W=3, D=8, uint8, layers 3 to 4 of 5)'
    thirds = [whole.shard(rank, 3, "D") for rank in range(3)]
    assert [(s.first_d, s.D, s.total("D")) for s in thirds] == [(0, 3, 8), (3, 3, 8), (6, 2, 8)]
    assert [whole.shard(rank, 2).replica for rank in range(2)] == [0, 1]
    both = parts(x=whole, y=KVLayout("L | B W D", L=5, B=2, W=3, D=4, dtype=U8)).shard(1, 2, "D")
    assert [(m.layout.first_d, m.layout.D) for m in both.members] == [(4, 4), (2, 2)]


def test_a_shard_keeps_the_steps_that_its_size_does_not_touch():
    shard = CELLS.shard(1, 4)
    assert repr(shard).count('steps={"N": 132}') == 2 and (shard.num_pools, shard.pools[0].page_bytes) == (1, 16 * 132)
    padded = KVLayout("B H N D", B=2, H=4, N=4, D=8, dtype=U8, steps={"H": 40, "N": 9}).shard(0, 2)
    assert padded.steps == {"H": 40, "N": 9}
    outer = KVLayout("B N H D", B=2, H=4, N=4, D=8, dtype=U8, steps={"N": 40}).shard(0, 2)
    assert not outer.steps and outer.padding_unsaid
    with pytest.raises(ValueError, match="or the shard must say its own row_bytes and offset_bytes"):
        KVCache(outer, torch.zeros(2 * 4 * 16 + 8, dtype=U8))
    # A latent's page is every rank's.
    rows = parts(
        latent=KVLayout("B N D", B=2, N=4, D=6, dtype=U8, steps={"N": 8}),
        rope=KVLayout("B N D", B=2, N=4, D=2, dtype=U8, steps={"N": 8}, offset_bytes=6),
    )
    assert rows.shard(1, 2).pools == rows.pools and rows.shard(1, 2).is_writer(1)


@pytest.mark.parametrize(
    ("layout", "arguments", "match"),
    [
        (B_N_D, (0, 2, "N"), "along must be one of L, H, D, got 'N'"),
        (B_N_D, (2, 2, "D"), "rank must be below size and not negative, got rank 2 of 2"),
        (B_N_D.shard(0, 2, "D"), (0, 2, "D"), "a shard cannot be sharded again"),
        (KVLayout("B K D", K=2, B=1, D=4, D_v=2, dtype=U8), (0, 2, "D"), "along must be H or L where K and V differ"),
        (CELLS, (0, 2, "D"), "part kv cannot be sharded along D where it lies, beside others in one page"),
    ],
)
def test_refused_shards(layout, arguments, match):
    with pytest.raises(ValueError, match=match):
        layout.shard(*arguments)


# Views.


@pytest.mark.parametrize(
    ("view", "letters", "given", "printed"),
    [
        (torch.zeros(6, 1, 64, 656, dtype=U8), "B H N D", {}, '"B H N D", B=6, N=64, H=1, D=656, uint8'),
        (torch.zeros(6, 1, 64, 8).transpose(1, 2), "B N H D", {}, '"B N H D", B=6, N=64, H=1, D=8, float32'),
        (torch.zeros(6, 4, 16, 8).transpose(1, 2), "B N H D", {}, '"B H N D", B=6, N=16, H=4, D=8, float32'),
        (torch.zeros(6, 4, 16, 8), "B H N (K D)", {"K": 2}, '"B H N K D", K=2, B=6, N=16, H=4, D=4, float32'),
        (torch.zeros(6, 4, 16, 8), "B H N (K D)", {"D": 4}, '"B H N K D", K=2, B=6, N=16, H=4, D=4, float32'),
        (torch.zeros(6, 4, 16, 8), "B H N (K D)", {"D_v": 3}, '"B H N K D", K=2, B=6, N=16, H=4, D=5, D_v=3, float32'),
        (torch.zeros(6, 4, 3, 16, 8), "B H D/8 N D%8", {}, '"B H D/8 N D%8", B=6, N=16, H=4, D=24, float32'),
        (torch.zeros(2, 6, 16, 8)[..., :6], "K B N D", {}, '"K B N D", K=2, B=6, N=16, D=6, float32, steps={"N": 32}'),
        (torch.zeros(6, 20, 8)[:, :16], "B N D", {}, '"B N D", B=6, N=16, D=8, float32, row_bytes=640'),
        ([torch.zeros(6, 16, 8)] * 3, "L | B N D", {}, '"L | B N D", L=3, B=6, N=16, D=8, float32'),
        (torch.zeros(96, 4, 8), "(B N) H D", {"N": 16}, '"B N H D", B=6, N=16, H=4, D=8, float32'),
        (torch.zeros(6, 16, 8, dtype=U8), "B N D", {"dtype": F8}, '"B N D", B=6, N=16, D=8, float8_e4m3fn'),
    ],
)  # fmt: skip
def test_a_view_says_its_own_layout(view, letters, given, printed):
    layout = KVLayout.of(view, letters, **given)
    assert repr(layout) == f"KVLayout({printed})"
    tensors = [view.view(F8)] if "dtype" in given else view
    assert KVCache(layout, tensors).pools[0].data_ptr() == (view if letters[0] != "L" else view[0]).data_ptr()


@pytest.mark.parametrize(
    ("view", "letters", "given", "match"),
    [
        (torch.zeros(6, 4, 8), "B N", {}, "letters must name each of the view's 3 dimensions, got 'B N'"),
        (torch.zeros(6, 4, 8), "B N D!", {}, "letters must name each of the view's 3 dimensions"),
        (torch.zeros(6, 4, 8), "B N (K D)", {}, r"all but one of \(K D\) must be given, and divide 8, got {}"),
        (torch.zeros(6, 4, 8), "B N (K D)", {"K": 3}, r"all but one of \(K D\) must be given, and divide 8, got {'K'"),
        (torch.zeros(6, 4, 8), "B N D", {"N": 5}, "N must be what the view has, 4, got 5"),
        (torch.zeros(6, 1, 8).expand(6, 4, 8), "B N D", {}, "view must have memory of its own for each element"),
        (torch.zeros(6, 4, 8), "L | B N D", {}, "letters must have a bar for a list of views, and none for one view"),
        ([torch.zeros(6, 4, 8)], "B N D", {}, "letters must have a bar for a list of views, and none for one view"),
        ([torch.zeros(6, 4), torch.zeros(6, 5)], "L | B D", {}, "view must be Tensors of one shape, one dtype"),
        ([], "L | B D", {}, "view must be a strided Tensor or a list of them, got list"),
        (torch.zeros(6, 4), None, {}, "letters must be a str, got None"),
        (torch.zeros(6, 4), "B D", {"dtype": U8}, "dtype must have the 4 bytes of the view's elements, got torch.uin"),
        (torch.zeros(6, 4), "N D", {}, "letters must have B, and not left of the bar, got 'N D'"),
    ],
)  # fmt: skip
def test_refused_views(view, letters, given, match):
    with pytest.raises(ValueError, match=match):
        KVLayout.of(view, letters, **given)


# Tensors.


def test_a_row_may_hold_more_than_a_part():
    latent = KVLayout("B N D", B=4, N=8, D=6, dtype=U8, steps={"N": 10})
    rows = torch.zeros(4, 8, 10, dtype=U8)
    for tensor in (rows, rows[..., :6], rows.view(32, 1, 10), rows.flatten()):
        (pool,) = KVCache(latent, tensor).pools
        assert pool.data_ptr() == rows.data_ptr() and (pool.shape, pool.stride()) == ((4, 76), (80, 1))
    others = (torch.zeros(4, 8, row, dtype=U8) for row in (9, 11))
    for tensor in (rows[:3], rows.view(1, 320), rows.view(4, 10, 8), *others):
        with pytest.raises(ValueError, match=r"tensors\[0\] must be \[4, 8, 6\] with strides of \[80, 10, 1\] bytes"):
            KVCache(latent, tensor)


def test_tensors_of_parts():
    cells = torch.zeros(8, 4, 16, 132, dtype=U8)
    for tensor in (cells, cells.flatten(), cells.view(8, 4, -1), cells.view(F8)):
        assert [tuple(pool.shape) for pool in KVCache(CELLS, tensor).pools] == [(8, 4 * 16 * 132)]
    with pytest.raises(ValueError, match=r"tensors\[0\] must be float8_e4m3fn or raw uint8, got bfloat16"):
        KVCache(CELLS, cells.view(BF16))
    with pytest.raises(ValueError, match=r"tensors\[0\] must be .*a flat buffer of"):
        KVCache(CELLS, cells[:, :, :, :130])
    with pytest.raises(ValueError, match="has 1 tensors, got 2"):
        KVCache(CELLS, [cells, cells])


# Pictures.


def test_pictures_show_what_lies_between():
    assert KVLayout("B N D", B=4, N=8, D=6, dtype=BF16, steps={"N": 16}).draw().split("\n") == [
        "B N D   1 tensor, 1 pool of 4 pages",
        "  B       4 x 128 bytes   blocks",
        "  N       8 x  16 bytes   | one page: 124 bytes   4 bytes lie between",
        "  D       6 x   2 bytes   |",
    ]
    picture = parts(
        latent=KVLayout("B N D", B=4, N=8, D=5, dtype=U8, steps={"N": 16}),
        scale=KVLayout("B N", B=4, N=8, dtype=F32, steps={"N": 16}, offset_bytes=8),
    ).draw()
    assert picture.split("\n")[0] == "1 tensor, 1 pool of 4 pages"
    assert "scale: B N   1 tensor, 1 pool of 4 pages, from byte 8 of tensor 0" in picture
    assert picture.endswith("every 16 bytes of tensor 0: | latent 0 to 4 | (3 bytes) | scale 8 to 11 | (4 bytes) |")
    cut = KVLayout("B D/8 N D%8", B=2, D=16, N=4, dtype=BF16).draw().split("\n")
    assert [line.split()[:2] for line in cut[1:]] == [["B", "2"], ["D/8", "2"], ["N", "4"], ["D%8", "8"]]
