"""nvcc and g++ for the tests: PTX of a source, and a library for the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def find_nvcc() -> str | None:
    return shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def compile_ptx(source: Path, architecture: str, output: Path, flags: tuple[str, ...] = ()) -> str:
    """Compiles to PTX and returns it."""
    nvcc = find_nvcc()
    assert nvcc is not None
    include = f"-I{Path(__file__).parent}"
    _run([nvcc, "-std=c++20", "-w", f"-arch={architecture}", "-ptx", include, *flags, str(source), "-o", str(output)])
    return output.read_text()


def compile_host(source: Path, output: Path) -> Path:
    """For the host, where signed numbers wrap and any type may be read from any bytes, as on the device."""
    flags = [
        "-O1",
        "-w",
        "-fwrapv",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-x",
        "c++",
        f"-I{Path(__file__).parent}",
    ]
    _run(["g++", "-std=c++20", *flags, str(source), "-o", str(output)])
    return output
