"""Logic, shifts, bit fields, byte permutations and dot products of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .build import UNSIGNED, Build, Run, Type, opcode, simple
from .parse import Reg


def _logic(name: str, function: Callable[..., np.ndarray]) -> None:
    @opcode(name, 3)
    def build(b: Build) -> Run:
        type_ = b.type("bp")
        return simple(b, type_, 2, function)


_logic("and", np.bitwise_and)
_logic("or", np.bitwise_or)
_logic("xor", np.bitwise_xor)


@opcode("not", 2)
def not_(b: Build) -> Run:
    return simple(b, b.type("bp"), 1, np.invert)


@opcode("cnot", 2)
def cnot(b: Build) -> Run:
    type_ = b.type("b")
    return simple(b, type_, 1, lambda x: (x == 0).astype(type_.dtype))


@opcode("lop3", 5)
def lop3(b: Build) -> Run:
    type_ = b.type("b", (32,))
    table = b.read(b.operands[4], Type("u", 32))

    def function(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        lut = int(table(None)[0])
        total = np.zeros(np.broadcast(x, y, z).shape, np.uint32)
        for i in range(8):
            if lut >> i & 1:
                total |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return total

    if isinstance(b.operands[4], Reg):
        raise b.refuse("the table must be a constant")
    return simple(b, type_, 3, function)


def _shift(b: Build, kinds: str, function: Callable[..., np.ndarray]) -> Run:
    """The amount is u32 and not taken modulo the width: larger ones shift everything out."""
    type_ = b.type(kinds)
    value, amount = b.read(b.operands[1], type_), b.read(b.operands[2], Type("u", 32))
    write = b.write(b.operands[0], type_)
    return lambda f: write(f, function(*np.broadcast_arrays(value(f), amount(f))))


def shift_left(x: np.ndarray, amount: np.ndarray) -> np.ndarray:
    bits = 8 * x.dtype.itemsize
    return np.where(amount < bits, x << np.minimum(amount, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: np.ndarray, amount: np.ndarray) -> np.ndarray:
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(amount, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(amount < bits, shifted, x.dtype.type(0))


@opcode("shl", 3)
def shl(b: Build) -> Run:
    return _shift(b, "b", shift_left)


@opcode("shr", 3)
def shr(b: Build) -> Run:
    return _shift(b, "usb", shift_right)


@opcode("shf", 4)
def shf(b: Build) -> Run:
    """A shift of the 64 bits b:a; left gives their upper half, right the lower one."""
    left = b.need("l", "r") == "l"
    wraps = b.need("wrap", "clamp") == "wrap"

    def function(x: np.ndarray, y: np.ndarray, amount: np.ndarray) -> np.ndarray:
        n = (amount & np.uint32(31) if wraps else np.minimum(amount, 32)).astype(np.uint64)
        both = y.astype(np.uint64) << np.uint64(32) | x
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return simple(b, b.type("b", (32,)), 3, function)


def _count(b: Build, function: Callable[[np.ndarray], np.ndarray], kinds: str = "b") -> Run:
    type_ = b.type(kinds, (32, 64))
    return simple(b, type_, 1, lambda x: function(x).astype(np.uint32), Type("u", 32))


def _smeared(x: np.ndarray) -> np.ndarray:
    """All bits below the highest one set."""
    for n in (1, 2, 4, 8, 16, 32):
        if n < 8 * x.dtype.itemsize:
            x = x | x >> x.dtype.type(n)
    return x


@opcode("popc", 2)
def popc(b: Build) -> Run:
    return _count(b, np.bitwise_count)


@opcode("clz", 2)
def clz(b: Build) -> Run:
    return _count(b, lambda x: np.bitwise_count(~_smeared(x)))


@opcode("bfind", 2)
def bfind(b: Build) -> Run:
    """The place of the highest bit that is not the sign; -1 where there is none."""
    as_shift = bool(b.take("shiftamt"))

    def function(x: np.ndarray) -> np.ndarray:
        bits = 8 * x.dtype.itemsize
        plain = np.where(x < 0, ~x, x).view(UNSIGNED[bits]) if x.dtype.kind == "i" else x
        place = np.bitwise_count(_smeared(plain)).astype(np.int32) - 1
        return np.where(place < 0, -1, bits - 1 - place if as_shift else place).view(np.int32).astype(np.uint32)

    return _count(b, function, "us")


REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


@opcode("brev", 2)
def brev(b: Build) -> Run:
    type_ = b.type("b", (32, 64))

    def function(x: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(x).view(np.uint8).reshape(-1, type_.bytes)
        return np.ascontiguousarray(REVERSED[rows[:, ::-1]]).view(type_.dtype).reshape(-1)

    return simple(b, type_, 1, function)


@opcode("bfe", 4)
def bfe(b: Build) -> Run:
    type_ = b.type("us", (32, 64))
    u32 = Type("u", 32)
    value, place, count = b.read(b.operands[1], type_), b.read(b.operands[2], u32), b.read(b.operands[3], u32)
    write = b.write(b.operands[0], type_)

    def run(f: Any) -> None:
        x, at, length = np.broadcast_arrays(value(f), place(f) & np.uint32(255), count(f) & np.uint32(255))
        rest = np.where(length < type_.bits, type_.bits - np.minimum(length, type_.bits), 0).astype(np.uint32)
        taken = shift_right(shift_left(shift_right(x, at), rest), rest)
        write(f, np.where(length == 0, x.dtype.type(0), taken))

    return run


@opcode("bfi", 5)
def bfi(b: Build) -> Run:
    type_ = b.type("b", (32, 64))
    u32 = Type("u", 32)
    new, old = b.read(b.operands[1], type_), b.read(b.operands[2], type_)
    place, count = b.read(b.operands[3], u32), b.read(b.operands[4], u32)
    write = b.write(b.operands[0], type_)

    def run(f: Any) -> None:
        x, y, at, length = np.broadcast_arrays(new(f), old(f), place(f) & np.uint32(255), count(f) & np.uint32(255))
        mask = shift_left(shift_left(np.ones_like(x), length) - x.dtype.type(1), at)
        write(f, (y & ~mask) | (shift_left(x, at) & mask))

    return run


@opcode("bmsk", 3)
def bmsk(b: Build) -> Run:
    wraps = b.need("wrap", "clamp") == "wrap"

    def function(at: np.ndarray, length: np.ndarray) -> np.ndarray:
        if wraps:
            at, length = at & np.uint32(31), length & np.uint32(31)
        return shift_left(shift_left(np.ones_like(at | length), length) - np.uint32(1), at)

    return simple(b, b.type("b", (32,)), 2, lambda x, y: function(*np.broadcast_arrays(x, y)))


PERMUTES = {
    "f4e": ((3, 2, 1, 0), (4, 3, 2, 1), (5, 4, 3, 2), (6, 5, 4, 3)),
    "b4e": ((5, 6, 7, 0), (6, 7, 0, 1), (7, 0, 1, 2), (0, 1, 2, 3)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((3, 2, 1, 0), (3, 2, 1, 1), (3, 2, 2, 2), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 1, 0), (3, 2, 1, 0)),
    "rc16": ((1, 0, 1, 0), (3, 2, 3, 2), (1, 0, 1, 0), (3, 2, 3, 2)),
}


@opcode("prmt", 4)
def prmt(b: Build) -> Run:
    """Picks four of the eight bytes b:a by nibbles of c, whose highest bit means the byte's sign instead."""
    type_ = b.type("b", (32,))
    mode = b.take(*PERMUTES)

    def selectors(c: np.ndarray) -> list[np.ndarray]:
        """Of the lowest byte first."""
        if not mode:
            return [c >> np.uint32(4 * i) & np.uint32(15) for i in range(4)]
        table = np.array(PERMUTES[mode], np.uint32)[c & np.uint32(3)]
        return [table[:, 3 - i] for i in range(4)]

    def function(x: np.ndarray, y: np.ndarray, c: np.ndarray) -> np.ndarray:
        both = y.astype(np.uint64) << np.uint64(32) | x
        total = np.zeros(np.broadcast(x, y, c).shape, np.uint32)
        for i, selector in enumerate(selectors(c)):
            byte = (both >> (8 * (selector & np.uint32(7))).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
            total |= np.where(selector & 8, sign, byte) << np.uint32(8 * i)
        return total

    return simple(b, type_, 3, function)


def _dot(b: Build, lanes: int) -> Run:
    """dp4a and dp2a: the sum of products of bytes, or of halves with bytes."""
    right_type, left_type = b.type("us", (32,)), b.type("us", (32,))
    upper = lanes == 2 and b.need("lo", "hi") == "hi"
    is_signed = "s" in (left_type.kind, right_type.kind)
    result = Type("s" if is_signed else "u", 32)
    reads = [b.read(b.operands[i], Type("u", 32)) for i in (1, 2, 3)]
    write = b.write(b.operands[0], result)
    halves = {2: (np.int16, np.uint16), 4: (np.int8, np.uint8)}[lanes]
    bytes_ = (np.int8, np.uint8)

    def run(f: Any) -> None:
        x, y, z = (np.ascontiguousarray(v) for v in np.broadcast_arrays(*(read(f) for read in reads)))
        left = x.view(halves[left_type.kind == "u"]).reshape(-1, lanes).astype(np.int64)
        right = y.view(bytes_[right_type.kind == "u"]).reshape(-1, 4).astype(np.int64)
        right = right[:, 2:] if upper else right[:, :lanes]
        write(f, ((left * right).sum(1) + z).astype(np.uint32))

    return run


@opcode("dp4a", 4)
def dp4a(b: Build) -> Run:
    return _dot(b, 4)


@opcode("dp2a", 4)
def dp2a(b: Build) -> Run:
    return _dot(b, 2)


@opcode("szext", 3)
def szext(b: Build) -> Run:
    """Extends the low ``b`` bits by zero or by their highest."""
    type_ = b.type("us", (32,))
    wraps = b.need("wrap", "clamp") == "wrap"
    value, count = b.read(b.operands[1], type_), b.read(b.operands[2], Type("u", 32))
    write = b.write(b.operands[0], type_)

    def run(f: Any) -> None:
        x, length = np.broadcast_arrays(value(f), count(f))
        length = length & np.uint32(31) if wraps else np.minimum(length, 32)
        rest = 32 - length
        write(f, np.where(length == 0, x.dtype.type(0), shift_right(shift_left(x, rest), rest)))

    return run
