"""Which of a model's buffers are KV: the names that exported models give them, prefixed, paired and selected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

#: What a buffer's name begins with; a dot and the layer follow.
STEMS = ("past_key", "past_value", "compressed_kv", "k_pe", "conv_state", "recurrent_state")
#: What an output's name ends with; its input has the same name without.
OUTPUT_SUFFIXES = ("RetainedState", "InternalRetainedState")

_NAME = re.compile(
    rf"(?P<kind>{'|'.join(STEMS)})\.(?P<layer>0|[1-9][0-9]*)"
    rf"(?:_(?!(?:{'|'.join(OUTPUT_SUFFIXES)})(?:_|\Z))(?P<prefix>[A-Za-z0-9]+))?"
    rf"(?:_(?P<suffix>{'|'.join(OUTPUT_SUFFIXES)}))?"
)
_LAYER_DIGITS = 18  # such a number fits in int64
_PREFIX = re.compile(r"[A-Za-z0-9]+")
_PARTS = ("vision", "lang")

Names = TypeVar("Names", list[str], dict[str, Any])
Value = TypeVar("Value")


@dataclass(frozen=True)
class BufferName:
    """A KV buffer's name in its parts; ``str()`` puts them together again.

    Examples
    --------
    >>> BufferName.parse("past_key.10_VLLM_RetainedState")
    BufferName(kind='past_key', layer=10, prefix='VLLM', suffix='RetainedState')
    >>> BufferName.parse("past_key_self.10") is None
    True
    """

    kind: str
    layer: int
    prefix: str | None = None
    suffix: str | None = None

    @staticmethod
    def parse(name: str) -> BufferName | None:
        """The name's parts, or None where it is not one of a KV buffer."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return BufferName(match["kind"], _layer_of(match), match["prefix"], match["suffix"])

    @property
    def input(self) -> BufferName:
        """The name of the input that this output is fed back to; an input's own."""
        return replace(self, suffix=None)

    def __str__(self) -> str:
        return "_".join(part for part in (f"{self.kind}.{self.layer}", self.prefix, self.suffix) if part)


def _layer_of(match: re.Match[str]) -> int:
    digits = match["layer"]
    if len(digits) > _LAYER_DIGITS:  # Python itself refuses to read thousands of them
        raise ValueError(f"names must have a layer of at most {_LAYER_DIGITS} digits, got one of {len(digits)} digits")
    return int(digits)


def check_prefix(prefix: str) -> None:
    """Raise ValueError unless it is made of ASCII letters and digits, and is not what an output's name ends with."""
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix) or prefix in OUTPUT_SUFFIXES:
        raise ValueError(
            f"prefix must be ASCII letters and digits, and none of {', '.join(OUTPUT_SUFFIXES)}, got {prefix!r}"
        )


def add_prefix(names: Names, prefix: str | None) -> Names:
    """KV buffers' names with a prefix between layer and suffix; every other name stays as it is.

    Parameters
    ----------
    names : list of str, or dict
        Names; or a dict by name; or ``{"vision": ..., "lang": ...}`` of either, of which only ``lang`` has KV.
    prefix : str, optional
        ASCII letters and digits; None changes nothing.

    Returns
    -------
    list or dict
        New, of the same kind and in the same order.

    Raises
    ------
    ValueError
        The prefix is not one; a name has another already; two names would become one.

    Examples
    --------
    >>> add_prefix(["past_key.0", "past_key.0_RetainedState", "logits"], "VLLM")
    ['past_key.0_VLLM', 'past_key.0_VLLM_RetainedState', 'logits']
    """
    if isinstance(names, str):
        raise ValueError(f"add_prefix: names must be a list or a dict, got {names!r}")
    if prefix is not None:
        check_prefix(prefix)
    if isinstance(names, dict) and names and set(names) <= set(_PARTS):
        return {part: add_prefix(value, prefix) if part == "lang" else value for part, value in names.items()}
    renamed = {name: _prefixed(name, prefix) for name in names}
    if len(set(renamed.values())) < len(renamed):
        twice = sorted(name for name in renamed.values() if list(renamed.values()).count(name) > 1)
        raise ValueError(f"add_prefix: names must stay different, got {twice[0]!r} twice")
    if isinstance(names, dict):
        return {renamed[name]: value for name, value in names.items()}
    return [renamed[name] for name in names]


