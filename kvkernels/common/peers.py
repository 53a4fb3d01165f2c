"""Two CUDA devices of which one reads and writes the other's memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes


def refusal(device: int, peer: int, enables: bool) -> str:
    """Why kernels on ``device`` cannot reach the memory of ``peer``; "" where they can, from now on if ``enables``.

    Access is torch's to enable: its allocator then maps what it has and will have, expandable segments too, which
    CUDA's own call leaves out. It does so for the first copy between two devices, so a byte is copied.
    """
    if not torch.cuda.can_device_access_peer(device, peer):
        return f"cuda:{device} cannot access the memory of cuda:{peer}"
    if enables:
        with _disable_current_modes(), torch.no_grad():
            here, there = (torch.empty(1, dtype=torch.uint8, device=f"cuda:{index}") for index in (device, peer))
            there.copy_(here)
    return ""
