"""Conversions as ops of their own, which is what a graph that is compiled or exported keeps of them.

A tracer cannot follow plans, addresses and ids. So where one is at work, ``convert_blocks`` and ``copy_slots`` call an
op over the tensors of their caches, whose layouts go along as text; the op does the same as the function does anywhere
else, once when it is traced, for the checks that need no values, and whenever the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvkernels.layout.cache import KVCache
from kvkernels.layout.layout import KVLayout
from kvkernels.registration import LIBRARY, lazy_bits, schemas


def register(name: str, function: Callable[..., None]) -> Any:
    """The op of ``schemas.TRACED`` with this name, which calls the function, also to be traced."""
    LIBRARY.registrations.define(name + schemas.TRACED[name], tags=schemas.TRACED_TAGS)
    LIBRARY.registrations.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{schemas.NAMESPACE}::{name}", function, lib=LIBRARY.registrations)
    lazy_bits.register_kernels(name, schemas.TRACED[name])
    return getattr(getattr(torch.ops, schemas.NAMESPACE), name).default


def tensors_and_text(caches: Sequence[KVCache]) -> tuple[list[Tensor], str]:
    """What an op is handed over of caches."""
    return [tensor for cache in caches for tensor in cache.tensors], "\n".join([cache.layout.text for cache in caches])


def caches_of(tensors: Sequence[Tensor], text: str) -> list[KVCache]:
    """The caches again."""
    caches, first = [], 0
    for layout in map(KVLayout.from_text, text.split("\n")):
        caches.append(KVCache(layout, list(tensors[first : first + layout.num_tensors])))
        first += layout.num_tensors
    return caches
