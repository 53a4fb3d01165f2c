"""Plans: what is merged, what one layer is, what goes back, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvkernels import KVLayout, compile_plan, copy_pages, expand_blocks, whole_page_runs
from kvkernels.layout import parts
from kvkernels.layout import plan as plan_module
from kvkernels.layout.axes import stretches
from kvkernels.layout.geometry import Digit

SIZES = {"L": 3, "K": 2, "B": 8, "N": 4, "H": 4, "D": 8, "dtype": torch.float16}
NHD = KVLayout("L | K B N H D", **SIZES)
HND = KVLayout("L | B K H N D", **SIZES)
PAGE = 4 * 4 * 8 * 2


@pytest.mark.parametrize(
    ("src", "dst", "runs", "fragments", "largest"),
    [
        ("L | K B N H D", "L | K B N H D", 6, 6, PAGE),
        ("L | K B N H D", "L | B K N H D", 6, 6, PAGE),
        ("L | B K N H D", "L | B K N H D", 3, 3, 2 * PAGE),
        ("B L K N H D", "B L K N H D", 1, 1, 6 * PAGE),
        ("L | K B N H D", "L | B K H N D", 6, 96, 16),
        ("L | B N H K D", "L | K B N H D", 6, 96, 16),
        ("B L K N H D", "B K L N H D", 1, 6, PAGE),
        ("B L K N H D", "B H L K N D", 1, 96, 16),
        ("B N H D L K", "B K L D H N", 6, 768, 2),
    ],
)
def test_what_is_contiguous_on_both_sides_is_one_fragment(src, dst, runs, fragments, largest):
    plan = compile_plan(KVLayout(src, **SIZES), KVLayout(dst, **SIZES))
    assert (len(plan.runs.all), plan.fragments) == (runs, fragments)
    assert (plan.largest_fragment_bytes, plan.smallest_fragment_bytes) == (largest, largest)
    assert plan.bytes == 6 * PAGE and plan.src_subblocks == plan.dst_subblocks == 1


def test_k_and_v_of_other_sizes_are_merged_where_they_lie_together():
    sizes = {**SIZES, "D_v": 4}
    plan = compile_plan(KVLayout("B L K N H D", **sizes), KVLayout("B L K N H D", **sizes))
    assert (len(plan.runs.all), plan.fragments, plan.bytes) == (1, 1, 3 * (PAGE + PAGE // 2))
    plan = compile_plan(KVLayout("L | B N H K D", **sizes), KVLayout("L | K B N H D", **sizes))
    assert (plan.largest_fragment_bytes, plan.smallest_fragment_bytes) == (16, 8)
    assert "16 fragments of 8 to 16 bytes" not in plan.explain() and "8 to 16 bytes" in plan.explain()


def test_the_runs_of_the_layers_are_the_runs():
    plan = compile_plan(NHD, KVLayout("B L K H N D", **SIZES))
    assert len(plan.runs) == 3
    rows = sorted(tuple(row) for layer in plan.runs for row in layer.tolist())
    assert rows == sorted(map(tuple, plan.runs.all.tolist()))
    paged = KVLayout("B L K N H D", **SIZES)
    one = compile_plan(paged, paged)
    assert [layer.tolist()[0][2:5] for layer in one.runs] == [[i * 2 * PAGE, i * 2 * PAGE, 2 * PAGE] for i in range(3)]
    for layer in (-1, 3):
        with pytest.raises(IndexError, match=f"layer must be below 3 and not negative, got {layer}"):
            one.runs[layer]


def test_plans_are_cached_and_equal_where_their_layouts_are():
    a, b = compile_plan(NHD, HND), compile_plan([replace(NHD, page_bytes=0)], (HND,))
    assert a is b and a == b and hash(a) == hash(b)
    assert compile_plan(HND, NHD) != a
    assert a.inverse() is compile_plan(HND, NHD) and a.inverse().inverse() is a


def test_the_inverse_of_a_part_is_a_part():
    shard = NHD.shard(1, 2)
    there = compile_plan(shard, NHD, allow_partial=True)
    back = there.inverse()
    assert back.bytes == there.bytes == 3 * PAGE
    assert "stay untouched" in there.explain() and "every byte" in back.explain()
    assert "every byte" in compile_plan(NHD, NHD, allow_partial=True).explain()
    replicas = [NHD.shard(rank, 8) for rank in range(8)]
    assert compile_plan(replicas, NHD).bytes == 6 * PAGE
    assert compile_plan(replicas, NHD).inverse().bytes == 12 * PAGE


def test_units():
    large = replace(HND, N=16, page_bytes=0)
    plan = compile_plan(NHD, large)
    assert (plan.unit_tokens, plan.src_subblocks, plan.dst_subblocks) == (4, 1, 4)
    assert "an id is a unit of 4 tokens: 1 a source block, 4 a destination block" in plan.explain()
    slots = compile_plan(NHD, large, unit_tokens=1)
    assert (slots.src_subblocks, slots.dst_subblocks, slots.bytes) == (4, 16, 6 * PAGE // 4)
    assert slots.inverse() is compile_plan(large, NHD, unit_tokens=1)
    six = replace(HND, N=6, page_bytes=0)
    assert (compile_plan(six, NHD).src_subblocks, compile_plan(six, NHD).dst_subblocks) == (3, 2)


@pytest.mark.parametrize(
    ("src", "dst", "match"),
    [
        (NHD, replace(HND, L=2), "L must be the same on both sides, got 3 and 2"),
        (NHD, replace(HND, D=4, page_bytes=0), "D must be the same on both sides, got 8 and 4"),
        (NHD, replace(HND, dtype=torch.bfloat16), "dtype must be the same on both sides, got torch.float16 and"),
        (NHD, replace(HND, H=2, total_heads=2, page_bytes=0), "total_heads must be the same on both sides, got 4"),
        (NHD, replace(HND, D_v=4, page_bytes=0), "D_v must be the same on both sides, got None and 4"),
        (NHD, KVLayout("L | B N H D", **{**SIZES, "K": 1}), "K must be the same on both sides, got 2 and 1"),
        (NHD.shard(0, 2), NHD, "the sources lack heads that the destination has; allow_partial=True leaves them"),
        ([NHD, replace(NHD, N=8, page_bytes=0)], NHD, "the shards of a side must have one block size"),
        (KVLayout("L | N B K H D", **{**SIZES, "N": 8}), HND, "blocks of 8 tokens cannot be cut into 4 where N counts"),
        (KVLayout("L|B", L=3, B=8, opaque=True, page_bytes=8), NHD, "an opaque page can only become the same"),
        (
            KVLayout("L|B", L=3, B=8, opaque=True, page_bytes=8), KVLayout("L|B", L=3, B=8, opaque=True, page_bytes=9),
            "opaque pages must be as many and as large on both sides",
        ),
        (
            KVLayout("B N D", B=8, N=4, D=2, dtype=torch.uint8, scales=KVLayout("B N", B=8, N=4, dtype=torch.float32)),
            KVLayout("B N D", B=8, N=4, D=2, dtype=torch.uint8), "scales must be on both sides or on neither",
        ),
        (
            KVLayout("L | K B N H D", **{**SIZES, "L": 2049}), KVLayout("L | B K N H D", **{**SIZES, "L": 2049}),
            "more than 4096 runs would be needed",
        ),
        ([], NHD, "src must be a KVLayout or a list of them"),
    ],
)  # fmt: skip
def test_refusals_name_both_layouts(src, dst, match):
    with pytest.raises(ValueError, match=match) as caught:
        compile_plan(src, dst)
    text = str(caught.value)
    assert text.startswith("compile_plan: ") and text.count("KVLayout(") >= (2 if src else 0)


ONE_K = {name: size for name, size in SIZES.items() if name not in "LK"}
STATE = KVLayout("B W D", B=8, W=4, D=8, dtype=torch.float16)
LATENT = KVLayout("B N D", B=8, N=8, D=8, dtype=torch.float16)
TWO = parts(latent=LATENT, rope=replace(LATENT, D=4, page_bytes=0))


@pytest.mark.parametrize(
    ("src", "dst", "match"),
    [
        (TWO, LATENT, "parts must be the same on both sides, got latent, rope and kv"),
        (TWO, parts(latent=LATENT, nope=replace(LATENT, D=4, page_bytes=0)), "got latent, rope and latent, nope"),
        (TWO, parts(latent=LATENT, rope=LATENT), "elements of part rope must be the same on both sides, got 4 and 8"),
        (
            TWO, parts(latent=LATENT, rope=replace(LATENT, D=4, dtype=torch.bfloat16, page_bytes=0)),
            "dtype of part rope must be the same on both sides, got torch.float16 and torch.bfloat16",
        ),
        (
            parts(k="B N H D", **ONE_K), parts(k="B N H D", **{**ONE_K, "H": 2}),
            "heads of part k must be the same on both sides, got 4 and 2",
        ),
        (STATE, replace(STATE, W=2, page_bytes=0), "rows of part kv must be the same on both sides, got 4 and 2"),
        (replace(LATENT, deal=(0, 2, 1)), LATENT, "the sources lack tokens that the destination has; allow_partial"),
        (replace(NHD, L=2, total_layers=3), NHD, "the sources lack layers that the destination has"),
        (LATENT.shard(1, 2, "D"), LATENT, "the sources lack elements that the destination has"),
        (
            [replace(LATENT, deal=(0, 2, 1)), replace(LATENT, deal=(0, 4, 1))], LATENT,
            "the shards of a side must have one block size",
        ),
        (
            KVLayout("B N/4 D N%4", B=8, N=8, D=8, dtype=torch.float16), replace(LATENT, N=2, page_bytes=0),
            "blocks of 8 tokens cannot be cut into 2 where N is cut by 4",
        ),
        (
            KVLayout("N/4 B N%4 D", B=8, N=8, D=8, dtype=torch.float16), replace(LATENT, N=4, page_bytes=0),
            "blocks of 8 tokens cannot be cut into 4 where N counts pools",
        ),
        (
            parts(kv=LATENT, scale=KVLayout("B D", B=8, D=8, dtype=torch.float32)),
            parts(kv=replace(LATENT, N=4, page_bytes=0), scale=KVLayout("B D", B=8, D=8, dtype=torch.float32)),
            "blocks of 8 tokens cannot be cut into 4 where part scale has no N",
        ),
        (
            parts(kv=LATENT, scale=KVLayout("B D", B=8, D=8, dtype=torch.float32)),
            parts(kv=LATENT, scale=KVLayout("B N D", B=8, N=8, D=8, dtype=torch.float32)),
            "part scale must have N on both sides, or on neither",
        ),
    ],
)  # fmt: skip
def test_refusals_of_parts_ranges_and_deals_name_both_layouts(src, dst, match):
    with pytest.raises(ValueError, match=match) as caught:
        compile_plan(src, dst)
    assert str(caught.value).startswith("compile_plan: ") and str(caught.value).count("KVLayout(") >= 2


@pytest.mark.parametrize(("unit", "of", "interleave"), [(4, 8, 1), (2, 2, 2), (12, 8, 1), (6, 2, 2)])
def test_a_unit_is_whole_turns_of_all_ranks(unit, of, interleave):
    sides = [[KVLayout("B N D", B=2, N=24, D=2, dtype=torch.uint8, deal=(r, of, interleave)) for r in range(of)]] * 2
    with pytest.raises(ValueError, match=f"a unit of {unit} tokens must be a multiple of the {of * interleave} that"):
        compile_plan(*sides, unit_tokens=unit)
    plan = compile_plan(*sides, unit_tokens=of * interleave)
    assert (plan.src_subblocks, plan.bytes) == (24 // interleave, 2 * of * interleave)


@pytest.mark.parametrize(
    ("src", "dst", "runs", "fragments"),
    [
        # Pages of like parts are one piece; parts apart are a row each; what is cut alike on both sides is not cut.
        ("page", "page", 1, 1),
        ("page", "apart", 3, 3 * 64),
        ("D/4 N D%4", "D/4 N D%4", 1, 1),
        ("D/4 N D%4", "N D", 1, 64 * 16),
        ("D/4 N D%4", "D/8 N D%8", 1, 64 * 16),
        ("dealt 8", "dealt 8", 8, 8),
        ("dealt 8", "N D", 8, 8 * 8),
        ("dealt 8", "dealt 4", 8, 8 * 8),
        ("dealt 2 by 16", "dealt 4 by 8", 4, 4 * 2),
    ],
)
def test_runs_are_few(src, dst, runs, fragments):
    """Of 64 tokens of 64 elements, and of a page of three parts."""
    plan = compile_plan(_named(src), _named(dst))
    assert (len(plan.runs.all), plan.fragments) == (runs, fragments), plan.runs.all


def _named(name: str) -> KVLayout | list[KVLayout]:
    of_parts = {part: ("B N D", size, torch.uint8) for part, size in (("latent", 512), ("scale", 16), ("rope", 128))}
    if name == "apart":
        return parts(**of_parts, B=4, N=64)
    if name == "page":
        at = {"latent": 0, "scale": 512, "rope": 528}
        return parts(**{part: (*said, at[part]) for part, said in of_parts.items()}, B=4, N=64, steps={"N": 656})
    if name.startswith("dealt"):
        of, interleave = int(name.split()[1]), int(name.split()[-1]) if "by" in name else 1
        sizes = {"B": 4, "N": 64 // of, "D": 64, "dtype": torch.uint8}
        return [KVLayout("B N D", deal=(rank, of, interleave), **sizes) for rank in range(of)]
    return KVLayout(f"B {name}", B=4, N=64, D=64, dtype=torch.uint8)


@pytest.mark.parametrize(("times", "written"), [(0, 0), (2, 6 * PAGE * 2)])
def test_a_plan_that_does_not_tile_its_destination_is_refused(monkeypatch, times, written):
    """Whatever finds the pieces may be wrong: the bytes are counted."""
    found = plan_module.pieces
    monkeypatch.setattr(plan_module, "pieces", lambda *given: (one for one in found(*given) for _ in range(times)))
    src, dst = (KVLayout(pattern, **{**SIZES, "B": 77 + times}) for pattern in ("L | B K N H D", "L | B H N K D"))
    with pytest.raises(ValueError, match=f"{written} bytes would be written into blocks of {6 * PAGE}; src is"):
        compile_plan(src, dst)


def _positions(digits, at):
    """Pools and bytes of each coordinate."""
    for x in at:
        steps = [(x // digit.divisor % digit.extent, digit) for digit in digits]
        yield sum(n * digit.pools for n, digit in steps), sum(n * digit.bytes for n, digit in steps)


def _walked(stretch):
    """The same, by the loops of a stretch."""
    begin = np.array([stretch.src_pools, stretch.src_bytes, stretch.dst_pools, stretch.dst_bytes])
    for index in itertools.product(*(range(loop.extent) for loop in stretch.loops)):
        at = begin.copy()
        for i, loop in zip(index, stretch.loops, strict=True):
            at += i * np.array([loop.src_pools, loop.src_bytes, loop.dst_pools, loop.dst_bytes])
        yield tuple(at.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_stretches_are_every_position_once_and_in_order(seed):
    """Whatever the two sides cut and deal out, the loops go where the coordinates, one by one, say."""
    rng = np.random.default_rng(seed)
    irregular = 0
    for _ in range(100):
        size = int(rng.integers(1, 60))
        sides = []
        for _ in range(2):
            by = int(rng.integers(1, 7))
            digits = (Digit(-(-size // by), by, 0, int(rng.integers(50, 90))), Digit(by, 1, int(rng.integers(2)), 7))
            at = np.arange(size) + int(rng.integers(by)) if rng.integers(2) else rng.permutation(size)
            sides.append((digits, at.tolist()))
        (src, src_at), (dst, dst_at) = sides
        wanted = [(*a, *b) for a, b in zip(*(_positions(digits, at) for digits, at in sides), strict=True)]
        pieces = stretches(src, dst, src_at, dst_at)
        found = [position for piece in pieces for position in _walked(piece)]
        assert found == wanted
        irregular += 1 < len(pieces) < size
    assert irregular > 10


def test_a_plan_of_many_parts_and_layers_is_quick_to_make():
    """Nothing goes through elements or tokens one by one that need not: 61 layers of two parts, 8 ranks to 4."""
    page = {"latent": ("L | B N D", 512, torch.uint8), "scale": ("L | B N D", 16, torch.uint8, 512)}
    sizes = {"L": 61, "B": 4096, "steps": {"N": 528}}
    sides = [[parts(**page, **sizes, N=512 // of, deal=(rank, of, 1)) for rank in range(of)] for of in (8, 4)]
    plan = compile_plan(*sides)
    assert len(plan.runs.all) == 61 * 8 and plan.bytes == 61 * 512 * 528


def test_a_cached_plan_cannot_be_changed():
    plan = compile_plan(NHD, HND)
    for runs in (plan.runs.all, plan.runs[0]):
        runs.zero_()
    assert plan.runs.all[:, 4].tolist() == [16] * 6 and plan.runs[0][:, 4].tolist() == [16] * 2


def test_units_are_integers():
    for unit in (1.0, True, "1"):
        with pytest.raises(ValueError, match=f"unit_tokens must be an integer, got {unit!r}"):
            compile_plan(NHD, HND, unit_tokens=unit)
    assert compile_plan(NHD, HND, unit_tokens=1).src_subblocks == 4


@pytest.mark.parametrize("unit", [0, 3, 8])
def test_refused_units(unit):
    with pytest.raises(ValueError, match=f"unit_tokens must divide 4, which divides both block sizes, got {unit}"):
        compile_plan(NHD, HND, unit_tokens=unit)


def test_4096_runs_are_allowed():
    layouts = [KVLayout(p, **{**SIZES, "L": 2048}) for p in ("L | K B N H D", "L | B K N H D")]
    assert len(compile_plan(*layouts).runs.all) == 4096


def test_expand_blocks():
    assert expand_blocks([3], 2).tolist() == [6, 7]
    assert expand_blocks(torch.tensor([3, -1, 0], dtype=torch.int32), 2).tolist() == [6, 7, -1, -1, 0, 1]
    assert expand_blocks([3, 1], 2, skip=1).tolist() == [7, 2, 3] and expand_blocks([3], 2, 2).tolist() == []
    assert expand_blocks([], 4).tolist() == [] and expand_blocks([5, 6], 1, count=1).tolist() == [5]
    for ids in (torch.tensor([1.5]), torch.tensor([True]), torch.tensor([[1]]), [2**62]):
        with pytest.raises(ValueError, match=r"^expand_blocks: chunk_ids must"):
            expand_blocks(ids, 4)
    for blocks, skip, count in ((0, 0, None), (-1, 0, None), (2, 3, None), (2, -1, None), (2, 1, 2), (2, 0, -1)):
        with pytest.raises(ValueError, match=r"^expand_blocks: "):
            expand_blocks([3], blocks, skip, count)


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3, 7])
def test_blocks_end_where_int64_does(blocks_per_chunk):
    largest = (2**63 - 1) // blocks_per_chunk - 1
    last = (largest + 1) * blocks_per_chunk - 1
    assert expand_blocks([0, largest, 1], blocks_per_chunk, skip=2 * blocks_per_chunk - 1, count=1).tolist() == [last]
    with pytest.raises(ValueError, match=f"chunk_ids must leave their blocks in int64, got {largest + 1}$"):
        expand_blocks([0, largest + 1, 1], blocks_per_chunk)


def test_whole_page_runs():
    pools = [torch.arange(12, dtype=torch.int16).reshape(3, 4), torch.arange(30, dtype=torch.uint8).reshape(3, 2, 5)]
    out = [torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(3, 10, dtype=torch.uint8)]
    copy_pages(pools, out, torch.tensor([[2, 1]]), whole_page_runs(pools, [8, 3]))
    assert out[0].view(torch.int16).tolist() == [[0] * 4, [8, 9, 10, 11], [0] * 4]
    assert out[1].tolist() == [[0] * 10, [20, 21, 22] + [0] * 7, [0] * 10]
    for sizes in ([8], [8, 11], [-1, 1]):
        with pytest.raises(ValueError, match=r"^whole_page_runs: page_bytes must be at most the pools' \[8, 10\]"):
            whole_page_runs(pools, sizes)
