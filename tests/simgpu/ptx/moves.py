"""Comparisons, choices, moves and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .build import PRED, Build, Run, Type, opcode, simple
from .parse import Symbol, Vector

# Comparisons and choices.

COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
UNORDERED = {name + "u": function for name, function in list(COMPARE.items())[:6]}


def _comparison(b: Build, type_: Type) -> Callable[..., np.ndarray]:
    name = b.need(*COMPARE, *UNORDERED, "num", "nan")
    if type_.kind == "f":
        isnan = lambda x, y: np.isnan(x) | np.isnan(y)  # noqa: E731
        if name in ("num", "nan"):
            return isnan if name == "nan" else lambda x, y: ~isnan(x, y)
        if name in UNORDERED:
            return lambda x, y: UNORDERED[name](x, y) | isnan(x, y)
        if name == "ne":
            return lambda x, y: (x != y) & ~isnan(x, y)
    elif name not in COMPARE or (name in ("lo", "ls", "hi", "hs") and type_.kind != "u"):
        raise b.refuse(f"comparison .{name} of {type_}")
    return COMPARE[name]


COMBINE: dict[str, Callable[..., np.ndarray]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp", 3, 4)
def setp(b: Build) -> Run:
    """``p|q = (a cmp b) op c, !(a cmp b) op c``."""
    type_ = b.type()
    compare = _comparison(b, type_)
    combine = COMBINE.get(b.take(*COMBINE))
    if (combine is not None) != (len(b.operands) == 4):
        raise b.refuse("a combining operation and a fourth operand go together")
    first, second = b.two(b.operands[0])
    write, write_opposite = b.write(first, PRED), b.write(second, PRED)
    left, right = b.read(b.operands[1], type_), b.read(b.operands[2], type_)
    third = b.read(b.operands[3], PRED) if combine else None

    def run(f: Any) -> None:
        result = compare(left(f), right(f))
        opposite = ~result
        if combine and third:
            result, opposite = combine(result, third(f)), combine(opposite, third(f))
        write(f, result)
        write_opposite(f, opposite)

    return run


@opcode("set", 3)
def set_(b: Build) -> Run:
    """All ones, or 1.0, where the comparison holds."""
    type_ = b.type("usbf")
    result = b.type("usf", (32,))
    compare = _comparison(b, type_)
    true = np.array([1.0], np.float32) if result.kind == "f" else np.array([-1], np.int32).view(np.uint32)
    return simple(b, type_, 2, lambda x, y: np.where(compare(x, y), true, true.dtype.type(0)), result)


@opcode("selp", 4)
def selp(b: Build) -> Run:
    type_ = b.type("usbf")
    left, right = b.read(b.operands[1], type_), b.read(b.operands[2], type_)
    chosen, write = b.read(b.operands[3], PRED), b.write(b.operands[0], type_)
    return lambda f: write(f, np.where(chosen(f), left(f), right(f)))


@opcode("slct", 4)
def slct(b: Build) -> Run:
    sign = b.type("sf", (32,))
    type_ = b.type("usbf")
    left, right = b.read(b.operands[1], type_), b.read(b.operands[2], type_)
    chosen, write = b.read(b.operands[3], sign), b.write(b.operands[0], type_)
    return lambda f: write(f, np.where(chosen(f) >= 0, left(f), right(f)))


# Moves and conversions.


@opcode("mov", 2)
def mov(b: Build) -> Run:
    type_ = b.type("usbfp", (16, 32, 64))
    to, source = b.operands
    if isinstance(to, Vector) or isinstance(source, Vector):
        return _pack(b, type_) if isinstance(source, Vector) else _unpack(b, type_)
    if isinstance(source, Symbol) and type_.kind == "p":
        raise b.refuse("a predicate from a variable")
    read, write = b.read(source, type_), b.write(to, type_)
    return lambda f: write(f, read(f))


def _pack(b: Build, type_: Type) -> Run:
    parts = b.operands[1].items
    element = Type("b", type_.bits // len(parts))
    reads, write = [b.read(part, element) for part in parts], b.write(b.operands[0], type_)

    def run(f: Any) -> None:
        columns = np.broadcast_arrays(*(read(f) for read in reads))
        write(f, np.stack(columns, 1).view(type_.dtype).reshape(-1))

    return run


def _unpack(b: Build, type_: Type) -> Run:
    parts = b.operands[0].items
    element = Type("b", type_.bits // len(parts))
    read, writes = b.read(b.operands[1], type_), [b.write(part, element) for part in parts]

    def run(f: Any) -> None:
        rows = np.ascontiguousarray(read(f)).view(element.dtype).reshape(-1, len(parts))
        for i, write in enumerate(writes):
            write(f, rows[:, i].copy())

    return run


TO_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt", 2)
def cvt(b: Build) -> Run:
    source, result = b.type("usf", (8, 16, 32, 64)), b.type("usf", (8, 16, 32, 64))
    saturates = bool(b.take("sat"))
    read = b.read(b.operands[1], source, any_width=True)
    write = b.write(b.operands[0], result, any_width=True)
    convert = _conversion(b, source, result, saturates)
    return lambda f: write(f, convert(read(f)))


def _conversion(b: Build, source: Type, result: Type, saturates: bool) -> Callable[[np.ndarray], np.ndarray]:
    if source.kind == "f" and result.kind == "f":
        to_whole = TO_WHOLE.get(b.take(*TO_WHOLE)) if source == result else None
        if saturates or (result.bits < source.bits and not b.take("rn")):
            raise b.refuse("only rounding to nearest is supported")
        return to_whole or (lambda x: x.astype(result.dtype))
    if result.kind == "f":
        b.need("rn")
        return lambda x: x.astype(result.dtype)
    limits = np.iinfo(result.dtype)
    if source.kind == "f":
        rounding = TO_WHOLE[b.need(*TO_WHOLE)]

        def from_float(x: np.ndarray) -> np.ndarray:
            """Clamped; NaN is zero."""
            wide = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
            inside = (wide > float(limits.min)) & (wide < float(limits.max))
            edges = np.where(wide > 0, limits.max, limits.min).astype(result.dtype)
            return np.where(inside, np.where(inside, wide, 0).astype(result.dtype), edges)

        return from_float
    if not saturates:
        return lambda x: x.astype(result.dtype)
    low = max(limits.min, np.iinfo(source.dtype).min)
    high = min(limits.max, np.iinfo(source.dtype).max)
    return lambda x: np.clip(x, source.dtype(low), source.dtype(high)).astype(result.dtype)
