"""explain() says what the lowering decided, moves nothing, and the executors issue just that."""

from __future__ import annotations

import threading

import cases
import numpy as np
import pytest
import torch
from hypothesis import given
from plans import copy_pages_cases, run_row, runs_tensor

import kvkernels
from kvkernels.common.text import ask


def _pool(blocks: int, page_bytes: int, stride_bytes: int | None = None) -> torch.Tensor:
    return torch.zeros(blocks, stride_bytes or page_bytes, dtype=torch.uint8)[:, :page_bytes]


def _swap(mapping, page_bytes=64, src=None, dst=None):
    src = _pool(16, page_bytes) if src is None else src
    dst = _pool(16, page_bytes) if dst is None else dst
    ids = torch.tensor(mapping, dtype=None if mapping else torch.int64).reshape(-1, 2)
    return kvkernels.explain("swap_blocks", src, dst, page_bytes, ids)


@pytest.mark.parametrize(
    ("mapping", "descriptors"),
    [
        ([[0, 4], [1, 5], [2, 6]], 1),
        ([[2, 6], [1, 5], [0, 4]], 1),
        ([[2, 6], [1, 5], [0, 4], [3, 7], [4, 8]], 1),
        ([[2, 6], [1, 5], [3, 7]], 1),
        ([[0, 4], [1, 5], [3, 6]], 2),
        ([[0, 6], [1, 5], [2, 4]], 3),
        ([[0, 4], [1, 5], [5, 0], [6, 1], [9, 15]], 3),
        ([[0, 1]], 1),
    ],
)
def test_neighbours_become_one_descriptor(mapping, descriptors):
    """Ids that follow each other upwards or downwards on both sides; not those that run against each other."""
    explained = _swap(mapping)
    assert explained.descriptors == descriptors
    assert (explained.pairs, explained.bytes, explained.moves) == (len(mapping), 64 * len(mapping), 1)
    assert (explained.op, explained.executor, explained.direction) == ("swap_blocks", "cpu", "h2h")
    assert (explained.launches, explained.lanes, explained.streaming) == (0, 1, False)


def test_padded_rows_are_descriptors_of_their_own():
    assert _swap([[0, 4], [1, 5], [2, 6]], src=_pool(16, 64, 80)).descriptors == 3
    assert _swap([[0, 4], [1, 5], [2, 6]], dst=_pool(16, 64, 65)).descriptors == 3


def test_repeated_pairs_count_once():
    explained = _swap([[0, 4], [0, 4], [7, 1], [0, 4], [7, 1]])
    assert (explained.pairs, explained.descriptors, explained.bytes) == (2, 2, 128)


def test_no_pairs():
    explained = _swap([])
    assert (explained.pairs, explained.descriptors, explained.bytes, explained.lanes) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("page_bytes", "stride_bytes", "shape"),
    [
        (16, 16, "row"),
        (1024, 1024, "row"),
        (1024, 1040, "row"),
        (1040, 1040, "page"),
        (1024, 1032, "page"),
        (100, 100, "page"),
        (1, 1, "page"),
        (1 << 20, 1 << 20, "page"),
    ],
)
def test_shape_of_whole_pages(page_bytes, stride_bytes, shape):
    """Multiples of 16 bytes up to 1 KiB at addresses to match are rows; without loops, the others are pages."""
    src = _pool(3, page_bytes, stride_bytes)
    assert _swap([[0, 1]], page_bytes, src, _pool(3, page_bytes)).shape == shape


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize("offset_bytes", [1, 8, 16])
def test_shape_depends_on_alignment(side, offset_bytes):
    pool = torch.zeros(16 * 64 + 16, dtype=torch.uint8)[offset_bytes : offset_bytes + 16 * 64].view(16, 64)
    assert _swap([[0, 1]], **{side: pool}).shape == ("row" if offset_bytes == 16 else "page")


