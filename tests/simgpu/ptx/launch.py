"""Loading PTX and launching its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .machine import Machine
from .memory import Area, Buffer
from .parse import Module, PtxError, parse
from .program import Kernel
from .report import Report

Argument = Buffer | int | bytes | np.generic


class LoadedKernel:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.name = kernel.name

    @property
    def parameter_bytes(self) -> int:
        return self.kernel.parameter_bytes

    def pack(self, arguments: Sequence[Argument]) -> bytes:
        """The parameters as the launch lays them out."""
        parameters = self.kernel.parameters
        if len(arguments) != len(parameters):
            raise ValueError(f"{self.name} has {len(parameters)} parameters, got {len(arguments)} arguments")
        packed = bytearray(self.parameter_bytes)
        for parameter, argument in zip(parameters, arguments, strict=True):
            raw = _bytes_of(argument, parameter.bytes)
            if len(raw) != parameter.bytes:
                raise ValueError(f"{parameter.name} has {parameter.bytes} bytes, got {len(raw)}")
            at = self.kernel.parameter_places[parameter.name]
            packed[at : at + len(raw)] = raw
        return bytes(packed)

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Argument],
        *,
        buffers: Sequence[Buffer] = (),
        **options: Any,
    ) -> Report:
        """Runs the grid. ``buffers`` are what the kernel reaches by other ways than its arguments.

        ``options``: ``dynamic_shared_bytes``; ``copies_early`` runs asynchronous copies when they are issued, instead
        of as late as they may; ``counts_sectors``; ``equal_writes_race``, which as False lets the threads of one
        instruction store the same bytes to one place of shared memory, as Triton's do; ``most_steps``, after which a
        kernel counts as endless.
        """
        named = {id(a): a for a in [*arguments, *buffers] if isinstance(a, Buffer)}
        areas = [buffer.area() for buffer in named.values() if buffer.data.nbytes]
        return self.launch_raw(grid, block, self.pack(arguments), areas, **options)

    def launch_raw(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        parameters: bytes,
        areas: Sequence[Area],
        **options: Any,
    ) -> Report:
        if len(parameters) != self.parameter_bytes:
            raise ValueError(f"{self.name} has {self.parameter_bytes} bytes of parameters, got {len(parameters)}")
        return Machine(self.kernel, grid, block, parameters, areas, **options).run()


def _bytes_of(argument: Argument, size: int) -> bytes:
    if isinstance(argument, Buffer):
        return argument.address.to_bytes(8, "little")
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.generic):
        return argument.tobytes()
    return (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


class LoadedModule:
    """The kernels of one PTX text. Its global variables keep their values from launch to launch."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._kernels: dict[str, LoadedKernel] = {}

    @property
    def target(self) -> str:
        return self.module.target

    @property
    def kernels(self) -> list[str]:
        return self.module.kernels

    def __getitem__(self, name: str) -> LoadedKernel:
        if name not in self._kernels:
            self._kernels[name] = LoadedKernel(Kernel(self.module, name))
        return self._kernels[name]

    def text(self, name: str) -> str:
        """A kernel's PTX without comments."""
        return self.module.text(name)

    def variable(self, name: str) -> np.ndarray:
        """A global variable's bytes."""
        storage = self.module.storage()
        if name not in storage:
            raise PtxError(f"no global variable {name!r}")
        return storage[name]


def load(text: str) -> LoadedModule:
    return LoadedModule(parse(text))
