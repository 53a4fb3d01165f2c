"""PTX text to kernels: parameters, variables and a flat list of instructions.

Written from the PTX ISA. Every statement is understood or refused: ``PtxError`` names the line.

    statement:   @!%p1  ld.global.v4.u32  {%r1, %r2, %r3, %r4}, [%rd1+16] ;
                 guard  opcode.modifiers  operands
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np


class PtxError(Exception):
    """PTX that the simulator does not know: nothing is skipped."""


@dataclass(frozen=True)
class Reg:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """The bits of a constant: integers in two's complement, floats as their encoding."""

    value: int
    float_bits: int = 0  # 32 or 64 where it was written as a float


@dataclass(frozen=True)
class Symbol:
    """A variable, a label or a function."""

    name: str


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Address:
    base: Reg | Symbol | Imm
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Both:
    """``a|b``: two destinations."""

    first: Operand
    second: Operand


SINK = Symbol("_")
Operand = Reg | Imm | Symbol | Special | Address | Vector | Both


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None = None

    def refuse(self, why: str) -> PtxError:
        return PtxError(f"line {self.line}: {why}: {self.text}")


@dataclass(frozen=True)
class Variable:
    name: str
    space: str
    align: int
    bytes: int
    initial: bytes = b""


@dataclass
class Function:
    name: str
    is_kernel: bool
    line: int
    parameters: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # name to type
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | str] = field(default_factory=list)  # a str is a label
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    limits: dict[str, tuple[int, ...]] = field(default_factory=dict)  # maxntid, reqntid


