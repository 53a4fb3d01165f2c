"""Says on which machine, and with which software, a benchmark ran."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import kvkernels


def cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_caches() -> dict[str, str]:
    """The sizes that the kernel reports for the first core's caches; a virtual machine may report its host's."""
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(folder / "type") != "Instruction":
            caches[f"L{_read(folder / 'level')}"] = _read(folder / "size")
    return caches


def describe(device: torch.device, huge_page_share: float | None) -> dict[str, Any]:
    """What a reader needs to judge the figures; ``huge_page_share`` is the part of the buffers on huge pages."""
    from kvkernels import _host, policy

    described: dict[str, Any] = {
        "device": str(device),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": cpu_caches(),
        "instruction_set": _host.instruction_set(),
        "cpu_policy": policy.cpu.in_force(),
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "huge_page_share": huge_page_share,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "kvkernels": kvkernels.__version__,
        "load_1_minute": os.getloadavg()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["compute_capability"] = f"{properties.major}.{properties.minor}"
        described["sms"] = properties.multi_processor_count
        described["cuda"] = torch.version.cuda
    return described


def in_words(described: dict[str, Any]) -> str:
    """The machine in one line."""
    caches = ", ".join(f"{level} {size}" for level, size in described["caches"].items())
    words = [f"{described['cpu']} ({described['cores']} cores, {caches}, {described['instruction_set']})"]
    if "gpu" in described:
        words.insert(0, f"{described['gpu']} (compute capability {described['compute_capability']})")
    if described["huge_page_share"] is not None:
        words.append(f"{described['huge_page_share']:.0%} of the buffers on huge pages")
    words.append(f"torch {described['torch']}")
    return "; ".join(words)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