@pytest.mark.parametrize(
    ("row_bytes", "shape"), [(128, "row"), (1024, "row"), (1040, "bytes"), (24, "bytes"), (1, "bytes")]
)
def test_shape_of_a_nest(row_bytes, shape):
    """Token-first to head-first pages: one fragment for each token of each head."""
    tokens, heads = 16, 4
    pools = [_pool(8, tokens * heads * row_bytes) for _ in range(2)]
    loops = [(tokens, heads * row_bytes, row_bytes), (heads, row_bytes, tokens * row_bytes)]
    runs = runs_tensor(run_row((0, 0), (0, 0), row_bytes, (0, 0), loops))
    explained = kvkernels.explain("copy_pages", [pools[0]], [pools[1]], torch.tensor([[0, 0], [1, 1]]), runs)
    assert explained.shape == shape
    assert (explained.descriptors, explained.bytes) == (2 * tokens * heads, 2 * tokens * heads * row_bytes)


@pytest.mark.parametrize(
    ("fragment_bytes", "loops", "descriptors"),
    [
        # Steps that continue the fragment on both sides make it longer, wherever they stand among the loops.
        (8, [(4, 8, 8)], 1),
        (8, [(4, 8, 8), (3, 64, 64)], 3),
        (8, [(3, 64, 64), (4, 8, 8)], 3),
        (8, [(2, 96, 96), (3, 32, 32), (4, 8, 8)], 1),
        (8, [(4, 8, 16)], 4),
        (8, [(4, -8, -8)], 4),
        (8, [(1, 5, 7), (4, 8, 8), (1, 0, 0)], 1),
    ],
)
def test_loops_fold_into_fragments(fragment_bytes, loops, descriptors):
    low = 64 if loops[0][1] < 0 else 0
    runs = runs_tensor(run_row((0, 0), (low, low), fragment_bytes, (0, 0), loops))
    pools = [_pool(4, 256) for _ in range(2)]
    # One pair, so that nothing is joined but the loops.
    explained = kvkernels.explain("copy_pages", [pools[0]], [pools[1]], torch.tensor([[2, 1]]), runs)
    assert explained.descriptors == descriptors
    assert explained.bytes == fragment_bytes * np.prod([extent for extent, _, _ in loops])


def test_neighbouring_pools_become_one_move():
    """All layers of a page-first tensor lie side by side, as in the rows of `out`: whole rows, then all rows."""
    page_first = torch.zeros(8, 3, 160, dtype=torch.uint8)
    layers = [page_first[:, i] for i in range(3)]
    out = torch.empty(4, 480, dtype=torch.uint8)
    explained = kvkernels.explain("gather_blocks", layers, torch.tensor([5, 0, 7, 2]), out)
    assert (explained.moves, explained.descriptors, explained.pairs, explained.bytes) == (1, 4, 4, 1920)
    explained = kvkernels.explain("gather_blocks", layers, torch.tensor([2, 3, 4, 5]), out)
    assert (explained.moves, explained.descriptors) == (1, 1)
    explained = kvkernels.explain("scatter_blocks", out, torch.tensor([2, 3, 4, 5]), layers[::-1])
    assert (explained.moves, explained.descriptors) == (3, 12)


def test_separate_pools_are_moves_of_their_own():
    pools = [_pool(8, 160), _pool(9, 32)]
    out = torch.empty(4, 192, dtype=torch.uint8)
    explained = kvkernels.explain("gather_blocks", pools, torch.tensor([2, 3, 4, 5]), out)
    assert (explained.moves, explained.descriptors, explained.pairs, explained.bytes) == (2, 8, 4, 768)


def test_slots_that_follow_each_other_become_one_descriptor():
    """Token slots of NHD pages continue from block to block; those of HND pages interleave."""
    pools = [_pool(4, 256) for _ in range(2)]
    mapping = torch.arange(3, 9)[:, None].repeat(1, 2)
    options = {"src_subblocks_per_block": 4, "dst_subblocks_per_block": 4}
    runs = runs_tensor(run_row((0, 0), (0, 0), 64, (64, 64)))
    explained = kvkernels.explain("copy_pages", [pools[0]], [pools[1]], mapping, runs, **options)
    assert (explained.descriptors, explained.pairs, explained.bytes) == (1, 6, 384)
    runs = runs_tensor(run_row((0, 0), (0, 0), 16, (16, 16), [(4, 64, 64)]))
    explained = kvkernels.explain("copy_pages", [pools[0]], [pools[1]], mapping, runs, **options)
    assert (explained.descriptors, explained.pairs, explained.bytes) == (24, 6, 384)


