"""The triton executor from the op down to compiled code: C++'s tables, and the kernels' PTX on the simulator."""

from __future__ import annotations

import mmap
import re
import subprocess

import numpy as np
import pytest
import torch
from cases import GUARD_BYTES, Arena, Case, assert_same_bytes, examples, gather_scatter_cases, pool_view, seeds
from hypothesis import assume, given
from hypothesis import strategies as st
from plans import copy_pages_cases, run_row, runs_tensor

pytest.importorskip("triton")

from simgpu.device import find_cuobjdump
from simgpu.ptx import Buffer
from simgpu.triton_device import CUDA_TARGETS, HIP_TARGETS, VARIANTS, SimulatedLaunch, buffers_of, compiled

import kvkernels
import kvkernels.triton
from kvkernels import reference
from kvkernels.triton import kernels
from kvkernels.triton import table as columns
from kvkernels.triton.table import FAULT_OPS, Head

pytestmark = pytest.mark.skipif(kvkernels.triton.interprets(), reason="TRITON_INTERPRET=1: nothing is compiled")
each_cuda_target = pytest.mark.parametrize("target", CUDA_TARGETS)
FAULT_BYTES = 24


@pytest.fixture(scope="module")
def on_simulator():
    """Calls on CPU tensors with executor="triton" run on the simulator; ``on_simulator(target)`` says which code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvkernels.triton, "interprets", lambda: True)

        def use(target: str) -> SimulatedLaunch:
            launch = SimulatedLaunch(target)
            patch.setattr(kernels, "launch", launch)
            return launch

        yield use


def run_case(launch: SimulatedLaunch, case: Case) -> None:
    """Every byte, and exactly which bytes were written: those that do not depend on what was there."""
    before = case.random_buffers()
    expected, flipped = [b.clone() for b in before], [b.clone() for b in before]
    for side, buffer in zip(case.sides, flipped, strict=True):
        if side == "dst":
            buffer ^= 0xFF
    for buffers in (expected, flipped):
        getattr(reference, case.op)(*case.arguments_on(buffers), **case.options)
    actual = [b.clone() for b in before]
    launch.buffers = buffers_of(actual, case.sides)
    launch.reports.clear()
    arguments = case.arguments_on(actual)
    options = {**case.options, "executor": "triton"}
    explained = kvkernels.explain(case.op, *arguments, **options)
    options["sm_budget"] = 2  # so few programs that they often go several rounds
    kvkernels.reset_counters()
    getattr(torch.ops.kvkernels, case.op)(*arguments, **options)
    assert_same_bytes(actual, expected, "executor triton")
    counted = kvkernels.counters()["triton"]
    issued = explained.launches, explained.descriptors, explained.bytes
    assert (counted["launches"], counted["descriptors"], counted["bytes"]) == issued
    assert len(launch.reports) == explained.launches == int(explained.bytes > 0)
    for report in launch.reports:
        for i, side in enumerate(case.sides):
            if side == "dst":
                assert np.array_equal(report.written(f"dst {i}"), (expected[i] == flipped[i]).numpy())


small_cases = st.one_of(
    gather_scatter_cases("gather_blocks"), gather_scatter_cases("scatter_blocks"), copy_pages_cases()
).filter(lambda case: sum(case.buffer_bytes) < 1 << 18)


@examples(16)
@given(small_cases)
def test_random_calls(on_simulator, case):
    arguments = case.arguments_on(case.random_buffers())
    cut = kvkernels.explain(case.op, *arguments, executor="triton", **case.options).device
    assume(cut.get("tiles", 0) <= 200 and cut.get("chunks", 0) <= 8192)  # a few seconds on the simulator
    run_case(on_simulator("sm_80"), case)


def whole_pages(sizes: list[int], offset_bytes: int = 0, padding_bytes: int = 0) -> Case:
    """gather_blocks from a pool of each size."""
    arena, blocks, n = Arena(), 7, 4
    pools = [
        pool_view(arena.reserve("src", blocks * (s + padding_bytes), offset_bytes), blocks, s, s + padding_bytes,
                  torch.uint8)
        for s in sizes
    ]  # fmt: skip
    row_bytes = sum(sizes)
    out = pool_view(arena.reserve("dst", n * row_bytes), n, row_bytes, row_bytes, torch.uint8)
    return arena.case("gather_blocks", pools, torch.tensor([5, 0, 6, 3]), out)


def transposed(fragment_bytes: int) -> Case:
    """copy_pages from token-first to head-first pages."""
    arena, blocks, tokens, heads = Arena(), 5, 5, 3
    page_bytes = tokens * heads * fragment_bytes
    src, dst = (
        pool_view(arena.reserve(side, blocks * page_bytes), blocks, page_bytes, page_bytes, torch.uint8)
        for side in ("src", "dst")
    )
    loops = [(tokens, heads * fragment_bytes, fragment_bytes), (heads, fragment_bytes, tokens * fragment_bytes)]
    runs = runs_tensor(run_row((0, 0), (0, 0), fragment_bytes, (0, 0), loops))
    return arena.case("copy_pages", [src], [dst], torch.tensor([[4, 0], [1, 3], [0, 1]]), runs)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("page", whole_pages([4096, 8192])),
        ("page", whole_pages([4096 + 8, 1400], offset_bytes=4)),
        ("row", whole_pages([1024, 48])),
        ("row", transposed(512)),
        ("bytes", whole_pages([24, 40])),
        ("bytes", whole_pages([37, 5], offset_bytes=3)),
        ("bytes", transposed(1500)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_newer_architectures(on_simulator, target, kernel, case):
    launch = on_simulator(target)
    run_case(launch, case)
    assert kernels.KERNELS[launch.heads[-1].kernel].__name__ == kernel


@pytest.mark.parametrize("differing", [0, 8, 4, 2, 1])
def test_sides_of_another_alignment(on_simulator, differing):
    """One launch for fragments that begin and end anywhere, in elements as wide as the two sides have in common."""
    launch = on_simulator("sm_80")
    sizes = (1, 15, 16, 17, 100, 127, 4095, 1029, 4097, 2500)
    buffer = torch.randint(0, 256, (2, 16 * 1024), dtype=torch.uint8)
    raw = torch.zeros(2 * 128 * 1024, dtype=torch.uint8)
    pools, at, src = [], -raw.data_ptr() % 16, buffer.data_ptr()
    for size in sizes:
        begin = at + (src + differing) % 16
        pools.append(raw[begin:].as_strided((2, size), (8192, 1), begin))
        at, src = at + 2 * 8192, src + size
    launch.buffers = buffers_of([buffer.view(-1), raw], ["src", "dst"])
    kvkernels.scatter_blocks(buffer[:, : sum(sizes)], torch.tensor([1, 0]), pools, executor="triton")
    expected, is_written = torch.zeros_like(raw), torch.zeros_like(raw, dtype=torch.bool)
    at = 0
    for size, pool in zip(sizes, pools, strict=True):
        place = (2, size), (8192, 1), pool.storage_offset()
        expected.as_strided(*place).copy_(buffer[:, at : at + size].flip(0))
        is_written.as_strided(*place).fill_(True)
        at += size
    assert torch.equal(raw, expected)
    assert np.array_equal(launch.reports[-1].written("dst 1"), is_written.numpy())
    assert launch.heads[-1].width == (differing or 16)


@each_cuda_target
@pytest.mark.parametrize(("page_bytes", "kernel"), [(4096, "page"), (32768, "page"), (1024, "row"), (256, "row")])
def test_aligned_pages_are_moved_in_full_sectors(on_simulator, target, page_bytes, kernel):
    """And in 16 bytes a thread: no request takes more sectors than its bytes fill."""
    launch = on_simulator(target)
    launch.counts_sectors = True
    pages = 16
    raw = [torch.randint(0, 256, (pages * page_bytes + 128,), dtype=torch.uint8) for _ in range(2)]
    src, dst = (t[-t.data_ptr() % 128 :][: pages * page_bytes].view(pages, page_bytes) for t in raw)
    launch.buffers = buffers_of(raw, ["src", "dst"])
    kvkernels.gather_blocks([src], torch.arange(pages).flip(0), dst, executor="triton")
    assert torch.equal(dst, src.flip(0))
    report = launch.reports[-1]
    loaded_from_src = [a for line, a in report.loads.items() if ".cg." in report_text(target, kernel, line)]
    for moved in (loaded_from_src, list(report.stores.values())):
        assert sum(a.bytes for a in moved) == pages * page_bytes
        assert all(a.sectors == a.least_sectors for a in moved)
        # A warp's request of 16 bytes a lane.
        assert all(a.bytes == 512 * a.requests for a in moved)


def report_text(target: str, kernel: str, line: int) -> str:
    return compiled(kernel, 16, kernel == "row", target).asm["ptx"].splitlines()[line - 1]


@each_cuda_target
@pytest.mark.parametrize(("kernel", "in_flight"), [("page", 8), ("row", 4)])
def test_sixteen_bytes_an_access(target, kernel, in_flight, tmp_path):
    """In PTX and in machine code, so many of them before the first store, and nothing spilled."""
    code = compiled(kernel, 16, kernel == "row", target)
    ptx = re.findall(r"(?:ld\.global\.cg|st\.global\.cs)\.\S+", code.asm["ptx"])
    wide = ["ld.global.cg.v4.b32"] * in_flight + ["st.global.cs.v4.b32"] * in_flight
    assert [text for text in ptx if not text.endswith(".b8")] == wide
    tool = find_cuobjdump()
    assert tool is not None, "triton's wheel brings cuobjdump"
    (tmp_path / "code.cubin").write_bytes(code.asm["cubin"])
    done = subprocess.run([tool, "-sass", tmp_path / "code.cubin"], check=True, capture_output=True, text=True)
    sass = re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", done.stdout)
    assert [name for name, suffix in sass if ".128" in suffix] == ["LDG"] * in_flight + ["STG"] * in_flight
    assert not {name for name, _ in sass} & {"LDL", "STL"}


@pytest.mark.parametrize("target", HIP_TARGETS)
@pytest.mark.parametrize(
    ("kernel", "width", "is_chunked"), [("page", 16, False), ("row", 16, True), ("bytes", 1, True), ("bytes", 2, False)]
)
def test_amd_targets_compile(target, kernel, width, is_chunked):
    """To code that nobody has run, with accesses as wide as the elements."""
    code = compiled(kernel, width, is_chunked, target)
    assert code.asm["hsaco"]
    element = {16: "dwordx4", 2: "short", 1: "byte"}[width]
    assert re.search(rf"(global|buffer|flat)_store_{element}\b", code.asm["amdgcn"])


class ReversedLaunch(SimulatedLaunch):
    """Copies from what C++ takes for the destination, with tiles cut at its lines: as from the host to a device."""

    def __call__(self, call: Head, table: torch.Tensor, fault: int, programs: int) -> None:
        call = call._replace(cuts_on_src=1, src_ids=call.dst_ids, dst_ids=call.src_ids)
        table[: len(call)] = torch.tensor(call)
        moves = table[columns.HEAD_COLUMNS :][: call.moves * columns.MOVE_COLUMNS].view(call.moves, -1)
        strides = columns.LOOPS + columns.LOOP_COLUMNS * torch.arange(3) + columns.LOOP_COLUMNS - 2
        side = torch.arange(columns.DST_SIDE - columns.SRC_SIDE)
        of_src = torch.cat((torch.tensor([columns.SRC_ADDRESS]), strides, columns.SRC_SIDE + side))
        of_dst = torch.cat((torch.tensor([columns.DST_ADDRESS]), strides + 1, columns.DST_SIDE + side))
        moves[:, torch.cat((of_src, of_dst))] = moves[:, torch.cat((of_dst, of_src))]
        super().__call__(call, table, fault, programs)


@pytest.mark.parametrize(
    ("src_at", "dst_at", "fragment_bytes"),
    [(0, 112, 4096), (112, 0, 4096), (112, 0, 4000), (5, 117, 4091), (117, 5, 8181), (0, 112, 12288), (96, 32, 5000)],
)
@pytest.mark.parametrize("loops", [[], [(2, 16384, 32768)]], ids=["page", "bytes"])
def test_tiles_are_cut_at_lines_of_a_source_on_the_host(on_simulator, src_at, dst_at, fragment_bytes, loops):
    """How many tiles a fragment has depends on where it begins in a line of the side at which they are cut."""
    on_simulator("sm_80")
    kernels.launch = launch = ReversedLaunch("sm_80")
    launch.counts_sectors = True
    blocks, block_bytes = 3, 65536
    raw = [torch.randint(0, 256, (blocks * block_bytes + 128,), dtype=torch.uint8) for _ in range(2)]
    src, dst = (t[-t.data_ptr() % 128 :][: blocks * block_bytes].view(blocks, block_bytes) for t in raw)
    launch.buffers = buffers_of(raw, ["src", "both"])
    expected, is_written = raw[1].clone(), torch.zeros_like(raw[1], dtype=torch.bool)
    for step in range(len(loops) + 1):
        copied = src[[1, 0], src_at + 32768 * step :][:, :fragment_bytes]
        for changed, value in ((expected, copied), (is_written, True)):
            pages = changed.as_strided(dst.shape, dst.stride(), dst.storage_offset())
            pages[[0, 2], dst_at + 16384 * step : dst_at + 16384 * step + fragment_bytes] = value
    runs = runs_tensor(run_row((0, 0), (dst_at, src_at), fragment_bytes, (0, 0), loops))
    kvkernels.copy_pages([dst], [src], torch.tensor([[0, 1], [2, 0]]), runs, executor="triton")
    (report,) = launch.reports
    assert torch.equal(raw[1], expected) and np.array_equal(report.written("both 1"), is_written.numpy())
    kernel = kernels.KERNELS[launch.heads[0].kernel].__name__
    assert kernel == ("bytes" if loops else "page")
    if src_at == 0:
        loads = [a for line, a in report.loads.items() if ".cg." in report_text("sm_80", kernel, line)]
        assert sum(a.bytes for a in loads) == is_written.sum()
        assert all(a.sectors == a.least_sectors for a in loads)


# Ids on a device: the host's tensors pass for a device's, whose ids C++ has not read.


class DeviceIdsLaunch(SimulatedLaunch):
    """Puts columns of ids in the place of the table's pairs, as C++ does for ids on a device."""

    def __init__(self, target: str, fault: np.ndarray, **head: int) -> None:
        super().__init__(target)
        self.fault = fault
        self.head = head

    def __call__(self, call: Head, table: torch.Tensor, fault: int, programs: int) -> None:
        call = call._replace(ids_on_device=1, **self.head)
        table[: len(call)] = torch.tensor(call)
        self.buffers = [*self.buffers, Buffer("fault", self.fault)]
        super().__call__(call, table, self.fault.ctypes.data, programs)


