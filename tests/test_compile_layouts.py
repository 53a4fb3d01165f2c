"""Conversions in graphs that are compiled, exported and packaged, whether or not their plan is cached already."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from kvkernels import KVCache, KVLayout, convert_blocks, copy_slots, expand_blocks, whole_page_runs

_elements = itertools.count(3000)  # layouts that no plan has been made for yet
pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Work:
    """One conversion and two copies of slots; ``inside`` has the caches made where a tracer sees it."""

    def __init__(self, element: int) -> None:
        sizes = {"L": 2, "B": 4, "N": 2, "H": 2, "D": element, "dtype": torch.float32}
        self.nhd, self.hnd = KVLayout("L | B N H D", **sizes), KVLayout("B L H N D", **sizes)
        whole = KVLayout("L | B N H D", **sizes)
        self.shards = [whole.shard(rank, 2) for rank in range(2)]
        self.element = element

    def inputs(self) -> list[torch.Tensor]:
        torch.manual_seed(self.element)
        tokens = [torch.randn(4, 2, 2, self.element) for _ in range(2)]
        shards = [torch.zeros(4, 2, 1, self.element) for _ in range(4)]
        chunks = [torch.zeros(1, 2, n, 2 * self.element) for n in (1, 2)]
        ids = [torch.tensor([[0, 1], [3, 2]]), torch.tensor([5, -1, 0])]
        return [*tokens, torch.zeros(4, 2, 2, 2, self.element), *shards, *chunks, *ids]

    def caches(self, tensors) -> list[KVCache]:
        return [
            KVCache(self.nhd, list(tensors[:2])), KVCache(self.hnd, tensors[2]),
            *(KVCache(self.shards[rank], list(tensors[3 + 2 * rank : 5 + 2 * rank])) for rank in range(2)),
        ]  # fmt: skip

    def run(self, caches, chunks, mapping, slots) -> torch.Tensor:
        nhd, hnd, *shards = caches
        convert_blocks(nhd, hnd, mapping)
        convert_blocks(hnd, shards, mapping.flip(1), layer=1)
        copy_slots(shards, slots, chunks, direction="to_buffer", executor="cpu")
        copy_slots(nhd, slots + 1, chunks, direction="to_cache", skip_first=1)
        return hnd.tensors[0] * 2 + nhd.tensors[1].amax()

    def inside(self, *tensors) -> torch.Tensor:
        return self.run(self.caches(tensors), tensors[7:9], *tensors[9:])

    def expected(self) -> list[torch.Tensor]:
        tensors = self.inputs()
        return [*tensors, self.inside(*tensors)]


class Module(torch.nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def forward(self, *tensors):
        return self.work.inside(*tensors)


def _compiled(work):
    return torch.compile(work.inside, fullgraph=True)


def _compiled_over_caches(work):
    compiled = torch.compile(work.run, fullgraph=True)
    return lambda *tensors: compiled(work.caches(tensors), tensors[7:9], *tensors[9:])


def _exported(work, strict: bool = False):
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(work), tuple(work.inputs()), strict=strict), file)
    file.seek(0)
    return torch.export.load(file).module()


def _packaged(work, path):
    exported = torch.export.export(Module(work), tuple(work.inputs()))
    torch._inductor.aoti_compile_and_package(exported, package_path=path)
    return torch._inductor.aoti_load_package(path)


WAYS = {
    "compiled": lambda work, _: _compiled(work),
    "compiled over caches": lambda work, _: _compiled_over_caches(work),
    "exported": lambda work, _: _exported(work),
    "exported strictly": lambda work, _: _exported(work, strict=True),
    "packaged": _packaged,
}


@pytest.mark.parametrize("is_cached", [False, True], ids=["no plan yet", "plan cached"])
@pytest.mark.parametrize("way", WAYS)
def test_conversions_in_a_graph(way, is_cached, tmp_path):
    work = Work(next(_elements))
    wanted = work.expected() if is_cached else None
    call, tensors = WAYS[way](work, str(tmp_path / "work.pt2")), work.inputs()
    result = call(*tensors)
    for mine, theirs in zip([*tensors, result], wanted or work.expected(), strict=True):
        assert torch.equal(mine, theirs)


def test_ids_are_checked_when_the_graph_runs():
    """All chunks' slots before the first of them is copied, and in the words of the function."""
    work = Work(next(_elements))
    compiled, tensors = _compiled(work), work.inputs()
    compiled(*tensors)
    for bad, message in (
        (8, r"copy_slots: slots\[2\] = 8 is out of range"),
        (1 << 40, "out of range for a cache with"),
    ):
        again = work.inputs()
        again[10] = torch.tensor([5, -1, bad])
        with pytest.raises(IndexError, match=message):
            compiled(*again)
        assert not any(chunk.any() for chunk in again[7:9])
    again[9] = torch.tensor([[0, 1], [4, 2]])
    with pytest.raises(IndexError, match=r"copy_pages: mapping\[1, 0\] = 4 is out of range"):
        compiled(*again)


def test_refusals_come_when_the_graph_is_traced():
    work = Work(next(_elements))
    tensors = work.inputs()
    tensors[2] = torch.zeros(4, 2, 2, 3, work.element)
    with pytest.raises(Exception, match=r"KVCache: tensors\[0\] must be \[4, 2, 2, 2, "):
        _compiled(work)(*tensors)


def test_helpers_in_a_graph():
    def step(ids, pool):
        return expand_blocks(ids, 3, 1), whole_page_runs([pool]), expand_blocks([1, 2], 2)

    ids, pool = torch.tensor([4, -1]), torch.zeros(4, 8)
    for mine, theirs in zip(torch.compile(step, fullgraph=True)(ids, pool), step(ids, pool), strict=True):
        assert torch.equal(mine, theirs)


def test_autograd_learns_of_a_conversion():
    """The caches' own tensors get a new version, and one that requires a gradient is refused."""
    work = Work(next(_elements))
    for call in (work.inside, _compiled(work)):
        tensors = work.inputs()
        before = [tensor._version for tensor in tensors]
        call(*tensors)
        assert all(now._version > then for now, then in zip(tensors[2:9], before[2:9], strict=True))
    tensors[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"convert_blocks: dst\[0\] must not require a gradient"):
        work.inside(*tensors)
