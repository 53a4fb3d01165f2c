"""The edits of `make mutants`: each is one, of what runs, and has a plan. Nothing is built or run here."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "mutants"))

import mutate
import python_edits
import steps

ROOT = Path(__file__).resolve().parents[1]

SOURCE = '''"""A module of 2 lines."""
from __future__ import annotations

LIMIT = 3


@dataclass(frozen=True)
class Pair:
    """Two, such as ``1 < 2``."""

    src: int = 0

    def f(self, low: Literal[1], high: list[2]) -> Literal[3]:
        """Return 4.

        >>> 1 + 1
        2
        """
        total = (low) - (high)
        for part in zip(self.parts, strict=True):
            total += part.src
        if total > LIMIT and not (
            self.off
        ):
            raise ValueError(f"f: total must be at most {LIMIT + 1}, got {total} of {1}")
        self.total = total
        self.note(min(low, high))
        return total if total in (low, high) else [n for n in self.parts if n][0]
'''

# By line.
EDITS = {
    4: ["LIMIT = 4", "LIMIT = 2"],
    11: ["src: int = 1"],
    19: ["total = (low) + (high)", "total = (high) - (low)", "total = (high) - (high)", "total = (low) - (low)"],
    21: ["total -= part.src", "total += part.dst", "pass"],
    22: [
        "if total >= LIMIT and not (",
        "if total > LIMIT or not (",
        "if not (total > LIMIT and not ( self.off )):",
        "if False and (total > LIMIT and not ( self.off )):",
    ],
    26: ["pass"],
    27: ["pass", "self.note(max(low, high))", "self.note(min(low, low))", "self.note(min(high, high))"],
    28: [
        "return total if total not in (low, high) else [n for n in self.parts if n][0]",
        "return total if not (total in (low, high)) else [n for n in self.parts if n][0]",
        "return total if total in (low, low) else [n for n in self.parts if n][0]",
        "return total if total in (high, high) else [n for n in self.parts if n][0]",
        "return total if total in (low, high) else [n for n in self.parts if not (n)][0]",
        "return total if total in (low, high) else [n for n in self.parts if n][1]",
    ],
}


def test_edits_of_python_are_of_what_runs():
    found: dict[int, list[str]] = {}
    for edit in python_edits.edits(SOURCE):
        found.setdefault(edit.line, []).append(" ".join(edit.after.split()))
    assert {line: sorted(after) for line, after in found.items()} == {
        line: sorted(after) for line, after in EDITS.items()
    }


@pytest.fixture(scope="module")
def candidates():
    return mutate.candidates(ROOT)


def test_an_edit_of_several_lines_is_made_and_found_again(tmp_path):
    path = tmp_path / "kvkernels" / "a.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    (edit,) = (one for one in mutate.candidates(tmp_path) if one.kind == "dropped check")
    path.write_text(f"# One line more.\n{SOURCE}")
    moved = edit.moved(tmp_path)
    assert moved is not None and moved.line == edit.line + 1 and moved.key() == edit.key()
    moved.apply(tmp_path)
    assert path.read_text() == "# One line more.\n" + SOURCE.replace(edit.before, edit.after)
    with pytest.raises(ValueError, match=r"a\.py:23 is not"):
        moved.apply(tmp_path)
    assert moved.moved(tmp_path) is None


def test_every_edit_of_python_is_python(candidates):
    for path in sorted({mutant.path for mutant in candidates if mutant.path.endswith(".py")}):
        source = (ROOT / path).read_text()
        for edit in python_edits.edits(source)[::25]:
            lines = source.split("\n")
            lines[edit.line - 1 : edit.line + edit.before.count("\n")] = edit.after.split("\n")
            ast.parse("\n".join(lines), path)


def test_choices_are_spread_and_as_many_as_asked_for(candidates):
    chosen = mutate.choose(ROOT, 60, 3)
    assert len(chosen) == len({(mutant.path, mutant.line) for mutant in chosen}) == 60
    folders = {str(Path(mutant.path).parent) for mutant in chosen}
    assert folders >= {"csrc/core", "csrc/cpu", "csrc/cuda", "csrc/ops", "kvkernels/layout", "kvkernels/memory"}
    assert chosen == mutate.choose(ROOT, 60, 3) != mutate.choose(ROOT, 60, 4)
    assert all("csrc/ops" in mutant.path for mutant in mutate.choose(ROOT, 9, 0, "csrc/ops"))


def test_plans_are_of_files_that_are_there(candidates):
    for start, plan in steps.PLANS.items():
        assert list(ROOT.glob(f"{start}*")), start
        assert all((ROOT / test.split("::")[0]).exists() for step in plan for test in step.tests), start
    assert all(steps.plan_of(mutant.path) for mutant in candidates)
