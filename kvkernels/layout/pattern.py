"""Patterns as they are written: letters, one bar, and letters that are cut in two."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

#: Layers, key/value, blocks, tokens of a block, rows of a state, heads, elements of a head.
LETTERS = "LKBNWHD"

_WORD = re.compile(r"([A-Za-z])(?:([/%])(\d+))?")


@dataclass(frozen=True)
class Word:
    """A letter as it stands in a pattern: ``D``, or one of the two that it is cut into, ``D/8`` and ``D%8``."""

    letter: str
    cut: str = ""
    by: int = 1

    def __str__(self) -> str:
        return f"{self.letter}{self.cut}{self.by}" if self.cut else self.letter

    def extent(self, size: int) -> int:
        """How many there are of it, of so many of the letter."""
        return size // self.by if self.cut == "/" else self.by if self.cut == "%" else size

    @property
    def divisor(self) -> int:
        """How many of the letter one step is."""
        return self.by if self.cut == "/" else 1


@lru_cache(maxsize=1024)
def read(pattern: str) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    """The words left and right of the bar, or ValueError saying what a pattern must have."""
    outside, _, inside = re.sub(r"\s", "", pattern).rpartition("|")
    sides = tuple(words_of(side) for side in (outside, inside))
    words = [word for side in sides for word in side or ()]
    seen: dict[str, list[Word]] = {}
    for word in words:
        seen.setdefault(word.letter, []).append(word)
    if None in sides or not all(_is_once(of_letter) for of_letter in seen.values()):
        raise ValueError(
            f"the pattern must have each of {', '.join(LETTERS.replace('W', ''))} at most once (and W, the rows of a "
            "state), and at most one bar; a letter but K and B may be cut in two, as D/8 and D%8"
        )
    return sides[0] or (), sides[1] or ()


def words_of(text: str) -> tuple[Word, ...] | None:
    """The words of one side; None where something else stands there."""
    text = re.sub(r"\s", "", text)
    found = list(_WORD.finditer(text))
    words = tuple(Word(m[1], m[2] or "", int(m[3] or 1)) for m in found)
    if "".join(m[0] for m in found) != text or any(word.letter not in LETTERS for word in words):
        return None
    return words


def _is_once(words: list[Word]) -> bool:
    """Whether these are a letter once, or its two halves."""
    if len(words) == 1:
        return not words[0].cut
    cuts = sorted((word.cut, word.by) for word in words)
    return len(words) == 2 and words[0].letter not in "KB" and cuts == [("%", words[0].by), ("/", words[0].by)]


def write(outside: tuple[Word, ...], inside: tuple[Word, ...]) -> str:
    """The pattern in the one way in which it is printed."""
    return " | ".join(" ".join(map(str, side)) for side in (outside, inside) if side)
