"""What is cached and what is made for a call are the same whatever torch's ambient modes and defaults are."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvkernels
from kvkernels import KVCache, KVLayout, compile_plan, convert_blocks, copy_slots, expand_blocks, whole_page_runs
from kvkernels.layout import canonicalize, copy_groups, empty_host_caches
from kvkernels.layout.specs import MLA, KVCacheGroup

_sizes = itertools.count(1000)  # layouts that no plan has been made for yet


@contextlib.contextmanager
def _default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "fake": FakeTensorMode,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "dtype": _default_dtype,
    "deterministic": _deterministic,
    "plain": contextlib.nullcontext,
}
in_each_mode = pytest.mark.parametrize("mode", MODES)


class Caches:
    """Token-first and head-first caches of a size of their own, and what is copied between them."""

    def __init__(self, element: int) -> None:
        sizes = {"L": 2, "B": 4, "N": 2, "H": 2, "D": element, "dtype": torch.float32}
        nhd, hnd = KVLayout("L | B N H D", **sizes), KVLayout("B L H N D", **sizes)
        self.src = KVCache(nhd, [torch.ones(4, 2, 2, element, dtype=torch.float32, device="cpu") for _ in range(2)])
        self.dst = KVCache(hnd, torch.zeros(4, 2, 2, 2, element, dtype=torch.float32, device="cpu"))
        self.buffer = torch.zeros(1, 2, 2, 2 * element, dtype=torch.float32, device="cpu")
        self.pair, self.slots = torch.tensor([[0, 1]], device="cpu"), torch.tensor([2, 3], device="cpu")

    def copy(self) -> None:
        convert_blocks(self.src, self.dst, self.pair)
        convert_blocks(self.src, self.dst, self.pair + 1, layer=1)
        copy_slots(self.src, self.slots, self.buffer, direction="to_buffer")

    def check(self) -> None:
        page = self.src.tensors[0][0].numel()
        assert [int(block.sum()) for block in self.dst.tensors[0]] == [0, 2 * page, page, 0]
        assert bool((self.buffer == 1).all())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fake"])
def test_a_prepared_copy_is_of_no_mode(mode):
    """Prepared in one mode and run in others, and in another thread."""
    src, dst = ([torch.full((4, 8), fill + i, device="cpu") for i in range(5)] for fill in (1, 100))
    with MODES[mode]():
        prepared = kvkernels.prepare(src, dst)
        prepared.run(torch.tensor([[0, 1]], device="cpu"), layer=1)
    prepared.run(torch.tensor([[0, 2]]))
    with MODES[mode]():
        thread = threading.Thread(target=lambda: prepared.run(torch.tensor([[0, 3]]), layer=4))
        thread.start()
        thread.join()
        prepared.run(torch.tensor([[1, 0]], device="cpu"), layer=2)
    written = [[block for block in range(4) if torch.equal(b[block], a[0])] for a, b in zip(src, dst, strict=True)]
    assert written == [[2], [1, 2], [0, 2], [2], [2, 3]]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fake"])
def test_groups_and_slabs_are_of_no_mode(mode):
    src = [torch.arange(32, device="cpu").reshape(4, 8) + 100 * i for i in range(5)]
    dst = [torch.zeros_like(pool) for pool in src]
    pairs = [torch.tensor(rows, device="cpu") for rows in ([[0, 1], [3, 2]], [[1, 0]])]
    with MODES[mode]():
        slabbed = kvkernels.prepare([list(pool.split([1, 3])) for pool in src], dst)
        groups = kvkernels.PreparedGroups([kvkernels.prepare(src, dst) for _ in range(2)])
        slabbed.run(pairs[0])
        groups.run([pairs[1], None])
    slabbed.run(torch.tensor([[2, 3]]))
    assert all(torch.equal(b, a[[1, 0, 3, 2]]) for a, b in zip(src, dst, strict=True))


def test_what_a_fake_mode_meets_of_prepared_copies():
    """What is prepared stays as it was; fake pools have no memory to be bound."""
    src, dst = ([torch.full((4, 8), fill + i) for i in range(5)] for fill in (1, 100))
    prepared = kvkernels.prepare(src, dst)
    with FakeTensorMode(allow_non_fake_inputs=True):
        prepared.run(torch.tensor([[0, 1]]), layer=1)
        with pytest.raises(ValueError, match="bind: pools must be tensors with memory"):
            kvkernels.bind([torch.zeros(4, 8)])
    assert [pool.unique().tolist() for pool in dst] == [[100 + i] for i in range(5)]
    prepared.run(torch.tensor([[0, 1]]), layer=1)
    assert torch.equal(dst[1][1], src[1][0])


@in_each_mode
@pytest.mark.parametrize("then", ["plain", "inference", "device"])
def test_plans_of_one_mode_serve_another(mode, then):
    element = next(_sizes)
    with MODES[mode]():
        first = Caches(element)
        first.copy()
    with MODES[then]():
        second = Caches(element)
        second.copy()
        second.check()
    if mode != "fake":
        first.check()


def test_plans_of_another_thread_and_mode():
    element = next(_sizes)

    def work() -> None:
        with torch.inference_mode(), FakeTensorMode():
            Caches(element).copy()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    caches = Caches(element)
    caches.copy()
    caches.check()


def _engine(blocks: int = 6):
    group = [KVCacheGroup(["a"], MLA(block_size=4, head_size=8, dtype=torch.float16))]
    page = torch.arange(blocks * 32, dtype=torch.float16, device="cpu").view(blocks, 4, 8)
    return canonicalize({"a": page}, group)


# The helpers that make tensors on the CPU.
HELPERS = {
    "runs of a plan": lambda: (
        compile_plan(
            KVLayout("B N D", B=2, N=3, D=4, dtype=torch.int8), KVLayout("B D N", B=2, N=3, D=4, dtype=torch.int8)
        ).runs.all
    ),
    "whole_page_runs": lambda: whole_page_runs([torch.zeros(3, 4, dtype=torch.uint8, device="cpu")]),
    "expand_blocks of a list": lambda: expand_blocks([3, 1], 2),
    "expand_blocks of a tensor": lambda: expand_blocks(torch.tensor([3, 1], device="cpu"), 2),
    "canonicalize": lambda: _engine().tensors[0].tensor,
}


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fake"])
def test_helpers_make_the_same_tensors(helper, mode):
    wanted = HELPERS[helper]()
    with MODES[mode]():
        made = HELPERS[helper]()
        assert (made.device, made.dtype) == (wanted.device, wanted.dtype)
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fake"])
@pytest.mark.parametrize("blocks_per_host_block", [1, 2])
def test_groups_are_copied(mode, blocks_per_host_block):
    with MODES[mode]():
        engine = _engine()
        host = empty_host_caches(engine, 3, blocks_per_host_block=blocks_per_host_block)
        assert host.tensors[0].tensor.device.type == "cpu"
        copy_groups(engine, host, torch.tensor([1], device="cpu"), torch.tensor([2], device="cpu"), [1])
        assert torch.equal(host.tensors[0].tensor[2, :64], engine.tensors[0].tensor[1])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fake"])
def test_the_reference_makes_its_tensors_on_the_cpu(mode):
    """What it checks ids, runs and overlaps with."""
    with MODES[mode]():
        pool = torch.arange(64, dtype=torch.uint8, device="cpu").view(4, 16)
        runs = whole_page_runs([pool])
        pairs = torch.tensor([[0, 2], [1, 3]], device="cpu")
        kvkernels.reference.copy_pages([pool], [pool], pairs, runs, executor="reference")
        assert torch.equal(pool[2:], pool[:2])
        out = torch.zeros(2, 16, dtype=torch.uint8, device="cpu")
        kvkernels.reference.gather_blocks([pool], torch.tensor([3, 0], device="cpu"), out)
        assert torch.equal(out, pool[[3, 0]])
        halves = [torch.zeros(4, 8, dtype=torch.uint8, device="cpu") for _ in range(2)]
        kvkernels.reference.split_tp_shards(pool, 1, halves)
        assert torch.equal(torch.cat(halves, 1), pool)
        with pytest.raises(ValueError, match="must not write what it reads"):
            kvkernels.reference.copy_pages(
                [pool], [pool], pairs.flip(0) - torch.tensor([0, 1], device="cpu"), runs, executor="reference"
            )
        addresses = [torch.tensor([t.data_ptr()], device="cpu") for t in (pool, out)]
        kvkernels.reference.swap_blocks_batch(*addresses, torch.tensor([8], device="cpu"))
        assert torch.equal(out[0, :8], pool[0, :8])


@in_each_mode
def test_the_library_answers(mode):
    with MODES[mode]():
        assert kvkernels.info()["ops"]["gather_blocks"]["cpu to cpu"]["auto"] in ("cpu", "reference")
        assert set(kvkernels.counters()) >= {"cpu", "reference"}


def test_explain_needs_values():
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"^explain: gather_blocks must be called on tensors with values"),
    ):
        out = torch.zeros(1, 32, dtype=torch.uint8)
        kvkernels.explain("gather_blocks", [torch.zeros(4, 8)], torch.tensor([1]), out)


def test_fake_transfers():
    """Shapes alone: chunks of one storage, ids, and groups, none of which has values."""
    with FakeTensorMode():
        caches = Caches(next(_sizes))
        chunks = [torch.zeros(1, 2, 1, caches.buffer.shape[3], dtype=torch.float32) for _ in range(2)]
        copy_slots(caches.src, caches.slots, chunks, direction="to_buffer")
        assert expand_blocks(torch.tensor([1, 2]), 3).shape == (6,)
        with pytest.raises(ValueError, match="must have addresses, which say what layers share, got a fake tensor"):
            _engine()
