"""Single edits of the sources, each of which the tests should notice.

C++ is read by lines as clang-format leaves them, where an operator has a space on either side: what is in angle
brackets of a template has none. Python is read by its syntax, in python_edits.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import python_edits

FOLDERS = (
    "csrc/core", "csrc/cpu", "csrc/cuda", "csrc/host", "csrc/ops", "csrc/transfer",
    "kvkernels", "kvkernels_cli", "kvkernels_records",
)  # fmt: skip
# What runs inside of an engine alone, where tests/e2e has seeded defects of its own.
IN_AN_ENGINE = ("kvkernels/connectors/vllm", "kvkernels/capture/vllm")
SUFFIXES = {".h", ".cpp", ".cu", ".inc", ".py"}

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OPERATORS = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "&": "|", "|": "&", "&&": "||", "||": "&&",
             "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+="}  # fmt: skip
SWAPS = {"src": "dst", "dst": "src", "min": "max", "max": "min", "begin": "end", "end": "begin", "low": "high",
         "high": "low", "true": "false", "false": "true"}  # fmt: skip

# Lines that say nothing about what runs, or only how it is worded.
SKIPPED = re.compile(
    r"^\s*(//|#|\"|\*|\}|public:|(using|namespace|template|extern|class|struct|enum)\b|static_assert)"
    r"|\bthrow\b|value_error|text\(|fail\(|KVKERNELS_PRAGMA"
)
# A call or an assignment on a line of its own.
STATEMENT = re.compile(
    r"^(\s*)"
    r"(?!return|const|auto|using|int|uint|bool|std::vector|static|case|default|else|for|if|while)"
    r"([\w:\[\]().>*-]+(\(.*\)| [-+*/|&]?= .*));$"
)
ASM_WAIT = re.compile(r'"(mbarrier\.try_wait|cp\.async\.bulk\.wait_group|fence\.proxy)')


@dataclass(frozen=True)
class Mutant:
    """Whole lines, from ``line`` on, and what stands there instead."""

    path: str
    line: int
    kind: str
    before: str
    after: str

    def apply(self, root: Path) -> None:
        target = root / self.path
        lines = target.read_text().split("\n")
        if not self._is_at(lines, self.line):
            raise ValueError(f"{self.path}:{self.line} is not {self.before!r}")
        lines[self.line - 1 : self.line - 1 + self._line_count()] = self.after.split("\n")
        target.write_text("\n".join(lines))

    def moved(self, root: Path) -> Mutant | None:
        """The same edit where its line is now: None where it is gone, or there several times."""
        path = root / self.path
        lines = path.read_text().split("\n") if path.exists() else []
        if self._is_at(lines, self.line):
            return self
        found = [number for number in range(1, len(lines) + 1) if self._is_at(lines, number)]
        return replace(self, line=found[0]) if len(found) == 1 else None

    def key(self) -> str:
        """Does not change when lines above it do."""
        return f"{self.path}: {self._change()}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: {self._change()}"

    def _change(self) -> str:
        return "  ->  ".join(re.sub(r"\n\s*", " ", text.strip()) for text in (self.before, self.after))

    def _line_count(self) -> int:
        return self.before.count("\n") + 1

    def _is_at(self, lines: list[str], line: int) -> bool:
        return "\n".join(lines[line - 1 : line - 1 + self._line_count()]) == self.before


def _swapped(code: str, table: dict[str, str], pattern: str) -> Iterator[str]:
    for match in re.finditer(pattern, code):
        yield code[: match.start(1)] + table[match[1]] + code[match.end(1) :]


def _edits_of_line(line: str) -> Iterator[tuple[str, str]]:
    code, comment = _without_comment(line)
    for kind, table, pattern in (
        ("comparison", COMPARISONS, r" (<=|>=|==|!=|<|>) "),
        ("operator", OPERATORS, r" (\+=|-=|&&|\|\||<<|>>|\+|-|\*|/|%|&|\|) "),
        ("swapped operand", SWAPS, rf"\b({'|'.join(SWAPS)})\b"),
    ):
        for edited in _swapped(code, table, pattern):
            yield kind, edited + comment
    for match in re.finditer(r"(?<![\w.\"'])(\d+)(?![\w.\"'])", code):
        for step in (1, -1):
            if int(match[1]) + step >= 0:
                yield "constant", code[: match.start()] + str(int(match[1]) + step) + code[match.end() :] + comment
    condition = re.match(r"^(\s*(?:\} else )?if (?:constexpr )?)\((.*)\)( \{| .*;)$", code)
    if condition:
        yield "negated condition", f"{condition[1]}(!({condition[2]})){condition[3]}{comment}"
        yield "dropped check", f"{condition[1]}(false && ({condition[2]})){condition[3]}{comment}"
    statement = STATEMENT.match(code)
    if statement:
        yield "dropped statement", f"{statement[1]};{comment}"
    if ASM_WAIT.search(code):
        yield "dropped wait", re.sub(r'"[^"]*"', '""', code, count=1) + comment


def _without_comment(line: str) -> tuple[str, str]:
    at = line.find("  //")
    return (line, "") if at < 0 else (line[:at], line[at:])


def _mutants_of(path: str, source: str) -> Iterator[Mutant]:
    if path.endswith(".py"):
        for edit in python_edits.edits(source):
            yield Mutant(path, *edit)
        return
    for number, line in enumerate(source.split("\n"), 1):
        if SKIPPED.search(line) and not ASM_WAIT.search(line):
            continue
        for kind, after in _edits_of_line(line):
            if after != line:
                yield Mutant(path, number, kind, line, after)


def candidates(root: Path) -> list[Mutant]:
    found = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    names = [name for name in (str(path.relative_to(root)) for path in found) if not name.startswith(IN_AN_ENGINE)]
    return [mutant for name in names for mutant in _mutants_of(name, (root / name).read_text())]


def choose(root: Path, count: int, seed: int, only: str = "") -> list[Mutant]:
    """Spread over folders, files and kinds: at most one edit a line, and files by the root of their size."""
    by_file: dict[str, list[Mutant]] = {}
    for mutant in candidates(root):
        if only in mutant.path:
            by_file.setdefault(mutant.path, []).append(mutant)
    wanted = _shares({path: len(mutants) ** 0.5 for path, mutants in sorted(by_file.items())}, count, seed)
    return [mutant for path, number in wanted.items() for mutant in _some(by_file[path], number, f"{seed} {path}")]


def _shares(weights: dict[str, float], count: int, seed: int) -> dict[str, int]:
    """Whole parts of the count, each less than 1 off: as the multiples of one step fall, from a random one on."""
    step = sum(weights.values()) / count if weights else 1
    at = random.Random(seed).random()
    shares = {}
    for path, weight in weights.items():
        shares[path] = int(at + weight / step) - int(at)
        at += weight / step
    return shares


def _some(mutants: list[Mutant], wanted: int, seed: str) -> list[Mutant]:
    # A seed of its own for each file, so that a change to one leaves the others' edits as they were.
    rng = random.Random(seed)
    kinds: dict[str, list[Mutant]] = {}
    for mutant in rng.sample(mutants, len(mutants)):
        kinds.setdefault(mutant.kind, []).append(mutant)
    order = rng.sample(sorted(kinds), len(kinds))
    taken: dict[int, Mutant] = {}
    while len(taken) < wanted and any(kinds.values()):
        for kind in order:
            if kinds[kind] and len(taken) < wanted:
                mutant = kinds[kind].pop()
                taken.setdefault(mutant.line, mutant)
    return list(taken.values())
