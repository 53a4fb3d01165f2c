"""The ops in plain torch: checked as the compiled library checks them, and moved by indexing on bytes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.common import autograd
from kvkernels.reference import checks, ledger
from kvkernels.reference.checks import Pool
from kvkernels.reference.overlap import (
    Intervals,
    Steps,
    first_read_of_written,
    first_tensors_sharing,
    shares_bytes_with_itself,
)
from kvkernels.reference.pairs import check_bytes_touched, host_ids, pairs_of_ids, pairs_of_mapping
from kvkernels.reference.runs import Run, check_runs, parse_runs, whole_page

_BYTES_AT_ONCE = 32 << 20
_ADDRESS_MASK = (1 << 64) - 1
_SIGN_BIT = -(1 << 63)
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
NO_LIBRARY = "no compiled library: every op runs on the reference"


def _check_servable(op: str, executor: str) -> None:
    if executor not in ("auto", "reference"):
        raise ValueError(
            f"{op}: executor '{executor}' cannot serve this call: kvkernels has no compiled library here, "
            "kvkernels.info() says why"
        )


def _direction(src: Tensor, dst: Tensor) -> str:
    letter = {"cpu": "h", "cuda": "d"}
    return f"{letter[src.device.type]}2{letter[dst.device.type]}"


class _Side(NamedTuple):
    """One side of a run as a tensor of words ``[blocks, (subblocks,) *extents, words]``, its loops ascending."""

    words: Tensor
    flips: tuple[int, ...]  # dimensions of a row of `words` that the run walks downwards
    subblocks: int

    @classmethod
    def of(cls, pool: Pool, steps: Steps, subblocks: int, subblock_stride: int, word_bytes: int) -> _Side:
        offset, fragment_bytes, loops = steps
        ascending = offset + sum(min(0, (extent - 1) * stride) for extent, stride in loops)
        sizes = [pool.blocks, *(extent for extent, _ in loops), fragment_bytes // word_bytes]
        strides = [pool.block_stride // word_bytes, *(abs(stride) // word_bytes for _, stride in loops), 1]
        flips = [1 + i for i, (_, stride) in enumerate(loops) if stride < 0]
        if subblocks > 1:
            ascending += min(0, (subblocks - 1) * subblock_stride)
            sizes.insert(1, subblocks)
            strides.insert(1, abs(subblock_stride) // word_bytes)
        t = pool.tensor
        start_bytes = t.storage_offset() * t.element_size() + ascending
        words = torch.empty(0, dtype=_WORDS[word_bytes], device=t.device)
        words.set_(t.untyped_storage(), start_bytes // word_bytes, sizes, strides)
        return cls(words, tuple(flips), -subblocks if subblock_stride < 0 else subblocks)

    def _index(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        subblocks = abs(self.subblocks)
        within = ids % subblocks
        if self.subblocks < 0:
            within = subblocks - 1 - within
        return (ids // subblocks).to(self.words.device), within.to(self.words.device)

    def read(self, ids: Tensor) -> Tensor:
        if self.subblocks == 1:
            rows = self.words.index_select(0, ids.to(self.words.device))
        else:
            rows = self.words[self._index(ids)]
        return rows.flip(self.flips) if self.flips else rows

    def write(self, ids: Tensor, rows: Tensor) -> None:
        rows = rows.flip(self.flips) if self.flips else rows
        rows = rows.to(self.words.device)
        if self.subblocks == 1:
            self.words.index_copy_(0, ids.to(self.words.device), rows)
        else:
            self.words[self._index(ids)] = rows


class _Step(NamedTuple):
    """A run bound to its two sides."""

    src: _Side
    dst: _Side
    bytes_per_pair: int
    fragments_per_pair: int

    def pairs_at_once(self) -> int:
        return max(1, _BYTES_AT_ONCE // self.bytes_per_pair)


def _word_bytes(run: Run, pools: Sequence[Pool], subblock_strides: Sequence[int]) -> int:
    """The widest word that every address and size of the run is a multiple of."""
    numbers = [run.fragment_bytes, run.src_offset, run.dst_offset, *subblock_strides]
    numbers += [stride for _, s, d in run.loops for stride in (s, d)]
    for pool in pools:
        t = pool.tensor
        numbers += [t.untyped_storage().data_ptr(), int(t.storage_offset()) * t.element_size()]
        numbers += [pool.block_stride]
    return math.gcd(8, *numbers)


def _bind(run: Run, src: Pool, dst: Pool, src_subblocks: int, dst_subblocks: int) -> _Step:
    run = run.folded()
    src_stride = run.src_subblock_stride if src_subblocks > 1 else 0
    dst_stride = run.dst_subblock_stride if dst_subblocks > 1 else 0
    word_bytes = _word_bytes(run, (src, dst), (src_stride, dst_stride))
    return _Step(
        _Side.of(src, run.src_steps(), src_subblocks, src_stride, word_bytes),
        _Side.of(dst, run.dst_steps(), dst_subblocks, dst_stride, word_bytes),
        run.bytes_per_pair(),
        run.src_steps().fragments(),
    )


def _bind_all(
    src: Sequence[Pool], dst: Sequence[Pool], runs: Sequence[Run], pairs: Tensor, src_subblocks: int, dst_subblocks: int
) -> list[_Step]:
    # Views over a pool of no blocks would not be in its storage; without pairs nothing needs them.
    if pairs.shape[0] == 0:
        return []
    return [_bind(r, src[r.src_pool], dst[r.dst_pool], src_subblocks, dst_subblocks) for r in runs]


def _move(steps: Sequence[_Step], pairs: Tensor) -> tuple[int, int]:
    """Copy, and say how many fragments and bytes that was."""
    descriptors = moved_bytes = 0
    for step in steps:
        for chunk in torch.split(pairs, step.pairs_at_once()):
            step.dst.write(chunk[:, 1], step.src.read(chunk[:, 0]))
            descriptors += chunk.shape[0] * step.fragments_per_pair
            moved_bytes += chunk.shape[0] * step.bytes_per_pair
    return descriptors, moved_bytes


class _Written(NamedTuple):
    """What a call writes, and what its errors call that."""

    op: str
    name: str
    is_list: bool
    tensors: Sequence[Tensor]

    def carry_out(self, record: ledger.Record, move: Callable[[], tuple[int, int]]) -> None:
        """Explain or carry out a call that has passed every other check; ``move`` says what it moved."""
        autograd.check_may_write(*self)
        if ledger.explains(record):
            return
        ledger.count(*move())
        autograd.note_writes(self.tensors)


def _copy_pairs(
    written: _Written,
    src: Sequence[Pool],
    dst: Sequence[Pool],
    runs: Sequence[Run],
    pairs: Tensor,
    src_subblocks: int = 1,
    dst_subblocks: int = 1,
) -> None:
    steps = _bind_all(src, dst, runs, pairs, src_subblocks, dst_subblocks)
    n = pairs.shape[0]
    record = ledger.Record(
        op=written.op,
        executor="reference",
        reason=NO_LIBRARY,
        direction=_direction(src[0].tensor, dst[0].tensor),
        descriptors=sum(n * step.fragments_per_pair for step in steps),
        bytes=sum(n * step.bytes_per_pair for step in steps),
        pairs=n,
        moves=len(steps),
    )
    written.carry_out(record, lambda: _move(steps, pairs))


def swap_blocks(
    src: Tensor,
    dst: Tensor,
    block_size_in_bytes: int,
    block_mapping: Tensor,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    op = "swap_blocks"
    src_pool, dst_pool = checks.check_swap_blocks(src, dst, block_size_in_bytes, block_mapping, executor, sm_budget)
    _check_servable(op, executor)
    pairs = pairs_of_mapping(op, "block_mapping", block_mapping, (src_pool,), (dst_pool,))
    runs = [whole_page(0, 0, 0, 0, block_size_in_bytes)]
    check_bytes_touched(op, "block_mapping", "dst", (src_pool,), (dst_pool,), runs, pairs)
    _copy_pairs(_Written(op, "dst", False, (dst,)), (src_pool,), (dst_pool,), runs, pairs)


def swap_blocks_checked(src: Tensor, dst: Tensor, block_size_in_bytes: int, block_mapping: Tensor) -> None:
    """The move alone: the compiled library has checked, and an error that crossed it would lose its type."""
    pools = [checks.blocks_of_bytes("swap_blocks", "", t, block_size_in_bytes) for t in (src, dst)]
    pairs = torch.unique(host_ids(block_mapping), dim=0)
    _move(_bind_all(pools[:1], pools[1:], [whole_page(0, 0, 0, 0, block_size_in_bytes)], pairs, 1, 1), pairs)


def _page_offsets(pools: Sequence[Pool]) -> list[int]:
    """Where each pool's page starts in a row of the buffer."""
    offsets, offset = [], 0
    for pool in pools:
        offsets.append(offset)
        offset += pool.page_bytes
    return offsets


