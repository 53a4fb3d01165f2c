"""copy_pages against the reference with random plans, and against plain indexing with the plans that users have."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from hypothesis import given
from plans import copy_pages_cases, run_row, runs_tensor

import kvkernels

EXECUTORS = ("auto", "cpu", "reference")


@cases.examples(300)
@given(copy_pages_cases())
def test_random_plans(case):
    cases.check(case)


@pytest.mark.cuda
@pytest.mark.parametrize(("placement", "pinned"), cases.DEVICE_PLACEMENTS)
def test_random_plans_on_a_device(placement, pinned):
    @cases.examples(100)
    @given(copy_pages_cases())
    def run(case):
        cases.check(case, placement, pinned)

    run()


@pytest.mark.cuda
@pytest.mark.parametrize(("pairs", "runs"), [(0, 0), (0, 1), (3, 0)])
def test_an_empty_plan_on_a_device(pairs, runs):
    """Ids on the device cannot be looked at, but their number can: nothing to copy is no call of an executor."""
    pools = [torch.full((4, 16), fill, dtype=torch.uint8).cuda() for fill in (1, 2)]
    mapping = torch.arange(2 * pairs).reshape(pairs, 2).cuda()
    plan = runs_tensor(*[run_row((0, 0), (0, 0), 16, (0, 0))] * runs)
    assert kvkernels.explain("copy_pages", pools[:1], pools[1:], mapping, plan).bytes == 0
    kvkernels.reset_counters()
    kvkernels.copy_pages(pools[:1], pools[1:], mapping, plan)
    assert not any(any(counter.values()) for counter in kvkernels.counters().values())
    assert [pool.cpu().unique().tolist() for pool in pools] == [[1], [2]]


def _random(rng, *shape):
    return torch.from_numpy(rng.integers(-(2**15), 2**15, shape, dtype=np.int16))


def _mapping(rng, src_ids, dst_ids, n):
    return torch.from_numpy(np.stack((rng.permutation(src_ids)[:n], rng.permutation(dst_ids)[:n]), 1))


def _copy(src, dst, mapping, runs, executor, **options):
    kvkernels.copy_pages(src, dst, mapping, runs, executor=executor, **options)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("head_size", [1, 8, 63, 64, 128])
def test_token_first_to_head_first(executor, head_size):
    """NHD pages to HND pages: 16 tokens of 4 heads."""
    rng = np.random.default_rng(head_size)
    blocks, tokens, heads = 12, 16, 4
    head_bytes = 2 * head_size
    src, dst = _random(rng, blocks, tokens, heads, head_size), _random(rng, blocks, heads, tokens, head_size)
    loops = [(tokens, heads * head_bytes, head_bytes), (heads, head_bytes, tokens * head_bytes)]
    mapping = _mapping(rng, blocks, blocks, 9)
    expected = dst.clone()
    expected[mapping[:, 1]] = src[mapping[:, 0]].transpose(1, 2)
    _copy([src], [dst], mapping, runs_tensor(run_row((0, 0), (0, 0), head_bytes, (0, 0), loops)), executor)
    assert torch.equal(dst, expected)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])
def test_token_slots(executor, heads_first):
    """A slot mapping: sub-blocks are tokens; in HND pages their stride is one head row and they interleave."""
    rng = np.random.default_rng(3)
    blocks, tokens, heads, head_size = 7, 16, 3, 20
    head_bytes = 2 * head_size
    shape = (heads, tokens, head_size) if heads_first else (tokens, heads, head_size)
    src, dst = _random(rng, blocks, tokens, heads, head_size), _random(rng, blocks, *shape)
    steps = (tokens * head_bytes, head_bytes) if heads_first else (head_bytes, heads * head_bytes)
    runs = runs_tensor(
        run_row((0, 0), (0, 0), head_bytes, (heads * head_bytes, steps[1]), [(heads, head_bytes, steps[0])])
    )
    mapping = _mapping(rng, blocks * tokens, blocks * tokens, 60)
    slots = src.reshape(blocks * tokens, heads, head_size)[mapping[:, 0]]
    expected = dst.clone()
    for slot, id in zip(slots, mapping[:, 1].tolist(), strict=True):
        block, token = divmod(id, tokens)
        if heads_first:
            expected[block, :, token] = slot
        else:
            expected[block, token] = slot
    _copy([src], [dst], mapping, runs, executor, src_subblocks_per_block=tokens, dst_subblocks_per_block=tokens)
    assert torch.equal(dst, expected)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("grows", [True, False], ids=["16to64", "64to16"])
@pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])
def test_block_size_conversion(executor, grows, heads_first):
    """Blocks of 16 tokens to and from the four parts of blocks of 64, also between head-first pages."""
    rng = np.random.default_rng(4)
    heads, head_size = 2, 24
    row = 2 * head_size
    sizes = (16, 64) if grows else (64, 16)
    blocks = [(64 // size) * 5 for size in sizes]
    src, dst = (
        _random(rng, n, *((heads, size, head_size) if heads_first else (size, heads, head_size)))
        for n, size in zip(blocks, sizes, strict=True)
    )
    if heads_first:
        loops = [(heads, sizes[0] * row, sizes[1] * row), (16, row, row)]
        fragment_bytes, part_bytes = row, 16 * row
    else:
        loops, fragment_bytes, part_bytes = [], 16 * heads * row, 16 * heads * row
    runs = runs_tensor(run_row((0, 0), (0, 0), fragment_bytes, (part_bytes, part_bytes), loops))
    mapping = _mapping(rng, 20, 20, 17)

    def parts(t, size):
        """The 20 parts of 16 tokens, as views ``[tokens, heads, head_size]``."""
        t = t.transpose(1, 2) if heads_first else t
        return [t[b, at : at + 16] for b in range(t.shape[0]) for at in range(0, size, 16)]

    expected = dst.clone()
    for s, d in mapping.tolist():
        parts(expected, sizes[1])[d].copy_(parts(src, sizes[0])[s])
    options = {"src_subblocks_per_block": sizes[0] // 16, "dst_subblocks_per_block": sizes[1] // 16}
    _copy([src], [dst], mapping, runs, executor, **options)
    assert torch.equal(dst, expected)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_layers_with_fused_keys_and_values_to_one_page_first_tensor(executor):
    """From "L | B K N H D" to "B L K N H D", and to K and V pools apart ("L K | B N H D"), in one call each."""
    rng = np.random.default_rng(5)
    layers, blocks, half = 3, 8, 40
    half_bytes = 2 * half
    src = [_random(rng, blocks, 2, half) for _ in range(layers)]
    page_first = _random(rng, blocks, layers, 2, half)
    split = [_random(rng, blocks, half) for _ in range(2 * layers)]
    mapping = _mapping(rng, blocks, blocks, 6)
    to_page_first = [run_row((i, 0), (0, 2 * i * half_bytes), 2 * half_bytes, (0, 0)) for i in range(layers)]
    to_split = [run_row((i // 2, i), (i % 2 * half_bytes, 0), half_bytes, (0, 0)) for i in range(2 * layers)]
    expected_first, expected_split = page_first.clone(), [t.clone() for t in split]
    for i in range(layers):
        expected_first[mapping[:, 1], i] = src[i][mapping[:, 0]]
        for k in range(2):
            expected_split[2 * i + k][mapping[:, 1]] = src[i][mapping[:, 0], k]
    _copy(src, [page_first], mapping, runs_tensor(*to_page_first), executor)
    _copy(src, split, mapping, runs_tensor(*to_split), executor)
    assert torch.equal(page_first, expected_first)
    assert all(torch.equal(a, b) for a, b in zip(split, expected_split, strict=True))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_tokens_in_reverse(executor):
    """Negative strides: the destination's tokens in reverse order, and the source's pools shared by two runs."""
    src = torch.arange(3 * 8, dtype=torch.uint8).reshape(3, 8)
    dst = torch.zeros(3, 16, dtype=torch.uint8)
    runs = runs_tensor(
        run_row((0, 0), (0, 6), 2, (0, 0), [(4, 2, -2)]), run_row((0, 0), (6, 8), 2, (0, 0), [(4, -2, 2)])
    )
    _copy([src], [dst], torch.tensor([[1, 2]]), runs, executor)
    backwards = [14, 15, 12, 13, 10, 11, 8, 9]
    assert dst.tolist() == [[0] * 16, [0] * 16, backwards + backwards]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_tensor_on_both_sides(executor):
    """Within one page, the first half to the second; and from even blocks to odd ones."""
    rng = np.random.default_rng(6)
    t = _random(rng, 10, 32)
    expected = t.clone()
    expected[[2, 7], 16:] = t[[2, 7], :16]
    _copy([t], [t], torch.tensor([[2, 2], [7, 7]]), runs_tensor(run_row((0, 0), (0, 32), 32, (0, 0))), executor)
    assert torch.equal(t, expected)
    expected[1::2] = t[0::2]
    mapping = torch.stack((torch.arange(0, 10, 2), torch.arange(1, 10, 2)), 1)
    _copy([t], [t], mapping, runs_tensor(run_row((0, 0), (0, 0), 64, (0, 0))), executor)
    assert torch.equal(t, expected)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_negative_ids_are_skipped_in_either_column(executor):
    src, dst = torch.arange(4, dtype=torch.uint8)[:, None], torch.zeros(4, 1, dtype=torch.uint8)
    mapping = torch.tensor([[3, 0], [-1, 1], [2, -1], [-1, 99], [-(2**63), 2], [1, 3]])
    _copy([src], [dst], mapping, runs_tensor(run_row((0, 0), (0, 0), 1, (0, 0))), executor, skip_negative=True)
    assert dst.flatten().tolist() == [3, 0, 0, 1]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_neither_runs_nor_pairs_touch_anything(executor):
    src, dst = torch.ones(4, 8), torch.zeros(4, 8)
    run = runs_tensor(run_row((0, 0), (0, 0), 32, (0, 0)))
    _copy([src], [dst], torch.empty(0, 2, dtype=torch.int64), run, executor)
    _copy([src], [dst], torch.tensor([[0, 0]]), runs_tensor(), executor)
    assert not dst.any()


@pytest.mark.parametrize("strides", ["column-major", "every-other-row"])
def test_runs_in_any_strides(strides):
    """The runs tensor itself may be strided."""
    src, dst = torch.arange(64, dtype=torch.uint8).reshape(4, 16), torch.zeros(4, 16, dtype=torch.uint8)
    runs = runs_tensor(run_row((0, 0), (8, 0), 4, (0, 0)), run_row((0, 0), (0, 4), 4, (0, 0)))
    if strides == "column-major":
        runs = runs.t().contiguous().t()
    else:
        runs = torch.full((4, 16), -1).index_copy_(0, torch.tensor([0, 2]), runs)[::2]
    kvkernels.copy_pages([src], [dst], torch.tensor([[1, 0]]), runs)
    assert dst[0].tolist() == [24, 25, 26, 27, 16, 17, 18, 19] + [0] * 8


@pytest.mark.parametrize("kind", ["NHD to HND", "slots", "large fragments", "tiny fragments"])
def test_large_calls_over_several_lanes(threads, kind):
    """Plans over 10 MiB and more, whose lanes begin in the middle of a page's loops."""
    heads, tokens, row = 8, 16, 128
    subblocks = 1
    if kind == "NHD to HND":
        page_bytes, runs = heads * tokens * row, [(0, 0, row, 0, 0, tokens, heads * row, row, heads, row, tokens * row)]
    elif kind == "slots":
        page_bytes, subblocks = heads * tokens * row, tokens
        runs = [(0, 0, row, heads * row, row, heads, row, tokens * row, 1, 0, 0)]
    elif kind == "large fragments":
        page_bytes = 700_003
        runs = [(3, 0, 300_001, 0, 0, 2, 300_001, 400_001, 1, 0, 0), (600_005, 300_001, 99_998, 0, 0, 1, 0, 0, 1, 0, 0)]
    else:
        page_bytes, runs = 30_000, [(0, 0, 3, 0, 0, 100, 300, 3, 100, 3, 300)]
    blocks = (10 << 20) // page_bytes + 2
    arena = cases.Arena()
    views = [
        cases.pool_view(arena.reserve(side, blocks * page_bytes), blocks, page_bytes, page_bytes, torch.uint8)
        for side in ("src", "dst")
    ]
    ids = blocks * subblocks
    # One segment of all ids, in whose middle a lane begins, and many short ones.
    for pairs in (
        np.stack((np.arange(1, ids), np.arange(ids - 1)), 1),
        cases.neighbouring_pairs(np.random.default_rng(7), ids, ids, ids),
    ):
        case = arena.case(
            "copy_pages",
            *([views[0]], [views[1]], torch.from_numpy(pairs), runs_tensor(*([0, 0, *run, 1, 0, 0] for run in runs))),
            src_subblocks_per_block=subblocks,
            dst_subblocks_per_block=subblocks,
        )
        cases.check(case)
        explained = kvkernels.explain("copy_pages", *case.arguments_on(case.random_buffers()), **case.options)
        assert explained.lanes == threads


