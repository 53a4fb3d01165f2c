"""What a refused call says, through torch.ops, explain and the reference alike, and that it leaves every byte alone.

test_errors.py has the catalogue, one case an entry. Here every tensor argument of every op is spoilt in every way, and
values are driven to the ends of int64.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plans import run_row, runs_tensor
from refusals import (
    DOORS,
    EVERY_TENSOR,
    I64_MAX,
    I64_MIN,
    RUN,
    VALID,
    Arguments,
    Path,
    batch_arguments,
    bytes_of,
    copy_arguments,
    get,
    name_of,
    noise,
    outcome,
    put,
    refused,
    swap_arguments,
    without_memory,
)

import kvkernels

RUN_COLUMNS = (
    "src_pool", "dst_pool", "src_offset", "dst_offset", "fragment_bytes", "src_subblock_stride", "dst_subblock_stride",
    "extent 0", "src_stride 0", "dst_stride 0", "extent 1", "src_stride 1", "dst_stride 1", "extent 2", "src_stride 2",
    "dst_stride 2",
)  # fmt: skip


def case_id(value: Any) -> str | None:
    return name_of(value) if isinstance(value, tuple) else None


@pytest.mark.parametrize("op", VALID)
def test_the_calls_that_are_spoilt_here_are_valid_and_write(op: str) -> None:
    for door in ("torch.ops", "reference"):
        arguments = VALID[op]()
        before = bytes_of(arguments)
        result = DOORS[door](op, without_memory(arguments))
        assert result is not None or bytes_of(arguments) != before


@pytest.mark.parametrize("op,path", EVERY_TENSOR, ids=case_id)
def test_meta(op: str, path: Path) -> None:
    text = f"{name_of(path)} must be on the cpu or a cuda device, got meta"
    if path[0] == "runs":
        text = "runs must be int64 of shape [r, 16] on the cpu, got int64 of shape [2, 16] on meta"
    refused(op, lambda a: put(a, path, get(a, path).to("meta")), ValueError, text)


@pytest.mark.parametrize("op,path", EVERY_TENSOR, ids=case_id)
def test_sparse(op: str, path: Path) -> None:
    text = f"{name_of(path)} must be a strided tensor, got layout torch.sparse_coo"
    refused(op, lambda a: put(a, path, get(a, path).to_sparse()), ValueError, text)


@pytest.mark.parametrize("op,path", EVERY_TENSOR, ids=case_id)
def test_freed_storage(op: str, path: Path) -> None:
    t = get(VALID[op](), path)
    text = (
        f"{name_of(path)} must lie inside its storage, got shape {list(t.shape)} and strides {list(t.stride())} "
        "on a smaller storage"
    )
    refused(op, lambda a: get(a, path).untyped_storage().resize_(0), ValueError, text)


IDS = [
    ("swap_blocks", "block_mapping", 2),
    ("gather_blocks", "block_ids", 1),
    ("scatter_blocks", "block_ids", 1),
    ("copy_pages", "mapping", 2),
]
ALL_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dtypes_of_ids(dtype: torch.dtype) -> None:
    if dtype in (torch.int32, torch.int64):
        return
    named = str(dtype).removeprefix("torch.")
    for op, argument, columns in IDS:
        empty = torch.empty(0, dtype=dtype) if columns == 1 else torch.empty(0, columns, dtype=dtype)
        text = f"{argument} must be int64 or int32, got {named}"
        refused(op, lambda a, argument=argument, empty=empty: put(a, (argument, None), empty), ValueError, text)


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (3, 3), (1, 3, 2), (2, 3)], ids=str)
def test_shapes_of_ids(shape: tuple[int, ...]) -> None:
    for op, argument, columns in IDS:
        if (columns == 1 and len(shape) == 1) or (columns == 2 and len(shape) == 2 and shape[1] == 2):
            continue
        text = f"{argument} must have shape {'[n]' if columns == 1 else '[n, 2]'}, got {list(shape)}"
        for dtype in (torch.int32, torch.int64):
            zeros = torch.zeros(shape, dtype=dtype)
            refused(op, lambda a, argument=argument, zeros=zeros: put(a, (argument, None), zeros), ValueError, text)


# Pools with the fewest blocks, the first of them, are what an error names.
LIMITS = [
    ("swap_blocks", "block_mapping", 0, "src with 6 blocks", 6),
    ("swap_blocks", "block_mapping", 1, "dst with 6 blocks", 6),
    ("gather_blocks", "block_ids", None, "pools[1] with 5 blocks", 5),
    ("scatter_blocks", "block_ids", None, "pools[1] with 5 blocks", 5),
    ("copy_pages", "mapping", 0, "src[0] with 6 blocks", 6),
    ("copy_pages", "mapping", 1, "dst[0] with 6 blocks", 6),
]


@pytest.mark.parametrize("op,argument,column,pool,blocks", LIMITS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_ids_out_of_range(
    op: str, argument: str, column: int | None, pool: str, blocks: int, dtype: torch.dtype, row: int
) -> None:
    info = torch.iinfo(dtype)
    for bad in (-1, blocks, blocks + 1, info.max, info.min):

        def spoil(a: Arguments, bad: int = bad) -> None:
            ids = a[argument].to(dtype)
            ids[row if column is None else (row, column)] = bad
            a[argument] = ids

        where = f"{argument}[{row}]" if column is None else f"{argument}[{row}, {column}]"
        refused(op, spoil, IndexError, f"{where} = {bad} is out of range for {pool}")


def test_ids_are_read_by_their_strides() -> None:
    wide = torch.full((6, 5), 99)
    wide[::2, 1::3] = torch.tensor([[0, 1], [5, 2], [7, 0]])
    text = "block_mapping[2, 0] = 7 is out of range for src with 6 blocks"
    refused("swap_blocks", lambda a: put(a, ("block_mapping", None), wide[::2, 1::3]), IndexError, text)
    backwards = torch.tensor([0, 9, 1]).flip(0)[None].expand(2, 3)[0]
    text = "block_ids[1] = 9 is out of range for pools[1] with 5 blocks"
    refused("gather_blocks", lambda a: put(a, ("block_ids", None), backwards), IndexError, text)


@pytest.mark.parametrize("op", VALID)
def test_executor_and_sm_budget(op: str) -> None:
    for name in ("", "foo", "CPU", "auto ", "é"):
        known = "'auto', 'cpu', 'kernel', 'bulk', 'dma', 'staged', 'triton', 'reference'"
        text = f"executor must be one of {known}, got '{name}'"
        refused(op, lambda a, name=name: a.update(executor=name), ValueError, text)
    for budget in (-1, I64_MIN):
        text = f"sm_budget must not be negative, got {budget}"
        refused(op, lambda a, budget=budget: a.update(sm_budget=budget), ValueError, text)


@pytest.mark.parametrize("op", VALID)
@pytest.mark.parametrize("executor", ["kernel", "bulk", "dma", "staged"])
def test_an_executor_that_cannot_serve_raises_and_none_else_runs(op: str, executor: str) -> None:
    for door in ("torch.ops", "explain"):
        arguments = VALID[op]()
        before = kvkernels.counters()
        error, text = outcome(door, op, {**arguments, "executor": executor})
        assert error is ValueError
        assert re.match(rf"{op}: executor '{executor}' cannot serve this call: \w", text)
        assert kvkernels.counters() == before


LISTS = [("gather_blocks", "pools"), ("scatter_blocks", "pools"), ("copy_pages", "src"), ("copy_pages", "dst"),
         ("concat_tp_shards", "shards"), ("concat_tp_shards_out", "shards"), ("split_tp_shards", "out")]  # fmt: skip


@pytest.mark.parametrize("op,name", LISTS)
def test_empty_lists(op: str, name: str) -> None:
    refused(op, lambda a: a.update({name: []}), ValueError, f"{name} must not be empty")


POOLS = [(op, path) for op, path in EVERY_TENSOR if path[0] in ("pools", "out", "buffer", "src", "dst")
         and op in ("gather_blocks", "scatter_blocks", "copy_pages")]  # fmt: skip


@pytest.mark.parametrize("op,path", POOLS, ids=case_id)
def test_pools(op: str, path: Path) -> None:
    name = name_of(path)
    blocks, page = get(VALID[op](), path).shape
    is_buffer = path[0] in ("out", "buffer")
    too_close = f"must have a row stride of at least its page of {page} bytes, got"
    spoilt = [
        (noise(page, blocks).t(), f"must have contiguous rows, got shape [{blocks}, {page}] and strides [1, {blocks}]"),
        (noise(200).as_strided((blocks, page), (page - 1, 1)), f"{too_close} {page - 1} bytes"),
        (noise(1, page).expand(blocks, page), f"{too_close} 0 bytes"),
    ]  # fmt: skip
    if not is_buffer:
        spoilt += [
            (noise(1)[0], "must have at least one dimension, got shape []"),
            (noise(blocks, 0), f"must have pages of at least one byte, got shape [{blocks}, 0]"),
        ]
    for t, text in spoilt:
        refused(op, lambda a, t=t: put(a, path, t), ValueError, f"{name} {text}")


def test_pools_without_blocks_may_claim_any_page() -> None:
    """The sizes of a tensor without elements come to more than int64 holds."""
    huge = torch.empty((0, 1 << 62), dtype=torch.uint8)
    for count in (2, 4):
        with pytest.raises(ValueError, match=r"^gather_blocks: out must be uint8 of shape \[0, \d+\], got uint8 of "):
            torch.ops.kvkernels.gather_blocks([huge] * count, torch.empty(0, dtype=torch.int64), noise(0, 5))
    with pytest.raises(ValueError, match=r"^concat_tp_shards_out: out must have shape \[0, \d+\], got \[0, 0\]"):
        torch.ops.kvkernels.concat_tp_shards_out([huge] * 4, 1, noise(0, 0))


def test_a_single_block_has_no_row_stride() -> None:
    """Its stride of dimension 0 says nothing, as torch's own is_contiguous has it."""
    for stride in (0, 3, 100):
        one = noise(200).as_strided((1, 8), (stride, 1))
        expected = one.clone()
        out = noise(2, 8)
        torch.ops.kvkernels.gather_blocks([one], torch.tensor([0, 0]), out)
        assert torch.equal(out, expected.expand(2, 8))
        torch.ops.kvkernels.swap_blocks(one, out, 8, torch.tensor([[0, 1]]))