def test_skipped_pairs_are_not_counted():
    pool, other = _pool(4, 32), _pool(4, 32)
    runs = runs_tensor(run_row((0, 0), (0, 0), 32, (0, 0)))
    mapping = torch.tensor([[0, 0], [-1, 1], [1, 1], [3, -5]])
    explained = kvkernels.explain("copy_pages", [pool], [other], mapping, runs, skip_negative=True)
    assert (explained.pairs, explained.descriptors, explained.bytes) == (2, 1, 64)


def test_raw_addresses():
    src, dst = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    at = torch.tensor([0, 8, 24, 40])
    sizes = torch.tensor([8, 8, 0, 10])
    explained = kvkernels.explain("swap_blocks_batch", src.data_ptr() + at, dst.data_ptr() + at, sizes)
    assert (explained.descriptors, explained.bytes, explained.executor) == (2, 26, "cpu")


@pytest.mark.parametrize(("dim", "descriptors"), [(0, 2), (1, 8)])
def test_concat(dim, descriptors):
    shards = [torch.zeros(4, 3), torch.zeros(4, 3)]
    explained = kvkernels.explain("concat_tp_shards", shards, dim)
    assert (explained.moves, explained.descriptors, explained.bytes) == (2, descriptors, 96)


@pytest.mark.parametrize(("bytes", "shared"), [((4 << 20) - 64, False), (4 << 20, True)])
def test_lanes(threads, bytes, shared):
    """Calls below 4 MiB run on one lane; larger ones on as many as torch has threads."""
    src, dst = (torch.empty(bytes, dtype=torch.uint8) for _ in range(2))
    explained = _swap([[0, 0]], bytes, src, dst)
    assert explained.lanes == (threads if shared else 1)
    assert explained.descriptors == 1


@pytest.mark.parametrize(
    "op", ["swap_blocks", "gather_blocks", "scatter_blocks", "copy_pages", "concat_tp_shards_out", "split_tp_shards"]
)
def test_the_named_executor_is_the_one_explained(op):
    pool, other, ids = _pool(4, 32), _pool(2, 32), torch.tensor([3, 1])
    mapping = torch.tensor([[3, 0], [1, 1]])
    arguments = {
        "swap_blocks": (pool, other, 32, mapping),
        "concat_tp_shards_out": ([pool[1:2], pool[3:4]], 0, other),
        "split_tp_shards": (pool[1:3], 0, [other[1:], other[:1]]),
        "gather_blocks": ([pool], ids, other),
        "scatter_blocks": (other, ids, [pool]),
        "copy_pages": (
            [pool],
            [other],
            mapping,
            runs_tensor(run_row((0, 0), (0, 0), 32, (0, 0))),
        ),
    }[op]
    for executor, shape in (("auto", "row"), ("cpu", "row"), ("reference", "reference")):
        explained = kvkernels.explain(op, *arguments, executor=executor)
        assert explained.executor == ("cpu" if executor == "auto" else executor)
        assert (explained.shape, explained.descriptors, explained.bytes) == (shape, 2, 64)
    for executor in ("kernel", "bulk", "dma", "staged", *(() if cases.TRITON_ON_HOST else ("triton",))):
        with pytest.raises(ValueError, match=rf"^{op}: executor '{executor}' cannot serve this call: "):
            kvkernels.explain(op, *arguments, executor=executor)


def test_an_op_may_be_named_or_given():
    shards = [torch.zeros(2)]
    assert kvkernels.explain(kvkernels.concat_tp_shards, shards, 0) == kvkernels.explain("concat_tp_shards", shards, 0)
    with pytest.raises(ValueError, match=r"^explain: op must be one of swap_blocks, .*, got torch_cat$"):
        kvkernels.explain("torch_cat", shards, 0)


