"""Branches and ends. A ``run`` here returns where each of the frame's threads goes on: a block's number, or EXIT."""

from __future__ import annotations

from typing import Any

import numpy as np

from .build import Build, Run, Type, opcode
from .parse import Symbol

EXIT = -2
STAY = -1  # waits where it is


def _target(b: Build, name: str) -> int:
    if name not in b.kernel.labels:
        raise b.refuse(f"unknown label {name!r}")
    return b.kernel.labels[name]


def everyone(f: Any, block: int) -> np.ndarray:
    return np.full(f.n, block, np.int32)


@opcode("bra", 1, alone=True)
def bra(b: Build) -> Run:
    b.take("uni")
    label = b.operands[0]
    if not isinstance(label, Symbol):
        raise b.refuse("expected a label")
    # Labels further down are known once all blocks are cut, which is before anything is built.
    target = _target(b, label.name)
    return lambda f: everyone(f, target)


@opcode("brx", 2, alone=True)
def brx(b: Build) -> Run:
    b.need("idx")
    b.take("uni")
    index = b.read(b.operands[0], Type("u", 32))
    table = b.operands[1]
    labels = b.kernel.function.branch_tables.get(table.name) if isinstance(table, Symbol) else None
    if labels is None:
        raise b.refuse("expected a list of branch targets")
    targets = np.array([_target(b, label) for label in labels], np.int32)
    instruction = b.instruction

    def run(f: Any) -> np.ndarray:
        which = np.broadcast_to(index(f), f.n)
        outside = which >= len(targets)
        if outside.any():
            f.find(instruction, "branch index out of range", outside)
        return np.where(outside, EXIT, targets[np.where(outside, 0, which)])

    return run


@opcode("ret", 0, alone=True)
def ret(b: Build) -> Run:
    b.take("uni")
    return lambda f: everyone(f, EXIT)


@opcode("exit", 0, alone=True)
def exit_(b: Build) -> Run:
    return lambda f: everyone(f, EXIT)


@opcode("trap", 0, alone=True)
def trap(b: Build) -> Run:
    instruction = b.instruction

    def run(f: Any) -> np.ndarray:
        f.find(instruction, "trap", np.ones(f.n, bool))
        return everyone(f, EXIT)

    return run
