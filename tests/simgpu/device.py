"""The device of the stand-in for CUDA: runs its kernel launches on the simulator, from the PTX inside a library."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .ptx import LoadedKernel, LoadedModule, Report, load
from .ptx.memory import Area

ILLEGAL_ADDRESS = 700
UNKNOWN = 999
PINNED_MEMORY = 1
_Runner = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t
)
_ParameterBytes = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)


def find_cuobjdump() -> str | None:
    """Of a CUDA toolkit, or of the triton package."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = None if found else importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        found = shutil.which("cuobjdump", path=str(Path(spec.submodule_search_locations[0], "backends/nvidia/bin")))
    return found


class Modules:
    """The kernels of a library, of which each source file has its own module."""

    def __init__(self, modules: Sequence[LoadedModule]) -> None:
        self.of = {name: module for module in modules for name in module.kernels}

    @property
    def kernels(self) -> list[str]:
        return list(self.of)

    def __getitem__(self, name: str) -> LoadedKernel:
        return self.of[name][name]

    def text(self, name: str) -> str:
        """A kernel's PTX without comments."""
        return self.of[name].text(name)


def ptx_of(library: Path) -> dict[str, Modules]:
    """The PTX that a library holds, by architecture."""
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump was not found: install a CUDA toolkit, or pip install triton")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool, "-xptx", "all", str(library.resolve())], cwd=folder, check=True, capture_output=True)
        modules: dict[str, list[LoadedModule]] = {}
        for path in sorted(Path(folder).glob("*.ptx")):
            architecture = re.search(r"sm_\w+?(?=\.ptx)", path.name)[0]  # type: ignore[index]
            modules.setdefault(architecture, []).append(load(path.read_text()))
    if not modules:
        raise RuntimeError(f"{library} holds no PTX")
    return {architecture: Modules(found) for architecture, found in sorted(modules.items())}


class Device:
    """Takes over the launches of a stand-in: ``cuda`` is its loaded libcuda."""

    def __init__(self, cuda: Any, module: Modules) -> None:
        self.cuda = cuda
        self.module = module
        self.counts_sectors = False
        self.copies_early = False  # asynchronous copies run when they are issued, not as late as they may
        self.reports: list[Report] = []
        self.last_reports: list[Report] = []
        self.failure: Exception | None = None
        self.unexecuted: dict[str, dict[int, str]] = {}
        # Memory that no allocation covers, for a device that reads pageable memory.
        self.pageable: list[np.ndarray] = []
        # Kept, since C holds nothing but their addresses.
        self.callbacks = _Runner(self._run), _ParameterBytes(self._parameter_bytes)
        cuda.fake_set_runner(*self.callbacks)

    def _parameter_bytes(self, kernel: bytes, index: int) -> int:
        """Of one parameter; 0 past the last."""
        name = kernel.decode()
        parameters = self.module[name].kernel.parameters if name in self.module.kernels else []
        return parameters[index].bytes if index < len(parameters) else 0

    def _run(self, kernel: bytes, arguments: Any, ctas: int, threads: int, shared_bytes: int) -> int:
        try:
            found = self.module[kernel.decode()]
            given = [ctypes.string_at(arguments[i], p.bytes) for i, p in enumerate(found.kernel.parameters)]
            report = found.launch_raw(
                ctas, threads, found.pack(given), self._areas(), counts_sectors=self.counts_sectors,
                dynamic_shared_bytes=shared_bytes, copies_early=self.copies_early,
            )  # fmt: skip
        except Exception as error:  # it must not cross C
            self.failure = error
            return UNKNOWN
        self._note(report)
        return ILLEGAL_ADDRESS if report.findings else 0

    def _note(self, report: Report) -> None:
        self.reports.append(report)
        known = self.unexecuted.setdefault(report.kernel, dict(report.unexecuted))
        self.unexecuted[report.kernel] = {line: text for line, text in known.items() if line in report.unexecuted}

    def _areas(self) -> list[Area]:
        count = self.cuda.fake_list_allocations(None, ctypes.c_int64(0))
        rows = np.zeros((count, 5), np.int64)
        self.cuda.fake_list_allocations(rows.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(count))
        areas = []
        for begin, end, memory, _, offset in rows.tolist():
            at = begin + (offset if memory == PINNED_MEMORY else 0)
            areas.append(Area.of_host(f"{begin:#x}", at, end - begin, True, True))
        areas += [Area.of_host("pageable", a.ctypes.data, a.nbytes, True, True) for a in self.pageable]
        return areas

    def take_reports(self) -> list[Report]:
        """Of the launches since the last call; raises what a launch failed with, or what was found in it."""
        reports, self.reports = self.reports, []
        self.last_reports = reports
        failure, self.failure = self.failure, None
        if failure:
            raise failure
        for report in reports:
            report.check()
        return reports
