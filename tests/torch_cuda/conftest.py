"""What torch's CUDA build and the ops do on the stand-in for CUDA. Only `make simgpu` has both."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from simgpu.sim import Sim

STAND_IN = os.environ.get("KVKERNELS_STAND_IN", "")
collect_ignore_glob = [] if STAND_IN else ["test_*.py"]


@pytest.fixture
def sim() -> Iterator[Sim]:
    """The stand-in that torch runs on; both devices are left on their default streams."""
    sim = Sim.of(STAND_IN)
    yield sim
    sim.reset()  # a context may be broken
    for device in (1, 0):
        torch.cuda.set_stream(torch.cuda.default_stream(device))
    torch.cuda.set_device(0)