def gather_blocks(
    pools: Sequence[Tensor], block_ids: Tensor, out: Tensor, executor: str = "auto", sm_budget: int = 0
) -> None:
    op = "gather_blocks"
    src, buffer = checks.check_gather_blocks(pools, block_ids, out, executor, sm_budget)
    _check_servable(op, executor)
    pairs = pairs_of_ids(op, block_ids, src, ids_are_sources=True)
    offsets = _page_offsets(src)
    runs = [whole_page(t, 0, 0, offsets[t], pool.page_bytes) for t, pool in enumerate(src)]
    check_bytes_touched(op, "block_ids", "out", src, (buffer,), runs, pairs)
    _copy_pairs(_Written(op, "out", False, (out,)), src, (buffer,), runs, pairs)


def scatter_blocks(
    buffer: Tensor, block_ids: Tensor, pools: Sequence[Tensor], executor: str = "auto", sm_budget: int = 0
) -> None:
    op = "scatter_blocks"
    dst, rows = checks.check_scatter_blocks(buffer, block_ids, pools, executor, sm_budget)
    _check_servable(op, executor)
    pairs = pairs_of_ids(op, block_ids, dst, ids_are_sources=False)
    offsets = _page_offsets(dst)
    runs = [whole_page(0, t, offsets[t], 0, pool.page_bytes) for t, pool in enumerate(dst)]
    check_bytes_touched(op, "block_ids", "pools", (rows,), dst, runs, pairs)
    _copy_pairs(_Written(op, "pools", True, pools), (rows,), dst, runs, pairs)


