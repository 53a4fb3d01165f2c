"""Tables that are printed on a terminal and written as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """``left`` names the columns that are aligned to the left."""

    title: str
    columns: Sequence[str]
    left: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"a row of '{self.title}' must have {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(list(cells))

    def markdown(self) -> str:
        rule = ["---" if name in self.left else "---:" for name in self.columns]
        lines = [self.columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def text(self) -> str:
        lines = [list(self.columns), *self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.columns))]

        def aligned(line: Sequence[str]) -> str:
            cells = [
                cell.ljust(width) if name in self.left else cell.rjust(width)
                for cell, width, name in zip(line, widths, self.columns, strict=True)
            ]
            return "  ".join(cells).rstrip()

        return "\n".join([self.title, *(aligned(line) for line in lines)])
