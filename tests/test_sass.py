"""The machine code of the CUDA kernels, and the reader of it on a listing in cuobjdump's form."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
from simgpu.device import find_cuobjdump

import kvkernels

TABLES = ("small", "large", "table")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

LISTING = """
arch = sm_90
		Function : other
        /*0000*/                   EXIT ;                                 /* 0x1 */
		Function : copy
        /*0010*/              @!P2 LDG.E.NA.128 R8, [R46.64] ;            /* 0x1 */
        /*0020*/                   LDG.E.NA.128 R12, [R46.64+0x200] ;
        /*0030*/                   LDG.E.128 R16, desc[UR4][R46.64] ;
        /*0040*/                   STG.E.EF.128 [R48.64], R8 ;
        /*0050*/                   LDG.E.128 R8, [R46.64] ;
        /*0060*/                   LDG.E.128 R8, [R46.64] ;
        /*0070*/               @P0 BRA 0x50 ;
        /*0080*/                   LDG.E.U8 R3, [R46.64] ;
        /*0090*/                   LDG.E.64 R4, [R46.64] ;
        /*00a0*/                   LDG.E R5, [R46.64] ;
        /*00b0*/                   STG.E.U16 [R48.64], R3 ;
        /*00c0*/                   STL [R1], R3 ;
        /*00d0*/                   LDL R3, [R1] ;
        /*00e0*/                   IADD3 R3, R3, 0x1, RZ ;
"""


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sass")


def test_it_counts_widths_spills_and_loads_in_flight(sass):
    lines = dict(sass.functions(LISTING))["sm_90", "copy"]
    kernel = sass.Kernel("sm_90", "copy")
    sass.read_code(kernel, lines)
    assert dict(kernel.loads) == {"128": 5, "8": 1, "64": 1, "32": 1}
    assert dict(kernel.stores) == {"128": 1, "16": 1}
    assert kernel.spill_instructions == 2
    # Three before the first store; then one register twice, of which the second load waits for the first one's use.
    assert kernel.loads_in_flight == 3
    assert kernel.bytes_in_flight == 3 * 16 * 32


def test_the_constants_are_those_of_the_kernels(sass):
    cuda = BENCHMARKS.parent / "csrc" / "cuda"
    grid = (cuda / "grid.h").read_text()
    assert f"kCtaWarps = {sass.CTA_WARPS};" in grid
    assert f"kLinkBytes = {sass.LINK_BYTES['PCIe'] >> 10} << 10;" in grid
    assert f"kCoherentLinkBytes = {sass.LINK_BYTES['coherent link'] >> 20} << 20;" in grid
    bulk = (cuda / "bulk_body.h").read_text()
    assert f"kBulkWarps = {sass.BULK_WARPS};" in bulk
    assert f"kRingBytes = {sass.RING_BYTES >> 10} << 10;" in bulk
    assert f"kGenerations = {sass.GENERATIONS};" in bulk
    assert f"kBulkTileBytes = {sass.BULK_TILE_BYTES >> 10} << 10;" in bulk


def test_bulk_copies_are_counted_and_their_rings_laid_out(sass):
    kernel = sass.Kernel("sm_90", "kvkernels_copy_bulk_small", registers=40)
    sass.read_code(
        kernel, ["  /*0010*/   UBLKCP.S.G [UR8], [UR4], UR9 ;", "  /*0020*/  @P0 UBLKCP.G.S [UR4], [UR8], UR9 ;"]
    )
    assert (kernel.bulk_loads, kernel.bulk_stores) == (1, 1)
    assert "| copy_bulk_small | sm_90 | 40 | 0 | 1 | 1 |" in sass.bulk_table([kernel])
    assert sass.ring(8192) == (2, 8192, 2 * 2 * 8192 * 4)
    assert sass.ring(600) == (25, 640, 2 * 25 * 600 * 4)


def test_the_table_has_a_row_for_each_kernel(sass):
    kernels = [sass.Kernel("sm_100", "kvkernels_copy"), sass.Kernel("sm_80", "kvkernels_copy", registers=56)]
    assert [row.split(" | ")[:3] for row in sass.table(kernels).splitlines()[2:]] == [
        ["| copy", "sm_80", "56"],
        ["| copy", "sm_100", "0"],
    ]


@pytest.fixture(scope="module")
def library() -> Path:
    """The op library as it is installed."""
    found = Path(kvkernels.__file__).parent / "libkvkernels_ops.so"
    if not kvkernels.info()["cuda"]["built"]:
        pytest.skip("the library was built without CUDA code")
    assert find_cuobjdump(), "cuobjdump was not found: install a CUDA toolkit, or pip install triton"
    return found


def test_the_kernels_neither_spill_nor_move_less_than_they_can(sass, library):
    kernels = sass.read_kernels(library)
    names = {f"kvkernels_copy_{shape}_{tables}" for shape in ("page", "row", "bytes", "bulk") for tables in TABLES}
    assert {(k.name, k.architecture) for k in kernels} == {(n, a) for n in names for a in ("sm_80", "sm_90", "sm_100")}
    for kernel in kernels:
        is_row = "_row_" in kernel.name
        assert kernel.spilled_bytes == kernel.spill_instructions == 0, kernel
        # 1,024 threads of an SM share 65,536 registers.
        assert kernel.registers <= 64, kernel
        if "_bulk_" in kernel.name:
            is_empty = kernel.architecture == "sm_80"
            assert (kernel.bulk_loads, kernel.bulk_stores) == ((0, 0) if is_empty else (1, 3)), kernel
            # Ends, and sides that differ in alignment: never whole vectors.
            assert not kernel.loads["128"] and not kernel.stores["128"], kernel
            continue
        assert kernel.loads_in_flight == (4 if is_row else 8), kernel
        assert kernel.loads["128"] >= kernel.stores["128"] >= (4 if is_row else 12), kernel
        if is_row:
            assert kernel.stores.total() == kernel.stores["128"], kernel


def test_the_table_is_that_of_the_results(sass, library):
    """`make sass` printed it; a kernel that changes changes it."""
    if "13.0" not in str(kvkernels.info()["cuda"]["version"]):
        pytest.skip("the table is nvcc 13.0's")
    results = (BENCHMARKS / "results" / "sass.md").read_text()
    for table in sass.tables(sass.read_kernels(library)):
        assert table in results


def machine_code(library: Path, architecture: str) -> dict[str, str]:
    """By kernel: each source file has a part of its own in a library, in any order."""
    command = [find_cuobjdump(), "-arch", architecture, "-sass", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"Function : (\w+)\n(.*?)\n\s*\.{10,}", listing, re.DOTALL))
    assert len(found) == 12, found.keys()
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_what_is_simulated_is_what_is_shipped(library, simgpu_build, architecture):
    """The release and the simgpu preset differ in their CUDA runtime, not in their machine code."""
    shipped = machine_code(library, architecture)
    assert "kvkernels_copy_page_small" in shipped
    assert shipped == machine_code(simgpu_build / "libkvkernels_ops.so", architecture)
    assert shipped == machine_code(simgpu_build / "libkvkernels_drive.so", architecture)
