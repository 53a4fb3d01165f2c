"""Which of an engine's KV cache groups is attention, and which are states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvkernels.common.arguments import integer
from kvkernels.layout.specs import spec_of_layer

_KINDS = ("full attention", "MLA", "chunked attention", "sliding window")


@dataclass(frozen=True)
class GroupChoice:
    """What each group of a model is to an offloader.

    Attributes
    ----------
    attention : int or None
        The group that decides how many tokens of a prefix are cached; None where a model has states alone.
    attention_layers : tuple of str
        Its layers.
    block_size : int
        Tokens of its blocks; of a model with states alone, of the first group's.
    states : tuple of int
        Groups whose blocks are states of a recurrence: opaque pages, restored before attention's.
    chained : tuple of int
        Groups in which a block is worth nothing without all before it: full attention and MLA.
    """

    attention: int | None
    attention_layers: tuple[str, ...]
    block_size: int
    states: tuple[int, ...]
    chained: tuple[int, ...]


def choose_groups(groups: Sequence[Any], attention_group: int | None = None) -> GroupChoice:
    """Tell a model's KV cache groups apart.

    Parameters
    ----------
    groups : sequence
        Each with ``layer_names`` and ``kv_cache_spec``: ``KVCacheGroup``, or vLLM's own.
    attention_group : int, optional
        The group to take for attention. By default the first of full attention, else of MLA, of chunked attention, or
        of a sliding window.

    Returns
    -------
    GroupChoice

    Raises
    ------
    ValueError
        There are no groups, the one that is named does not exist or is a state, or a spec is of no known kind.

    Examples
    --------
    >>> import torch
    >>> from kvkernels.layout.specs import FullAttention, KVCacheGroup, Mamba
    >>> state = Mamba(shapes=((4, 4),), dtypes=(torch.float32,), block_size=16)
    >>> full = FullAttention(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float16)
    >>> groups = [KVCacheGroup(["m0"], state), KVCacheGroup(["m1"], state), KVCacheGroup(["attn0", "attn1"], full)]
    >>> choice = choose_groups(groups)
    >>> choice.attention, choice.attention_layers, choice.block_size, choice.states
    (2, ('attn0', 'attn1'), 16, (0, 1))
    """
    if not groups:
        raise ValueError("choose_groups: groups must be at least one KV cache group, got none")
    specs = [spec_of_layer(group, next(iter(group.layer_names), "")) for group in groups]
    kinds = [_kind_of(spec) for spec in specs]
    if attention_group is None:
        attention = next((kinds.index(kind) for kind in _KINDS if kind in kinds), None)
    else:
        attention = integer("choose_groups: attention_group", attention_group)
        if not 0 <= attention < len(groups):
            raise ValueError(
                f"choose_groups: attention_group must be from 0 to {len(groups) - 1}, got {attention_group}"
            )
        if kinds[attention] == "state":
            raise ValueError(
                f"choose_groups: attention_group must be a group of attention layers, got {attention}, of states"
            )
    return GroupChoice(
        attention,
        tuple(groups[attention].layer_names) if attention is not None else (),
        int(specs[attention or 0].block_size),
        tuple(i for i, kind in enumerate(kinds) if kind == "state"),
        tuple(i for i, kind in enumerate(kinds) if kind in ("full attention", "MLA")),
    )


def _kind_of(spec: Any) -> str:
    """By what vLLM's specs and ours have in common; a full-attention layer of vLLM's may note a window, too."""
    if hasattr(spec, "shapes") and hasattr(spec, "dtypes"):
        return "state"
    names = [kind.__name__ for kind in type(spec).__mro__]
    if any("SlidingWindow" in name for name in names):
        return "sliding window"
    if any("ChunkedLocal" in name for name in names):
        return "chunked attention"
    if any("MLA" in name for name in names):
        return "MLA"
    if hasattr(spec, "num_kv_heads"):
        return "full attention"
    raise ValueError(
        f"choose_groups: groups must have the specs of attention layers or of states, got {type(spec).__name__}"
    )