def copy_pages(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    mapping: Tensor,
    runs: Tensor,
    src_subblocks_per_block: int = 1,
    dst_subblocks_per_block: int = 1,
    skip_negative: bool = False,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    subblocks = src_subblocks_per_block, dst_subblocks_per_block
    _copy_pages("copy_pages", src, dst, mapping, runs, subblocks, skip_negative, executor, sm_budget)


def _copy_pages(
    op: str, src: Sequence[Tensor], dst: Sequence[Tensor], mapping: Tensor, runs: Tensor, subblocks: tuple[int, int],
    skip_negative: bool, executor: str, sm_budget: int,
) -> None:  # fmt: skip
    src_pools, dst_pools = checks.check_copy_pages(src, dst, mapping, runs, *subblocks, executor, sm_budget, op)
    _check_servable(op, executor)
    plan = parse_runs(runs)
    check_runs(op, plan, src_pools, dst_pools, *subblocks)
    pairs = pairs_of_mapping(op, "mapping", mapping, src_pools, dst_pools, *subblocks, skip_negative)
    check_bytes_touched(op, "mapping", "dst", src_pools, dst_pools, plan, pairs, *subblocks)
    _copy_pairs(_Written(op, "dst", True, dst), src_pools, dst_pools, plan, pairs, *subblocks)


class PreparedCopy:
    """All of a call of copy_pages but its mapping, checked; the tensors must stay where they are."""

    def __init__(
        self, src: Sequence[Tensor], dst: Sequence[Tensor], runs: Tensor, src_subblocks_per_block: int,
        dst_subblocks_per_block: int, skip_negative: bool, executor: str, sm_budget: int,
    ) -> None:  # fmt: skip
        subblocks = src_subblocks_per_block, dst_subblocks_per_block
        pools = checks.check_copy_pages(src, dst, None, runs, *subblocks, executor, sm_budget, "prepare")
        _check_servable("prepare", executor)
        check_runs("prepare", parse_runs(runs), *pools, *subblocks)
        self._sides = {"dst": list(dst), "src": list(src)}
        self._memory = {name: [_memory_of(t) for t in side] for name, side in self._sides.items()}
        self._rest = (runs.clone(), subblocks, skip_negative, executor, sm_budget)

    def run(self, mapping: Tensor) -> None:
        op = "PreparedCopy.run"
        for name, side in self._sides.items():
            for i, tensor in enumerate(side):
                if _memory_of(tensor) != self._memory[name][i]:
                    raise ValueError(
                        f"{op}: {name}[{i}] must be in the memory that it had when the copy was prepared, got a "
                        "storage that was resized, freed or moved since; bind the pools again"
                    )
        _copy_pages(op, self._sides["src"], self._sides["dst"], mapping, *self._rest)


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.untyped_storage().nbytes()


def copy_pages_checked(
    src: Sequence[Tensor],
    dst: Sequence[Tensor],
    mapping: Tensor,
    runs: Tensor,
    src_subblocks_per_block: int,
    dst_subblocks_per_block: int,
    skip_negative: bool,
) -> None:
    """The move alone: the compiled library has checked, and an error that crossed it would lose its type."""
    op = "copy_pages"
    subblocks = src_subblocks_per_block, dst_subblocks_per_block
    src_pools, dst_pools = checks.pools_of(op, "src", src), checks.pools_of(op, "dst", dst)
    plan = parse_runs(runs)
    ids = host_ids(mapping)
    pairs = torch.unique(ids[(ids >= 0).all(1)] if skip_negative else ids, dim=0)
    _move(_bind_all(src_pools, dst_pools, plan, pairs, *subblocks), pairs)


def swap_blocks_batch(
    src_ptrs: Tensor,
    dst_ptrs: Tensor,
    sizes: Tensor,
    is_src_access_order_any: bool = False,
    executor: str = "auto",
    sm_budget: int = 0,
) -> None:
    op = "swap_blocks_batch"
    checks.check_swap_blocks_batch(src_ptrs, dst_ptrs, sizes, executor, sm_budget)
    _check_servable(op, executor)
    triples = _host_triples(op, src_ptrs, dst_ptrs, sizes)
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"{op}: src_ptrs and dst_ptrs must be told apart as host or device addresses, got no compiled library "
            "to ask the CUDA driver with; kvkernels.info() says why"
        )
    record = ledger.Record(
        op=op,
        executor="reference",
        reason=NO_LIBRARY,
        direction="h2h",
        descriptors=len(triples),
        bytes=int(triples[:, 2].sum()),
        pairs=len(triples),
        moves=1,
    )
    if ledger.explains(record):
        return
    swap_blocks_batch_checked(triples)
    ledger.count(record.descriptors, record.bytes)