FAR = 1 << 62
PAGES = {"row": 64, "page": 5000, "chunks 1": 37, "tiles": 1500}


@examples(6)
@given(seeds, st.sampled_from(list(PAGES)), st.sampled_from([torch.int32, torch.int64]), st.booleans(), st.booleans())
def test_ids_on_the_device(on_simulator, seed, shape, dtype, skip_negative, has_earlier):
    """Bad pairs are not copied; they are counted, and the lowest row of the op that failed first is kept."""
    on_simulator("sm_80")
    rng = np.random.default_rng(seed)
    page_bytes, rows, limits = PAGES[shape], 40, (50, 60)
    two = int(shape == "tiles") + 1
    sizes = [limits[0] * two * page_bytes, limits[1] * two * page_bytes]
    raw = [torch.from_numpy(rng.integers(0, 256, size + 2 * GUARD_BYTES, dtype=np.uint8)) for size in sizes]
    src, dst = (t[GUARD_BYTES:-GUARD_BYTES].view(n, -1) for t, n in zip(raw, limits, strict=True))
    pairs = np.stack((rng.integers(0, limits[0], rows), rng.permutation(limits[1])[:rows]), 1)
    far = FAR if dtype == torch.int64 else 2**31 - 1
    for i in np.flatnonzero(rng.integers(0, 3, rows) == 0):
        side = rng.integers(2)
        pairs[i, side] = rng.choice([-1, -far, limits[side], limits[side] + 1, far])
    is_negative, is_good = (pairs < 0).any(1), ((pairs >= 0) & (pairs < limits)).all(1)
    expected = raw[1].clone()
    rows_of = expected[GUARD_BYTES:-GUARD_BYTES].view(limits[1], -1)
    for s, d in pairs[is_good].tolist():
        rows_of[d] = src[s]
    bad = np.flatnonzero(~is_good & ~(is_negative & skip_negative))

    # Every other row of a wider tensor, as a caller may have it.
    ids = torch.full((2 * rows, 3), 99, dtype=dtype)
    ids[::2, 1:] = torch.from_numpy(pairs)
    fault = np.zeros(FAULT_BYTES, np.uint8)
    earlier = FAULT_OPS.index("gather_blocks")
    if has_earlier:
        fault.view(np.int64)[:] = 1, ~np.int64(77), earlier
    width, stride = ids.element_size(), 6 * ids.element_size()
    launch = DeviceIdsLaunch(
        "sm_80", fault, src_ids=ids.data_ptr() + width, dst_ids=ids.data_ptr() + 2 * width, src_ids_stride_bytes=stride,
        dst_ids_stride_bytes=stride, src_ids_width=width, dst_ids_width=width, src_limit=limits[0],
        dst_limit=limits[1], skips_negative=int(skip_negative), fault_op=FAULT_OPS.index("copy_pages"),
    )  # fmt: skip
    kernels.launch = launch
    memory = ids.view(torch.uint8).view(-1)
    launch.buffers = buffers_of([*raw, memory], ["src", "both", "ids"])
    loops = [(2, page_bytes, page_bytes)] if shape == "tiles" else []
    if shape == "tiles":  # a loop that does not fold into the fragment: the halves change places
        loops = [(2, page_bytes, -page_bytes)]
        rows_of[:] = torch.where(
            torch.isin(torch.arange(limits[1]), torch.from_numpy(pairs[is_good, 1]))[:, None],
            rows_of.view(-1, 2, page_bytes).flip(1).reshape(limits[1], -1),
            rows_of,
        )
    runs = runs_tensor(run_row((0, 0), (0, page_bytes if loops else 0), page_bytes, (0, 0), loops))
    replaced = torch.arange(rows)[:, None].repeat(1, 2)
    torch.ops.kvkernels.copy_pages([src], [dst], replaced, runs, executor="triton")

    assert_same_bytes([raw[1]], [expected], "ids on the device")
    count, row, op = fault.view(np.int64).tolist()
    if has_earlier:
        assert (count, ~row, op) == (len(bad) + 1, 77, earlier)
    elif len(bad):
        assert (count, ~row, op) == (len(bad), bad[0], FAULT_OPS.index("copy_pages"))
    else:
        assert (count, row, op) == (0, 0, 0)


