"""Tensors that are conjugated or negated when they are read: sources are, and destinations are refused.

torch's own fallback for such tensors runs an op on copies and writes them back, which fails, in words about something
else, where the op returns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kvkernels.registration import schemas
from kvkernels.registration.library import LIBRARY

_KEYS = ("Conjugate", "Negative")
_WRITTEN = re.compile(r"Tensor\(a!\)(?:\[\])? (\w+)")  # (b!) is of a source that is only said to be written


def _is_lazy(t: Tensor) -> bool:
    return t.is_conj() or t.is_neg()


def _check_written(op: str, name: str, value: Tensor | list[Tensor]) -> None:
    for i, t in enumerate([value] if isinstance(value, Tensor) else value):
        if _is_lazy(t):
            which = name if isinstance(value, Tensor) else f"{name}[{i}]"
            raise ValueError(
                f"{op}: {which} must hold its values as they are, got one that is conjugated or negated when read"
            )


def _kernel(op: str, schema: str) -> Callable[..., Any]:
    overload = getattr(getattr(torch.ops, schemas.NAMESPACE), op).default
    names = [argument.name for argument in overload._schema.arguments]
    written = [(names.index(name), name) for name in _WRITTEN.findall(schema)]

    def resolved(*args: Any, **kwargs: Any) -> Any:
        for i, name in written:
            _check_written(op, name, args[i] if i < len(args) else kwargs[name])
        args, kwargs = tree_map_only(Tensor, lambda t: t.resolve_conj().resolve_neg(), (args, kwargs))
        return overload(*args, **kwargs)

    return resolved


def register_kernels(op: str, schema: str) -> None:
    """For tensors with either bit among an op's arguments."""
    for key in _KEYS:
        LIBRARY.registrations.impl(op, _kernel(op, schema), key)


for _op, _schema in schemas.PUBLIC.items():
    register_kernels(_op, _schema)
