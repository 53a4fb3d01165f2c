"""The ops under torch's own checks and under torch.compile, where what counts is that the effect happened.

An op that mutates nothing by its schema is removed from a compiled graph without a word, so every test looks at bytes.
"""

from __future__ import annotations

import pytest
import torch
from plans import run_row, runs_tensor
from torch.library import opcheck

import kvkernels
from kvkernels.registration import schemas

ops = torch.ops.kvkernels


def _pages(blocks: int, page: int, pad: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(blocks, page + pad).to(dtype)[:, :page]


def _pairs(*pairs: tuple[int, int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(pairs, dtype=dtype).reshape(-1, 2)


def _whole_page(page_bytes: int, src_pool: int = 0, dst_pool: int = 0) -> list[int]:
    return run_row((src_pool, dst_pool), (0, 0), page_bytes, (0, 0))


def _pointers(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)


_A, _B = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)

SAMPLES = {
    "swap_blocks": [
        lambda: ((_pages(6, 8), _pages(5, 8), 32, _pairs((5, 0), (1, 4))), {}),
        lambda: ((_pages(6, 8, pad=8), _pages(5, 8, pad=1), 32, _pairs((0, 0), dtype=torch.int32)), {}),
        lambda: ((torch.randn(2, 3, 4), torch.randn(24), 16, _pairs()), {}),
        lambda: ((_pages(6, 8, dtype=torch.int8), _pages(5, 4, dtype=torch.bfloat16), 8, _pairs((5, 0))), {}),
        lambda: ((_pages(6, 8), _pages(5, 8), 32, _pairs((5, 0))), {"executor": "cpu", "sm_budget": 1}),
        lambda: ((_pages(6, 8), _pages(5, 8), 32, _pairs((5, 0))), {"executor": "reference"}),
    ],
    "swap_blocks_batch": [
        lambda: ((_pointers(_A), _pointers(_B), torch.tensor([8])), {}),
        lambda: ((_pointers(_A).to(torch.uint64), _pointers(_B).to(torch.uint64), torch.tensor([3])), {}),
        lambda: ((_pointers(), _pointers(), torch.empty(0, dtype=torch.int32)), {"is_src_access_order_any": True}),
        lambda: ((_pointers(_A), _pointers(_B), torch.tensor([5])), {"executor": "cpu", "sm_budget": 2}),
        lambda: ((_pointers(_A), _pointers(_B), torch.tensor([5])), {"executor": "reference"}),
    ],
    "gather_blocks": [
        lambda: (([_pages(6, 8)], torch.tensor([5, 0, 5]), torch.empty(3, 32, dtype=torch.uint8)), {}),
        lambda: (
            (
                [_pages(6, 8, pad=2), _pages(4, 3, dtype=torch.bfloat16)],
                torch.tensor([3, 0], dtype=torch.int32),
                torch.empty(2, 50, dtype=torch.uint8)[:, :38],
            ),
            {"executor": "cpu", "sm_budget": 3},
        ),
        lambda: (([_pages(6, 8)], torch.tensor([1]), torch.empty(1, 32, dtype=torch.uint8)), {"executor": "reference"}),
    ],
    "scatter_blocks": [
        lambda: ((torch.ones(3, 32, dtype=torch.uint8), torch.tensor([5, 0, 1]), [_pages(6, 8)]), {}),
        lambda: (
            (
                torch.ones(2, 50, dtype=torch.uint8)[:, :38],
                torch.tensor([3, 0], dtype=torch.int32),
                [_pages(6, 8, pad=2), _pages(4, 3, dtype=torch.bfloat16)],
            ),
            {"executor": "cpu"},
        ),
    ],
    "copy_pages": [
        lambda: (([_pages(6, 8)], [_pages(6, 8)], _pairs((5, 0), (1, 4)), runs_tensor(_whole_page(32))), {}),
        lambda: (
            (
                [_pages(6, 8, pad=8), _pages(7, 4)],
                [_pages(5, 16, pad=1)],
                _pairs((11, 0), (-1, 4), dtype=torch.int32),
                runs_tensor(
                    run_row((0, 0), (0, 0), 4, (16, 0), [(2, 4, 8)]), run_row((1, 0), (0, 32), 8, (8, 0), [(1, 0, 0)])
                ),
            ),
            {"src_subblocks_per_block": 2, "skip_negative": True},
        ),
        lambda: (([_pages(6, 8)], [_pages(6, 8)], _pairs((5, 0)), runs_tensor()), {"executor": "reference"}),
    ],
    "concat_tp_shards": [
        lambda: (([torch.randn(2, 3), torch.randn(2, 1)], 1), {}),
        lambda: (([torch.randn(3, 2).t().to(torch.bfloat16)], -2), {}),
        lambda: (([torch.randn(2, 3, 4), torch.randn(2, 3, 4).transpose(0, 1).contiguous().transpose(0, 1)], 0), {}),
        lambda: (([torch.randn(2, 3), torch.randn(2, 1)], 1), {"executor": "cpu", "sm_budget": 4}),
        lambda: (([torch.randn(2, 3), torch.randn(2, 1)], 1), {"executor": "reference"}),
    ],
    "concat_tp_shards_out": [
        lambda: (([torch.randn(2, 3), torch.randn(2, 1)], 1, torch.empty(2, 4)), {}),
        lambda: (([torch.randn(2, 3), torch.randn(2, 1)], -1, torch.empty(4, 2).t()), {}),
        lambda: (([torch.randn(2, 3), torch.randn(2, 1)], 1, torch.empty(2, 4)), {"executor": "reference"}),
    ],
    "split_tp_shards": [
        lambda: ((torch.randn(2, 4), 1, [torch.empty(2, 3), torch.empty(2, 1)]), {}),
        lambda: ((torch.randn(4, 6).t(), 0, [torch.empty(5, 4)[:2], torch.empty(4, 4)]), {}),
        lambda: ((torch.randn(2, 4), 1, [torch.empty(2, 3), torch.empty(2, 1)]), {"executor": "reference"}),
    ],
}


@pytest.mark.parametrize(("op", "sample"), [(op, i) for op, samples in SAMPLES.items() for i in range(len(samples))])
def test_opcheck(op, sample):
    args, kwargs = SAMPLES[op][sample]()
    opcheck(getattr(ops, op).default, args, kwargs)


def test_every_op_has_samples():
    assert set(SAMPLES) == set(schemas.PUBLIC)


@pytest.mark.parametrize("op", schemas.PUBLIC)
def test_schema_and_tags(op):
    overload = getattr(ops, op).default
    assert overload._schema == torch._C.parse_schema(f"kvkernels::{op}{schemas.PUBLIC[op]}")
    tags = {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides}
    if op not in ("concat_tp_shards", "concat_tp_shards_out", "split_tp_shards"):
        tags.add(torch.Tag.cudagraph_unsafe)
    assert set(overload.tags) == tags


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("swap_blocks", (torch.zeros(4, 8), torch.zeros(4, 8), 31, _pairs((0, 0)))),
        ("swap_blocks", (torch.zeros(4, 8)[:, ::2], torch.zeros(4, 8), 16, _pairs((0, 0)))),
        ("gather_blocks", ([torch.zeros(4, 8)], torch.tensor([0]), torch.empty(1, 31, dtype=torch.uint8))),
        ("scatter_blocks", (torch.empty(1, 32, dtype=torch.uint8), torch.tensor([0.0]), [torch.zeros(4, 8)])),
        ("copy_pages", ([torch.zeros(4, 8)], [torch.zeros(())], _pairs((0, 0)), runs_tensor())),
        ("concat_tp_shards", ([torch.zeros(2, 3), torch.zeros(3, 3)], 1)),
        ("concat_tp_shards_out", ([torch.zeros(2, 3)], 1, torch.zeros(3, 2))),
        ("split_tp_shards", (torch.zeros(2, 3), 1, [torch.zeros(2, 2)])),
    ],
)
def test_fake_kernels_refuse_what_the_ops_refuse(op, args):
    """Same type, same words: a compiled model fails where it is traced, not where it runs."""
    with pytest.raises(ValueError, match=f"^{op}: ") as real:
        getattr(ops, op)(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        with pytest.raises(ValueError, match=f"^{op}: ") as fake:
            getattr(ops, op)(*fakes)
    assert str(fake.value) == str(real.value)


def _compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="inductor", **options)


