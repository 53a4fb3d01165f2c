"""swap_blocks_batch: raw addresses on the host, every byte against a loop of slices, guard bytes and overlaps."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from cases import addresses_are_the_hosts, assert_issued, examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvkernels
from kvkernels import reference

DOORS = {
    "torch.ops": torch.ops.kvkernels.swap_blocks_batch,
    "cpu": partial(torch.ops.kvkernels.swap_blocks_batch, executor="cpu"),
    "reference, named": partial(torch.ops.kvkernels.swap_blocks_batch, executor="reference"),
    "reference": addresses_are_the_hosts()(reference.swap_blocks_batch),
}
Row = tuple[int, int, int]  # source offset, destination offset, bytes


def memory(size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))


def column(values: list[int], dtype: torch.dtype = torch.int64, step: int = 1) -> Tensor:
    t = torch.zeros(len(values), step, dtype=dtype)
    # Addresses fit in int64; uint64 has few operators of its own.
    t.view(torch.int64 if dtype == torch.uint64 else dtype)[:, 0] = torch.tensor(values, dtype=torch.int64)
    return t[:, 0]


def columns(src: Tensor, dst: Tensor, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        column([src.data_ptr() + row[0] for row in rows]),
        column([dst.data_ptr() + row[1] for row in rows]),
        column([row[2] for row in rows]),
    )


def expected(src: Tensor, dst: Tensor, rows: list[Row]) -> Tensor:
    out = dst.clone()
    for at, to, size in rows:
        out[to : to + size] = src[at : at + size]
    return out


@st.composite
def layouts(draw: st.DrawFn) -> list[Row]:
    """Destinations one after the other with gaps, in random order; sources anywhere, often where the last one ended."""
    rows: list[Row] = []
    to = draw(st.integers(0, 17))
    at = 0
    for _ in range(draw(st.integers(0, 25))):
        size = draw(st.one_of(st.integers(0, 40), st.integers(0, 5000)))
        if draw(st.booleans()):
            at = draw(st.integers(0, 3000))
        rows.append((at, to, size))
        at = (at + size) % 3000
        to += size + draw(st.sampled_from([0, 0, 1, 3, 64]))
    rows += draw(st.lists(st.sampled_from(rows), max_size=3)) if rows else []
    return draw(st.permutations(rows))


@examples(300)
@given(
    layouts(),
    st.sampled_from([torch.int64, torch.uint64]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(1, 3),
)
def test_random_fragments(rows: list[Row], pointers: torch.dtype, sizes: torch.dtype, step: int) -> None:
    src = memory(8200)
    dst = memory(200 + max((to + size for _, to, size in rows), default=0))
    source, wanted = src.clone(), expected(src, dst, rows)
    for call in DOORS.values():
        out = dst.clone()
        call(
            column([src.data_ptr() + row[0] for row in rows], pointers, step),
            column([out.data_ptr() + row[1] for row in rows], pointers, step),
            column([row[2] for row in rows], sizes, step),
        )
        assert torch.equal(out, wanted)
        assert torch.equal(src, source)


@pytest.mark.parametrize("executor", ["auto", "cpu", "reference"])
def test_what_is_explained_is_issued(executor: str) -> None:
    src, dst = memory(4096), memory(4096)
    rows = [(100, 200, 64), (164, 264, 64), (3000, 0, 7), (3000, 0, 7), (5, 5, 0)]
    wanted = expected(src, dst, rows)
    explained = kvkernels.explain("swap_blocks_batch", *columns(src, dst, rows), executor=executor)
    assert explained.executor == ("cpu" if executor == "auto" else executor)
    assert (explained.pairs, explained.bytes) == (3, 135)
    kvkernels.reset_counters()
    kvkernels.swap_blocks_batch(*columns(src, dst, rows), executor=executor, sm_budget=3)
    assert_issued(explained)
    assert torch.equal(dst, wanted)


@pytest.mark.parametrize("executor", ["kernel", "bulk", "dma", "staged", "triton"])
def test_executors_that_do_not_serve_the_hosts_addresses(executor: str) -> None:
    why = "it takes tensors, and got addresses"
    if executor not in ("staged", "triton"):
        why = "it needs a tensor on a cuda device"
    src, dst = memory(64), memory(64)
    before = dst.clone()
    with pytest.raises(ValueError) as raised:
        kvkernels.swap_blocks_batch(*columns(src, dst, [(0, 1, 8)]), executor=executor)
    assert str(raised.value) == f"swap_blocks_batch: executor '{executor}' cannot serve this call: {why}"
    assert torch.equal(dst, before)


KINDS = {"pageable": lambda t: t, "pinned": Tensor.pin_memory, "device": Tensor.cuda}


@pytest.mark.cuda
@pytest.mark.parametrize("kinds", [(s, d) for s in KINDS for d in KINDS if "device" in (s, d)], ids="-to-".join)
def test_random_fragments_on_a_device(kinds: tuple[str, str]) -> None:
    """Alone, and with as many between two places on the host in the same call."""
    place_src, place_dst = (KINDS[kind] for kind in kinds)

    @examples(60)
    @given(layouts(), layouts(), st.booleans(), st.booleans())
    def run(rows: list[Row], host_rows: list[Row], any_order: bool, on_own_stream: bool) -> None:
        host_src, src = memory(8300), place_src(memory(8200))
        host_dst, dst = memory(130_000), place_dst(memory(130_001))
        wanted, host_wanted = expected(src.cpu(), dst.cpu(), rows), expected(host_src, host_dst, host_rows)
        device, host = columns(src, dst, rows), columns(host_src, host_dst, host_rows)
        with torch.cuda.stream(torch.cuda.Stream() if on_own_stream else None):
            torch.cuda.synchronize()
            torch.ops.kvkernels.swap_blocks_batch(*map(torch.cat, zip(device, host, strict=True)), any_order)
            torch.cuda.synchronize()
        assert torch.equal(dst.cpu(), wanted)
        assert torch.equal(host_dst, host_wanted)

    run()


@st.composite
def few_sizes(draw: st.DrawFn, sizes: st.SearchStrategy[int], step: int) -> list[Row]:
    """Destinations as in ``layouts``, of at most eight sizes, at multiples of ``step``; neighbours often join."""
    chosen = draw(st.lists(sizes, min_size=1, max_size=8))
    rows: list[Row] = []
    at = to = 0
    for size in draw(st.lists(st.sampled_from(chosen), max_size=40)):
        if draw(st.booleans()):
            at = draw(st.integers(0, 8000 // step)) * step
        rows.append((at, to, size))
        at = (at + size + step - 1) // step * step % (8000 // step * step)
        to += (size + step - 1) // step * step + draw(st.sampled_from([0, 0, step, 4 * step]))
    return draw(st.permutations(rows))


@pytest.mark.cuda
@pytest.mark.parametrize("executor", ["kernel", "bulk", "dma"])
@pytest.mark.parametrize("kinds", ["pinned-to-device", "device-to-pinned", "device-to-device"])
def test_executors_on_a_device(executor: str, kinds: str) -> None:
    """By name, with several sizes in one call: what was predicted, by the executor named, and every byte."""
    place_src, place_dst = (KINDS[kind] for kind in kinds.split("-to-"))
    least = 512 if executor == "bulk" else 1

    @examples(40)
    @given(
        st.sampled_from([1, 8, 16]).flatmap(lambda step: few_sizes(st.integers(least, 3000), step)),
        st.integers(0, 4),
        st.booleans(),
    )
    def run(rows: list[Row], sm_budget: int, on_own_stream: bool) -> None:
        src, dst = place_src(memory(11_100)), place_dst(memory(160_000))
        wanted = expected(src.cpu(), dst.cpu(), rows)
        arguments = columns(src, dst, rows)
        with torch.cuda.stream(torch.cuda.Stream() if on_own_stream else None):
            torch.cuda.synchronize()
            explained = kvkernels.explain("swap_blocks_batch", *arguments, executor=executor, sm_budget=sm_budget)
            kvkernels.reset_counters()
            kvkernels.swap_blocks_batch(*arguments, executor=executor, sm_budget=sm_budget)
            torch.cuda.synchronize()
        assert explained.executor == executor
        assert_issued(explained)
        assert torch.equal(dst.cpu(), wanted)
        if rows and executor != "dma":
            assert explained.launches == explained.moves <= len({size for _, _, size in rows})
            assert sm_budget == 0 or explained.device["ctas"] <= sm_budget

    run()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 129, 4095, 4097, 70_001])
@pytest.mark.parametrize("src_shift", [0, 1, 8])
@pytest.mark.parametrize("dst_shift", [0, 3, 16])
def test_sizes_and_alignments(size: int, src_shift: int, dst_shift: int) -> None:
    src, dst = memory(size + 64), memory(size + 65)
    rows = [(src_shift, dst_shift + 1, size)]
    wanted = expected(src, dst, rows)
    torch.ops.kvkernels.swap_blocks_batch(*columns(src, dst, rows))
    assert torch.equal(dst, wanted)


def test_null_addresses_are_fine_where_nothing_is_copied() -> None:
    before = kvkernels.counters()
    for call in DOORS.values():
        call(column([0, 0]), column([0, 1]), column([0, 0]))
        call(column([]), column([]), column([]))
    assert kvkernels.counters() == before


def test_memory_within_one_tensor() -> None:
    t = memory(100)
    wanted = t.clone()
    wanted[50:60], wanted[60:65] = t[0:10].clone(), t[10:15].clone()
    for call in DOORS.values():
        out = t.clone()
        call(*columns(out, out, [(0, 50, 10), (10, 60, 5)]))
        assert torch.equal(out, wanted)


# Rows are named as the caller counts them, also after rows of no bytes and repeated ones.
REFUSED = [
    ([(0, 10, 4), (0, 14, 4), (20, 13, 2)], "must name each destination once, got rows 0 and 2 sharing bytes"),
    (
        [(9, 3, 0), (0, 10, 4), (0, 10, 4), (20, 11, 2)],
        "must name each destination once, got rows 1 and 3 sharing bytes",
    ),
    ([(0, 10, 4), (1, 10, 4)], "must name each destination once, got rows 0 and 1 sharing bytes"),
    ([(0, 10, 4), (0, 10, 5)], "must name each destination once, got rows 0 and 1 sharing bytes"),
]


@pytest.mark.parametrize("rows,text", REFUSED)
def test_destinations_that_meet(rows: list[Row], text: str) -> None:
    src, dst = memory(64), memory(64)
    for call in DOORS.values():
        before = dst.clone()
        with pytest.raises(ValueError) as raised:
            call(*columns(src, dst, rows))
        assert str(raised.value) == f"swap_blocks_batch: dst_ptrs {text}"
        assert torch.equal(dst, before)


@pytest.mark.parametrize(
    "rows,writer,reader",
    [
        ([(0, 40, 8), (47, 60, 4)], 0, 1),
        ([(0, 40, 8), (39, 60, 2)], 0, 1),
        ([(5, 5, 8)], 0, 0),
        ([(0, 30, 0), (0, 4, 8)], 1, 1),
        ([(0, 30, 0), (20, 40, 8), (20, 40, 8), (44, 50, 2)], 1, 3),
    ],
)
def test_a_byte_both_read_and_written(rows: list[Row], writer: int, reader: int) -> None:
    t = memory(100)
    for call in DOORS.values():
        before = t.clone()
        with pytest.raises(ValueError) as raised:
            call(*columns(t, t, rows))
        text = f"must not write what src_ptrs read, got rows {writer} and {reader} sharing bytes"
        assert str(raised.value) == f"swap_blocks_batch: dst_ptrs {text}"
        assert torch.equal(t, before)


def test_ranges_that_only_touch_are_fine() -> None:
    t = memory(100)
    rows = [(0, 40, 8), (48, 32, 8), (24, 56, 8)]
    wanted = expected(t, t, rows)
    torch.ops.kvkernels.swap_blocks_batch(*columns(t, t, rows))
    assert torch.equal(t, wanted)


@examples(150)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 12)), max_size=8))
def test_random_overlaps_are_refused_or_copied(rows: list[Row]) -> None:
    t = memory(80)
    wanted, refused = t.clone(), False
    written: dict[int, Row] = {}
    for row in rows:
        at, to, size = row
        refused |= any(written.get(byte, row) != row for byte in range(to, to + size))
        written.update((byte, row) for byte in range(to, to + size))
        wanted[to : to + size] = t[at : at + size]
    refused |= any(byte in written for at, _, size in rows for byte in range(at, at + size))
    for call in DOORS.values():
        out = t.clone()
        if refused:
            with pytest.raises(ValueError, match="sharing bytes"):
                call(*columns(out, out, rows))
            assert torch.equal(out, t)
        else:
            call(*columns(out, out, rows))
            assert torch.equal(out, wanted)


def test_neighbours_become_one_descriptor() -> None:
    src, dst = memory(4096), memory(4096)
    neighbours = [(8 * i, 16 + 8 * i, 8) for i in range(100)]
    explained = kvkernels.explain("swap_blocks_batch", *columns(src, dst, neighbours))
    assert (explained.descriptors, explained.pairs, explained.bytes) == (1, 100, 800)
    assert explained.executor == "cpu" and explained.direction == "h2h"
    apart = [(16 * i, 16 + 8 * i, 8) for i in range(100)]
    assert kvkernels.explain("swap_blocks_batch", *columns(src, dst, apart)).descriptors == 100
    kvkernels.reset_counters()
    torch.ops.kvkernels.swap_blocks_batch(*columns(src, dst, neighbours + neighbours[:5]))
    counted = kvkernels.counters()["cpu"]
    assert (counted["calls"], counted["descriptors"], counted["bytes"]) == (1, 1, 800)


def test_a_hundred_thousand_rows() -> None:
    n = 100_000
    src, dst = memory(n * 24), torch.zeros(n * 24, dtype=torch.uint8)
    order = torch.randperm(n)
    starts, ends = src.data_ptr() + 24 * order, dst.data_ptr() + 24 * torch.arange(n)
    torch.ops.kvkernels.swap_blocks_batch(starts, ends, torch.full((n,), 23, dtype=torch.int32))
    rows = dst.view(n, 24)
    assert torch.equal(rows[:, :23], src.view(n, 24)[order][:, :23])
    assert not rows[:, 23].any()
    ends[n // 2] += 22
    before = dst.clone()
    with pytest.raises(ValueError, match=f"got rows {n // 2} and {n // 2 + 1} sharing bytes"):
        torch.ops.kvkernels.swap_blocks_batch(starts, ends, torch.full((n,), 23))
    assert torch.equal(dst, before)


@pytest.mark.parametrize(
    "sizes", [[9 << 20], [5 << 20, 1, 4 << 20, 3], [(64 << 10) + 13] * 150], ids=["one", "few", "many"]
)
def test_lanes_share_the_work(sizes: list[int], threads: int) -> None:
    total = sum(sizes)
    src = memory(1 << 20).repeat(total // (1 << 20) + 2)[: total + 99]
    src[::4099] ^= torch.arange(src[::4099].numel()).to(torch.uint8)
    dst = torch.full((total + 2 * len(sizes) + 99,), 0xA5, dtype=torch.uint8)
    rows, at, to = [], 7, 5
    for size in sizes:
        rows.append((at, to, size))
        at, to = at + size, to + size + 2
    wanted = expected(src, dst, rows)
    explained = kvkernels.explain("swap_blocks_batch", *columns(src, dst, rows))
    assert explained.lanes == threads
    kvkernels.reset_counters()
    torch.ops.kvkernels.swap_blocks_batch(*columns(src, dst, rows))
    assert torch.equal(dst, wanted)
    counted = kvkernels.counters()["cpu"]
    assert (counted["descriptors"], counted["bytes"]) == (explained.descriptors, total) == (len(sizes), total)


def test_a_compiled_graph_keeps_the_call(fresh_compiler: None) -> None:
    src, dst = memory(64), torch.zeros(64, dtype=torch.uint8)
    addresses = columns(src, dst, [(3, 10, 20), (40, 41, 5)])

    def step(src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor) -> Tensor:
        torch.ops.kvkernels.swap_blocks_batch(src_ptrs, dst_ptrs, sizes)
        return sizes + 1

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        dst.zero_()
        assert torch.equal(compiled(*addresses), addresses[2] + 1)
        assert torch.equal(dst, expected(src, torch.zeros(64, dtype=torch.uint8), [(3, 10, 20), (40, 41, 5)]))


def test_the_tensors_of_addresses_are_only_read() -> None:
    src, dst = memory(64), memory(64)
    addresses = columns(src, dst, [(3, 10, 20)])
    copies = [t.clone() for t in addresses]
    torch.ops.kvkernels.swap_blocks_batch(*addresses, is_src_access_order_any=True)
    assert all(map(torch.equal, addresses, copies))
