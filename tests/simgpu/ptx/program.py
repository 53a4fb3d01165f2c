"""A kernel ready to run: calls inlined, variables placed, instructions built and cut into blocks.

block        instructions that run one after the other, with one entry at its first and one exit at its last
place        of a variable in its space: shared and local memory start at SPACE_BEGIN, so that 0 is nobody's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import access, arithmetic, bits, control, copies, moves, sync  # noqa: F401  (they register the opcodes)
from .build import PRED, UNSIGNED, Build, Run, build_instruction, known_opcode
from .parse import (
    TYPE_BYTES,
    Address,
    Both,
    Function,
    Instruction,
    Module,
    Operand,
    PtxError,
    Reg,
    Symbol,
    Variable,
    Vector,
)

SPACE_BEGIN = 1024
GUARD_BYTES = 16
MOST_INLINED = 64


@dataclass
class Step:
    """An instruction, its guard, and what it does."""

    instruction: Instruction
    guard: Callable[[Any], np.ndarray] | None
    run: Run


@dataclass
class Block:
    steps: list[Step] = field(default_factory=list)
    is_alone: bool = False
    # Registers that other blocks read, too.
    escaping: set[str] = field(default_factory=set)


@dataclass
class Layout:
    """Variables of one space, one after the other with a guard between."""

    size: int = SPACE_BEGIN
    places: dict[str, int] = field(default_factory=dict)

    def add(self, variable: Variable) -> None:
        align = max(variable.align, 1)
        begin = -(-self.size // align) * align
        self.places[variable.name] = begin
        self.size = begin + variable.bytes + (GUARD_BYTES if variable.bytes else 0)

    @property
    def parts(self) -> list[tuple[int, str]]:
        return sorted((place, name) for name, place in self.places.items())


class Kernel:
    def __init__(self, module: Module, name: str) -> None:
        if name not in module.kernels:
            raise PtxError(f"no kernel {name!r}; there are {', '.join(module.kernels) or 'none'}")
        self.module = module
        self.name = name
        entry = module.function(name)
        assert entry is not None
        function = _inlined(module, entry, (name,))
        self.function = function
        self.registers = function.registers | {arithmetic.CARRY: "pred"}
        self.parameters = function.parameters
        self.limits = function.limits
        self._place_variables()
        self.labels: dict[str, int] = {}
        self.blocks: list[Block] = []
        self._build_blocks()
        self.synchronises = any(_synchronises(s.instruction) for b in self.blocks for s in b.steps)
        self._find_escaping()

    # Variables.

    def _place_variables(self) -> None:
        self.shared, self.local = Layout(), Layout()
        self.dynamic_shared: str | None = None
        for variable in [*self.module.variables.values(), *self.function.variables.values()]:
            if variable.space == "shared":
                if variable.bytes == 0:
                    self.dynamic_shared = variable.name
                else:
                    self.shared.add(variable)
            elif variable.space in ("local", "param"):
                self.local.add(variable)
        if self.dynamic_shared:
            self.shared.size = -(-self.shared.size // 1024) * 1024
            self.shared.places[self.dynamic_shared] = self.shared.size
        at = 0
        self.parameter_places: dict[str, int] = {}
        for parameter in self.parameters:
            at = -(-at // parameter.align) * parameter.align
            self.parameter_places[parameter.name] = at
            at += parameter.bytes
        self.parameter_bytes = at
        self.global_places = {name: data.ctypes.data for name, data in self.module.storage().items()}

    def space_of(self, name: str) -> str:
        if name in self.parameter_places:
            return "param"
        if name in self.shared.places:
            return "shared"
        if name in self.local.places:
            return "local"
        return "global"

    def symbol_address(self, name: str, instruction: Instruction) -> int:
        """In its own space."""
        for places in (self.parameter_places, self.shared.places, self.local.places, self.global_places):
            if name in places:
                return places[name]
        raise instruction.refuse(f"unknown name {name!r}")

    def special(self, name: str) -> Callable[[Any], np.ndarray] | None:
        return sync.special(name)

    # Blocks.

    def _build_blocks(self) -> None:
        """Cuts at labels and round the instructions that stand alone; falling off the end is a return."""
        cuts: list[Block] = []
        instructions: list[list[Instruction]] = []
        is_open = False
        for item in [*self.function.body, Instruction(0, "ret", "ret", (), ())]:
            if isinstance(item, str):
                self.labels[item] = len(cuts)
                is_open = False
                continue
            alone = known_opcode(item).is_alone
            if alone or not is_open:
                cuts.append(Block(is_alone=alone))
                instructions.append([])
            instructions[-1].append(item)
            is_open = not alone
        self.blocks = cuts
        for block, items in zip(cuts, instructions, strict=True):
            block.steps = [self._step(item) for item in items]

    def _step(self, instruction: Instruction) -> Step:
        build = Build(instruction, self)
        guard = build.read(instruction.guard, PRED) if instruction.guard else None
        return Step(instruction, guard, build_instruction(instruction, self))

    def _find_escaping(self) -> None:
        """A register that one block alone uses, and writes before it reads it, need not be kept."""
        users: dict[str, set[int]] = {}
        exposed: set[str] = set()
        for number, block in enumerate(self.blocks):
            written: set[str] = set()
            for step in block.steps:
                reads, writes = _uses(step.instruction)
                exposed |= reads - written
                if step.guard is None:
                    written |= writes
                else:
                    exposed |= writes - written
                for name in reads | writes:
                    users.setdefault(name, set()).add(number)
        kept = {name for name, blocks in users.items() if len(blocks) > 1} | exposed | {arithmetic.CARRY}
        for block in self.blocks:
            block.escaping = kept

    def lines(self) -> dict[int, str]:
        return {s.instruction.line: s.instruction.text for b in self.blocks for s in b.steps if s.instruction.line}

    def zero_of(self, name: str) -> np.ndarray:
        """What a register holds before it is written: nothing sensible."""
        kind = self.registers[name]
        if kind == "pred":
            return np.array([False])
        count = TYPE_BYTES[kind]
        return np.full(count, 0xDB, np.uint8).view(UNSIGNED[8 * count])


def _synchronises(instruction: Instruction) -> bool:
    orders = {"acquire", "release", "acq_rel", "volatile"}
    names = {"bar", "barrier", "mbarrier", "cp", "fence", "membar"}
    return instruction.opcode in names or bool(orders & set(instruction.modifiers))


def _registers(operand: Operand | None) -> Iterator[str]:
    if isinstance(operand, Reg):
        yield operand.name
    elif isinstance(operand, Address):
        yield from _registers(operand.base)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _registers(item)
    elif isinstance(operand, Both):
        yield from _registers(operand.first)
        yield from _registers(operand.second)


def _uses(instruction: Instruction) -> tuple[set[str], set[str]]:
    """Registers read and written. A first operand that is an address, or a store's, is read."""
    operands = list(instruction.operands)
    writes: set[str] = set()
    if operands and not isinstance(operands[0], Address):
        writes = set(_registers(operands[0]))
        operands = operands[1:]
    reads = {name for operand in operands for name in _registers(operand)}
    if instruction.guard:
        reads.add(instruction.guard.name)
    # Not every opcode's first operand is a destination (bar.sync %r1): then it is both.
    if instruction.opcode in ("bar", "barrier", "brx", "nanosleep", "cp", "griddepcontrol"):
        reads |= writes
    return reads, writes


