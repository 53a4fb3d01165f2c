"""The triton executor: what C++ lowered, carried out by Triton kernels. Unverified on a GPU.

Imports nothing of Triton until a call needs it: torch is the only hard dependency.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.triton.table import FAULT_OPS, Head

# Programs on a host link where the caller names no number, as csrc/cuda/kernel.h has for the compiled kernels.
HOST_LINK_PROGRAMS = 12

MISSING = "it needs the package triton: pip install kvkernels[triton]"

_fault_words: dict[int, Tensor] = {}
_fault_lock = threading.RLock()


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels, which it does on the CPU; settled when they are imported."""
    if "kvkernels.triton.kernels" not in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        return False
    from kvkernels.triton import kernels

    return kernels.INTERPRETED


def is_installed() -> bool:
    """Whether the package ``triton`` is there."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # something else has taken the name
        return False


def refusal(device: int) -> str:
    """Why no call on a device can be served now; ``""`` where it can. ``device`` -1 is the host."""
    try:
        is_interpreted = interprets()
        if device < 0 and not is_interpreted:
            return "it needs a tensor on a cuda device"
        if not is_installed():
            return MISSING
        importlib.import_module("kvkernels.triton.kernels")
    except Exception as error:
        return MISSING if not is_installed() else f"the package triton does not load: {type(error).__name__}: {error}"
    if device < 0:
        return ""
    if is_interpreted:
        return "TRITON_INTERPRET is set, and Triton's interpreter does not reach a device's memory"
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return "the stream captures a CUDA graph, which would repeat the upload of a table that is gone by then"
    return ""


def copy(table: Tensor, head: Sequence[int]) -> None:
    """Launch the kernel that C++ chose over its table, on the device's current stream."""
    from kvkernels.triton import kernels

    call = Head.of(head)
    programs = _programs(call, kernels.units_at_once(call))
    if call.fault or not call.ids_on_device:
        return kernels.launch(call, table.view(torch.int64), call.fault, programs)
    with _fault_lock:  # take_fault clears nothing that a launch writes after it has read
        kernels.launch(call, table.view(torch.int64), _fault_word(call.device).data_ptr(), programs)


def _programs(call: Head, units_at_once: int) -> int:
    """A persistent grid, never more than the units need."""
    budget = call.sm_budget or HOST_LINK_PROGRAMS
    if call.device >= 0:
        processors = torch.cuda.get_device_properties(call.device).multi_processor_count
        budget = min(budget if call.sm_budget or call.links_host else processors, processors)
    return min(budget, -(-call.units // units_at_once))


def _fault_word(device: int) -> Tensor:
    """What ``struct Fault`` in csrc/cuda/copy_body.h is, for a library without CUDA code."""
    with _fault_lock:
        if device not in _fault_words:
            with torch.inference_mode(False):  # it outlives the caller's mode, and is written outside of it
                _fault_words[device] = torch.zeros(3, dtype=torch.int64, device="cpu").to(f"cuda:{device}")
            torch.cuda.synchronize(device)  # once: the next call may be on another stream
        return _fault_words[device]


def take_fault(device: int) -> dict[str, int | str]:
    """What ``_check_device`` returns, from the words that are kept here: synchronises the device and clears."""
    with _fault_lock:
        word = _fault_words.get(device)
        if word is None:
            return {}
        torch.cuda.synchronize(device)
        count, complemented_row, op = word.tolist()
        if count == 0:
            return {}
        word.copy_(torch.zeros(3, dtype=torch.int64, device="cpu"))
        torch.cuda.synchronize(device)
        return {"count": count, "first_row": ~complemented_row, "op": FAULT_OPS[op]}
