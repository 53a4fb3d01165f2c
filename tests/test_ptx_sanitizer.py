"""The simulator's sanitizer finds every planted bug, and nothing in the same kernels without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simgpu.compile import ARCHITECTURES, compile_ptx, find_nvcc
from simgpu.ptx import Buffer, LoadedModule, load

THREADS, BLOCKS = 128, 4
WORDS = THREADS * BLOCKS

# By kernel: what is found, in which buffer.
BUGS = {
    "read_past_the_end": ("out of bounds", "src"),
    "read_before_the_begin": ("out of bounds", "src"),
    "write_past_the_end": ("out of bounds", "dst"),
    "offset_in_32_bits": ("out of bounds", "src"),
    "misaligned_vector": ("misaligned access", "src"),
    "write_to_the_source": ("write to read-only memory", "src"),
    "read_of_the_unwritten": ("read of unwritten bytes", "dst"),
    "unwritten_shared": ("read of unwritten bytes", "tile"),
    "shared_out_of_bounds": ("out of bounds", "tile"),
    "two_writers": ("race (write after write)", "dst"),
    "overlap_of_one_byte": ("race (write after write)", "dst"),
    "missing_barrier": ("race (read after write)", "tile"),
    "missing_second_barrier": ("race (write after read)", "tile"),
    "warp_barrier_for_a_block": ("race (read after write)", "tile"),
    "across_blocks": ("race (read after write)", "dst"),
    "plain_counter": ("race (write after read)", "dst"),
    "last_block": ("race (read after write)", "dst"),
    "non_coherent_read": ("non-coherent read", "dst"),
    "conditional_barrier": ("barrier missed", ""),
    "left_before_the_barrier": ("barrier missed", ""),
    "divergent_barrier": ("barrier in divergent code", ""),
    "absent_lane": ("shuffle from an absent lane", ""),
    "mask_of_those_who_left": ("mask names a lane that has left", ""),
    "endless": ("does not end", ""),
    "failed_assert": ("trap", ""),
    "async_no_wait": ("read of unwritten bytes", "ring"),
    "async_wait_too_short": ("read of unwritten bytes", "ring"),
    "async_no_barrier": ("race (read after write)", "ring"),
    "async_reuse": ("race (write after read)", "ring"),
    "bulk_load_no_full_wait": ("read of unwritten bytes", "ring"),
    "bulk_load_wrong_parity": ("read of unwritten bytes", "ring"),
    "bulk_load_wrong_bytes": ("never goes on", ""),
    "bulk_load_no_empty_wait": ("race (write after read)", "ring"),
    "bulk_load_misaligned": ("misaligned access", "src"),
    "bulk_load_out_of_bounds": ("out of bounds", "src"),
    "bulk_load_no_init_barrier": ("race (read after write)", "full"),
    "bulk_store_no_proxy_fence": ("missing proxy fence", "ring"),
    "bulk_store_no_read_wait": ("race (read after write)", "ring"),
    "bulk_store_no_final_wait": ("copy not waited for", ""),
    "bulk_pass_no_reuse_wait": ("race (read after write)", "ring"),
    "bulk_pass_other_barrier": ("race (read after write)", "ring"),
}
# The same without a bug; several bugs share one.
CLEAN = [name for name in BUGS if name not in ("across_blocks",) and not name.startswith(("async", "bulk"))]
CLEAN += ["async", "bulk_load", "bulk_store", "bulk_pass"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModule]:
    """By architecture."""
    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    source = Path(__file__).parent / "simgpu" / "planted.cu"
    folder = tmp_path_factory.mktemp("planted")
    return cache(lambda architecture: load(compile_ptx(source, architecture, folder / f"{architecture}.ptx")))


def on_each(names: Iterable[str]) -> Any:
    """Names with every architecture that has the instructions: bulk copies begin with sm_90."""
    cases = [(a, n) for a in ARCHITECTURES for n in names if a != "sm_80" or not n.startswith("bulk")]
    return pytest.mark.parametrize(("architecture", "name"), cases)


def run(module: LoadedModule, name: str, copies_early: bool = False):
    words = 8 * WORDS if name.startswith(("async", "bulk")) else WORDS
    src = np.random.default_rng(0).integers(0, 256, 4 * words, np.uint8)
    dst = np.zeros(4 * words, np.uint8)
    arguments = [Buffer("dst", dst, written=False), Buffer("src", src, writable=False), words]
    before = src.copy()
    report = module[name].launch(BLOCKS, THREADS, arguments, copies_early=copies_early, most_steps=5_000)
    assert name == "write_to_the_source_bug" or np.array_equal(src, before)
    return report, src.view(np.uint32), dst.view(np.uint32)


@on_each(BUGS)
def test_a_planted_bug_is_found(planted, architecture, name):
    kind, buffer = BUGS[name]
    module = planted(architecture)
    report, _, _ = run(module, name + "_bug")
    assert kind in report.kinds(), [str(finding) for finding in report.findings]
    finding = next(finding for finding in report.findings if finding.kind == kind)
    assert buffer in finding.buffer
    assert finding.text in module[name + "_bug"].kernel.lines()[finding.line]
    assert finding.count > 0 and finding.thread[0] < THREADS and finding.block[0] < BLOCKS


@on_each([name for name in BUGS if name.startswith(("async", "bulk"))])
def test_a_copy_that_runs_at_once_hides_no_bug(planted, architecture, name):
    """Then the bytes are right by luck."""
    report, _, _ = run(planted(architecture), name + "_bug", copies_early=True)
    assert report.findings or name == "bulk_store_no_final_wait"


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@on_each(CLEAN)
def test_nothing_is_found_without_the_bug(planted, architecture, name, early):
    report, src, dst = run(planted(architecture), name + "_ok", copies_early=early)
    report.check()
    if name == "async":
        rows = src.reshape(-1, THREADS, 4)
        assert np.array_equal(dst.reshape(-1, THREADS, 4), np.roll(rows, -33, axis=1))
    if name == "bulk_load":
        assert np.array_equal(dst.reshape(-1, THREADS), src.reshape(-1, THREADS)[:, np.arange(THREADS) ^ 5])
    if name in ("bulk_store", "bulk_pass"):
        assert np.array_equal(dst, src)


SAME_PLACE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry same_place(.param .u64 out) {
  .shared .align 4 .b8 word[4];
  .reg .b32 %value, %at;
  .reg .b64 %out;
  mov.u32 %value, %tid.x;
  shr.u32 %value, %value, SHIFT;
  mov.u32 %at, word;
  st.shared.b32 [%at], %value;
  bar.sync 0;
  ld.shared.b32 %value, [%at];
  ld.param.u64 %out, [out];
  st.global.b32 [%out], %value;
  ret;
}
"""


@pytest.mark.parametrize(("shift", "is_equal"), [(10, True), (0, False)], ids=["equal", "different"])
@pytest.mark.parametrize("equal_writes_race", [True, False])
def test_equal_bytes_stored_at_once(shift, is_equal, equal_writes_race):
    """A race by the memory model; one that no value can tell, where the bytes are the same and the memory is shared."""
    kernel = load(SAME_PLACE.replace("SHIFT", str(shift)))["same_place"]
    out = Buffer("out", np.zeros(4, np.uint8))
    report = kernel.launch(1, 64, [out], equal_writes_race=equal_writes_race)
    found = {(f.kind, f.buffer) for f in report.findings}
    assert (("race (write after write)", "word") in found) == (equal_writes_race or not is_equal)
    assert ("race (write after write)", "out") in found