# Calls.


def _renamed(operand: Operand | None, prefix: str, names: dict[str, str]) -> Any:
    if isinstance(operand, Reg):
        return replace(operand, name=prefix + operand.name)
    if isinstance(operand, Symbol):
        return Symbol(names.get(operand.name, operand.name))
    if isinstance(operand, Address):
        return Address(_renamed(operand.base, prefix, names), operand.offset)
    if isinstance(operand, Vector):
        return Vector(tuple(_renamed(item, prefix, names) for item in operand.items))
    if isinstance(operand, Both):
        return Both(_renamed(operand.first, prefix, names), _renamed(operand.second, prefix, names))
    return operand


def _inlined(module: Module, function: Function, stack: tuple[str, ...]) -> Function:
    """The function with every call replaced by what it calls; its parameters are the caller's variables."""
    if not any(isinstance(item, Instruction) and item.opcode == "call" for item in function.body):
        return function
    result = replace(
        function,
        registers=dict(function.registers),
        variables=dict(function.variables),
        branch_tables=dict(function.branch_tables),
        body=[],
    )
    for item in function.body:
        if isinstance(item, str) or item.opcode != "call":
            result.body.append(item)
        else:
            _inline(module, result, item, stack)
    return result


def _inline(module: Module, caller: Function, call: Instruction, stack: tuple[str, ...]) -> None:
    operands = list(call.operands)
    returned = list(operands.pop(0).items) if isinstance(operands[0], Vector) else []
    name = operands.pop(0)
    passed = list(operands.pop(0).items) if operands else []
    if isinstance(name, Symbol) and name.name == "__assertfail":
        caller.body.append(replace(call, opcode="trap", modifiers=(), operands=()))
        return
    called = module.function(name.name) if isinstance(name, Symbol) else None
    if operands or called is None or not called.body:
        raise call.refuse("only direct calls of functions of the same module are supported")
    if called.name in stack or len(stack) > MOST_INLINED:
        raise call.refuse("recursion is not supported")
    if len(returned) != len(called.returns) or len(passed) != len(called.parameters):
        raise call.refuse(f"the parameters are not those of {called.name}")
    body = _inlined(module, called, (*stack, called.name))
    prefix = f"{len(caller.body)}.{called.name}:"
    end = prefix + "end"
    names = {variable: prefix + variable for variable in body.variables}
    names |= {label: prefix + label for label in body.body if isinstance(label, str)}
    names |= {table: prefix + table for table in body.branch_tables}
    for variable, given in [*zip(called.returns, returned, strict=True), *zip(called.parameters, passed, strict=True)]:
        if not isinstance(given, Symbol):
            raise call.refuse("parameters must be variables in parameter space")
        names[variable.name] = given.name
    caller.registers |= {prefix + register: kind for register, kind in body.registers.items()}
    caller.variables |= {prefix + v.name: replace(v, name=prefix + v.name) for v in body.variables.values()}
    caller.branch_tables |= {
        prefix + table: [prefix + label for label in labels] for table, labels in body.branch_tables.items()
    }
    begin = len(caller.body)
    for item in body.body:
        if isinstance(item, str):
            caller.body.append(prefix + item)
            continue
        guard = replace(item.guard, name=prefix + item.guard.name) if item.guard else None
        operands_ = tuple(_renamed(operand, prefix, names) for operand in item.operands)
        moved = replace(item, operands=operands_, guard=guard)
        if item.opcode == "ret":
            moved = replace(moved, opcode="bra", modifiers=(), operands=(Symbol(end),))
        caller.body.append(moved)
    if call.guard:
        skip = replace(call.guard, negated=not call.guard.negated)
        caller.body.insert(begin, replace(call, opcode="bra", modifiers=(), operands=(Symbol(end),), guard=skip))
    caller.body.append(end)
