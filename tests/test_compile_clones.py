"""A clone that keeps a source and a destination apart is kept by inductor: it drops those whose value it has elsewhere.

It would hand the op one tensor twice, which is an error where the ids are on the host, and wrong bytes where they are
on a device. Each op is compared with itself outside of a graph, whatever is cloned and whatever is a view.
"""

from __future__ import annotations

import pytest
import torch

import kvkernels
from kvkernels import KVCache, KVLayout, convert_blocks, copy_slots, whole_page_runs

ops = torch.ops.kvkernels
pytestmark = pytest.mark.usefixtures("fresh_compiler")
MAPPING, IDS = torch.tensor([[0, 1], [1, 2]]), torch.tensor([2, 0])
RUNS = whole_page_runs([torch.zeros(4, 32, dtype=torch.uint8)])
NHD, HND = (KVLayout(f"B {inner}", B=4, N=8, H=4, dtype=torch.uint8) for inner in ("N H", "H N"))


def _convert(src, dst) -> None:
    convert_blocks(KVCache(NHD, src), KVCache(HND, dst), MAPPING)


def _slots(src, dst) -> None:
    copy_slots(KVCache(NHD, src), torch.arange(16), dst[1:3].view(-1), direction="to_buffer", pattern="T H")


# From one tensor of four rows of 32 bytes to another.
COPIES = {
    "swap_blocks": lambda src, dst: ops.swap_blocks(src, dst, 32, MAPPING),
    "gather_blocks": lambda src, dst: ops.gather_blocks([src], IDS, dst[1:3]),
    "scatter_blocks": lambda src, dst: ops.scatter_blocks(src[:2], IDS, [dst]),
    "copy_pages": lambda src, dst: ops.copy_pages([src], [dst], MAPPING, RUNS),
    "convert_blocks": _convert,
    "copy_slots": _slots,
}


def _source_is_a_clone(copy, x):
    copy(x.clone(), x)
    return x * 1


def _destination_is_a_clone(copy, x):
    y = x.clone()
    copy(x, y)
    return y * 2 + x


def _both_are_clones(copy, x):
    y, z = x.clone(), x.clone()
    copy(y, z)
    return y + 2 * z


def _clone_of_an_intermediate(copy, x):
    y = x + 1
    copy(y.clone(), y)
    return y * 1


def _there_and_back(copy, x):
    y = x.clone()
    copy(y, x)
    copy(x.clone(), y)
    return x + 3 * y


def _clone_under_a_view(copy, x):
    y = x.view(8, 16).clone().view(4, 32)
    copy(y, x)
    return y - 2 * x


PROGRAMS = [
    _source_is_a_clone, _destination_is_a_clone, _both_are_clones, _clone_of_an_intermediate, _there_and_back,
    _clone_under_a_view,
]  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__[1:])
def test_clones_are_kept(program, name):
    copy, x = COPIES[name], torch.arange(128, dtype=torch.uint8).view(4, 32)
    outside, inside = x.clone(), x.clone()
    right = program(copy, outside)
    assert torch.equal(torch.compile(lambda t: program(copy, t), fullgraph=True)(inside), right)
    assert torch.equal(inside, outside)


def test_no_more_is_copied_than_is_needed():
    """Sources that say that they are written cost no copy where nothing keeps them apart."""

    def step(src, dst):
        COPIES["swap_blocks"](src, dst)
        return src + dst

    compiled = torch.compile(step, fullgraph=True)
    _, (code,) = torch._inductor.utils.run_and_get_code(compiled, torch.ones(4, 8), torch.zeros(4, 8))
    body = code[code.index("def call(") :]
    assert body.count("kvkernels.swap_blocks.default(") == 1
    assert body.count("empty_strided_cpu(") == 1  # the sum


def test_gradients_of_a_source_are_kept():
    """The source is only said to be written."""

    def loss(weight, dst):
        source = weight * 2
        kvkernels.swap_blocks(source, dst, 32, MAPPING)
        return (source * source).sum()

    weight, dst = torch.ones(4, 8, requires_grad=True), torch.zeros(4, 8)
    torch.compile(loss, fullgraph=True)(weight, dst).backward()
    assert torch.equal(weight.grad, torch.full((4, 8), 8.0)) and float(dst.sum()) == 32


def test_outside_of_a_graph_a_source_has_no_new_version():
    src, dst = torch.ones(4, 8), torch.zeros(4, 8)
    for copy in COPIES.values():
        copy(src.view(torch.uint8), dst.view(torch.uint8))
    assert src._version == 0 and dst._version > 0


def test_shards_say_nothing_of_their_sources():
    """They may be expanded, and then nothing may write to them; a clone that inductor drops is an error."""

    def apart(x):
        kvkernels.split_tp_shards(x.clone(), 0, [x[2:], x[:2]])

    def expanded(row, out, parts):
        kvkernels.concat_tp_shards_out([row, row], 0, out)
        kvkernels.split_tp_shards(row, 0, parts)

    with pytest.raises(ValueError, match="out must not write what it reads"):
        torch.compile(apart, fullgraph=True)(torch.arange(32.0).view(4, 8))
    row, out, parts = torch.arange(8.0).expand(2, 8), torch.zeros(4, 8), [torch.zeros(1, 8) for _ in range(2)]
    torch.compile(expanded, fullgraph=True)(row, out, parts)
    assert torch.equal(out, row[:1].expand(4, 8)) and torch.equal(torch.cat(parts), row)