@pytest.mark.parametrize("size", [0, -1, I64_MIN])
def test_block_size(size: int) -> None:
    text = f"block_size_in_bytes must be positive, got {size}"
    refused("swap_blocks", lambda a: a.update(block_size_in_bytes=size), ValueError, text)


def test_block_size_that_does_not_divide() -> None:
    for size in (5, 7, 96, I64_MAX):
        text = f"src must hold a whole number of blocks of {size} bytes, got 48 bytes"
        refused("swap_blocks", lambda a, size=size: a.update(block_size_in_bytes=size), ValueError, text)


@pytest.mark.parametrize("column", range(16), ids=RUN_COLUMNS)
@pytest.mark.parametrize("value", [I64_MIN, I64_MIN + 1, -1, 1 << 31, 1 << 32, 1 << 62, I64_MAX - 1, I64_MAX])
@pytest.mark.parametrize("subblocks", [1, 2])
def test_runs_at_the_ends_of_int64(column: int, value: int, subblocks: int) -> None:
    """Every door says the same, whatever that is; a stride that is not used says nothing."""
    said = set()
    for door in DOORS:
        arguments = copy_arguments()
        arguments["src_subblocks_per_block"] = arguments["dst_subblocks_per_block"] = subblocks
        run = [0, 0, 0, 0, 2, 4, 4, 2, 2, 2, 1, 0, 0, 1, 0, 0]
        run[column] = value
        arguments["runs"] = torch.tensor([run])
        said.add(outcome(door, "copy_pages", arguments))
    assert len(said) == 1
    error, text = said.pop()
    unused = column in (11, 12, 14, 15) or (column in (5, 6) and subblocks == 1)
    assert (error is None) == unused
    assert unused or re.match(r"copy_pages: runs(\[0\] \w+| must write each byte once)", text)


