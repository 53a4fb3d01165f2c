"""What turns an instruction into a function: the registry of opcodes, their modifiers, and readers of operands.

A builder gets the instruction once and returns ``run(frame)``, which does it for all of a frame's threads. Register
values are NumPy arrays of unsigned integers (predicates: bool), one element a thread, or one element in all where every
thread has the same value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parse import SINK, TYPE_BYTES, Both, Imm, Instruction, Operand, PtxError, Reg, Special, Symbol, Vector, float_of

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

Run = Callable[[Any], None]
Read = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Type:
    kind: str  # u, s, b, f or p
    bits: int

    @property
    def dtype(self) -> Any:
        if self.kind == "p":
            return np.bool_
        return {"s": SIGNED, "f": FLOAT}.get(self.kind, UNSIGNED)[self.bits]

    @property
    def bytes(self) -> int:
        return self.bits // 8

    def __str__(self) -> str:
        return "pred" if self.kind == "p" else f"{self.kind}{self.bits}"


PRED = Type("p", 1)


def type_of(name: str) -> Type | None:
    if name == "pred":
        return PRED
    if name in TYPE_BYTES and name[1:].isdigit() and name != "b128":
        return Type(name[0], int(name[1:]))
    return None


class Build:
    """An instruction being built: hands out its modifiers and operands, and refuses what nobody took."""

    def __init__(self, instruction: Instruction, kernel: Any) -> None:
        self.instruction = instruction
        self.kernel = kernel
        self.operands = instruction.operands
        self.modifiers = list(instruction.modifiers)

    def refuse(self, why: str) -> PtxError:
        return self.instruction.refuse(why)

    def take(self, *names: str) -> str:
        """The first of these modifiers that is there, or ""."""
        for name in names:
            if name in self.modifiers:
                self.modifiers.remove(name)
                return name
        return ""

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if not found:
            raise self.refuse(f"expected one of .{', .'.join(names)}")
        return found

    def type(self, kinds: str = "usbfp", bits: tuple[int, ...] = (16, 32, 64)) -> Type:
        """The type that stands last."""
        found = type_of(self.modifiers[-1]) if self.modifiers else None
        if found is None or found.kind not in kinds or (found.kind != "p" and found.bits not in bits):
            raise self.refuse("the type is missing or not known for this instruction")
        self.modifiers.pop()
        return found

    # Operands.

    def register_bits(self, reg: Reg) -> int:
        """1 for a predicate."""
        kind = self.kernel.registers[reg.name]
        return 1 if kind == "pred" else 8 * TYPE_BYTES[kind]

    def read(self, operand: Operand, type_: Type, any_width: bool = False) -> Read:
        """Reads as ``type_``; a register of another width is refused, or cut or zero-extended with ``any_width``."""
        if isinstance(operand, Imm) and type_.kind == "p":
            chosen = np.array([operand.value != 0])
            return lambda f: chosen
        if isinstance(operand, Imm):
            return _constant(self._encode(operand, type_), type_)
        if isinstance(operand, Special):
            return _special(operand.name, type_, self)
        if isinstance(operand, Symbol):
            return _constant(self.kernel.symbol_address(operand.name, self.instruction), type_)
        if not isinstance(operand, Reg):
            raise self.refuse("expected a register or a constant")
        bits = self.register_bits(operand)
        if (bits == 1) != (type_.kind == "p") or (bits != type_.bits and not any_width):
            raise self.refuse(f"{operand.name} does not have the type {type_}")
        name, dtype = operand.name, np.dtype(type_.dtype)
        if type_.kind == "p":
            return (lambda f: ~f.get(name)) if operand.negated else (lambda f: f.get(name))
        if bits == type_.bits:
            return lambda f: f.get(name).view(dtype)
        unsigned = UNSIGNED[type_.bits]
        return lambda f: f.get(name).astype(unsigned).view(dtype)

    def _encode(self, imm: Imm, type_: Type) -> int:
        if imm.float_bits and type_.kind == "f" and imm.float_bits != type_.bits:
            return int(np.array([float_of(imm)], type_.dtype).view(UNSIGNED[type_.bits])[0])
        if not imm.float_bits and type_.kind == "f":
            raise self.refuse("an integer constant for a float")
        return imm.value & ((1 << type_.bits) - 1)

    def write(self, operand: Operand, type_: Type, any_width: bool = False) -> Callable[[Any, np.ndarray], None]:
        """Writes a value of ``type_``; into a wider register it is extended by its sign, if it has one."""
        if operand == SINK:
            return lambda f, value: None
        if not isinstance(operand, Reg):
            raise self.refuse("the destination is not a register")
        bits = self.register_bits(operand)
        if (bits == 1) != (type_.kind == "p") or (bits != type_.bits and not (any_width and bits > type_.bits)):
            raise self.refuse(f"{operand.name} cannot hold the type {type_}")
        name = operand.name
        if type_.kind == "p":
            return lambda f, value: f.set(name, value)
        unsigned, dtype = UNSIGNED[bits], np.dtype(type_.dtype)
        if bits == type_.bits:
            return lambda f, value: f.set(name, value.view(unsigned))
        if type_.kind == "s":
            wide = SIGNED[bits]
            return lambda f, value: f.set(name, value.view(dtype).astype(wide).view(unsigned))
        return lambda f, value: f.set(name, value.view(UNSIGNED[type_.bits]).astype(unsigned))

    def items(self, operand: Operand, count: int) -> list[Operand]:
        """The elements of a vector operand; a plain one is a vector of one."""
        found = list(operand.items) if isinstance(operand, Vector) else [operand]
        if len(found) != count:
            raise self.refuse(f"expected {count} elements, found {len(found)}")
        return found

    def two(self, operand: Operand) -> tuple[Operand, Operand]:
        """``a|b``, of which the second may be missing."""
        return (operand.first, operand.second) if isinstance(operand, Both) else (operand, SINK)


def simple(b: Build, type_: Type, count: int, function: Callable[..., np.ndarray], result: Type | None = None) -> Run:
    """``d = function(a, …)``, all of one type."""
    reads = [b.read(operand, type_) for operand in b.operands[1 : 1 + count]]
    write = b.write(b.operands[0], result or type_)
    return lambda f: write(f, function(*(read(f) for read in reads)))


def _constant(value: int, type_: Type) -> Read:
    made = np.array([value & ((1 << type_.bits) - 1)], UNSIGNED[type_.bits]).view(type_.dtype)
    made.flags.writeable = False
    return lambda f: made


def _special(name: str, type_: Type, build: Build) -> Read:
    read = build.kernel.special(name)
    if read is None:
        raise build.refuse(f"unknown special register %{name}")
    unsigned, dtype = UNSIGNED[type_.bits], np.dtype(type_.dtype)
    return lambda f: read(f).astype(unsigned).view(dtype)


@dataclass(frozen=True)
class Opcode:
    build: Callable[[Build], Run]
    operands: tuple[int, ...]
    # A block of its own: threads wait for others there, or a branch ends it.
    is_alone: bool


OPCODES: dict[str, Opcode] = {}


def opcode(
    name: str, *operands: int, alone: bool = False
) -> Callable[[Callable[[Build], Run]], Callable[[Build], Run]]:
    """Registers the builder of an opcode, with the operand counts that it knows."""

    def register(build: Callable[[Build], Run]) -> Callable[[Build], Run]:
        OPCODES[name] = Opcode(build, operands, alone)
        return build

    return register


def known_opcode(instruction: Instruction) -> Opcode:
    found = OPCODES.get(instruction.opcode)
    if found is None:
        raise instruction.refuse(f"unknown opcode {instruction.opcode!r}")
    if len(instruction.operands) not in found.operands:
        counts = " or ".join(map(str, found.operands))
        raise instruction.refuse(f"{instruction.opcode} with {len(instruction.operands)} operands, not {counts}")
    return found


def build_instruction(instruction: Instruction, kernel: Any) -> Run:
    build = Build(instruction, kernel)
    run = known_opcode(instruction).build(build)
    if build.modifiers:
        raise instruction.refuse(f"unknown modifier .{build.modifiers[0]}")
    return run