BLOCKS = 5


def full_call(kernel: str, width: int, is_chunked: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Both sides' bytes, a pool in each, and two runs for which C++ takes this kernel.

    Sub-blocks on both sides, ragged ends in tiles, and loops that fold into nothing where the kernel knows any.
    """
    fragment_bytes = 33 * width if is_chunked else 300 * width + (width > 2)
    step = (fragment_bytes // (2 * width) + 1) * 2 * width
    loops = [] if kernel == "page" else [(2, step, 4 * step), (2, 2 * step, 2 * step), (2, 4 * step, step)]
    run_bytes = 8 * step if loops else step
    page_bytes = 2 * run_bytes
    block_bytes = 2 * page_bytes + 32
    raw = [torch.randint(0, 256, (BLOCKS * block_bytes + 64,), dtype=torch.uint8) for _ in range(2)]
    begin = int(width > 1 and not is_chunked)
    begins = [-raw[0].data_ptr() % 16 + begin, -raw[1].data_ptr() % 16 + begin + width % 16]
    pools = [t.as_strided((BLOCKS, 2 * page_bytes), (block_bytes, 1), b) for t, b in zip(raw, begins, strict=True)]
    runs = [
        run_row((0, 0), (at, run_bytes - at), fragment_bytes, (page_bytes, page_bytes), loops) for at in (0, run_bytes)
    ]
    return raw, pools, runs_tensor(*runs)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
@each_cuda_target
def test_every_line(on_simulator, target, variant):
    """Of each kernel in each width: calls with ids on the host, and on the device in both dtypes, some of them bad."""
    raw, (src, dst), runs = full_call(*variant)
    ids = torch.tensor([[3, 0], [9, 1], [0, 7], [5, 4], [2, 9], [6, 6], [1, 3], [9, 8]])
    left_out: dict[int, str] | None = None
    for dtype in (None, torch.int64, torch.int32):
        launch, fault = on_simulator(target), np.zeros(FAULT_BYTES, np.uint8)
        bad = ids.to(dtype or torch.int64, copy=True)
        bad[[1, 3], 0], bad[[4, 6], 1] = 2 * BLOCKS, -1
        if dtype:
            width = bad.element_size()
            launch = DeviceIdsLaunch(
                target, fault, src_ids=bad.data_ptr(), dst_ids=bad.data_ptr() + width, src_ids_stride_bytes=2 * width,
                dst_ids_stride_bytes=2 * width, src_ids_width=width, dst_ids_width=width, src_limit=2 * BLOCKS,
                dst_limit=2 * BLOCKS,
            )  # fmt: skip
            kernels.launch = launch
        raw[1] ^= 255  # what an earlier call copied must not pass for this one's work
        expected = raw[1].clone()
        wanted = expected.as_strided(dst.shape, dst.stride(), dst.storage_offset())
        reference.copy_pages([src], [wanted], ids[[0, 2, 5, 7]] if dtype else ids, runs, 2, 2)
        launch.buffers = buffers_of([*raw, bad.view(torch.uint8).view(-1)], ["src", "both", "ids"])
        torch.ops.kvkernels.copy_pages([src], [dst], ids, runs, 2, 2, executor="triton")
        assert_same_bytes([raw[1]], [expected], f"ids on the device: {dtype}")
        (head,) = launch.heads
        assert (kernels.KERNELS[head.kernel].__name__, head.width, bool(head.is_chunked)) == variant
        assert fault.view(np.int64)[0] == 4 * bool(dtype)
        unexecuted = launch.reports[0].unexecuted
        left_out = {line: text for line, text in (left_out or unexecuted).items() if line in unexecuted}
    assert left_out is not None
    texts = [text for text in left_out.values() if not re.match(r"@!?%p\d+ +bra", text)]
    assert not texts, f"{len(texts)} lines: {texts[:12]}"


@pytest.mark.parametrize("subblocks", [1, 2])
def test_offsets_beyond_32_bits(on_simulator, subblocks):
    """Of blocks, of sub-blocks and of loops, on both sides, in memory that is there only where it is touched."""
    launch = on_simulator("sm_80")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    src, dst = (torch.frombuffer(mmap.mmap(-1, 20 << 30, flags=flags), dtype=torch.uint8) for _ in range(2))
    stride, far = 5 << 30, 3 << 30
    launch.buffers = [Buffer("src", src.numpy(), writable=False), Buffer("dst", dst.numpy())]
    pools = [t.view(4, stride) for t in (src, dst)]
    runs = runs_tensor(
        # The loop's second step, and with two sub-blocks a block the odd ids, lie 3 and 1 GiB further.
        run_row((0, 0), (0, 64), 48, (1 << 30, 1 << 30), [(2, far, far)]),
        run_row((0, 0), (4096, 4096), 1500, (1 << 30, 1 << 30)),
    )
    mapping = torch.tensor([[4 * subblocks - 1, 3 * subblocks], [subblocks, 2 * subblocks - 1]])

    def fragments(t: torch.Tensor, id: int, to: int) -> list[torch.Tensor]:
        begin = id // subblocks * stride + id % subblocks * (1 << 30)
        return [t[begin + at :][:size] for at, size in ((to, 48), (to + far, 48), (4096, 1500))]

    for src_id, _ in mapping.tolist():
        for fragment in fragments(src, src_id, 0):
            fragment.copy_(torch.randint(0, 256, fragment.shape, dtype=torch.uint8))
    kvkernels.copy_pages(
        [pools[0]], [pools[1]], mapping, runs, src_subblocks_per_block=subblocks, dst_subblocks_per_block=subblocks,
        executor="triton",
    )  # fmt: skip
    for src_id, dst_id in mapping.tolist():
        for copied, fragment in zip(fragments(dst, dst_id, 64), fragments(src, src_id, 0), strict=True):
            assert torch.equal(copied, fragment)