@pytest.mark.parametrize("argument", ["src_subblocks_per_block", "dst_subblocks_per_block"])
def test_subblocks(argument: str) -> None:
    for value in (0, -1, I64_MIN):
        text = f"{argument} must be positive, got {value}"
        refused("copy_pages", lambda a, value=value: a.update({argument: value}), ValueError, text)
    side = argument[:3]
    text = f"{argument} must leave {side}'s ids in int64, got {I64_MAX} for {7 if side == 'src' else 8} blocks"
    refused("copy_pages", lambda a: a.update({argument: I64_MAX}), ValueError, text)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.uint64], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (16,), (2, 15), (1, 1, 16), ()], ids=str)
def test_runs_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for d, s in ((dtype, shape), (torch.int64, shape)):
        if d == torch.int64 and s == (1, 16):
            continue
        named = str(d).removeprefix("torch.")
        text = f"runs must be int64 of shape [r, 16] on the cpu, got {named} of shape {list(s)} on cpu"
        refused("copy_pages", lambda a, d=d, s=s: a.update(runs=torch.zeros(s, dtype=d)), ValueError, text)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("r", [0, 1])
def test_nothing_to_do_still_checks(n: int, r: int) -> None:
    def smaller(a: Arguments) -> None:
        a.update(mapping=a["mapping"][:n], runs=a["runs"][:r])

    for door in DOORS:
        arguments = copy_arguments()
        smaller(arguments)
        assert outcome(door, "copy_pages", arguments) == (None, "")
    refused("copy_pages", lambda a: (smaller(a), put(a, ("dst", 1), noise(3, 4).t())), ValueError,
            "dst[1] must have contiguous rows, got shape [4, 3] and strides [1, 4]")  # fmt: skip


