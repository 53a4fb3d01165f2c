"""What torch's CUDA build and the ops do, on a GPU or on the stand-in for CUDA that `make simgpu` has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from simgpu.sim import Sim
from torch_cuda.calls import reads_pageable

STAND_IN = os.environ.get("KVKERNELS_STAND_IN", "")


@pytest.fixture
def sim() -> Iterator[Sim | None]:
    """The stand-in that torch runs on, None on a GPU. All devices are left idle and on their default streams."""
    sim = Sim.of(STAND_IN) if STAND_IN else None
    yield sim
    if sim is None:
        torch.cuda.synchronize()  # an error of a kernel is that of the test which launched it
    else:
        sim.reset()  # a context may be broken
    for device in reversed(range(torch.cuda.device_count())):
        torch.cuda.set_stream(torch.cuda.default_stream(device))
    torch.cuda.set_device(0)


@pytest.fixture
def refuses_pageable() -> None:
    """For tests of what happens where a kernel cannot reach memory that nobody pinned: most devices, not all."""
    if reads_pageable():
        pytest.skip("the device reads pageable memory")


@pytest.fixture
def stand_in(sim: Sim | None) -> Sim:
    """The stand-in, for tests that can do without a GPU but not without it."""
    if sim is None:
        pytest.skip("has CUDA fail, reads a log of its calls or simulates a kernel, which only the stand-in can do")
    return sim
