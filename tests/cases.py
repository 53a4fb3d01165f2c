"""Random calls of the ops, and the check that all executors share: byte for byte what the reference does, nothing else.

A case says where its tensors lie in a few buffers of bytes; the buffers are made anew for the reference and for each
executor. What is compared is every byte of every buffer, so guard bytes, row padding, blocks that no id names and the
sources are covered by the same comparison as the copied bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import kvkernels
from kvkernels import reference, triton

GUARD_BYTES = 64
MAX_OFFSET_BYTES = 16
_CASE_BYTES = 1 << 20

# The ops that take ids on a device: where those stand among the arguments.
IDS_AT = {"gather_blocks": 1, "scatter_blocks": 1, "copy_pages": 2}
# (placement, whether host memory is pinned): the combinations that need a GPU.
DEVICE_PLACEMENTS = [("h2d", True), ("h2d", False), ("d2h", True), ("d2h", False), ("d2d", False)]
# `make simgpu`: the stand-in for CUDA runs kvkernels' own kernels, but not torch's, which the reference needs.
ON_STAND_IN = "KVKERNELS_STAND_IN" in os.environ
# On the host Triton's kernels run in its interpreter; on a GPU wherever the package is.
TRITON_ON_HOST = ("triton",) if triton.interprets() else ()
TRITON_ON_GPU = ("triton",) if triton.is_installed() and not triton.interprets() and not ON_STAND_IN else ()


def examples(count: int) -> settings:
    """Hypothesis settings for ``count`` examples, times KVKERNELS_EXAMPLES."""
    return settings(max_examples=max(1, round(count * float(os.environ.get("KVKERNELS_EXAMPLES", "1")))))


def addresses_are_the_hosts() -> Any:
    """Lets the reference take raw addresses, as it does until CUDA is initialised, which tests do where it is."""
    return mock.patch.object(torch.cuda, "is_initialized", lambda: False)


def _all_dtypes() -> list[torch.dtype]:
    """Every dtype but the quantized ones, whose tensors carry scales besides their bytes."""
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted((dtype for dtype in found if not str(dtype).startswith("torch.q")), key=str)


DTYPES = _all_dtypes()


@dataclass(frozen=True)
class View:
    """A tensor as its place in buffer ``buffer``: the offset in bytes, the strides in elements."""

    buffer: int
    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def on(self, buffers: Sequence[Tensor]) -> Tensor:
        raw = buffers[self.buffer]
        size = self.dtype.itemsize
        if self.offset_bytes % size == 0:
            return strided(raw, self.dtype, self.offset_bytes // size, self.shape, self.strides)
        if raw.is_cuda:
            strides = (*(s * size for s in self.strides), 1)
            return strided(raw, torch.uint8, self.offset_bytes, (*self.shape, size), strides)
        # A tensor's offset counts elements, so only a storage that begins at an odd address is unaligned.
        tail = torch.frombuffer(memoryview(raw.numpy())[self.offset_bytes :], dtype=torch.uint8)
        return strided(tail, self.dtype, 0, self.shape, self.strides)


def strided(raw: Tensor, dtype: torch.dtype, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of complex32
        return torch.empty(0, dtype=dtype, device=raw.device).set_(raw.untyped_storage(), offset, shape, strides)


def bytes_of(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    assert t.is_contiguous()
    size = t.element_size()
    return strided(t, torch.uint8, t.storage_offset() * size, (t.numel() * size,), (1,))


@dataclass(frozen=True)
class Case:
    """A call of ``op``; its arguments may be Views or lists of them."""

    op: str
    buffer_bytes: tuple[int, ...]
    sides: tuple[str, ...]  # of each buffer: "src", "dst" or, where it is both, "both"
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def random_buffers(self) -> list[Tensor]:
        rng = np.random.default_rng(self.seed)
        return [torch.from_numpy(rng.integers(0, 256, n, dtype=np.uint8)) for n in self.buffer_bytes]

    def arguments_on(self, buffers: Sequence[Tensor]) -> list[Any]:
        def bound(value: Any) -> Any:
            if isinstance(value, View):
                return value.on(buffers)
            if isinstance(value, list):
                return [v.on(buffers) for v in value]
            return value

        return [bound(value) for value in self.arguments]

    def fits(self, placement: str) -> bool:
        return "both" not in self.sides or placement in ("h2h", "d2d")

    def executors(self, placement: str, pinned: bool) -> tuple[str, ...]:
        if self.op == "concat_tp_shards":
            placement = f"{placement[0]}2{placement[0]}"  # its result is where the shards are
        if placement == "h2h":
            return ("auto", "cpu", *TRITON_ON_HOST, "reference")
        reference = () if ON_STAND_IN else ("reference",)
        if placement == "d2d":
            return ("auto", "bulk", "kernel", *TRITON_ON_GPU, *reference)
        kernels = ("bulk", "kernel", *TRITON_ON_GPU) if pinned else ()
        return ("auto", "dma", "staged", *kernels, *reference)


def _placed(case: Case, buffers: Sequence[Tensor], placement: str, pinned: bool) -> list[Tensor]:
    source, _, destination = placement.partition("2")
    placed = []
    for side, buffer in zip(case.sides, buffers, strict=True):
        on_device = (source if side == "src" else destination) == "d"
        if on_device:
            placed.append(buffer.to("cuda"))
        else:
            placed.append(buffer.clone().pin_memory() if pinned else buffer.clone())
    return placed


def check(case: Case, placement: str = "h2h", pinned: bool = False) -> None:
    """Each executor moves what the reference moves, and issues what explain() predicted."""
    before = case.random_buffers()
    expected = [b.clone() for b in before]
    result = getattr(reference, case.op)(*case.arguments_on(expected), **case.options)
    for executor in case.executors(placement, pinned):
        takes_device_ids = case.op in IDS_AT and (
            executor in ("bulk", "kernel") or (executor == "triton" and placement != "h2h")
        )
        ids_places = ("cpu", "cuda") if takes_device_ids else ("cpu",)
        for ids_place in ids_places:
            actual = _placed(case, before, placement, pinned)
            arguments = case.arguments_on(actual)
            if ids_place == "cuda":
                arguments[IDS_AT[case.op]] = arguments[IDS_AT[case.op]].cuda()
            _check_call(case, executor, arguments, actual, before, expected, result)


def _check_call(
    case: Case,
    executor: str,
    arguments: Sequence[Any],
    actual: Sequence[Tensor],
    before: Sequence[Tensor],
    expected: Sequence[Tensor],
    expected_result: Tensor | None,
) -> None:
    options = case.options if executor == "auto" else {**case.options, "executor": executor}
    on_device = any(buffer.is_cuda for buffer in actual)
    if on_device:
        torch.cuda.synchronize()
    # Half of the cases on a stream of their own: torch's default stream is the legacy one, which takes no batches.
    with torch.cuda.stream(torch.cuda.Stream()) if on_device and case.seed % 2 else contextlib.nullcontext():
        try:
            predicted = kvkernels.explain(case.op, *arguments, **options)
        except ValueError as error:
            # By what a case's fragments are.
            if executor not in ("bulk", "staged") or "cannot serve this call: " not in str(error):
                raise
            return
        assert_same_bytes(actual, before, f"explain with executor {executor}")
        kvkernels.reset_counters()
        result = getattr(torch.ops.kvkernels, case.op)(*arguments, **options)
        if on_device:
            torch.cuda.synchronize()
    assert_same_bytes(actual, expected, f"executor {executor}")
    if expected_result is not None:
        assert (result.shape, result.stride()) == (expected_result.shape, expected_result.stride())
        assert_same_bytes([bytes_of(result)], [bytes_of(expected_result)], f"executor {executor}, result")
    assert_issued(predicted)
    assert executor in ("auto", predicted.executor)


def assert_issued(predicted: kvkernels.Explanation) -> None:
    """Since the counters were reset, one call was carried out, as predicted."""
    issued = {name: c for name, c in kvkernels.counters().items() if any(c.values())}
    if predicted.bytes == 0:
        assert issued == {}
        return
    wanted = {
        "calls": 1,
        "launches": predicted.launches,
        "descriptors": predicted.descriptors,
        "bytes": predicted.bytes,
    }
    assert issued == {predicted.executor: wanted}


def assert_same_bytes(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if torch.equal(a.cpu(), e):
            continue
        wrong = (a.cpu() != e).nonzero().flatten()
        raise AssertionError(
            f"{what}: buffer {i} differs in {wrong.numel()} of {e.numel()} bytes, at {wrong[:8].tolist()}: "
            f"got {a.cpu()[wrong[:8]].tolist()}, expected {e[wrong[:8]].tolist()}"
        )


class Arena:
    """Collects the buffers of a case and hands out views of them between guard bytes."""

    def __init__(self) -> None:
        self.buffer_bytes: list[int] = []
        self.sides: list[str] = []

    def reserve(self, side: str, bytes: int, offset_bytes: int = 0) -> tuple[int, int]:
        """A new buffer with room for ``bytes``, as (buffer, ``offset_bytes`` past a multiple of 64)."""
        self.buffer_bytes.append(GUARD_BYTES + MAX_OFFSET_BYTES + bytes + GUARD_BYTES)
        self.sides.append(side)
        return len(self.buffer_bytes) - 1, GUARD_BYTES + offset_bytes

    def case(self, op: str, *arguments: Any, seed: int = 0, **options: Any) -> Case:
        return Case(op, tuple(self.buffer_bytes), tuple(self.sides), arguments, options, seed)


def pool_view(place: tuple[int, int], blocks: int, page_bytes: int, stride_bytes: int, dtype: torch.dtype) -> View:
    """A pool of rows of one dimension."""
    size = dtype.itemsize
    assert page_bytes % size == 0 and stride_bytes % size == 0
    return View(place[0], place[1], dtype, (blocks, page_bytes // size), (stride_bytes // size, 1))


# Below, at and above what kernels and loops treat differently: vectors of 16 bytes, strips of 64, rows of 1 KiB, pieces
# of 4 KiB.
_EDGE_BYTES = (
    *(1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 160, 255, 256, 257),
    *(511, 512, 1008, 1023, 1024, 1025, 1040, 2047, 2048, 2049, 4080, 4095, 4096, 4097, 5120, 8191, 8192, 8200),
    *(12288, 16384, 32768, 40960, 65535, 65536, 65552),
)
page_sizes = st.one_of(
    st.sampled_from(_EDGE_BYTES),
    st.integers(1, 320),
    st.sampled_from((16, 32, 48, 128, 256, 512, 1024, 4096)),
    st.sampled_from((131072, 262144 + 16, 524288, 1 << 20, (1 << 20) - 1, (1 << 20) - 8)),
)
offsets = st.integers(0, MAX_OFFSET_BYTES)
seeds = st.integers(0, 2**32 - 1)


def dtypes_for(*sizes_bytes: int) -> st.SearchStrategy[torch.dtype]:
    """Dtypes whose elements divide all the sizes."""
    whole = math.gcd(*sizes_bytes)
    return st.sampled_from([d for d in DTYPES if whole % d.itemsize == 0])


@st.composite
def row_shapes(draw: Callable[..., Any], elements: int) -> tuple[int, ...]:
    """One to four sizes that multiply to ``elements``."""
    shape = [elements]
    for _ in range(draw(st.integers(0, 3))):
        last = shape.pop()
        factor = draw(st.sampled_from([f for f in (1, 2, 3, 4, 8, 16) if last % f == 0] or [1]))
        shape += [factor, last // factor]
    return tuple(shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


@st.composite
def pools(draw: Callable[..., Any], arena: Arena, side: str, blocks: int, page_bytes: int) -> View:
    """A pool of a buffer of its own: any dtype, shape of row, padding and alignment."""
    dtype = draw(dtypes_for(page_bytes))
    size = dtype.itemsize
    padding_bytes = draw(st.sampled_from((0, 0, 0, size, 3 * size, 16 * size, 64 * size)))
    shape = draw(row_shapes(page_bytes // size))
    place = arena.reserve(side, blocks * (page_bytes + padding_bytes), draw(offsets))
    strides = ((page_bytes + padding_bytes) // size, *contiguous_strides(shape))
    return View(*place, dtype, (blocks, *shape), strides)


def blocks_for(page_bytes: int, most: int = 48) -> st.SearchStrategy[int]:
    return st.integers(1, max(2, min(most, _CASE_BYTES // page_bytes)))


def neighbouring_ids(rng: np.random.Generator, ids: int, count: int) -> np.ndarray:
    """``count`` distinct ids below ``ids``, in ascending and descending runs as free lists hand them out."""
    chunks = np.array_split(np.arange(ids), max(1, int(rng.integers(1, ids + 1))))
    parts = [chunks[i][:: rng.choice((1, -1))] for i in rng.permutation(len(chunks))]
    return np.concatenate(parts)[:count]


def neighbouring_pairs(rng: np.random.Generator, src_ids: int, dst_ids: int, count: int) -> np.ndarray:
    """Pairs with distinct destinations: some sources follow their destinations, others are anywhere, some repeat."""
    dst = neighbouring_ids(rng, dst_ids, min(count, dst_ids))
    src = rng.integers(0, src_ids, len(dst))
    if rng.random() < 0.7:
        follows = rng.random(len(dst)) < 0.8
        src[follows] = (dst[follows] + rng.integers(0, src_ids)) % src_ids
    pairs = np.stack((src, dst), 1)
    if len(pairs) and rng.random() < 0.4:
        again = rng.integers(0, len(pairs), rng.integers(1, 4))
        pairs = np.concatenate((pairs, pairs[again]))
        if rng.random() < 0.5:
            pairs = rng.permutation(pairs)
    return pairs


def as_ids(rng: np.random.Generator, values: np.ndarray) -> Tensor:
    """The ids as int64 or int32, in strides that a caller may have."""
    dtype = torch.int32 if rng.random() < 0.4 and (values < 2**31).all() and (values >= -(2**31)).all() else torch.int64
    ids = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    form = rng.integers(0, 5)
    if form == 1 and ids.dim() == 2:
        return ids.t().contiguous().t()
    if form in (2, 3):
        # Every other row, and the middle columns, of a tensor that holds rubbish elsewhere.
        rows, columns = 2 * ids.shape[0] + 1, ids.shape[1] + 3 if ids.dim() == 2 else 1
        wide = torch.full((rows, columns), -7_777_777, dtype=dtype)
        view = wide[1::2, 1 : 1 + ids.shape[1]] if ids.dim() == 2 else wide[1::2, 0]
        return view.copy_(ids)
    if form == 4 and ids.shape[0] > 1 and bool((ids == ids[0]).all()):
        return ids[:1].expand(ids.shape)
    return ids


counts = st.one_of(st.just(0), st.integers(1, 4), st.integers(0, 64))


@st.composite
def swap_cases(draw: Callable[..., Any]) -> Case:
    rng = np.random.default_rng(draw(seeds))
    page_bytes = draw(page_sizes)
    arena = Arena()

    def side(name: str) -> tuple[View, int]:
        blocks = draw(blocks_for(page_bytes))
        if draw(st.booleans()):
            return draw(pools(arena, name, blocks, page_bytes)), blocks
        # vLLM's rule: any contiguous tensor is a row of blocks, whatever its dimensions are.
        dtype = draw(dtypes_for(blocks * page_bytes))
        shape = draw(row_shapes(blocks * page_bytes // dtype.itemsize))
        place = arena.reserve(name, blocks * page_bytes, draw(offsets))
        return View(*place, dtype, shape, contiguous_strides(shape)), blocks

    in_place = draw(st.integers(0, 5)) == 0
    src, src_blocks = side("both" if in_place else "src")
    if in_place and src_blocks > 1:
        order, half = rng.permutation(src_blocks), src_blocks // 2
        pairs = neighbouring_pairs(rng, half, src_blocks - half, draw(counts))
        pairs = np.stack((order[:half][pairs[:, 0]], order[half:][pairs[:, 1]]), 1)
        return arena.case("swap_blocks", src, src, page_bytes, as_ids(rng, pairs), seed=draw(seeds))
    dst, dst_blocks = side("dst")
    pairs = neighbouring_pairs(rng, src_blocks, dst_blocks, draw(counts))
    return arena.case("swap_blocks", src, dst, page_bytes, as_ids(rng, pairs), seed=draw(seeds))


@st.composite
def layer_pools(draw: Callable[..., Any], arena: Arena, side: str) -> list[View]:
    """Pools of one call: separate tensors, K and V of one tensor, or all layers of a page-first tensor."""
    page_bytes = draw(page_sizes)
    blocks = draw(blocks_for(2 * page_bytes))
    kind = draw(st.sampled_from(("separate", "separate", "interleaved", "stacked")))
    if kind == "separate":
        sizes = [page_bytes, *draw(st.lists(page_sizes, max_size=3 if page_bytes < 8192 else 1))]
        return [draw(pools(arena, side, blocks + draw(st.integers(0, 2)), size)) for size in sizes]
    layers = draw(st.integers(2, 4))
    dtype = draw(dtypes_for(page_bytes))
    place = arena.reserve(side, layers * blocks * page_bytes, draw(offsets))
    step, stride = (page_bytes, layers * page_bytes) if kind == "interleaved" else (blocks * page_bytes, page_bytes)
    return [pool_view((place[0], place[1] + i * step), blocks, page_bytes, stride, dtype) for i in range(layers)]


@st.composite
def gather_scatter_cases(draw: Callable[..., Any], op: str) -> Case:
    rng = np.random.default_rng(draw(seeds))
    arena = Arena()
    gathers = op == "gather_blocks"
    layers = draw(layer_pools(arena, "src" if gathers else "dst"))
    blocks = min(view.shape[0] for view in layers)
    row_bytes = sum(math.prod(view.shape[1:]) * view.dtype.itemsize for view in layers)
    n = min(draw(counts), max(3, _CASE_BYTES // row_bytes))
    if gathers:
        ids = neighbouring_ids(rng, blocks, n) if rng.random() < 0.5 else rng.integers(0, blocks, n)
        if n and rng.random() < 0.1:
            ids = np.full(n, ids[0])
    else:
        ids = neighbouring_ids(rng, blocks, n)
    padding_bytes = draw(st.sampled_from((0, 0, 1, 16, 24)))
    place = arena.reserve("dst" if gathers else "src", len(ids) * (row_bytes + padding_bytes), draw(offsets))
    buffer = pool_view(place, len(ids), row_bytes, row_bytes + padding_bytes, torch.uint8)
    block_ids = as_ids(rng, ids)
    arguments = (layers, block_ids, buffer) if gathers else (buffer, block_ids, layers)
    return arena.case(op, *arguments, seed=draw(seeds))


@st.composite
def _strided_view(
    draw: Callable[..., Any], arena: Arena, side: str, dtype: torch.dtype, shape: Sequence[int], expand: bool = False
) -> View:
    """A tensor of this shape whose dimensions lie in any order in memory, with gaps."""
    strides = [0] * len(shape)
    reach = 1
    for i in draw(st.permutations(range(len(shape)))):
        if expand and draw(st.integers(0, 9)) == 0:
            continue
        strides[i] = reach + draw(st.sampled_from((0, 0, 0, 1, 2)))
        reach += strides[i] * (max(shape[i], 1) - 1)
    if draw(st.booleans()):
        strides, reach = list(contiguous_strides(shape)), math.prod(shape)
    place = arena.reserve(side, reach * dtype.itemsize, draw(offsets))
    return View(*place, dtype, tuple(shape), tuple(strides))


@st.composite
def concat_cases(draw: Callable[..., Any], op: str) -> Case:
    arena = Arena()
    dtype = draw(st.sampled_from(DTYPES))
    whole = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    if draw(st.integers(0, 9)) == 0:
        whole[draw(st.integers(0, len(whole) - 1))] = 0
    dim = draw(st.integers(0, len(whole) - 1))
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    whole[dim] = sum(sizes)
    splits = op == "split_tp_shards"
    many = "dst" if splits else "src"
    shapes = [[*whole[:dim], size, *whole[dim + 1 :]] for size in sizes]
    shards = [draw(_strided_view(arena, many, dtype, shape, expand=not splits)) for shape in shapes]
    if not splits and draw(st.integers(0, 4)) == 0:
        shards.append(shards[0])
        whole[dim] += sizes[0]
    dim -= len(whole) if draw(st.booleans()) else 0
    if op == "concat_tp_shards":
        return arena.case(op, shards, dim, seed=draw(seeds))
    one = draw(_strided_view(arena, "src" if splits else "dst", dtype, whole, expand=splits))
    return arena.case(op, *((one, dim, shards) if splits else (shards, dim, one)), seed=draw(seeds))
