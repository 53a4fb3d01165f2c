"""Whether two sides hold the same cache, and whether ids can name the same tokens on both."""

from __future__ import annotations

from kvkernels.layout.layout import KVLayout
from kvkernels.layout.pieces import WORDS, matched

_Layouts = tuple[KVLayout, ...]


def check_one_cache(src: _Layouts, dst: _Layouts, unit: int) -> None:
    """ValueError saying what is not the same, or what cannot be cut into units of so many tokens."""
    first, both = src[0], (*src, *dst)
    is_simple = not any(layout.beside or layout.name != "kv" for layout in both)
    for layout in both:
        if layout.opaque != first.opaque:
            raise ValueError("an opaque page can only become the same opaque page")
        for name in ("L", "K") if first.opaque else ("L", "K", "D", "D_v", "total_heads", "dtype") if is_simple else ():
            ours, theirs = _size(first, name), _size(layout, name)
            if ours != theirs:
                raise ValueError(f"{name} must be the same on both sides, got {ours} and {theirs}")
    for side in (src, dst):
        if any(layout.span_tokens != side[0].span_tokens for layout in side):
            raise ValueError("the shards of a side must have one block size")
    if first.opaque:
        pages = [[layout.page_bytes for layout in side] for side in (src, dst)]
        if pages[0] != pages[1] or (unit, unit) != (src[0].N, dst[0].N):
            raise ValueError("opaque pages must be as many and as large on both sides")
    for layout in both:
        _check_units(layout, unit)
    if not first.opaque:
        _check_parts(src, dst)


def _size(layout: KVLayout, name: str) -> object:
    return layout.total(name) if name in ("L", "D") else getattr(layout, name)


def _check_units(layout: KVLayout, unit: int) -> None:
    """That a block's tokens can be taken a unit at a time."""
    for member in layout.members:
        part = member.layout
        dealt = part.deal[1] * part.deal[2] if part.deal else 1
        if unit % dealt:
            raise ValueError(f"a unit of {unit} tokens must be a multiple of the {dealt} that tokens are dealt out in")
        if unit == layout.span_tokens:
            continue
        if "N" not in part.page_letters or "N" in part.pool_letters:
            where = "where N counts pools" if "N" in part.letters else f"where part {member.name} has no N"
            raise ValueError(f"blocks of {layout.block_tokens} tokens cannot be cut into {unit} {where}")
        held = unit // (part.deal[1] if part.deal else 1)
        by = next((word.by for word in part.inside_words if word.letter == "N" and word.cut), 1)
        if held % by:
            raise ValueError(f"blocks of {layout.block_tokens} tokens cannot be cut into {held} where N is cut by {by}")


def _check_parts(src: _Layouts, dst: _Layouts) -> None:
    names = [{name for layout in side for m in layout.members for name in m.names} for side in (src, dst)]
    if names[0] != names[1]:
        got = " and ".join(", ".join(sorted(side)) for side in names)
        if names[0] ^ names[1] <= {"scales", "k_scales", "v_scales"}:
            raise ValueError("scales must be on both sides or on neither")
        raise ValueError(f"parts must be the same on both sides, got {got}")
    for ours, theirs in matched(src, dst):
        one = ours[0]
        for held in (*ours, *theirs):
            for letter in "LHDW":
                if held.total(letter) != one.total(letter):
                    word = WORDS.get(letter, "rows")
                    raise ValueError(
                        f"{word} of part {one.names[0]} must be the same on both sides, "
                        f"got {one.total(letter)} and {held.total(letter)}"
                    )
            if held.layout.dtype != one.layout.dtype:
                raise ValueError(
                    f"dtype of part {one.names[0]} must be the same on both sides, "
                    f"got {one.layout.dtype} and {held.layout.dtype}"
                )
            if ("N" in held.layout.letters) != ("N" in one.layout.letters) and max(held.layout.N, one.layout.N) != 1:
                raise ValueError(f"part {one.names[0]} must have N on both sides, or on neither")
