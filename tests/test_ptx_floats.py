"""The simulator against the processor in IEEE arithmetic: one source, compiled by nvcc and by g++, the same bits."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from simgpu.compile import ARCHITECTURES, compile_host, compile_ptx, find_nvcc
from simgpu.ptx import Buffer, load

SOURCE = Path(__file__).parent / "simgpu" / "floats.cu"
THREADS, BLOCKS = 128, 16
EDGES = np.array(
    [0.0, -0.0, 0.5, -0.5, 1.0, -1.5, 2.5, 3.5, 2.0**23 + 0.5, 2.0**24 + 1, -(2.0**31), 2.0**31, 2.0**32, 2.0**63,
     2.0**64, 1e-310, 1e-45, 3e38, 1e308, np.inf, -np.inf, np.nan, 0.1, 1 / 3]
)  # fmt: skip
NUMBERS = np.dtype([("x", "f4"), ("y", "f4"), ("z", "f4"), ("u", "f8"), ("v", "f8"), ("whole", "u8")], align=True)


def numbers(rng: np.random.Generator) -> np.ndarray:
    """Edges, numbers of any bits, and numbers near each other, which cancel."""
    count = THREADS * BLOCKS
    given = np.zeros(count, NUMBERS)
    near = rng.normal(size=count)
    for name in ("x", "y", "z", "u", "v"):
        type_ = NUMBERS[name]
        any_bits = rng.integers(0, 256, count * type_.itemsize, np.uint8).view(type_)
        with np.errstate(all="ignore"):
            kinds = [
                rng.choice(EDGES, count).astype(type_),
                any_bits,
                (near + rng.normal(size=count) * 1e-6).astype(type_),
            ]
        given[name] = np.choose(rng.integers(0, 3, count), kinds)
    given["whole"] = rng.integers(0, 2**64, count, np.uint64) >> rng.integers(0, 64, count).astype(np.uint64)
    return given


@pytest.mark.parametrize("flags", [(), ("-G",)], ids=["", "debug"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_floats(architecture: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    module = load(compile_ptx(SOURCE, architecture, tmp_path / "floats.ptx", flags))
    host = ctypes.CDLL(str(compile_host(SOURCE, tmp_path / "floats.so")))
    given = numbers(np.random.default_rng(7))
    found = np.zeros((THREADS * BLOCKS, ctypes.c_int.in_dll(host, "results").value), np.uint64)
    expected = found.copy()
    host.floats(*(ctypes.c_void_p(array.ctypes.data) for array in (given, expected)), THREADS * BLOCKS)
    buffers = [Buffer("in", given.view(np.uint8), writable=False), Buffer("out", found.view(np.uint8).reshape(-1))]
    module["floats"].launch(BLOCKS, THREADS, buffers).check()
    wrong = np.argwhere(found != expected)
    assert not len(wrong), [
        (result, hex(found[i, result]), hex(expected[i, result]), given[i]) for i, result in wrong[:5]
    ]
