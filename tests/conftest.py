"""The test session: which kvkernels is tested, what a missing GPU means, and how cases are drawn."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What somebody has tuned on this machine is none of the tests' business, unless they name it.
os.environ.setdefault("KVKERNELS_POLICY", "default")

import hypothesis
import numpy as np
import pytest
import torch

import kvkernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(kvkernels.__file__).resolve().parent
ALLOWS_REFERENCE = os.environ.get("KVKERNELS_ALLOW_REFERENCE") == "1"
ON_STAND_IN = "KVKERNELS_STAND_IN" in os.environ
REQUIRES_CUDA = os.environ.get("KVKERNELS_REQUIRE_CUDA") == "1"
GIB = 1 << 30
BULK_SHARED_BYTES = 193 << 10  # of a CTA of the bulk kernel

# Tests import the case generators by name, and --import-mode=importlib leaves sys.path alone.
sys.path.append(str(Path(__file__).parent))

hypothesis.settings.register_profile(
    "kvkernels",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("kvkernels")


def pytest_sessionstart(session: pytest.Session) -> None:
    problem = _wrong_package()
    if problem:
        pytest.exit(problem, returncode=3)


def _wrong_package() -> str:
    """Why this kvkernels is not the one to test, or ""."""
    foreign = [path for path in sorted(PACKAGE.rglob("*.py")) if not _is_from_this_tree(path)]
    if foreign:
        return (
            f"the tests in {ROOT / 'tests'} import kvkernels from {PACKAGE}, whose {foreign[0].relative_to(PACKAGE)} "
            "is not this tree's; install this tree: pip install -e ."
        )
    found = kvkernels.info()
    if not found["compiled"] and not ALLOWS_REFERENCE:
        return (
            f"kvkernels from {PACKAGE} runs on the reference ({found['why']}), which would be compared with itself; "
            "build it, or set KVKERNELS_ALLOW_REFERENCE=1"
        )
    return ""


def _is_from_this_tree(path: Path) -> bool:
    twin = ROOT / "kvkernels" / path.relative_to(PACKAGE)
    return twin.exists() and twin.read_bytes() == path.read_bytes()


def pytest_report_header() -> str:
    found = kvkernels.info()
    return f"kvkernels: {PACKAGE}, library {found['library']}, CUDA device: {torch.cuda.is_available()}"


# Minutes each, with few tests: what runs in several processes must not leave them for last.
LONG_FILES = ("triton_ptx", "ptx_kernels", "ptx_bulk", "kernel_body", "ptx_fuzz", "core_cpp", "install", "streaming")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    marks = [mark.kwargs for mark in item.iter_markers("cuda")]
    if not marks:
        return
    if ON_STAND_IN and any(mark.get("torch_kernels") for mark in marks):
        pytest.skip("torch's own kernels do not run on the stand-in for CUDA")
    reason = _why_no_cuda()
    if reason and REQUIRES_CUDA:
        pytest.fail(f"KVKERNELS_REQUIRE_CUDA=1, but {reason}", pytrace=False)
    lacks = reason or _what_is_lacking(marks)
    if lacks:
        pytest.skip(lacks)


def _what_is_lacking(marks: list[dict[str, Any]]) -> str:
    """Which of the marks' needs the machine does not meet, or ""; a missing one is never a failure."""
    needs = {name: max(mark.get(name, 0) for mark in marks) for name in ("devices", "gib", "host_gib", "bulk")}
    if torch.cuda.device_count() < needs["devices"]:
        return f"needs {needs['devices']} CUDA devices, and {torch.cuda.device_count()} is there"
    device = torch.cuda.get_device_properties(0)
    if needs["bulk"] and (device.major < 9 or device.shared_memory_per_block_optin < BULK_SHARED_BYTES):
        return f"{device.name} has no bulk copies, or not the shared memory for them"
    # The stand-in's memory, host and device, exists only where it is touched.
    if ON_STAND_IN:
        return ""
    if device.total_memory < needs["gib"] * GIB:
        return f"needs {needs['gib']} GiB on the device, and it has {device.total_memory / GIB:.1f}"
    if needs["host_gib"] and _available_bytes() < needs["host_gib"] * GIB:
        return f"needs {needs['host_gib']} GiB of free host memory, and there are {_available_bytes() / GIB:.1f}"
    return ""


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _why_no_cuda() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if kvkernels.info()["cuda"]["built"] else "the library was built without CUDA code"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "cuda" in getattr(r, "keywords", ())]
    if skipped and _why_no_cuda():
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped: {_why_no_cuda()}", yellow=True)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seeds, and one thread: a team that waits for its slowest member makes thousands of small cases slow."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _any_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the stand-in for CUDA, asynchronous work happens as late and as mixed as CUDA allows, anew in every test."""
    if not ON_STAND_IN or request.node.get_closest_marker("cuda") is None:
        yield
        return
    from simgpu.sim import Sim

    sim = Sim.of(os.environ["KVKERNELS_STAND_IN"])
    sim.adversarial(zlib.crc32(request.node.nodeid.encode()))
    yield
    sim.adversarial(0)
    sim.reset()


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest, _same_start: None) -> int:
    """Torch's number of threads, which is what the cpu executor may use."""
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what earlier runs left in its caches: a cached graph would hide what a change broke."""
    import torch._functorch.config
    import torch._inductor.config

    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture(scope="session")
def simgpu_build() -> Path:
    """The build directory of the ``simgpu`` preset, up to date."""
    if shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin") is None:
        pytest.skip("the simgpu preset needs nvcc, which was not found")
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    build = ROOT / "build" / "simgpu"
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist share it
        for command in (
            ["cmake", "--preset", "simgpu", f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", "--preset", "simgpu"],
        ):
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}", pytrace=False)
    return build
