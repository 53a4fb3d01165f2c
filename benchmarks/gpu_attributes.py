"""What the device, its driver and its link say of themselves, before anything is measured."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import machine

# CUDA's numbers of cudaDeviceAttr.
ATTRIBUTES = {
    "PageableMemoryAccess": 88,
    "PageableMemoryAccessUsesHostPageTables": 100,
    "CanUseHostPointerForRegisteredMem": 91,
    "HostRegisterSupported": 99,
    "HostNativeAtomicSupported": 86,
    "ConcurrentManagedAccess": 89,
    "DirectManagedMemAccessFromHost": 101,
    "UnifiedAddressing": 41,
    "CanMapHostMemory": 19,
    "AsyncEngineCount": 40,
    "MultiProcessorCount": 16,
    "L2CacheSize": 38,
    "MaxSharedMemoryPerBlockOptin": 97,
    "ClockRate": 13,
    "MemoryClockRate": 36,
    "GlobalMemoryBusWidth": 37,
    "MemoryPoolsSupported": 115,
}

NVIDIA_SMI_FIELDS = (
    "driver_version",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "mig.mode.current",
)
LINK_FILES = ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width", "numa_node")


def describe(device: torch.device) -> dict[str, Any]:
    described = machine.describe(device, None)
    described["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    described["host_memory_bytes"] = host_memory_bytes("MemTotal")
    described["attributes"] = attributes(device.index)
    described["driver"] = _version("cudaDriverGetVersion")
    described["runtime"] = _version("cudaRuntimeGetVersion")
    described["link"] = link(device)
    described["nvidia_smi"] = nvidia_smi(device.index)
    described["git_commit"] = git_commit()
    return described


def runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    major = (torch.version.cuda or "").split(".")[0]
    return ctypes.CDLL(f"libcudart.so.{major}")


def attributes(device_index: int) -> dict[str, int | str]:
    """Each attribute, or CUDA's error code where the runtime has none."""
    found: dict[str, int | str] = {}
    value = ctypes.c_int()
    for name, number in ATTRIBUTES.items():
        error = runtime().cudaDeviceGetAttribute(ctypes.byref(value), number, device_index)
        found[name] = f"error {error}" if error else value.value
    runtime().cudaGetLastError()  # or torch's next call raises what was found out here
    return found


def _version(function: str) -> str:
    value = ctypes.c_int()
    error = getattr(runtime(), function)(ctypes.byref(value))
    return f"error {error}" if error else f"{value.value // 1000}.{value.value % 1000 // 10}"


def link(device: torch.device) -> dict[str, str]:
    """The link's speed and width as the system's files give them; a virtual machine's may be made up."""
    text = ctypes.create_string_buffer(64)
    error = runtime().cudaDeviceGetPCIBusId(text, len(text), device.index)
    runtime().cudaGetLastError()
    if error:
        return {"pci": f"error {error}"}
    place = text.value.decode().lower()
    found = {"pci": place}
    for name in LINK_FILES:
        try:
            found[name] = (Path("/sys/bus/pci/devices") / place / name).read_text().strip()
        except OSError:
            continue
    return found


def nvidia_smi(device_index: int) -> dict[str, str] | str:
    """What nvidia-smi answers, or why it does not."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    command = [
        "nvidia-smi",
        "-i",
        str(device_index),
        f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    answers = done.stdout.strip().split(", ")
    return dict(zip(NVIDIA_SMI_FIELDS, answers, strict=False))


def git_commit() -> str | None:
    """The commit of the tree that this file is in, or None where it has no history."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def host_memory_bytes(field: str) -> int:
    """``MemTotal`` or ``MemAvailable`` of this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
