"""Loads, stores and atomics in every space, and what goes with addresses.

ld.param/.const/.global/.shared/.local, generic: an address in a space's window of the generic addresses
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .build import PRED, Build, Read, Run, Type, opcode
from .parse import Address, Imm, Reg, Symbol

# Where each space lies among generic addresses; no process has memory there.
WINDOWS = {"shared": 0x7FF1 << 48, "local": 0x7FF2 << 48, "param": 0x7FF3 << 48}
WINDOW_BYTES = 1 << 40

LOAD_CACHE = ("ca", "cg", "cs", "lu", "cv")
STORE_CACHE = ("wb", "cg", "cs", "wt")
SCOPES = ("cta", "cluster", "gpu", "sys")
HINTS = (
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
    "L2::evict_normal", "L2::evict_first", "L2::evict_last", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip


def take_space(b: Build, *more: str) -> str:
    """param, shared, local, global, or "" for generic; constants lie in global memory."""
    found = b.take(
        "global",
        "shared",
        "shared::cta",
        "shared::cluster",
        "local",
        "const",
        "param",
        "param::entry",
        "param::func",
        *more,
    )
    found = found.split("::")[0]
    return "global" if found == "const" else found


def read_address(b: Build, operand: Any, space: str) -> tuple[Read, str]:
    """``[base + offset]`` as 64 bits, and its space, which the base of a generic one may decide."""
    if not isinstance(operand, Address):
        raise b.refuse("expected an address in brackets")
    base, offset = operand.base, np.uint64(operand.offset & (2**64 - 1))
    if isinstance(base, Symbol):
        own = b.kernel.space_of(base.name)
        # A function's parameters are variables of its caller.
        if space and space != own and not (space == "param" and own == "local"):
            raise b.refuse(f"{base.name} is not in {space} memory")
        space = own
        at = np.array([b.kernel.symbol_address(base.name, b.instruction)], np.uint64) + offset
        return (lambda f: at), space
    if isinstance(base, Imm):
        at = np.array([base.value & (2**64 - 1)], np.uint64) + offset
        return (lambda f: at), space
    assert isinstance(base, Reg)
    bits = b.register_bits(base)
    if bits not in (32, 64) or (bits == 32 and space not in ("shared", "local", "param")):
        raise b.refuse("addresses have 64 bits")
    if bits == 32:
        low = np.uint64(0xFFFFFFFF)
        return (lambda f: (f.get(base.name).astype(np.uint64) + offset) & low), space
    return (lambda f: f.get(base.name).view(np.uint64) + offset), space


def _strength(b: Build, names: tuple[str, ...]) -> str:
    """weak, or how the access synchronises."""
    found = b.take(*names)
    if found in ("relaxed", "acquire", "release", "mmio"):
        b.need(*SCOPES)
    return found


def _hints(b: Build, cache: tuple[str, ...]) -> int:
    """Takes hints, and says how many operands they add."""
    b.take(*cache)
    while b.take(*HINTS):
        pass
    return 1 if b.take("L2::cache_hint") else 0


def _vector(b: Build) -> int:
    return int(b.take("v2", "v4", "v8")[1:] or 1)


@opcode("ld", 2, 3)
def ld(b: Build) -> Run:
    type_ = b.type("usbf", (8, 16, 32, 64))
    count = _vector(b)
    strength = _strength(b, ("weak", "volatile", "relaxed", "acquire", "mmio"))
    space = take_space(b)
    read_only = bool(b.take("nc"))
    _check_operands(b, 2 + _hints(b, LOAD_CACHE))
    b.take("unified")
    address, space = read_address(b, b.operands[1], space)
    writes = [b.write(item, type_, any_width=True) for item in b.items(b.operands[0], count)]
    width = type_.bytes * count
    how = {"strong": strength not in ("", "weak"), "acquires": strength in ("acquire", "volatile")}
    instruction = b.instruction

    def run(f: Any) -> None:
        rows = f.machine.load(f, instruction, space, address(f), width, read_only=read_only, **how)
        words = rows.view(type_.dtype)
        for i, write in enumerate(writes):
            write(f, words[:, i].copy())

    return run


@opcode("ldu", 2)
def ldu(b: Build) -> Run:
    return ld(b)


def _check_operands(b: Build, count: int) -> None:
    if len(b.operands) != count:
        raise b.refuse(f"{len(b.operands)} operands, not {count}")


@opcode("st", 2, 3)
def st(b: Build) -> Run:
    type_ = b.type("usbf", (8, 16, 32, 64))
    count = _vector(b)
    strength = _strength(b, ("weak", "volatile", "relaxed", "release", "mmio"))
    space = take_space(b)
    _check_operands(b, 2 + _hints(b, STORE_CACHE))
    address, space = read_address(b, b.operands[0], space)
    reads = [b.read(item, type_, any_width=True) for item in b.items(b.operands[1], count)]
    how = {"strong": strength not in ("", "weak"), "releases": strength in ("release", "volatile")}
    instruction = b.instruction

    def run(f: Any) -> None:
        columns = [np.broadcast_to(read(f), f.n) for read in reads]
        rows = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        f.machine.store(f, instruction, space, address(f), rows, **how)

    return run


# Atomics: one thread after the other.

Update = Callable[[np.generic, np.generic], Any]
UPDATES: dict[str, Update] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: old + old.dtype.type(1) if old < x else old.dtype.type(0),
    "dec": lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1),
}


def _atomic(b: Build, target: int) -> Run:
    """``target`` is the address's place among the operands; what stands before it gets the old value."""
    type_ = b.type("usbf", (32, 64))
    order = b.take("relaxed", "acquire", "release", "acq_rel")
    b.take(*SCOPES)
    space = take_space(b)
    operation = b.need("cas", *UPDATES)
    b.take("noftz")
    hints = _hints(b, ())
    if type_.kind == "b" and operation not in ("and", "or", "xor", "exch", "cas"):
        raise b.refuse(f".{operation} of {type_}")
    if type_.kind == "f" and operation != "add":
        raise b.refuse(f".{operation} of {type_}")
    _check_operands(b, target + (3 if operation == "cas" else 2) + hints)
    address, space = read_address(b, b.operands[target], space)
    operand = b.read(b.operands[target + 1], type_)
    swap = b.read(b.operands[target + 2], type_) if operation == "cas" else None
    write = b.write(b.operands[0], type_) if target else None
    update = UPDATES.get(operation)
    instruction = b.instruction

    def run(f: Any) -> None:
        xs = np.broadcast_to(operand(f), f.n)
        swaps = np.broadcast_to(swap(f), f.n) if swap else xs
        old = np.zeros(f.n, type_.dtype)

        def one(i: int, before: np.generic) -> Any:
            old[i] = before
            if swap:
                return swaps[i] if before == xs[i] else before
            assert update is not None
            return update(before, xs[i])

        with np.errstate(over="ignore"):
            f.machine.atomics(f, instruction, space, address(f), type_, one, order)
        if write:
            write(f, old)

    return run