def swap_blocks_batch_checked(copies: Tensor) -> None:
    """The move alone: the compiled library has checked, and an error that crossed it would lose its type."""
    for src, dst, size in copies.tolist():
        ctypes.memmove(dst & _ADDRESS_MASK, src & _ADDRESS_MASK, size)


def _host_triples(op: str, src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor) -> Tensor:
    """The copies to make, int64 ``[n, 3]`` with addresses as their bits, after the checks on their values."""
    src, dst, size = src_ptrs.detach().view(torch.int64), dst_ptrs.detach().view(torch.int64), host_ids(sizes)
    _raise_at_first(size < 0, lambda i: f"{op}: sizes[{i}] must not be negative, got {int(size[i])}")
    for name, ptrs in (("src_ptrs", src), ("dst_ptrs", dst)):
        _check_addresses(op, name, ptrs, size)
    rows = (size > 0).nonzero().flatten()
    triples = torch.stack((src, dst, size), 1)[rows]
    first = _first_occurrences(triples)
    _check_ranges_disjoint(op, triples[first], rows[first])
    return triples[first]


def _raise_at_first(bad: Tensor, message: Callable[[int], str]) -> None:
    rows = bad.nonzero()
    if rows.numel():
        raise ValueError(message(int(rows[0])))


def _check_addresses(op: str, name: str, ptrs: Tensor, size: Tensor) -> None:
    _raise_at_first((ptrs == 0) & (size > 0), lambda i: f"{op}: {name}[{i}] must not be null, got 0")
    # An address of 2^63 or more is negative here, and its end wraps past 2^64 where it comes back to 0 or more.
    _raise_at_first(
        (ptrs < 0) & (ptrs + size >= 0),
        lambda i: f"{op}: {name}[{i}] + sizes[{i}] must fit in the address space, got an overflow",
    )


def _check_ranges_disjoint(op: str, triples: Tensor, rows: Tensor) -> None:
    # Flipping the sign bit makes signed comparison order addresses as unsigned numbers.
    reads, writes = (
        Intervals(start, start + triples[:, 2], torch.zeros_like(rows), rows)
        for start in (triples[:, 0] ^ _SIGN_BIT, triples[:, 1] ^ _SIGN_BIT)
    )
    writes = writes.sorted()
    shared = writes.first_neighbours_sharing()
    if shared is not None:
        a, b = sorted(int(writes.rows[i]) for i in shared)
        raise ValueError(f"{op}: dst_ptrs must name each destination once, got rows {a} and {b} sharing bytes")
    hit = first_read_of_written(writes, reads)
    if hit is not None:
        raise ValueError(
            f"{op}: dst_ptrs must not write what src_ptrs read, got rows {int(writes.rows[hit[0]])} and "
            f"{int(reads.rows[hit[1]])} sharing bytes"
        )