@dataclass
class Module:
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    # A function is parsed when it is first asked for: libraries hold many.
    _texts: dict[str, str] = field(default_factory=dict)
    _functions: dict[str, Function] = field(default_factory=dict)
    _storage: dict[str, np.ndarray] = field(default_factory=dict)

    def function(self, name: str) -> Function | None:
        """None where the module has no body of that name."""
        if name not in self._functions and name in self._texts:
            function = _Parser(self._texts[name]).function()
            _with_registers(function)
            self._functions[name] = function
        return self._functions.get(name)

    def text(self, name: str) -> str:
        return self._texts.get(name, "").strip()

    def storage(self) -> dict[str, np.ndarray]:
        """The memory of the module's global and constant variables, which all launches share; zero at first."""
        for name, variable in self.variables.items():
            if variable.space in ("global", "const") and name not in self._storage:
                raw = np.zeros(variable.bytes + 256, np.uint8)
                begin = -raw.ctypes.data % 256
                self._storage[name] = raw[begin : begin + variable.bytes]
                self._storage[name][: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
        return self._storage


TYPE_BYTES = {f"{kind}{bits}": bits // 8 for kind in "usbf" for bits in (8, 16, 32, 64, 128)}
TYPE_BYTES |= {"pred": 1, "f16x2": 4, "bf16": 2, "bf16x2": 4}
IGNORED_DIRECTIVES = (".loc", ".file", ".pragma", ".version", ".address_size")

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>"[^"]*") |
    (?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|[0-9]+(?:\.[0-9]*(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)) |
    (?P<number>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|[0-9]+U?) |
    (?P<word>[%$A-Za-z_.][\w$%.:]*(?:::[\w$]+)*) |
    (?P<mark>[{}\[\](),;:@!|+\-<>=])
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int


def _without_comments(text: str) -> str:
    """Blanks comments out; lines keep their numbers."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    return re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.DOTALL)


def _tokens(text: str) -> list[Token]:
    found = []
    at, line = 0, 1
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise PtxError(f"line {line}: cannot read {text[at : at + 40].split()[0]!r}")
        begin = match.start(match.lastgroup)
        line += text.count("\n", at, begin)
        word = match[match.lastgroup]
        # A label's colon is not part of its name; `shared::cta` keeps its own.
        if match.lastgroup == "word" and word.endswith(":"):
            word = word[:-1]
            at = match.end() - 1
        else:
            at = match.end()
        found.append(Token(match.lastgroup, word, line))
    return found


class _Parser:
    """Of a text without comments, whose lines are those of the file."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.tokens = _tokens(text)
        self.at = 0

    # Tokens.

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at].text if at < len(self.tokens) else ""

    @property
    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)].line

    def next(self) -> str:
        if self.at >= len(self.tokens):
            raise PtxError("the text ends in the middle of a statement")
        self.at += 1
        return self.tokens[self.at - 1].text

    def take(self, text: str) -> bool:
        if self.peek() != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> None:
        found, line = self.peek(), self.line
        if not self.take(text):
            raise PtxError(f"line {line}: expected {text!r}, found {found!r}")

    def number(self) -> int:
        sign = -1 if self.take("-") else 1
        token = self.next()
        try:
            return sign * _integer(token)
        except ValueError:
            raise PtxError(f"line {self.line}: expected a number, found {token!r}") from None

    # Directives.

    def module(self) -> Module:
        """All but the functions."""
        module = Module()
        while self.at < len(self.tokens):
            word = self.peek()
            if word == ".target":
                self.next()
                module.target = self.next()
                while self.take(","):
                    self.next()
            elif word in IGNORED_DIRECTIVES:
                self.rest_of_line()
            elif word in (".visible", ".extern", ".weak", ".common"):
                self.next()
            elif word in (".global", ".const", ".shared"):
                module.variables |= {v.name: v for v in self.variables()}
            else:
                raise PtxError(f"line {self.line}: unknown directive {word!r}")
        return module

    def rest_of_line(self) -> None:
        line = self.line
        while self.at < len(self.tokens) and self.line == line:
            self.at += 1

    def function(self) -> Function:
        line = self.line
        is_kernel = self.next() == ".entry"
        returns = self.parameters() if self.peek() == "(" else []
        function = Function(self.next(), is_kernel, line, returns=returns)
        if self.peek() == "(":
            function.parameters = self.parameters()
        while self.peek() not in ("{", ";"):
            self.function_directive(function)
        if self.take(";"):
            return function
        self.expect("{")
        self.block(function, {}, "")
        return function

    def function_directive(self, function: Function) -> None:
        word = self.next()
        if word in (".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".maxnctapersm", ".reqnctapercluster"):
            numbers = [self.number()]
            while self.take(","):
                numbers.append(self.number())
            function.limits[word[1:]] = tuple(numbers)
        elif word == ".pragma":
            self.next()
            self.take(";")
        elif word not in (".noreturn", ".explicitcluster", ".blocksareclusters"):
            raise PtxError(f"line {self.line}: unknown directive {word!r} of {function.name}")

    def parameters(self) -> list[Variable]:
        found = []
        self.expect("(")
        while not self.take(")"):
            found += self.variables(".param", ends=(",", ")"))
            self.take(",")
        return found

    def variables(self, space: str | None = None, ends: tuple[str, ...] = (";",)) -> list[Variable]:
        """``.shared .align 16 .b8 name[64] = {…}, other;``"""
        found_space = self.next()
        if found_space == ".reg" and space == ".param":
            raise PtxError(f"line {self.line}: a function with register parameters")
        align, kind = 0, ""
        while self.peek().startswith("."):
            word = self.next()
            if word == ".align":
                align = self.number()
            elif word == ".ptr":
                # What it points to: `.ptr .global .align 16`.
                while self.peek() in (".global", ".const", ".shared", ".local", ".align", ".generic"):
                    if self.next() == ".align":
                        self.number()
            elif word in (".attribute", ".managed"):
                raise PtxError(f"line {self.line}: {word} is not supported")
            elif word[1:] in TYPE_BYTES:
                kind = word[1:]
            elif word not in (".v2", ".v4"):
                raise PtxError(f"line {self.line}: unknown {word!r} in a declaration")
            else:
                raise PtxError(f"line {self.line}: vector variables are not supported")
        found = []
        while True:
            name, count = self.next(), 1
            while self.take("["):
                count *= 0 if self.peek() == "]" else self.number()
                self.expect("]")
            size = TYPE_BYTES[kind]
            initial = self.initial(size) if self.take("=") else b""
            found.append(Variable(name, found_space[1:], align or size, size * count, initial))
            if ends != (";",) or not self.take(","):
                break
        if ends == (";",):
            self.expect(";")
        return found

    def initial(self, size: int) -> bytes:
        numbers = []
        if not self.take("{"):
            numbers.append(self.constant())
        else:
            while not self.take("}"):
                numbers.append(self.constant())
                self.take(",")
        return b"".join((n.value & ((1 << 8 * size) - 1)).to_bytes(size, "little") for n in numbers)

    def constant(self) -> Imm:
        token = self.tokens[self.at]
        if token.kind not in ("number", "float") and token.text != "-":
            raise PtxError(f"line {self.line}: only constants can initialise a variable, found {token.text!r}")
        operand = self.operand({})
        assert isinstance(operand, Imm)
        return operand

    # Code. `scope` renames what an inner block declares; `prefix` makes those names unique.

    def block(self, function: Function, scope: dict[str, str], prefix: str) -> None:
        inner = 0
        begin = len(function.body)
        while not self.take("}"):
            word = self.peek()
            if word == "{":
                self.next()
                inner += 1
                self.block(function, dict(scope), f"{prefix}{self.line}.{inner}:")
            elif word == ".reg":
                self.registers(function, scope, prefix)
            elif word in (".local", ".shared", ".param"):
                for variable in self.variables():
                    scope[variable.name] = prefix + variable.name
                    function.variables[prefix + variable.name] = replace(variable, name=prefix + variable.name)
            elif word in (".loc", ".file"):
                self.rest_of_line()
            elif word == ".pragma":
                self.next(), self.next(), self.expect(";")
            elif word == ".branchtargets" or word == ".callprototype":
                raise PtxError(f"line {self.line}: {word} without a label")
            elif self.peek(1) == ":":
                self.label(function, scope, prefix)
            else:
                function.body.append(self.instruction(scope))
        if prefix:
            self.rename_labels(function, begin, prefix)

    def rename_labels(self, function: Function, begin: int, prefix: str) -> None:
        """Branches to labels of an inner block that stand further down than the branch."""
        inside = {item for item in function.body[begin:] if isinstance(item, str) and item.startswith(prefix)}
        for i, item in enumerate(function.body[begin:], begin):
            if isinstance(item, Instruction) and item.opcode in ("bra", "brx"):
                operands = tuple(
                    Symbol(prefix + o.name) if isinstance(o, Symbol) and prefix + o.name in inside else o
                    for o in item.operands
                )
                function.body[i] = replace(item, operands=operands)

    def registers(self, function: Function, scope: dict[str, str], prefix: str) -> None:
        """``.reg .b32 %r<10>;`` or names."""
        self.next()
        kind = self.next()[1:]
        if kind not in TYPE_BYTES:
            raise PtxError(f"line {self.line}: registers of unknown type {kind!r}")
        while True:
            name = self.next()
            names = [name]
            if self.take("<"):
                names = [f"{name}{i}" for i in range(self.number())]
                self.expect(">")
            for each in names:
                scope[each] = prefix + each
                function.registers[prefix + each] = kind
            if not self.take(","):
                break
        self.expect(";")

    def label(self, function: Function, scope: dict[str, str], prefix: str) -> None:
        name = self.next()
        self.expect(":")
        if self.peek() == ".branchtargets":
            self.next()
            targets = [self.next()]
            while self.take(","):
                targets.append(self.next())
            self.expect(";")
            function.branch_tables[name] = targets
            return
        if self.peek() == ".callprototype":
            raise PtxError(f"line {self.line}: indirect calls are not supported")
        scope[name] = prefix + name
        function.body.append(prefix + name)

    def instruction(self, scope: dict[str, str]) -> Instruction:
        line = self.line
        guard = None
        if self.take("@"):
            negated = self.take("!")
            guard = Reg(scope.get(self.peek(), self.peek()), negated)
            self.next()
        opcode, *modifiers = self.next().split(".")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", opcode):
            raise PtxError(f"line {line}: expected an instruction, found {opcode!r}")
        operands = []
        while not self.take(";"):
            operands.append(self.operand(scope))
            if not self.take(",") and self.peek() != ";":
                raise PtxError(f"line {line}: expected ',' or ';', found {self.peek()!r}")
        return Instruction(line, self.lines[line - 1].strip(), opcode, tuple(modifiers), tuple(operands), guard)

    def operand(self, scope: dict[str, str]) -> Operand:
        first = self.one_operand(scope)
        return Both(first, self.one_operand(scope)) if self.take("|") else first

    def float_constant(self) -> Imm:
        """In hexadecimal its bits; in decimal a double."""
        text = self.next()
        if text[1:2] in ("f", "F", "d", "D"):
            return Imm(int(text[2:], 16), 32 if text[1] in "fF" else 64)
        return Imm(int.from_bytes(struct.pack("<d", float(text)), "little"), 64)

    def one_operand(self, scope: dict[str, str]) -> Operand:
        token = self.tokens[self.at]
        if self.take("{"):
            return Vector(tuple(self.list_until("}", scope)))
        if self.take("("):
            return Vector(tuple(self.list_until(")", scope)))
        if self.take("["):
            return self.address(scope)
        if self.take("!"):
            operand = self.one_operand(scope)
            if not isinstance(operand, Reg):
                raise PtxError(f"line {token.line}: '!' before something that is no predicate")
            return replace(operand, negated=True)
        if token.kind == "float":
            return self.float_constant()
        if token.text == "-" and self.tokens[self.at + 1].kind == "float":
            self.next()
            imm = self.float_constant()
            return replace(imm, value=imm.value ^ 1 << imm.float_bits - 1)
        if token.kind == "number" or token.text == "-":
            return Imm(self.number())
        if token.kind != "word":
            raise PtxError(f"line {token.line}: expected an operand, found {token.text!r}")
        word = self.next()
        if word in scope:
            word = scope[word]
        elif word.startswith("%"):
            return Special(word[1:])
        # Whether a scoped name is a register or a variable is known once the function has been read.
        if self.peek() == "+" and self.tokens[self.at + 1].kind == "number":
            self.next()
            return Address(Symbol(word), self.number())
        return Symbol(word)

    def list_until(self, end: str, scope: dict[str, str]) -> Iterator[Operand]:
        while not self.take(end):
            yield self.operand(scope)
            self.take(",")

    def address(self, scope: dict[str, str]) -> Address:
        operand = self.one_operand(scope)
        offset = 0
        if isinstance(operand, Address):
            operand, offset = operand.base, operand.offset
        if self.take("+") or self.peek() == "-":
            offset += self.number()
        self.expect("]")
        if not isinstance(operand, Symbol | Imm):
            raise PtxError(f"line {self.line}: an address must be a register, a variable or a number")
        return Address(operand, offset)


def _integer(token: str) -> int:
    text = token.rstrip("U")
    if len(text) > 1 and text[0] == "0" and text[1] not in "xXbB":
        return int(text, 8)
    return int(text, 0)


def _with_registers(function: Function) -> None:
    """Turns the symbols that are registers into ``Reg``."""

    def known(operand: Operand | None) -> Operand | None:
        if isinstance(operand, Symbol):
            return Reg(operand.name) if operand.name in function.registers else operand
        if isinstance(operand, Address):
            return Address(known(operand.base), operand.offset)
        if isinstance(operand, Vector):
            return Vector(tuple(known(item) for item in operand.items))
        if isinstance(operand, Both):
            return Both(known(operand.first), known(operand.second))
        return operand

    for i, item in enumerate(function.body):
        if isinstance(item, Instruction):
            function.body[i] = replace(item, operands=tuple(known(o) for o in item.operands))


_FUNCTION = re.compile(r"\.(entry|func)\b")


def parse(text: str) -> Module:
    # Debug information says nothing about what runs.
    text = _without_comments(re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0])
    outside, texts, kernels = [], {}, []
    at = 0
    while match := _FUNCTION.search(text, at):
        end = _end_of_function(text, match.end())
        outside.append(text[at : match.start()])
        found = text[match.start() : end]
        outside.append("\n" * found.count("\n"))
        # As many empty lines before it as it has in the file.
        padded = "\n" * text.count("\n", 0, match.start()) + found
        name = _name_of(found)
        if found.endswith("}"):
            texts[name] = padded
            kernels += [name] if match[1] == "entry" else []
        at = end
    module = _Parser("".join(outside) + text[at:]).module()
    module.kernels, module._texts = kernels, texts
    return module


def _end_of_function(text: str, at: int) -> int:
    """Past the closing brace of the body, or past the semicolon of a declaration."""
    depth = 0
    for match in re.finditer(r"[{};]", text[at:]):
        depth += {"{": 1, "}": -1, ";": 0}[match[0]]
        if depth == 0:
            return at + match.end()
    raise PtxError("the text ends in the middle of a function")


def _name_of(text: str) -> str:
    """After the returned parameters, if there are any."""
    match = re.match(r"\.(?:entry|func)\s*(?:\([^)]*\))?\s*([\w$%.]+)", text)
    if match is None:
        raise PtxError(f"a function without a name: {text[:60]!r}")
    return match[1]


def float_of(imm: Imm) -> float:
    if imm.float_bits == 32:
        return struct.unpack("<f", imm.value.to_bytes(4, "little"))[0]
    return struct.unpack("<d", imm.value.to_bytes(8, "little"))[0]
