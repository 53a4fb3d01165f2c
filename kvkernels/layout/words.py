"""A layout as it is printed, and read again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from kvkernels.common.arguments import dtype_text
from kvkernels.layout.pattern import LETTERS

#: What is printed of a range, the fields that it is of, and the letter.
RANGES = {"layer": "L", "head": "H", "element": "D"}
FIRST = {"L": "first_layer", "H": "first_head", "D": "first_d"}
TOTAL = {"L": "total_layers", "H": "total_heads", "D": "total_d"}


class Printed(Protocol):
    """What is printed of a layout."""

    @property
    def pattern(self) -> str: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype | None: ...
    @property
    def steps(self) -> Mapping[str, int]: ...
    def size(self, letter: str, k: int = 0) -> int: ...
    def total(self, letter: str) -> int: ...
    def first(self, letter: str) -> int: ...


def printed(layout: Any) -> str:
    """``KVLayout("L | B N H D", L=2, ...)``, or ``parts(k=KVLayout(...), ...)``."""
    one = f"KVLayout({', '.join(_words(layout))})"
    if not layout.beside and layout.name == "kv":
        return one
    named = [(layout.name, one), *((name, printed(part)) for name, part in layout.beside)]
    return f"parts({', '.join(f'{name}={part}' for name, part in named)})"


def _words(layout: Any) -> Iterator[str]:
    yield f'"{layout.pattern}"'
    yield from (f"{letter}={layout.size(letter)}" for letter in LETTERS if letter in layout.pattern)
    if layout.D_v is not None:
        yield f"D_v={layout.D_v}"
    if layout.dtype is not None:
        yield dtype_text(layout.dtype)
    if layout.opaque:
        yield from ("opaque", f"page_bytes={layout.page_bytes}")
    if layout.row_bytes is not None:
        yield f"row_bytes={layout.row_bytes}"
    if layout.steps:
        yield "steps={" + ", ".join(f'"{word}": {step}' for word, step in layout.steps.items()) + "}"
    if layout.offset_bytes:
        yield f"offset_bytes={layout.offset_bytes}"
    if layout.tensor is not None:
        yield f"tensor={layout.tensor}"
    for word, letter in RANGES.items():
        first, size, total = layout.first(letter), layout.size(letter), layout.total(letter)
        if size != total:
            which = f"{word} {first}" if size == 1 else f"{word}s {first} to {first + size - 1}"
            yield f"{which} of {total}"
    if layout.deal is not None:
        yield f"deal={layout.deal}"
    if layout.replicas > 1:
        yield f"replica {layout.replica} of {layout.replicas}"
    if layout.scales:
        yield f"scales={layout.scales!r}"


_RANGE = re.compile(r"(layer|head|element)s? (\d+)(?: to (\d+))? of (\d+)")
_REPLICA = re.compile(r"replica (\d+) of (\d+)")
_NAMED = re.compile(r"(\w+)=(.*)", re.DOTALL)
_CALL = re.compile(r"(KVLayout|parts)\((.*)\)", re.DOTALL)


def read_again(text: str) -> tuple[str, dict[str, Any]]:
    """``KVLayout`` or ``parts``, and its fields; layouts among these are still text. ValueError for anything else."""
    call = _CALL.fullmatch(text.strip())
    if call is None:
        raise ValueError(f"KVLayout.from_text: text must be what a layout is printed as, got {text!r}")
    fields: dict[str, Any] = {}
    for word in _split(call[2]):
        fields.update(_field(word, text))
    return call[1], fields


def is_layout(value: object) -> bool:
    """Whether a field that was read is a layout, still as text."""
    return isinstance(value, str) and _CALL.fullmatch(value) is not None


def _field(word: str, text: str) -> dict[str, Any]:
    if found := _RANGE.fullmatch(word):
        letter, first = RANGES[found[1]], int(found[2])
        size = int(found[3] or first) - first + 1
        return {FIRST[letter]: first, letter: size, TOTAL[letter]: int(found[4])}
    if found := _REPLICA.fullmatch(word):
        return {"replica": int(found[1]), "replicas": int(found[2])}
    if word.startswith('"') and word.endswith('"'):
        return {"pattern": word[1:-1]}
    if word == "opaque":
        return {"opaque": True}
    if isinstance(getattr(torch, word, None), torch.dtype):
        return {"dtype": getattr(torch, word)}
    found = _NAMED.fullmatch(word)
    if found is not None and found[1] == "steps":
        return {"steps": {name: int(step) for name, step in re.findall(r'"([^"]+)": (\d+)', found[2])}}
    if found is not None and found[1] == "deal":
        return {"deal": tuple(int(number) for number in re.findall(r"\d+", found[2]))}
    if found is not None and re.fullmatch(r"\d+", found[2]):
        return {found[1]: int(found[2])}
    if found is not None and is_layout(found[2]):
        return {found[1]: found[2]}
    raise ValueError(f"KVLayout.from_text: text must be what a layout is printed as, got {word!r} in {text!r}")


def _split(text: str) -> Iterator[str]:
    """At commas that are in no bracket and no quotes."""
    depth, start, quoted = 0, 0, False
    for i, character in enumerate(text):
        quoted ^= character == '"'
        if quoted:
            continue
        depth += (character in "({") - (character in ")}")
        if character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()
