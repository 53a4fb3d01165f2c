"""concat_tp_shards, concat_tp_shards_out and split_tp_shards against the reference, torch.cat and slicing."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from hypothesis import given

import kvkernels

OPS = ("concat_tp_shards", "concat_tp_shards_out", "split_tp_shards")


@pytest.mark.parametrize("op", OPS)
def test_random_cases(op):
    @cases.examples(150)
    @given(cases.concat_cases(op))
    def run(case):
        cases.check(case)

    run()


@pytest.mark.cuda
@pytest.mark.parametrize(("placement", "pinned"), cases.DEVICE_PLACEMENTS)
@pytest.mark.parametrize("op", OPS)
def test_random_cases_on_a_device(op, placement, pinned):
    # Elements at unaligned addresses become a dimension of bytes on a device, which would shift negative dimensions.
    @cases.examples(60)
    @given(cases.concat_cases(op).filter(lambda case: all(_is_aligned(v) for v in _views(case))))
    def run(case):
        cases.check(case, placement, pinned)

    run()


def _views(case):
    for argument in case.arguments:
        if isinstance(argument, cases.View):
            yield argument
        elif isinstance(argument, list):
            yield from argument


def _is_aligned(view):
    return view.offset_bytes % view.dtype.itemsize == 0


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_dtype_keeps_its_bytes(dtype):
    arena = cases.Arena()
    size = dtype.itemsize
    shapes = [(3, 2, 5), (3, 4, 5), (3, 1, 5)]
    shards = [cases.View(*arena.reserve("src", 30 * size * 4), dtype, shape, (1, 3, 3 * shape[1])) for shape in shapes]
    cases.check(arena.case("concat_tp_shards", shards, 1))
    out = cases.View(*arena.reserve("dst", 150 * size), dtype, (3, 7, 5), (49, 7, 1))
    cases.check(arena.case("concat_tp_shards_out", shards, -2, out))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 4, 5), (2, 3, 1, 4, 5), (2, 3, 2, 2, 3, 4)], ids=str)
def test_every_dimension_as_torch_does(shape):
    """One to six dimensions, each of them, from either end, as torch.cat and slicing have it."""
    for dim in range(-len(shape), len(shape)):
        shards = []
        for extra in (0, 2, 1):
            wanted = list(shape)
            wanted[dim] += extra
            shards.append(torch.randn(wanted))
        whole = torch.cat(shards, dim)
        assert torch.equal(kvkernels.concat_tp_shards(shards, dim), whole)
        out = torch.empty_like(whole)
        kvkernels.concat_tp_shards_out(shards, dim, out)
        assert torch.equal(out, whole)
        parts = [torch.empty_like(shard) for shard in shards]
        kvkernels.split_tp_shards(whole, dim, parts)
        assert all(torch.equal(a, b) for a, b in zip(parts, shards, strict=True))


def test_dimensions_in_any_order():
    """Every order of four dimensions in memory, on both sides: more loops than a run has."""
    orders = list(itertools.permutations(range(4)))
    sizes = (2, 3, 4, 5)
    for order, out_order in zip(orders, reversed(orders), strict=True):
        shards = [torch.randn([sizes[i] for i in order]).permute([order.index(i) for i in range(4)]) for _ in range(2)]
        whole = torch.cat(shards, 2)
        out = torch.empty([whole.shape[i] for i in out_order]).permute([out_order.index(i) for i in range(4)])
        kvkernels.concat_tp_shards_out(shards, 2, out)
        assert torch.equal(out, whole)


def test_one_shard_is_copied():
    shard = torch.randn(3, 4)
    result = kvkernels.concat_tp_shards([shard], 0)
    assert torch.equal(result, shard)
    assert result.data_ptr() != shard.data_ptr()


def test_the_result_is_contiguous():
    shards = [torch.randn(4, 3).t(), torch.randn(4, 3).t()]
    assert kvkernels.concat_tp_shards(shards, 1).is_contiguous()


def test_empty_shards_are_skipped():
    shards = [torch.empty(2, 0), torch.randn(2, 3), torch.empty(2, 0)]
    assert torch.equal(kvkernels.concat_tp_shards(shards, 1), shards[1])
    assert kvkernels.concat_tp_shards([torch.empty(0, 3), torch.empty(0, 3)], 0).shape == (0, 3)
    assert kvkernels.concat_tp_shards([torch.empty(2, 0), torch.empty(3, 0)], 0).shape == (5, 0)


def test_one_tensor_twice():
    shard = torch.arange(6).reshape(2, 3)
    assert torch.equal(
        kvkernels.concat_tp_shards([shard, shard, shard[:, :1]], 1), torch.cat([shard, shard, shard[:, :1]], 1)
    )
    assert torch.equal(kvkernels.concat_tp_shards([shard[:1].expand(4, 3), shard], 0), shard[[0, 0, 0, 0, 0, 1]])


def test_outs_that_are_views_of_one_tensor():
    """The heads of a fused QKV projection: shards of unequal sizes, interleaved in one tensor's memory."""
    fused = torch.zeros(5, 8 + 2 + 2)
    input = torch.randn(5, 12)
    order = [fused[:, 4:12], fused[:, 0:2], fused[:, 2:4]]
    kvkernels.split_tp_shards(input, 1, order)
    assert torch.equal(fused, torch.cat([input[:, 8:], input[:, :8]], 1))


def test_out_between_its_own_shards():
    """The even rows are read, the odd ones written: spans meet, bytes do not."""
    t = torch.arange(24.0).reshape(6, 4)
    expected = t.clone()
    expected[1::2] = t[0::2]
    kvkernels.concat_tp_shards_out([t[0:2:2], t[2:6:2]], 0, t[1::2])
    assert torch.equal(t, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True], ids=["as it lies", "transposed"])
def test_large_calls_over_several_lanes(threads, dim, transposed):
    """12 MiB of bfloat16 in four shards, which several threads share."""
    shape = (48, 512, 64)
    shards = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16) for _ in range(4)]
    if transposed:
        shards = [s.transpose(0, 1).contiguous().transpose(0, 1) for s in shards]
    words = torch.cat([s.view(torch.int16) for s in shards], dim)
    kvkernels.reset_counters()
    predicted = kvkernels.explain("concat_tp_shards", shards, dim)
    result = kvkernels.concat_tp_shards(shards, dim)
    assert torch.equal(result.view(torch.int16), words)
    assert predicted.lanes == threads
    cases.assert_issued(predicted)
    parts = [torch.empty_like(s) for s in shards]
    kvkernels.split_tp_shards(result, dim, parts)
    assert all(torch.equal(p.view(torch.int16), s.view(torch.int16)) for p, s in zip(parts, shards, strict=True))