def _first_occurrences(rows: Tensor) -> Tensor:
    """Positions of the first of each set of equal rows, ascending."""
    if rows.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((unique.shape[0],), rows.shape[0], device="cpu")
    first.scatter_reduce_(0, inverse, torch.arange(rows.shape[0], device="cpu"), "amin")
    return first.sort().values


def _as_words(t: Tensor) -> Tensor:
    """The same bytes as integers, one an element (two for 16-byte ones): no dtype is interpreted, NaNs keep theirs."""
    size = t.element_size()
    words_per_element = max(1, size // 8)
    words = torch.empty(0, dtype=_WORDS[size // words_per_element], device=t.device)
    return words.set_(
        t.untyped_storage(),
        t.storage_offset() * words_per_element,
        (*t.shape, words_per_element),
        (*(stride * words_per_element for stride in t.stride()), 1),
    )


def _copy_tensors(written: _Written, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """(source, destination) copies of equal shapes."""
    copies = [(src, dst) for src, dst in copies if src.numel()]
    total_bytes = sum(src.numel() * src.element_size() for src, _ in copies)
    direction = _direction(*copies[0]) if copies else "h2h"
    n = len(copies)
    record = ledger.Record(written.op, "reference", NO_LIBRARY, direction, n, total_bytes, pairs=n, moves=n)

    def move() -> tuple[int, int]:
        _move_tensors(copies)
        return n, total_bytes

    written.carry_out(record, move)


def _move_tensors(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    for src, dst in copies:
        _as_words(dst).copy_(_as_words(src))


def _parts_along(t: Tensor, dim: int, shards: Sequence[Tensor]) -> list[Tensor]:
    """``t`` cut along ``dim`` into parts of the shards' sizes."""
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + shard.shape[dim])
    return [t.narrow(dim, start, shard.shape[dim]) for start, shard in zip(starts, shards, strict=False)]


def concat_tp_shards(shards: Sequence[Tensor], dim: int, executor: str = "auto", sm_budget: int = 0) -> Tensor:
    op = "concat_tp_shards"
    dim, shape = checks.check_concat_tp_shards(shards, dim, executor, sm_budget)
    _check_servable(op, executor)
    out = torch.empty(shape, dtype=shards[0].dtype, device=shards[0].device)
    parts = _parts_along(out, dim, shards)
    _copy_tensors(_Written(op, "out", False, (out,)), list(zip(shards, parts, strict=True)))
    return out


def concat_tp_shards_out(
    shards: Sequence[Tensor], dim: int, out: Tensor, executor: str = "auto", sm_budget: int = 0
) -> None:
    op = "concat_tp_shards_out"
    dim = checks.check_concat_tp_shards_out(shards, dim, out, executor, sm_budget)
    _check_servable(op, executor)
    _check_tensors_apart(op, (out,), shards)
    parts = _parts_along(out, dim, shards)
    _copy_tensors(_Written(op, "out", False, (out,)), list(zip(shards, parts, strict=True)))


def concat_tp_shards_checked(shards: Sequence[Tensor], dim: int, out: Tensor) -> None:
    """The move alone: the compiled library has checked, and an error that crossed it would lose its type."""
    _move_tensors(zip(shards, _parts_along(out, dim, shards), strict=True))


def split_tp_shards(input: Tensor, dim: int, out: Sequence[Tensor], executor: str = "auto", sm_budget: int = 0) -> None:
    op = "split_tp_shards"
    dim = checks.check_split_tp_shards(input, dim, out, executor, sm_budget)
    _check_servable(op, executor)
    _check_tensors_apart(op, out, (input,))
    parts = _parts_along(input, dim, out)
    _copy_tensors(_Written(op, "out", True, out), list(zip(parts, out, strict=True)))


def split_tp_shards_checked(input: Tensor, dim: int, out: Sequence[Tensor]) -> None:
    """The move alone: the compiled library has checked, and an error that crossed it would lose its type."""
    _move_tensors(zip(_parts_along(input, dim, out), out, strict=True))


def _check_tensors_apart(op: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """No byte written twice, or both read and written."""
    for t in written:
        if shares_bytes_with_itself(t):
            raise ValueError(checks.self_overlap_text(op, t))
    shared = first_tensors_sharing(written, read)
    if shared is None:
        return
    kind, i, j = shared
    if kind == "written":
        raise ValueError(f"{op}: out must not overlap where they are written, got out[{i}] and out[{j}] sharing bytes")
    raise ValueError(f"{op}: out must not write what it reads, got destination 0 overlapping source 0")