@opcode("atom", 3, 4, 5)
def atom(b: Build) -> Run:
    return _atomic(b, 1)


@opcode("red", 2, 3)
def red(b: Build) -> Run:
    return _atomic(b, 0)


# Addresses.


@opcode("cvta", 2)
def cvta(b: Build) -> Run:
    type_ = b.type("u", (32, 64))
    to_space = bool(b.take("to"))
    space = take_space(b)
    offset = np.uint64(WINDOWS.get(space, 0))
    u64 = Type("u", 64)
    if type_.bits != 64:
        raise b.refuse("generic addresses have 64 bits")
    read, write = b.read(b.operands[1], u64), b.write(b.operands[0], u64)
    if to_space:
        return lambda f: write(f, read(f) - offset)
    return lambda f: write(f, read(f) + offset)


def in_window(addresses: np.ndarray, space: str) -> np.ndarray:
    if space == "global":
        inside = np.ones(len(addresses), bool)
        for name in WINDOWS:
            inside &= ~in_window(addresses, name)
        return inside
    return (addresses - np.uint64(WINDOWS[space])) < WINDOW_BYTES


@opcode("isspacep", 2)
def isspacep(b: Build) -> Run:
    space = take_space(b)
    write, read = b.write(b.operands[0], PRED), b.read(b.operands[1], Type("u", 64))
    return lambda f: write(f, in_window(read(f), space))


def _does_nothing(name: str, *operands: int, modifiers: tuple[str, ...] = ()) -> None:
    """Hints, which change no value."""

    @opcode(name, *operands)
    def build(b: Build) -> Run:
        take_space(b)
        while b.take(*modifiers, *HINTS, "L1", "L2", "L2::cache_hint"):
            pass
        return lambda f: None


_does_nothing("prefetch", 1)
_does_nothing("prefetchu", 1)
_does_nothing("applypriority", 2)
_does_nothing("nanosleep", 1, modifiers=("u32",))
_does_nothing("pmevent", 1)
_does_nothing("griddepcontrol", 0, modifiers=("launch_dependents", "wait"))
_does_nothing("setmaxnreg", 1, modifiers=("inc", "dec", "sync", "aligned", "u32"))


@opcode("createpolicy", 1, 2, 3, 4)
def createpolicy(b: Build) -> Run:
    """A cache policy is an opaque number."""
    while b.take("fractional", "range", "cvt", "L2", "global", *HINTS):
        pass
    type_ = b.type("b", (64,))
    write = b.write(b.operands[0], type_)
    policy = np.array([0x12F0000000000000], np.uint64)
    return lambda f: write(f, policy)


@opcode("membar", 0)
def membar(b: Build) -> Run:
    b.need("cta", "gl", "sys")
    return lambda f: f.machine.fence(f)


@opcode("fence", 0)
def fence(b: Build) -> Run:
    if b.take("proxy"):
        kind = b.need("async", "alias", "async::generic")
        b.take("acquire", "release")
        b.take("global", "shared::cta", "shared::cluster", "sync_restrict::shared::cta")
        b.take(*SCOPES)
        return (lambda f: None) if kind == "alias" else lambda f: f.machine.proxy_fence(f)
    if b.take("mbarrier_init"):
        b.need("release")
        b.need("cluster")
        return lambda f: f.machine.proxy_fence(f)
    b.take("sc", "acq_rel", "acquire", "release")
    b.need(*SCOPES)
    return lambda f: f.machine.fence(f)