def test_many_threads_at_once():
    """Ops run without the GIL: the cache of verified plans and the lists kept for reuse belong to many callers."""
    from concurrent.futures import ThreadPoolExecutor

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            page_bytes = int(rng.integers(1, 200))
            src = torch.from_numpy(rng.integers(0, 256, (40, page_bytes), dtype=np.uint8))
            dst, expected = torch.zeros_like(src), torch.zeros_like(src)
            mapping = _mapping(rng, 40, 40, int(rng.integers(0, 40)))
            runs = runs_tensor(run_row((0, 0), (0, 0), page_bytes, (0, 0)))
            kvkernels.copy_pages([src], [dst], mapping, runs)
            expected[mapping[:, 1]] = src[mapping[:, 0]]
            assert torch.equal(dst, expected)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize(
    ("offsets", "loops"),
    [
        ((0, 48), [(4, 16, 64)]),
        ((192, 0), [(4, -64, 8)]),
        ((0, 8), [(2, 256, 256), (4, 16, 24)]),
        ((0, 8), [(4, 16, 24), (2, 256, 256)]),
        ((0, 8), [(1, 0, 0), (1, 0, 0), (4, 16, 24)]),
    ],
)
def test_an_overlap_of_later_fragments_is_found(offsets, loops):
    """The first fragments of a nest are apart; one of the others is both read and written."""
    pool = torch.randint(256, (2, 512), dtype=torch.uint8)
    before = pool.clone()
    runs = runs_tensor(run_row((0, 0), offsets, 8, (0, 0), loops))
    with pytest.raises(
        ValueError, match="mapping must not write what it reads, got destination 1 overlapping source 1"
    ):
        kvkernels.copy_pages([pool], [pool], torch.tensor([[1, 1]]), runs)
    assert torch.equal(pool, before)
