"""Arguments as Python takes them on every floor: integers, what a tracer stands behind, and how errors print them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

INT64_MAX = (1 << 63) - 1
RUN_COLUMNS = 16  # of a row of copy_pages' runs


def shape_text(values: Sequence[Any]) -> str:
    """``[2, 3]``, as every error prints shapes and strides."""
    return "[" + ", ".join(map(str, values)) + "]"


def dtype_text(dtype: torch.dtype) -> str:
    """``float32``, as every error prints a dtype."""
    return str(dtype).removeprefix("torch.")


def integer(what: str, value: Any, wanted: str = "an integer", least: int = -INT64_MAX) -> int:
    """What ``operator.index`` makes of a value that is no bool, or ValueError; ``what`` is ``<op>: <argument>``."""
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    # Python refuses to print thousands of digits.
    if number is not None and not -INT64_MAX <= number <= INT64_MAX:
        raise ValueError(f"{what} must fit in int64, got a number of {number.bit_length()} bits")
    if number is None or number < least:
        raise ValueError(f"{what} must be {wanted}, got {value!r}")
    return number


def integers(what: str, values: Any) -> list[int]:
    """A list of them, from whatever can be gone through."""
    try:
        given = list(values)
    except TypeError:
        given = [None]
    if not all(isinstance(value, SupportsIndex) and not isinstance(value, bool) for value in given):
        raise ValueError(f"{what} must be integers, got {values!r}")
    return [integer(f"{what}[{i}]", value) for i, value in enumerate(given)]


def is_traced(t: Tensor) -> bool:
    """Whether it stands for a tensor to come: FakeTensorMode's, or one of a graph that is being compiled."""
    return hasattr(t, "fake_mode") or torch.compiler.is_compiling()


def has_values(t: Tensor) -> bool:
    """Whether it can be looked into."""
    return not (t.is_meta or is_traced(t))
