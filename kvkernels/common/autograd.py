"""What autograd has to know of an op that writes: it compares a tensor's version with the one it saved for backward.

The compiled library does the same in C++, and calls this where it does not know how to in a later torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def first_requiring_grad(tensors: Sequence[Tensor]) -> int:
    """Which of them requires a gradient; -1 where none does."""
    return next((i for i, tensor in enumerate(tensors) if tensor.requires_grad), -1)


def check_may_write(op: str, name: str, is_list: bool, written: Sequence[Tensor]) -> None:
    """ValueError where gradients are recorded and a tensor to be written requires one."""
    found = first_requiring_grad(written) if torch.is_grad_enabled() else -1
    if found >= 0:
        raise ValueError(
            f"{op}: {name}{f'[{found}]' if is_list else ''} must not require a gradient where gradients are recorded, "
            "got a tensor that does; torch.no_grad() allows it"
        )


def note_writes(written: Sequence[Tensor]) -> None:
    """A new version of each tensor; inference tensors have none."""
    for tensor in written:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