compiles = pytest.mark.usefixtures("fresh_compiler")


@compiles
def test_swap_blocks_between_other_work():
    """What is computed before the call is copied, and what comes after it sees the copy."""

    def step(src, dst, mapping):
        kvkernels.swap_blocks(src + 1, dst, 32, mapping)
        return dst * 2

    src, dst, mapping = _pages(6, 8), torch.zeros(5, 8), _pairs((5, 0), (1, 4))
    result = _compiled(step)(src, dst, mapping)
    expected = torch.zeros(5, 8)
    expected[[0, 4]] = src[[5, 1]] + 1
    assert torch.equal(dst, expected)
    assert torch.equal(result, expected * 2)


@compiles
def test_swap_blocks_of_padded_rows():
    """Exact strides: inductor must not hand over a re-strided copy of padded inputs, nor of padded intermediates."""

    def step(src, dst, mapping):
        inner = torch.empty_strided((6, 8), (12, 1))
        inner.copy_(src)
        kvkernels.swap_blocks(inner, dst, 32, mapping)
        kvkernels.swap_blocks(src, dst, 32, mapping + 1)

    src, whole = _pages(6, 8, pad=4), torch.zeros(6, 11)
    _compiled(step)(src, whole[:, :8], _pairs((3, 0), (1, 4)))
    expected = torch.zeros(6, 11)
    expected[[0, 4, 1, 5], :8] = src[[3, 1, 4, 2]]
    assert torch.equal(whole, expected)