def overlapping_by_one_byte(a: Arguments) -> None:
    memory = noise(200)
    a.update(src=memory.as_strided((6, 8), (9, 1)), dst=memory.as_strided((6, 8), (9, 1), 2))
    a["block_mapping"] = torch.tensor([[4, 3]])  # source 4 is bytes 36 to 44, destination 3 bytes 29 to 37


def with_other_strides(a: Arguments) -> None:
    memory = noise(100)
    a.update(src=memory.as_strided((6, 8), (8, 1)), dst=memory.as_strided((6, 8), (12, 1)))
    a["block_mapping"] = torch.tensor([[3, 0], [1, 2]])


OVERLAPS = [
    ("one byte", overlapping_by_one_byte, "destination 3 overlapping source 4"),
    ("one tensor", lambda a: a.update(dst=a["src"]), "destination 0 overlapping source 0"),
    ("a shifted view", lambda a: a.update(dst=(t := noise(8, 8))[2:], src=t[:6]), "destination 0 overlapping source 2"),
    ("other strides", with_other_strides, "destination 2 overlapping source 3"),
]


@pytest.mark.parametrize("spoil,pair", [case[1:] for case in OVERLAPS], ids=[case[0] for case in OVERLAPS])
def test_a_block_both_read_and_written(spoil: Callable[[Arguments], None], pair: str) -> None:
    for door in DOORS:
        arguments = swap_arguments()
        if "source 0" in pair:
            arguments["block_mapping"] = torch.tensor([[0, 1], [2, 0]])
        if "source 2" in pair:
            arguments["block_mapping"] = torch.tensor([[2, 0], [0, 1]])
        spoil(arguments)
        error, text = outcome(door, "swap_blocks", arguments)
        assert (error, text) == (ValueError, f"swap_blocks: block_mapping must not write what it reads, got {pair}")


