"""What a launch did: the sanitizer's findings, and what was counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Area
from .parse import Instruction

MOST_FINDINGS = 100


class SanitizerError(AssertionError):
    """A launch with findings."""


@dataclass
class Finding:
    """One kind of fault at one line: the first thread that it was found in, and how many there were."""

    kind: str
    line: int
    text: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    buffer: str = ""
    offset: int | None = None
    detail: str = ""
    count: int = 1

    def __str__(self) -> str:
        where = f" {self.buffer}[{self.offset}]" if self.buffer else ""
        detail = f": {self.detail}" if self.detail else ""
        return (
            f"{self.kind}{where} by thread {place_text(self.thread)} of block {place_text(self.block)}{detail}, "
            f"{self.count} in all; line {self.line}: {self.text}"
        )


def place_text(place: tuple[int, int, int]) -> str:
    return str(place[0]) if place[1:] == (0, 0) else str(place)


@dataclass
class Access:
    """What one instruction's warp requests moved in global memory; a sector is 32 bytes."""

    requests: int = 0
    sectors: int = 0
    least_sectors: int = 0
    bytes: int = 0


@dataclass
class Report:
    kernel: str
    threads: int
    findings: list[Finding] = field(default_factory=list)
    # By PTX line.
    executed: Counter[int] = field(default_factory=Counter)
    unexecuted: dict[int, str] = field(default_factory=dict)
    loads: dict[int, Access] = field(default_factory=dict)
    stores: dict[int, Access] = field(default_factory=dict)
    areas: dict[str, Area] = field(default_factory=dict)
    steps: int = 0

    def written(self, buffer: str) -> np.ndarray:
        """Which bytes of a buffer the launch wrote."""
        return self.areas[buffer].written_map()

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def check(self) -> Report:
        if self.findings:
            raise SanitizerError("\n".join(str(finding) for finding in self.findings))
        return self


class Findings:
    """Collects; the same kind at the same line is one finding."""

    def __init__(self, place: Any) -> None:
        self._place = place  # thread number to block and thread
        self._found: dict[tuple[str, int], Finding] = {}

    def add(
        self,
        kind: str,
        instruction: Instruction,
        threads: np.ndarray,
        buffer: str = "",
        offset: int | None = None,
        detail: str = "",
    ) -> None:
        key = (kind, instruction.line)
        if key in self._found:
            self._found[key].count += len(threads)
        elif len(self._found) < MOST_FINDINGS:
            block, thread = self._place(int(threads[0]))
            self._found[key] = Finding(
                kind, instruction.line, instruction.text, block, thread, buffer, offset, detail, len(threads)
            )

    def list(self) -> list[Finding]:
        return list(self._found.values())