@compiles
def test_swap_blocks_batch_is_not_removed():
    def step(src_ptrs, dst_ptrs, sizes):
        ops.swap_blocks_batch(src_ptrs, dst_ptrs, sizes)

    src, dst = torch.arange(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    _compiled(step)(_pointers(src[4:], src), _pointers(dst, dst[8:]), torch.tensor([4, 2]))
    assert dst.tolist() == [4, 5, 6, 7, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@compiles
def test_gather_blocks_into_a_tensor_of_the_graph():
    def step(pools, ids):
        out = torch.empty(ids.shape[0], 48, dtype=torch.uint8)
        kvkernels.gather_blocks(pools, ids, out)
        return out.view(torch.float32)

    k, v = _pages(6, 8), _pages(6, 4, pad=3)
    ids = torch.tensor([5, 2, 5])
    assert torch.equal(_compiled(step)([k, v], ids), torch.cat((k[ids], v[ids]), 1))


@compiles
@pytest.mark.parametrize("views_inside", [True, False], ids=["views in the graph", "views as inputs"])
def test_scatter_blocks_into_views_of_one_tensor(views_inside):
    """K = t[:, 0] and V = t[:, 1] interleave; written through both, each keeps its own."""

    def inside(buffer, ids, t):
        kvkernels.scatter_blocks(buffer, ids, [t[:, 0], t[:, 1]])
        return t.sum()

    def outside(buffer, ids, k, v):
        kvkernels.scatter_blocks(buffer, ids, [k, v])
        return k.sum() + v.sum()

    t, buffer, ids = torch.zeros(5, 2, 8), torch.randn(2, 16), torch.tensor([4, 1])
    arguments = (t,) if views_inside else (t[:, 0], t[:, 1])
    total = _compiled(inside if views_inside else outside)(buffer.view(torch.uint8), ids, *arguments)
    expected = torch.zeros(5, 2, 8)
    expected[ids] = buffer.view(2, 2, 8)
    assert torch.equal(t, expected)
    assert torch.allclose(total, expected.sum())


@compiles
def test_copy_pages_into_views_of_one_tensor():
    """Two layers' K and V to another tensor's, and back in reverse, in one graph."""

    def step(src, dst, mapping, runs):
        kvkernels.copy_pages([src[:, 0], src[:, 1]], [dst[:, 0], dst[:, 1]], mapping, runs)
        dst.mul_(2)
        kvkernels.copy_pages([dst[:, 1]], [src[:, 0]], mapping.flip(1), runs[:1])

    src, dst = torch.randn(6, 2, 8), torch.zeros(6, 2, 8)
    expected_src, expected_dst = src.clone(), dst.clone()
    expected_dst[[3, 0]] = 2 * src[[1, 2]]
    expected_src[[1, 2], 0] = expected_dst[[3, 0], 1]
    runs = runs_tensor(_whole_page(32), _whole_page(32, 1, 1))
    _compiled(step)(src, dst, _pairs((1, 3), (2, 0)), runs)
    assert torch.equal(dst, expected_dst)
    assert torch.equal(src, expected_src)


@compiles
def test_concat_and_split():
    """A functional concat feeds a split into views of one tensor, which feeds a concat into a transposed out."""

    def step(shards, fused, out):
        whole = kvkernels.concat_tp_shards(shards, 1)
        parts = [fused[:, 3:], fused[:, :3]]
        kvkernels.split_tp_shards(whole, 1, parts)
        kvkernels.concat_tp_shards_out(parts, 1, out)
        return whole

    shards = [torch.randn(4, 2), torch.randn(3, 4).t()]
    fused, out = torch.zeros(4, 5), torch.zeros(5, 4).t()
    whole = _compiled(step)(shards, fused, out)
    expected = torch.cat(shards, 1)
    assert torch.equal(whole, expected)
    assert torch.equal(fused, torch.cat((expected[:, 2:], expected[:, :2]), 1))
    assert torch.equal(out, expected)


@compiles
@torch._dynamo.config.patch(error_on_recompile=True)
def test_sizes_may_be_dynamic():
    """One graph serves any number of ids and blocks."""

    def step(pool, ids, out, other):
        kvkernels.gather_blocks([pool], ids, out)
        kvkernels.scatter_blocks(out, ids, [other])

    compiled = _compiled(step, dynamic=True)
    for blocks, n in ((7, 3), (9, 5), (12, 11)):
        pool, other = _pages(blocks, 8), torch.zeros(blocks, 8)
        ids = torch.randperm(blocks)[:n]
        out = torch.zeros(n, 32, dtype=torch.uint8)
        compiled(pool, ids, out, other)
        assert torch.equal(out.view(torch.float32), pool[ids])
        assert torch.equal(other[ids], pool[ids])
        assert other.count_nonzero() == n * 8
