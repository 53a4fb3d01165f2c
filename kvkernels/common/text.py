"""Strings of the private ops, as bytes, since torch before 2.14 never frees one that an op returns; and messages'."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def tensor_of(text: str) -> Tensor:
    """The bytes of ``text`` as uint8 on the CPU, whatever torch's default device is."""
    if not text:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def ask(op: Callable[..., Tensor], *args: object) -> str:
    """What a private op says, also under a mode, such as FakeTensorMode, that would answer in its place."""
    with _disable_current_modes():
        return op(*args).numpy().tobytes().decode()


def shortened(value: object) -> str:
    """A value in a message: its ``repr``, of which a long one is cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
