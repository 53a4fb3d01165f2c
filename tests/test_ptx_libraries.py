"""The simulator on code of other hands: CUDA's C++ libraries (groups, barriers, pipelines, atomics) and assembly."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from simgpu.compile import ARCHITECTURES, compile_ptx, find_nvcc
from simgpu.ptx import Buffer, load

ROUNDS = 6

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
early_and_late = pytest.mark.parametrize("early", [False, True], ids=["late", "early"])


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    source = Path(__file__).parent / "simgpu" / "libraries.cu"
    folder = tmp_path_factory.mktemp("libraries")
    return cache(lambda architecture: load(compile_ptx(source, architecture, folder / f"{architecture}.ptx")))


def numbers(count):
    return np.random.default_rng(count).integers(0, 1000, count).astype(np.int32)


def launch(module, kernel, grid, block, arrays, *more, **options):
    buffers = [Buffer(name, array.view(np.uint8).reshape(-1)) for name, array in arrays.items()]
    return module[kernel].launch(grid, block, [*buffers, *more], **options)


@each_architecture
def test_groups(libraries, architecture):
    given, found = numbers(512), np.zeros(512, np.int32)
    launch(libraries(architecture), "groups", 2, 256, {"out": found, "in": given}).check()
    tiles = given.reshape(-1, 16)
    shifted = np.where(np.arange(16) < 13, np.roll(tiles, -3, axis=1), tiles)
    sums = (tiles.sum(axis=1, keepdims=True) + shifted).reshape(2, 256)
    assert np.array_equal(found.reshape(2, 256), np.roll(sums, -5, axis=1))


@early_and_late
@each_architecture
def test_copies(libraries, architecture, early):
    given, found = numbers(64 * 4 * ROUNDS), np.zeros(64 * 4 * ROUNDS, np.int32)
    arrays = {"out": found, "in": given}
    module = libraries(architecture)
    launch(module, "barrier_copies", 1, 64, arrays, copies_early=early).check()
    assert np.array_equal(found[:256].reshape(64, 4), given[:256].reshape(64, 4)[np.arange(64) ^ 21])
    launch(module, "pipelined_copies", 1, 64, arrays, ROUNDS, copies_early=early).check()
    assert np.array_equal(found.reshape(ROUNDS, 64, 4), np.roll(given.reshape(ROUNDS, 64, 4), -1, axis=1))


@each_architecture
def test_handing_over_between_blocks(libraries, architecture):
    for kernel, findings in (("ordered", set()), ("unordered", {"race (read after write)"})):
        arrays = {name: np.zeros(2, np.int32) for name in ("flags", "data", "out")}
        report = launch(libraries(architecture), kernel, 2, 32, arrays)
        assert report.kinds() == findings
        assert arrays["out"][0] == 42


@each_architecture
def test_assembly_by_hand(libraries, architecture):
    given, found, constants = numbers(128), np.zeros(128, np.int32), np.zeros(4)
    arrays = {"out": found, "in": given, "constants": constants}
    launch(libraries(architecture), "by_hand", 1, 32, arrays).check()
    assert np.array_equal(found, given)
    assert constants.tolist() == [1, -1.25, 300, -1.5]
