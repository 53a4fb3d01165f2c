"""Single edits of the sources, each of which the tests should notice.

Works on lines as clang-format and ruff leave them, where an operator has a space on either side: what is in angle
brackets of a template has none.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

FOLDERS = ("csrc/core", "csrc/cpu", "csrc/cuda", "kvkernels/triton")
SUFFIXES = {".h", ".cpp", ".cu", ".inc", ".py"}

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OPERATORS = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "&": "|", "|": "&", "&&": "||", "||": "&&",
             "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "and": "or", "or": "and"}  # fmt: skip
SWAPS = {"src": "dst", "dst": "src", "min": "max", "max": "min", "begin": "end", "end": "begin", "low": "high",
         "high": "low", "true": "false", "false": "true", "True": "False", "False": "True"}  # fmt: skip

# Lines that say nothing about what runs, or only how it is worded.
SKIPPED = re.compile(
    r"^\s*(//|#|\"|'|\*|@|\}|public:"
    r"|(using|namespace|template|import|from|extern|class|struct|enum)\b|static_assert)"
    r"|\bthrow\b|\braise\b|value_error|text\(|fail\(|KVKERNELS_PRAGMA|\"\"\""
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
    path: str
    line: int
    kind: str
    before: str
    after: str

    def apply(self, root: Path) -> None:
        target = root / self.path
        lines = target.read_text().split("\n")
        if lines[self.line - 1] != self.before:
            raise ValueError(f"{self.path}:{self.line} is not {self.before!r}")
        lines[self.line - 1] = self.after
        target.write_text("\n".join(lines))

    def moved(self, root: Path) -> Mutant | None:
        """The same edit where its line is now: None where it is gone, or there several times."""
        path = root / self.path
        lines = path.read_text().split("\n") if path.exists() else []
        if self.line <= len(lines) and lines[self.line - 1] == self.before:
            return self
        found = [number for number, line in enumerate(lines, 1) if line == self.before]
        return replace(self, line=found[0]) if len(found) == 1 else None

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: {self.before.strip()}  ->  {self.after.strip()}"


def _swapped(code: str, table: dict[str, str], pattern: str) -> Iterator[str]:
    for match in re.finditer(pattern, code):
        yield code[: match.start(1)] + table[match[1]] + code[match.end(1) :]


def _edits(line: str, is_python: bool) -> Iterator[tuple[str, str]]:
    code, comment = _without_comment(line, is_python)
    for kind, table, pattern in (
        ("comparison", COMPARISONS, r" (<=|>=|==|!=|<|>) "),
        ("operator", OPERATORS, r" (\+=|-=|&&|\|\||<<|>>|\+|-|\*|/|%|&|\||and|or) "),
        ("swapped operand", SWAPS, rf"\b({'|'.join(SWAPS)})\b"),
    ):
        for edited in _swapped(code, table, pattern):
            yield kind, edited + comment
    for match in re.finditer(r"(?<![\w.\"'])(\d+)(?![\w.\"'])", code):
        for step in (1, -1):
            if int(match[1]) + step >= 0:
                yield "constant", code[: match.start()] + str(int(match[1]) + step) + code[match.end() :] + comment
    condition = re.match(r"^(\s*(?:\} else )?if (?:constexpr )?)\((.*)\)( \{| .*;)$", code)
    if condition and not is_python:
        yield "negated condition", f"{condition[1]}(!({condition[2]})){condition[3]}{comment}"
        yield "dropped check", f"{condition[1]}(false && ({condition[2]})){condition[3]}{comment}"
    statement = STATEMENT.match(code)
    if statement and not is_python:
        yield "dropped statement", f"{statement[1]};{comment}"
    if ASM_WAIT.search(code):
        yield "dropped wait", re.sub(r'"[^"]*"', '""', code, count=1) + comment


def _without_comment(line: str, is_python: bool) -> tuple[str, str]:
    at = line.find("  #" if is_python else "  //")
    return (line, "") if at < 0 else (line[:at], line[at:])


def candidates(root: Path) -> list[Mutant]:
    found = []
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.suffix in SUFFIXES):
        in_text = False
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if path.suffix == ".py" and line.count('"""') == 1:
                in_text = not in_text
            if in_text or (SKIPPED.search(line) and not ASM_WAIT.search(line)):
                continue
            for kind, after in _edits(line, path.suffix == ".py"):
                if after != line:
                    found.append(Mutant(str(path.relative_to(root)), number, kind, line, after))
    return found


def choose(root: Path, count: int, seed: int, only: str = "") -> list[Mutant]:
    """Spread over folders, files and kinds: at most one edit a line, and files by the root of their size."""
    by_file: dict[str, list[Mutant]] = {}
    for mutant in candidates(root):
        if only in mutant.path:
            by_file.setdefault(mutant.path, []).append(mutant)
    weights = {path: len(mutants) ** 0.5 for path, mutants in by_file.items()}
    scale = count / sum(weights.values()) if weights else 0
    chosen: list[Mutant] = []
    for path, mutants in sorted(by_file.items()):
        # Of its own, so that a change to one file leaves the others' edits as they were.
        rng = random.Random(f"{seed} {path}")
        kinds: dict[str, list[Mutant]] = {}
        for mutant in rng.sample(mutants, len(mutants)):
            kinds.setdefault(mutant.kind, []).append(mutant)
        taken: dict[int, Mutant] = {}
        wanted = max(1, round(weights[path] * scale))
        while len(taken) < wanted and any(kinds.values()):
            for kind in sorted(kinds):
                if kinds[kind] and len(taken) < wanted:
                    mutant = kinds[kind].pop()
                    taken.setdefault(mutant.line, mutant)
        chosen += taken.values()
    return chosen