def test_nothing_moves_and_nothing_is_counted():
    src, dst = torch.ones(4, 16), torch.zeros(4, 16)
    kvkernels.reset_counters()
    _swap([[0, 1]], 64, src, dst)
    assert not dst.any()
    assert not any(sum(c.values()) for c in kvkernels.counters().values())


@pytest.mark.parametrize("mapping", [[[0, 99]], [[0, 1], [1, 1]], [[0, 0.5]]])
def test_an_error_closes_the_scope(mapping):
    """A refused explain() must not leave the thread explaining: the next call would silently move nothing."""
    src, dst = torch.ones(4, 16), torch.zeros(4, 16)
    with pytest.raises((IndexError, ValueError), match=r"^swap_blocks: "):
        _swap(mapping, 64, src, dst)
    kvkernels.swap_blocks(src, dst, 64, torch.tensor([[0, 1]]))
    assert dst[1].all()


def test_other_threads_keep_moving():
    src, dst = torch.ones(4, 16), torch.zeros(4, 16)
    mapping = torch.tensor([[0, 1]])
    torch.ops.kvkernels._explain_begin()
    try:
        worker = threading.Thread(target=kvkernels.swap_blocks, args=(src, dst, 64, mapping))
        worker.start()
        worker.join()
    finally:
        assert ask(torch.ops.kvkernels._explain_end) == "{}"
    assert dst[1].all()


def test_counters_add_up():
    src, dst = torch.ones(4, 16), torch.zeros(4, 16)
    kvkernels.reset_counters()
    for _ in range(3):
        kvkernels.swap_blocks(src, dst, 64, torch.tensor([[0, 1], [1, 2], [3, 0]]))
    kvkernels.gather_blocks([src], torch.tensor([1]), torch.empty(1, 64, dtype=torch.uint8), "reference")
    counted = kvkernels.counters()
    assert counted["cpu"] == {"calls": 3, "launches": 0, "descriptors": 6, "bytes": 576}
    assert counted["reference"] == {"calls": 1, "launches": 0, "descriptors": 1, "bytes": 64}
    assert set(counted) == {"cpu", "kernel", "bulk", "dma", "staged", "triton", "reference"}


@pytest.mark.parametrize("page_bytes", [48, 4096, 70_000, 3 << 20])
def test_lanes_issue_each_descriptor_once(threads, page_bytes):
    """Lanes cut long fragments between them; a cut one is counted by the lane that has its begin."""
    blocks = (9 << 20) // page_bytes + 1
    src, dst = torch.empty(blocks, page_bytes, dtype=torch.uint8), torch.empty(blocks, page_bytes, dtype=torch.uint8)
    pairs = cases.neighbouring_pairs(np.random.default_rng(page_bytes), blocks, blocks, blocks)
    for mapping in (torch.from_numpy(pairs), torch.arange(blocks)[:, None].repeat(1, 2)):
        kvkernels.reset_counters()
        explained = kvkernels.explain("swap_blocks", src, dst, page_bytes, mapping)
        kvkernels.swap_blocks(src, dst, page_bytes, mapping)
        assert explained.lanes == threads
        cases.assert_issued(explained)


@cases.examples(40)
@given(copy_pages_cases())
def test_random_plans_come_to_what_their_runs_say(case):
    """Bytes and pairs from the arguments alone; descriptors within what joining neighbours can leave."""
    src, dst, mapping, runs = case.arguments_on(case.random_buffers())
    explained = kvkernels.explain("copy_pages", src, dst, mapping, runs, **case.options)
    ids = mapping.to(torch.int64)
    ids = ids[(ids >= 0).all(1)] if case.options["skip_negative"] else ids
    pairs = len({tuple(pair) for pair in ids.tolist()})
    fragments = runs[:, [7, 10, 13]].prod(1)
    assert explained.pairs == pairs
    assert explained.bytes == pairs * int((fragments * runs[:, 4]).sum())
    assert (explained.descriptors > 0) == (explained.bytes > 0)
    assert explained.descriptors <= pairs * int(fragments.sum())
