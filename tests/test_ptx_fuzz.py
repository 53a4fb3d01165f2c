"""The simulator against the processor: random integer kernels, compiled by nvcc for one and by g++ for the other."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from simgpu.compile import compile_host, compile_ptx, find_nvcc
from simgpu.fuzz import BLOCKS, INPUT_BYTES, OUTPUT_BYTES, THREADS, generate
from simgpu.ptx import Buffer, load

KERNELS = max(4, round(40 * float(os.environ.get("KVKERNELS_EXAMPLES", "1"))))

# Unoptimised code has calls, memory and conversions that the optimiser removes.
BUILDS = [
    ("sm_80", ()), ("sm_90", ()), ("sm_100", ()), ("sm_90", ("-maxrregcount=32", "-Xcicc", "-O1")), ("sm_100", ("-G",)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BUILDS)), ids=[" ".join((arch, *flags)) for arch, flags in BUILDS])
def test_random_kernels(number: int, tmp_path: Path):
    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    architecture, flags = BUILDS[number]
    source = generate(number, range(KERNELS))
    path = tmp_path / "kernels.cu"
    path.write_text(source.text)
    module = load(compile_ptx(path, architecture, tmp_path / "kernels.ptx", flags))
    host = ctypes.CDLL(str(compile_host(path, tmp_path / "kernels.so")))
    rng = np.random.default_rng(number)
    for name in source.names:
        given = rng.integers(0, 256, INPUT_BYTES, np.uint8)
        found = np.zeros(BLOCKS * THREADS * OUTPUT_BYTES, np.uint8)
        expected = found.copy()
        getattr(host, name)(given.ctypes.data_as(ctypes.c_void_p), expected.ctypes.data_as(ctypes.c_void_p))
        arguments = [Buffer("in", given, writable=False), Buffer("out", found)]
        report = module[name].launch(BLOCKS, THREADS, arguments, counts_sectors=False)
        report.check()
        assert np.array_equal(found, expected), name
        # Every thread's checksum, if nothing else.
        assert report.written("out").reshape(-1, OUTPUT_BYTES)[:, :8].all()
