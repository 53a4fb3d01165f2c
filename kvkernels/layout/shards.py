"""What a rank holds of a letter, and which of the given steps still hold for its buffers."""

from __future__ import annotations

from typing import Any

from kvkernels.layout.geometry import Measured

#: The fields that say which part of a letter is held.
FIELDS = {"L": ("first_layer", "total_layers"), "H": ("first_head", "total_heads"), "D": ("first_d", "total_d")}


def part_of_rank(count: int, rank: int, size: int) -> tuple[int, int, int, int]:
    """The first, how many, which replica, how many replicas."""
    if size <= count:
        share, more = divmod(count, size)
        return rank * share + min(rank, more), share + (rank < more), 0, 1
    held = rank * count // size
    holders = [r for r in range(size) if r * count // size == held]
    return held, 1, holders.index(rank), len(holders)


def shard_fields(layout: Measured, letter: str, rank: int, size: int) -> dict[str, Any]:
    """What of a layout changes where a rank holds its part of a letter, or a replica where there is none."""
    words = [str(word) for word in layout.inside_words]
    letters = [word.letter for word in layout.inside_words]
    count = layout.size(letter)
    first, part, replica, replicas = part_of_rank(count, rank, size)
    kept = dict(layout.steps)
    if letter in letters:
        kept = {word: step for word, step in kept.items() if words.index(word) >= letters.index(letter)}
    elif not any(word.letter == letter for word in layout.outside_words):
        first, part, replica, replicas = 0, count, rank, size
    of, total = FIELDS[letter]
    return {
        letter: part, of: first, total: count, "replica": replica, "replicas": replicas, "steps": kept,
        "row_bytes": None, "offset_bytes": 0, "page_bytes": 0,
        "padding_unsaid": layout.row_bytes is not None or layout.offset_bytes > 0 or len(kept) < len(layout.steps),
    }  # fmt: skip
