"""What a measurement holds for: the processor and the GPUs, as the system names them, without asking CUDA."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from kvkernels.common.text import ask

# Of the processor's features those that copies have to do with: a kernel that names others is no other machine.
_FEATURES = ("avx", "avx2", "avx512f", "avx512vl", "erms", "fsrm", "movdir64b", "asimd", "sve", "sve2")


def machine(root: Path = Path("/")) -> dict[str, Any]:
    """The machine that this process runs on.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are.

    Returns
    -------
    dict
        ``processor``, ``instruction_set`` (of the copies), ``features``, ``cores``, ``gpus`` (names with their links)
        and ``driver`` (of the GPUs, or None).
    """
    processor = _first_processor(root / "proc/cpuinfo")
    flags = set((processor.get("flags") or processor.get("Features") or "").split())
    driver = re.search(r"\b\d+\.\d+(\.\d+)?\b", _first_line(root / "proc/driver/nvidia/version"))
    build = json.loads(ask(torch.ops.kvkernels._build_info))
    return {
        "processor": _name_of(processor),
        "instruction_set": build.get("instruction_set"),
        "features": [name for name in _FEATURES if name in flags],
        "cores": os.cpu_count(),
        "gpus": sorted(_gpu(path, root) for path in (root / "proc/driver/nvidia/gpus").glob("*/information")),
        "driver": driver.group() if driver else None,
    }


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first thing in which a file's machine is another one, in words; empty where it is this one."""
    for key, value in here.items():
        if there.get(key) != value:
            return f"machine.{key} must be this machine's {value!r}, got {there.get(key)!r}"
    return ""


def _first_processor(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _name_of(processor: dict[str, str]) -> str:
    """Virtual machines have one model name for many processors, and Arm's have none."""
    names = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    return ", ".join(processor[name] if name == "model name" else f"{name} {processor[name]}"
                     for name in names if name in processor)  # fmt: skip


def _gpu(information: Path, root: Path) -> str:
    """``NVIDIA H100 80GB HBM3, 32.0 GT/s PCIe, x16``."""
    lines = _first_processor(information)
    device = root / "sys/bus/pci/devices" / information.parent.name.lower()
    width = _first_line(device / "max_link_width")
    link = [_first_line(device / "max_link_speed"), f"x{width}" if width else ""]
    return ", ".join(part for part in (lines.get("Model", "unknown"), *link) if part)


def _first_line(path: Path) -> str:
    try:
        return path.read_text().split("\n", 1)[0].strip()
    except OSError:
        return ""
