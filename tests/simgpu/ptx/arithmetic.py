"""Sums, products, quotients and extremes of integers and IEEE floats. Unsigned arrays wrap as registers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .build import UNSIGNED, Build, Run, Type, opcode, simple

CARRY = "CC"


def _odd_sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sum of doubles with its last bit set where it is not exact: whatever rounds that to float rounds once."""
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)
    is_even = (total.view(np.uint64) & np.uint64(1)) == 0
    moved = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(total) & (error != 0) & is_even, moved, total)


def _wide_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exact."""
    return x.astype(np.float64) * y.astype(np.float64)


def _towards_zero(x: np.ndarray) -> np.ndarray:
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest.astype(np.float64)) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def _rounded(b: Build, type_: Type, nearest: Callable[..., np.ndarray], wide: Callable[..., np.ndarray]) -> Any:
    """To nearest even, as NumPy does, or of ``wide`` towards zero; other modes, and flushing denormals, are refused by
    being left."""
    if type_ == Type("f", 32) and b.take("rz"):
        return lambda *numbers: _towards_zero(wide(*numbers))
    if type_.kind == "f":
        b.take("rn")
    return nearest


def _carried(b: Build, type_: Type, function: Callable[..., tuple[np.ndarray, np.ndarray]], adds_carry: bool) -> Run:
    """add.cc, addc, sub.cc, subc: the carry is a register that only these see."""
    sets = bool(b.take("cc"))
    unsigned = Type("u", type_.bits)
    left, right = b.read(b.operands[1], unsigned), b.read(b.operands[2], unsigned)
    write = b.write(b.operands[0], unsigned)

    def run(f: Any) -> None:
        carry = f.get(CARRY).astype(unsigned.dtype) if adds_carry else np.zeros(1, unsigned.dtype)
        value, out = function(left(f), right(f), carry)
        write(f, value)
        if sets:
            f.set(CARRY, out)

    return run


def _add_carry(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    partial = a + b
    total = partial + carry
    return total, (partial < a) | (total < partial)


def _sub_borrow(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    partial = a - b
    total = partial - borrow
    return total, (a < b) | (partial < borrow)


def _saturated(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    limits = np.iinfo(np.int32)

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.clip(function(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max).astype(np.int32)

    return run


def _add_or_sub(b: Build, function: Callable[..., np.ndarray], carried: Callable[..., Any]) -> Run:
    type_ = b.type("usf")
    if "cc" in b.modifiers:
        return _carried(b, type_, carried, adds_carry=False)
    sign = function(0.0, 1.0)
    function = _rounded(b, type_, function, lambda x, y: _odd_sum(x.astype(np.float64), sign * y.astype(np.float64)))
    if b.take("sat"):
        if type_ != Type("s", 32):
            raise b.refuse(".sat is known for s32 alone")
        function = _saturated(function)
    return simple(b, type_, 2, function)


@opcode("add", 3)
def add(b: Build) -> Run:
    return _add_or_sub(b, np.add, _add_carry)


@opcode("sub", 3)
def sub(b: Build) -> Run:
    return _add_or_sub(b, np.subtract, _sub_borrow)


@opcode("addc", 3)
def addc(b: Build) -> Run:
    return _carried(b, b.type("us"), _add_carry, adds_carry=True)


@opcode("subc", 3)
def subc(b: Build) -> Run:
    return _carried(b, b.type("us"), _sub_borrow, adds_carry=True)


def high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product: of 64-bit numbers from four 32-bit products."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> bits).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = ua & low, ua >> np.uint64(32), ub & low, ub >> np.uint64(32)
    middle = a1 * b0 + ((a0 * b0) >> np.uint64(32))
    cross = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> np.uint64(32)) + (cross >> np.uint64(32))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


def _product(b: Build, type_: Type) -> tuple[Callable[..., np.ndarray], Type]:
    """lo, hi or wide, and the type of the result."""
    part = b.need("lo", "hi", "wide")
    if part == "lo":
        return np.multiply, type_
    if part == "hi":
        return high_half, type_
    if type_.bits == 64:
        raise b.refuse("128-bit products are not supported")
    wide = Type(type_.kind, 2 * type_.bits)
    return lambda x, y: x.astype(wide.dtype) * y.astype(wide.dtype), wide


@opcode("mul", 3)
def mul(b: Build) -> Run:
    type_ = b.type("usf")
    if type_.kind == "f":
        return simple(b, type_, 2, _rounded(b, type_, np.multiply, _wide_product))
    function, result = _product(b, type_)
    return simple(b, type_, 2, function, result)


def _mad(b: Build, carried: bool) -> Run:
    type_ = b.type("us")
    sets = bool(b.take("cc"))
    function, result = _product(b, type_)
    left, right = b.read(b.operands[1], type_), b.read(b.operands[2], type_)
    third, write = b.read(b.operands[3], result), b.write(b.operands[0], result)
    unsigned = UNSIGNED[result.bits]

    def run(f: Any) -> None:
        product, addend = function(left(f), right(f)), third(f)
        if not sets and not carried:
            return write(f, product + addend)
        carry = f.get(CARRY).astype(unsigned) if carried else np.zeros(1, unsigned)
        total, out = _add_carry(product.view(unsigned), addend.view(unsigned), carry)
        write(f, total)
        if sets:
            f.set(CARRY, out)

    return run


@opcode("madc", 4)
def madc(b: Build) -> Run:
    return _mad(b, carried=True)


def _wide_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return _odd_sum(_wide_product(x, y), z.astype(np.float64))


@opcode("fma", 4)
def fma(b: Build) -> Run:
    type_ = b.type("f", (32,))
    if not {"rn", "rz"} & set(b.modifiers):
        raise b.refuse("expected one of .rn, .rz")
    return simple(b, type_, 3, _rounded(b, type_, lambda *xyz: _wide_fma(*xyz).astype(np.float32), _wide_fma))


@opcode("mad", 4)
def mad(b: Build) -> Run:
    if b.modifiers[-1] == "f32":
        return fma(b)
    return _mad(b, carried=False)


def _low24(a: np.ndarray) -> np.ndarray:
    """The low 24 bits as a 64-bit number of the same signedness."""
    if a.dtype.kind == "i":
        return ((a.astype(np.int64) << 40) >> 40).astype(np.int64)
    return a.astype(np.uint64) & np.uint64(0xFFFFFF)


def _product24(b: Build, type_: Type) -> Callable[..., np.ndarray]:
    shift = 16 if b.need("lo", "hi") == "hi" else 0
    return lambda x, y: ((_low24(x) * _low24(y)) >> shift).astype(type_.dtype)


@opcode("mul24", 3)
def mul24(b: Build) -> Run:
    type_ = b.type("us", (32,))
    return simple(b, type_, 2, _product24(b, type_))


@opcode("mad24", 4)
def mad24(b: Build) -> Run:
    type_ = b.type("us", (32,))
    product = _product24(b, type_)
    return simple(b, type_, 3, lambda x, y, z: product(x, y) + z)


@opcode("sad", 4)
def sad(b: Build) -> Run:
    return simple(b, b.type("us"), 3, lambda x, y, z: np.where(x < y, y - x, x - y) + z)


def _magnitude(a: np.ndarray) -> np.ndarray:
    """Unsigned, so that the lowest number has one too."""
    unsigned = a.view(UNSIGNED[8 * a.dtype.itemsize])
    return np.where(a < 0, 0 - unsigned, unsigned) if a.dtype.kind == "i" else unsigned


def _signed(magnitude: np.ndarray, negative: np.ndarray, dtype: Any) -> np.ndarray:
    return np.where(negative, 0 - magnitude, magnitude).view(dtype)


def _division(b: Build, function: Callable[..., np.ndarray], sign: Callable[..., np.ndarray]) -> Run:
    """Towards zero. By zero the result is unspecified, which is a finding."""
    type_ = b.type("us")
    left, right, write = b.read(b.operands[1], type_), b.read(b.operands[2], type_), b.write(b.operands[0], type_)
    instruction = b.instruction

    def run(f: Any) -> None:
        x, y = np.broadcast_arrays(left(f), right(f))
        if not y.all():
            f.find(instruction, "division by zero", np.broadcast_to(y == 0, f.n))
            y = np.where(y == 0, y.dtype.type(1), y)
        write(f, _signed(function(_magnitude(x), _magnitude(y)), sign(x, y), type_.dtype))

    return run


@opcode("div", 3)
def div(b: Build) -> Run:
    if b.modifiers[-1][0] == "f":
        b.need("rn")
        return simple(b, b.type("f", (32, 64)), 2, np.divide)
    return _division(b, np.floor_divide, lambda x, y: (x < 0) != (y < 0))


@opcode("rem", 3)
def rem(b: Build) -> Run:
    return _division(b, np.remainder, lambda x, y: x < 0)


def _float_bits(b: Build, type_: Type, function: Callable[[np.ndarray, Any], np.ndarray]) -> Run:
    """abs and neg touch the sign alone, of NaNs too."""
    unsigned = UNSIGNED[type_.bits]
    sign = unsigned(1 << (type_.bits - 1))
    return simple(b, type_, 1, lambda x: function(x.view(unsigned), sign))


@opcode("abs", 2)
def abs_(b: Build) -> Run:
    type_ = b.type("sf")
    if type_.kind == "f":
        return _float_bits(b, type_, lambda x, sign: x & ~sign)
    return simple(b, type_, 1, lambda x: _magnitude(x))


@opcode("neg", 2)
def neg(b: Build) -> Run:
    type_ = b.type("sf")
    if type_.kind == "f":
        return _float_bits(b, type_, lambda x, sign: x ^ sign)
    return simple(b, type_, 1, lambda x: 0 - x)


def _extreme(
    b: Build,
    integer: Callable[..., np.ndarray],
    floating: Callable[..., np.ndarray],
    of_signs: Callable[..., np.ndarray],
) -> Run:
    """min and max: of two floats the one that is a number, and -0 is below 0."""
    type_ = b.type("usf")
    if type_.kind != "f":
        return simple(b, type_, 2, integer)
    unsigned = UNSIGNED[type_.bits]

    def choose(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = np.broadcast_arrays(x, y)
        signed = of_signs(np.ascontiguousarray(x).view(unsigned), np.ascontiguousarray(y).view(unsigned))
        return np.where(x == y, signed.view(type_.dtype), floating(x, y))

    return simple(b, type_, 2, choose)


@opcode("min", 3)
def min_(b: Build) -> Run:
    return _extreme(b, np.minimum, np.fmin, np.bitwise_or)


@opcode("max", 3)
def max_(b: Build) -> Run:
    return _extreme(b, np.maximum, np.fmax, np.bitwise_and)


@opcode("copysign", 3)
def copysign(b: Build) -> Run:
    """The first number's sign and the second's magnitude."""
    return simple(b, b.type("f", (32, 64)), 2, lambda sign, magnitude: np.copysign(magnitude, sign))


@opcode("sqrt", 2)
def sqrt(b: Build) -> Run:
    b.need("rn")
    return simple(b, b.type("f", (32, 64)), 1, np.sqrt)
