"""Single edits of Python sources, by their syntax: none is of a text, a docstring, an annotation or an error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "&"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
}  # fmt: skip
_BOOLEANS: dict[type[ast.boolop], tuple[str, str]] = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
_UNLIKE_SWAPPED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.LShift, ast.RShift)
_NAMES = {"src": "dst", "dst": "src", "min": "max", "max": "min", "begin": "end", "end": "begin", "low": "high",
          "high": "low", "any": "all", "all": "any"}  # fmt: skip
_CALLABLE = {"min", "max", "any", "all"}
_LEAVES = (ast.Raise, ast.Return, ast.Continue, ast.Break)


class Edit(NamedTuple):
    """Whole lines, from ``line`` on, and what stands there instead."""

    line: int
    kind: str
    before: str
    after: str


def edits(source: str) -> list[Edit]:
    """In the order of the lines."""
    return sorted(set(_Editor(source).of(ast.parse(source), set())))


class _Editor:
    def __init__(self, source: str) -> None:
        # Columns are counted in bytes.
        self._lines = [line.encode() for line in source.split("\n")]

    def _text(self, begin: tuple[int, int], end: tuple[int, int]) -> str:
        lines = self._lines[begin[0] - 1 : end[0]]
        lines[-1] = lines[-1][: end[1]]
        lines[0] = lines[0][begin[1] :]
        return b"\n".join(lines).decode()

    def _edit(self, kind: str, begin: tuple[int, int], end: tuple[int, int], text: str) -> Edit:
        first, last = self._lines[begin[0] - 1], self._lines[end[0] - 1]
        before = b"\n".join(self._lines[begin[0] - 1 : end[0]]).decode()
        return Edit(begin[0], kind, before, first[: begin[1]].decode() + text + last[end[1] :].decode())

    def _replaced(self, kind: str, node: ast.expr | ast.stmt, text: str) -> Edit:
        return self._edit(kind, _begin(node), _end(node), text)

    def _between(self, kind: str, left: ast.expr, right: ast.expr, words: tuple[str, str]) -> Iterator[Edit]:
        """The operator between two operands, which may be in parentheses."""
        begin, end = _end(left), _begin(right)
        text = self._text(begin, end)
        at = text.find(words[0])
        if at >= 0 and "#" not in text:
            yield self._edit(kind, begin, end, text[:at] + words[1] + text[at + len(words[0]) :])

    def of(self, node: ast.AST, names: set[str]) -> Iterator[Edit]:
        """``names``: what the function around it calls by name."""
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            names = _names_in(node)
        yield from self._of_one(node, names)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not (isinstance(child, ast.keyword) and child.arg == "strict"):
                    yield from self.of(child, names)

    def _of_one(self, node: ast.AST, names: set[str]) -> Iterator[Edit]:
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from self._between("comparison", left, right, _COMPARISONS[type(op)])
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from self._between("operator", left, right, _BOOLEANS[type(node.op)])
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            yield from self._between("operator", node.left, node.right, _OPERATORS[type(node.op)])
            if isinstance(node.op, _UNLIKE_SWAPPED):
                yield self._exchanged(node)
        elif isinstance(node, ast.Constant):
            yield from self._constants(node)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            yield from self._other_names(node, names)
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield from self._conditions(node)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield self._replaced("negated condition", test, f"not ({self._of_node(test)})")
        if isinstance(node, ast.stmt):
            yield from self._statements(node)

    def _of_node(self, node: ast.expr) -> str:
        return self._text(_begin(node), _end(node))

    def _exchanged(self, node: ast.BinOp) -> Edit:
        """With what is between the operands, and so with their parentheses."""
        between = self._text(_end(node.left), _begin(node.right))
        text = self._of_node(node.right) + between + self._of_node(node.left)
        return self._edit("swapped operand", _begin(node.left), _end(node.right), text)

    def _constants(self, node: ast.Constant) -> Iterator[Edit]:
        if isinstance(node.value, bool):
            yield self._replaced("swapped operand", node, str(not node.value))
        elif isinstance(node.value, int):
            for value in (node.value + 1, node.value - 1):
                if value >= 0:
                    yield self._replaced("constant", node, str(value))

    def _other_names(self, node: ast.Name | ast.Attribute, names: set[str]) -> Iterator[Edit]:
        word = node.id if isinstance(node, ast.Name) else node.attr
        other = _NAMES.get(word)
        if other is None or not isinstance(node.ctx, ast.Load):
            return
        if isinstance(node, ast.Attribute) or other in names or other in _CALLABLE:
            line, column = _end(node)
            yield self._edit("swapped operand", (line, column - len(word)), (line, column), other)

    def _conditions(self, node: ast.If | ast.While | ast.IfExp) -> Iterator[Edit]:
        test = self._of_node(node.test)
        yield self._replaced("negated condition", node.test, f"not ({test})")
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], _LEAVES):
            yield self._replaced("dropped check", node.test, f"False and ({test})")

    def _statements(self, node: ast.stmt) -> Iterator[Edit]:
        """A call, or what changes something that was there before."""
        targets = node.targets if isinstance(node, ast.Assign) else []
        changes = isinstance(node, ast.AugAssign) or any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets)
        if changes or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield self._replaced("dropped statement", node, "pass")
        if isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
            words = _OPERATORS[type(node.op)]
            yield from self._between("operator", node.target, node.value, (f"{words[0]}=", f"{words[1]}="))


def _names_in(node: ast.AST) -> set[str]:
    arguments = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
    return arguments | {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _begin(node: ast.expr | ast.stmt) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.expr | ast.stmt) -> tuple[int, int]:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset
