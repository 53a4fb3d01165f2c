"""Strings of the private ops, as bytes: torch before 2.14 never frees a string that an op returns."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_of(text: str) -> Tensor:
    """The bytes of ``text`` as uint8 on the CPU, whatever torch's default device is."""
    if not text:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def text_of(returned: Tensor) -> str:
    return returned.numpy().tobytes().decode()