def _prefixed(name: str, prefix: str | None) -> str:
    parsed = BufferName.parse(name)
    if parsed is None or prefix is None or parsed.prefix == prefix:
        return name
    if parsed.prefix is not None:
        raise ValueError(f"add_prefix: {name!r} must have no other prefix, got prefix {prefix!r}")
    return str(replace(parsed, prefix=prefix))


def pair_names(names: Iterable[str]) -> dict[str, str]:
    """Each KV input with the output that is fed back to it.

    Raises
    ------
    ValueError
        An input has no output or two, or an output no input.

    Examples
    --------
    >>> pair_names(["past_key.1", "past_key.10", "past_key.10_RetainedState", "past_key.1_InternalRetainedState"])
    {'past_key.1': 'past_key.1_InternalRetainedState', 'past_key.10': 'past_key.10_RetainedState'}
    """
    parsed = [found for found in map(BufferName.parse, names) if found is not None]
    inputs = {str(name): "" for name in parsed if name.suffix is None}
    for name in parsed:
        if name.suffix is None:
            continue
        wanted = str(name.input)
        if wanted not in inputs:
            raise ValueError(f"pair_names: output {str(name)!r} must have the input {wanted!r}, got none")
        if inputs[wanted]:
            raise ValueError(
                f"pair_names: input {wanted!r} must have one output, got {inputs[wanted]!r} and {str(name)!r}"
            )
        inputs[wanted] = str(name)
    alone = [name for name, output in inputs.items() if not output]
    if alone:
        raise ValueError(f"pair_names: input {alone[0]!r} must have an output, got none")
    return inputs


def pattern(prefix: str | None = None, *, kinds: Iterable[str] = STEMS) -> re.Pattern[str]:
    """What matches, whole, the names of KV inputs with this prefix, or without one; groups ``kind`` and ``layer``.

    Examples
    --------
    >>> bool(pattern("VLLM").fullmatch("past_key.3_VLLM")), bool(pattern().fullmatch("past_key.3_VLLM"))
    (True, False)
    """
    if prefix is not None:
        check_prefix(prefix)
    kinds = tuple(kinds)
    if not kinds or any(kind not in STEMS for kind in kinds):
        raise ValueError(f"kinds must be some of {', '.join(STEMS)}, got {list(kinds)}")
    end = f"_{prefix}" if prefix else ""
    return re.compile(rf"(?P<kind>{'|'.join(kinds)})\.(?P<layer>0|[1-9][0-9]*){end}")


def select(
    buffers: Mapping[str, Value] | Iterable[str], prefix: str | None = None, *, kinds: Iterable[str] = STEMS
) -> dict[tuple[str, int], Any]:
    """A model's KV inputs, by kind and layer: layer after layer, a layer's kinds in the order of ``STEMS``.

    Parameters
    ----------
    buffers : mapping of str to Tensor, or iterable of str
        Tensors by name, or names alone as an exported graph lists them.
    prefix : str, optional
        Only buffers with this prefix; without it, only those that have none.
    kinds : iterable of str
        Which of ``STEMS``; all by default.

    Returns
    -------
    dict
        ``(kind, layer)`` to the tensor, or to the name where only names were given. Its values are pools where
        dimension 0 is the block.

    Raises
    ------
    ValueError
        The prefix or a kind is not one, or a name comes twice.

    Examples
    --------
    >>> select(["logits", "past_value.0", "past_key.0", "past_key.1_VLLM"])
    {('past_key', 0): 'past_key.0', ('past_value', 0): 'past_value.0'}
    """
    if isinstance(buffers, str):
        raise ValueError(f"select: buffers must be a mapping or an iterable of names, got {buffers!r}")
    wanted = pattern(prefix, kinds=kinds)
    items = buffers.items() if isinstance(buffers, Mapping) else ((name, name) for name in buffers)
    found: dict[tuple[str, int], Any] = {}
    for name, value in items:
        match = wanted.fullmatch(name)
        if match is None:
            continue
        key = match["kind"], _layer_of(match)
        if key in found:
            raise ValueError(f"select: buffers must have each name once, got {name!r} twice")
        found[key] = value
    return {key: found[key] for key in sorted(found, key=lambda key: (key[1], STEMS.index(key[0])))}