def test_what_interleaves_or_meets_in_no_byte_is_fine() -> None:
    memory = noise(7, 2, 8)
    k, v = memory[:, 0], memory[:, 1]
    expected = k[2].clone(), k[3].clone()
    torch.ops.kvkernels.swap_blocks(k, v, 8, torch.tensor([[2, 2], [3, 0]]))
    assert torch.equal(v[2], expected[0]) and torch.equal(v[0], expected[1])
    torch.ops.kvkernels.swap_blocks(memory, memory, 16, torch.tensor([[2, 0], [2, 1], [3, 6], [2, 0]]))
    assert torch.equal(memory[0], memory[2]) and torch.equal(memory[6], memory[3])
    memory = noise(200)
    torch.ops.kvkernels.swap_blocks(
        memory.as_strided((6, 8), (9, 1)), memory.as_strided((6, 8), (9, 1), 1), 8, torch.tensor([[4, 3]])
    )
    assert torch.equal(memory[28:36], memory[36:44])
    neighbours = noise(96)
    torch.ops.kvkernels.swap_blocks(neighbours[:48], neighbours[48:], 8, torch.tensor([[5, 0], [0, 5]]))
    # The second half of a page from the first half of the same block.
    pool = noise(4, 16)
    run = torch.tensor([[0, 0, 0, 8, 8, *RUN[5:]]])
    torch.ops.kvkernels.copy_pages([pool], [pool], torch.tensor([[i, i] for i in range(4)]), run)
    assert torch.equal(pool[:, :8], pool[:, 8:])


def test_shards_beside_each_other_in_many_rows_are_fine() -> None:
    """More pieces than are compared one by one: 18 million of one byte."""
    shards = [noise(2_250_000, 1) for _ in range(8)]
    whole = torch.ops.kvkernels.concat_tp_shards(shards, 1)
    assert torch.equal(whole, torch.cat(shards, 1))
    apart = torch.zeros_like(whole)
    torch.ops.kvkernels.split_tp_shards(whole, 1, [apart[:, i : i + 1] for i in range(8)])
    assert torch.equal(apart, whole)


def combs(*parts: tuple[int, int, int, int]) -> torch.Tensor:
    """Runs that fill these bytes of a page: first offset, fragment, stride, fragments."""
    return torch.tensor(
        [[0, 0, at, at, size, 0, 0, count, stride, stride, *[1, 0, 0] * 2] for at, size, stride, count in parts]
    )


def test_rows_that_do_not_begin_with_the_page_are_compared_as_rows() -> None:
    """18 million fragments of shards that lie beside each other, from the second byte on."""
    page = torch.empty(1, (9 << 23) + 1, dtype=torch.uint8)
    runs = combs((1, 4, 8, 9 << 20), (5, 4, 8, 9 << 20))
    pair = torch.tensor([[0, 0]])
    assert kvkernels.explain("copy_pages", [page], [torch.empty_like(page)], pair, runs).bytes == 9 << 23


def test_runs_that_touch_are_compared_as_one() -> None:
    """Both ends of every page to its middle, backwards and byte by byte: one by one these would be too many."""
    quarter = 300
    ends = [*range(quarter), *range(3 * quarter, 4 * quarter)]
    middle = range(3 * quarter - 1, quarter - 1, -1)
    runs = torch.tensor([[0, 0, src, dst, 1, *RUN[5:]] for src, dst in zip(ends, middle, strict=True)])
    pool = noise(7200, 4 * quarter)
    pairs = torch.arange(7200)[:, None].expand(-1, 2).contiguous()
    expected = pool.clone()
    expected[:, middle] = pool[:, ends]
    torch.ops.kvkernels.copy_pages([pool], [pool], pairs, runs)
    assert torch.equal(pool, expected)


