"""A simulator of compiled GPU code: executes PTX on NumPy arrays, with a sanitizer.

    module = load(Path("kernel.ptx").read_text())
    src, dst = Buffer("src", bytes_in, writable=False), Buffer("dst", bytes_out, written=False)
    report = module["copy"].launch(grid=2, block=128, arguments=[src, dst, 4096])
    report.check()   # raises SanitizerError with every finding

``arguments`` are what the kernel's parameters are: a Buffer for a pointer, an int, or the bytes of a structure. Bytes
that no buffer of the launch holds are out of bounds.
"""

from .launch import LoadedKernel, LoadedModule, load
from .memory import Buffer
from .parse import PtxError
from .report import Access, Finding, Report, SanitizerError

__all__ = [
    "Access",
    "Buffer",
    "Finding",
    "LoadedKernel",
    "LoadedModule",
    "PtxError",
    "Report",
    "SanitizerError",
    "load",
]
