"""Calls that are one to their caller: each has passed every check before the first one moves anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def all_or_none(calls: Sequence[Callable[[], None]], has_values: bool) -> None:
    """Make the calls of ops one after the other; where one of them is refused, none was made.

    Without values, as where a compiler traces them, nothing moves anyway.
    """
    if has_values and len(calls) > 1:
        torch.ops.kvkernels._explain_begin()  # until the end of it, ops check and lower, and move nothing
        try:
            for call in calls:
                call()
        finally:
            torch.ops.kvkernels._explain_end()
    for call in calls:
        call()
