"""Rules for which differences are too many: ``REGEX EXPRESSION``."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

#: What an expression may name.
METRICS = ("max_abs", "mean_abs", "rel", "cosine")
_COMPARISONS = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}


class Rule(NamedTuple):
    """When arrays whose name a pattern matches count as equal."""

    pattern: re.Pattern[str]
    text: str
    expression: ast.expr

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether the expression is true of an array's figures."""
        return _value(self.expression, figures)


def parse_rule(text: str) -> Rule:
    """Read a rule: a regular expression without spaces, and what must be true of the arrays that it is found in.

    Raises
    ------
    ValueError
        It is none; the text says why.

    Examples
    --------
    >>> rule = parse_rule("layer_1[0-9]_.*_key max_abs < 1e-2 and (cosine >= 0.99 or rel < 0.1)")
    >>> rule.holds({"max_abs": 0.005, "mean_abs": 0.0, "rel": 0.05, "cosine": 0.5})
    True
    """
    regex, _, expression = text.strip().partition(" ")
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ValueError(f"check-kv: --rule must begin with a regular expression, got {regex!r}: {error}") from None
    try:
        body = ast.parse(expression.strip(), mode="eval").body
        _check(body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(
            f"check-kv: --rule must be REGEX EXPRESSION, the expression of {', '.join(METRICS)}, numbers, "
            f"<, <=, >, >=, and, or, not, got {text!r}"
        ) from None
    return Rule(pattern, text, body)


def _check(node: ast.expr) -> None:
    """ValueError for whatever is no condition."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand)
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        for operand in (node.left, *node.comparators):
            _number(operand, dict.fromkeys(METRICS, 0.0))
    else:
        raise ValueError("no condition")


def _value(node: ast.expr, figures: Mapping[str, float]) -> bool:
    if isinstance(node, ast.BoolOp):
        values = (_value(value, figures) for value in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        return not _value(node.operand, figures)
    assert isinstance(node, ast.Compare)  # _check has seen to it
    numbers = [_number(operand, figures) for operand in (node.left, *node.comparators)]
    return all(
        _COMPARISONS[type(op)](left, right) for op, left, right in zip(node.ops, numbers, numbers[1:], strict=False)
    )


def _number(node: ast.expr, figures: Mapping[str, float]) -> float:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, figures)
    if isinstance(node, ast.Name) and node.id in METRICS:
        return figures[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not math.isnan(node.value):
        return float(node.value)
    raise ValueError("no number")