def test_more_fragments_than_are_compared() -> None:
    page = torch.empty(1, 1 << 26, dtype=torch.uint8)
    runs = combs((0, 1, 4, 1 << 24), (1, 1, 8, 1 << 10))
    text = r"runs must have at most 16777216 fragments in a page where they interleave, got 16778240 in dst\[0\]$"
    with pytest.raises(ValueError, match=text):
        torch.ops.kvkernels.copy_pages([page], [torch.empty_like(page)], torch.tensor([[0, 0]]), runs)


@pytest.mark.parametrize("extents", [(3, 5, 600_000), (3, 600_000, 5), (600_000, 3, 5)], ids=str)
def test_more_fragments_than_are_compared_between_sides(extents: tuple[int, int, int]) -> None:
    """Every second byte of a page to the byte after it: inside each other, and each has to be told from each."""
    a, b, c = extents
    strides = [b * (2 * c + 2) + 2, 2 * c + 2, 2]  # with gaps, so that no loops are one
    loops = [(extent, stride, stride) for extent, stride in zip(extents, strides, strict=True)]
    page = torch.empty(2, a * strides[0], dtype=torch.uint8)
    runs = runs_tensor(run_row((0, 0), (0, 1), 1, (0, 0), loops))
    text = "^copy_pages: src and dst must be shown not to overlap, got more than 8388608 fragments to compare$"
    with pytest.raises(ValueError, match=text):
        torch.ops.kvkernels.copy_pages([page], [page], torch.tensor([[1, 1]]), runs)


def test_two_sources_for_one_destination() -> None:
    for ids in ([[0, 1], [5, 2], [3, 2]], [[3, 2], [0, 1], [5, 2], [3, 2]]):
        text = "block_mapping must name each destination once, got two sources for destination 2"
        refused("swap_blocks", lambda a, ids=ids: a.update(block_mapping=torch.tensor(ids)), ValueError, text)
    text = "block_ids must name each destination once, got two sources for destination 1"
    refused("scatter_blocks", lambda a: a.update(block_ids=torch.tensor([1, 1, 0])), ValueError, text)


def test_an_identical_pair_is_copied_once_however_often_it_comes() -> None:
    src, dst = noise(6, 8), noise(6, 8)
    often = torch.tensor([[5, 2]]).expand(1 << 20, 2)
    assert kvkernels.explain("swap_blocks", src, dst, 8, often).bytes == 8
    kvkernels.reset_counters()
    torch.ops.kvkernels.swap_blocks(src, dst, 8, often)
    assert torch.equal(dst[2], src[5]) and kvkernels.counters()["cpu"]["bytes"] == 8


def test_an_absurd_number_of_rows_is_refused_by_memory() -> None:
    arguments = swap_arguments()
    before = bytes_of(arguments)
    arguments["block_mapping"] = torch.tensor([[5, 2]]).expand(1 << 50, 2)
    with pytest.raises((MemoryError, RuntimeError)):
        torch.ops.kvkernels.swap_blocks(**arguments)
    assert bytes_of({**arguments, "block_mapping": torch.tensor([[0, 1], [5, 2], [5, 0]])}) == before
    assert outcome("torch.ops", "swap_blocks", swap_arguments()) == (None, "")


def test_views_of_a_storage_that_is_copied_on_write() -> None:
    """Opening the destination moves the storage; the source's address must be the new one."""
    original = noise(6, 8)
    ops = torch.ops.kvkernels
    for call in (
        lambda t: ops.swap_blocks(t[:4], t[2:], 8, torch.tensor([[2, 0]])),
        lambda t: ops.copy_pages([t], [t], torch.tensor([[1, 1]]), torch.tensor([RUN])),
        lambda t: ops.gather_blocks([t], torch.tensor([1]), t[1:2]),
        lambda t: ops.scatter_blocks(t[1:2], torch.tensor([1]), [t]),
        lambda t: ops.concat_tp_shards_out([t[:2]], 0, t[1:3]),
        lambda t: ops.split_tp_shards(t[:2], 0, [t[1:3]]),
    ):
        with pytest.raises(ValueError, match="must not write what it reads"):
            call(torch._lazy_clone(original))
    clone = torch._lazy_clone(original)
    before = original.clone()
    torch.ops.kvkernels.swap_blocks(clone, clone, 8, torch.tensor([[0, 5]]))
    assert torch.equal(original, before) and torch.equal(clone[5], before[0])


BATCH = [
    ("sizes", 1, -1, "sizes[1] must not be negative, got -1"),
    ("sizes", 0, I64_MIN, f"sizes[0] must not be negative, got {I64_MIN}"),
    ("sizes", 2, I64_MAX, None),
    ("src_ptrs", 1, 0, "src_ptrs[1] must not be null, got 0"),
    ("dst_ptrs", 2, 0, "dst_ptrs[2] must not be null, got 0"),
    ("src_ptrs", 0, -8, "src_ptrs[0] + sizes[0] must fit in the address space, got an overflow"),
    ("dst_ptrs", 1, -1, "dst_ptrs[1] + sizes[1] must fit in the address space, got an overflow"),
]


@pytest.mark.parametrize("name,row,value,text", BATCH)
def test_batch(name: str, row: int, value: int, text: str | None) -> None:
    said = set()
    for door in DOORS:
        arguments = batch_arguments()
        start = arguments["memory"].data_ptr()
        arguments[name][row] = value
        error, message = outcome(door, "swap_blocks_batch", arguments)
        assert error is ValueError and (text is None or message == f"swap_blocks_batch: {text}"), start
        said.add(message)
    assert len(said) == 1


@pytest.mark.parametrize("name", ["src_ptrs", "dst_ptrs", "sizes"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dtypes_of_batch(name: str, dtype: torch.dtype) -> None:
    other = torch.int32 if name == "sizes" else torch.uint64
    if dtype in (torch.int64, other):
        return
    wanted = f"int64 or {str(other).removeprefix('torch.')}"
    text = f"{name} must be {wanted}, got {str(dtype).removeprefix('torch.')}"
    refused("swap_blocks_batch", lambda a: a.update({name: torch.empty(0, dtype=dtype)}), ValueError, text)


@pytest.mark.parametrize("dim", [-3, 2, I64_MAX, I64_MIN])
def test_dim(dim: int) -> None:
    for op in ("concat_tp_shards", "concat_tp_shards_out", "split_tp_shards"):
        refused(op, lambda a: a.update(dim=dim), ValueError, f"dim must be in [-2, 2), got {dim}")


def test_shards_that_do_not_fit() -> None:
    for op, name in (("concat_tp_shards", "shards"), ("concat_tp_shards_out", "shards"), ("split_tp_shards", "out")):
        for t, text in (
            (noise(3, 4), "must have size 2 in dimension 0, got 3"),
            (noise(4), "must have 2 dimensions, got 1"),
            (noise(2, 4).to(torch.int8), "must be uint8, got int8"),
            (noise(2, 4).to(torch.float8_e8m0fnu), "must be uint8, got float8_e8m0fnu"),
        ):
            refused(op, lambda a, n=name, t=t: put(a, (n, 1), t), ValueError, f"{name}[1] {text}")
    for t, text in ((noise(2, 8), "shape [2, 7], got [2, 8]"), (noise(14), "shape [2, 7], got [14]")):
        refused("concat_tp_shards_out", lambda a, t=t: a.update(out=t), ValueError, f"out must have {text}")
