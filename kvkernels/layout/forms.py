"""The shapes that engines register a layer's cache in, and the layouts that they are."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kvkernels.layout.cache import KVCache
from kvkernels.layout.layout import KVLayout

# FlashMLA's rows of DeepSeek V3.2, a head of 576 in so many bytes: fp8_ds_mla and nvfp4_ds_mla. Those of V4 are cut
# in two, all values of a page before all scales.
_PACKED_ROWS = {(576, 656), (576, 352)}


def layout_of(tensor: Tensor, spec: Any, layers: int | None = None) -> KVLayout | None:
    """The layout of a layer's tensor, if its shape is one that engines use and leaves nothing open; else None.

    Known are ``[B, 2, N, H, D]``, ``[2, B, N, H, D]``, ``[B, H, N, D + D_v]`` and ``[B, N, H, D + D_v]``; for MLA
    ``[B, N, D]`` and ``[B, 1, N, D]``; and ``[B, H, N, cell]`` where a spec says ``state_content_bytes``, so that K and
    V of a head and token are one cell: each in any physical order, which the strides decide. With one head, equal
    strides are read as token-first. The two shapes of four dimensions leave open which is which where there are as many
    heads as tokens. With ``layers`` it is a tensor of so many, ``[B, L, ...]``; two of them could be
    K and V.

    Examples
    --------
    >>> import torch
    >>> from kvkernels.layout.specs import FullAttention
    >>> spec = FullAttention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float16)
    >>> layout_of(torch.zeros(6, 2, 2, 4, 8, dtype=torch.float16).transpose(2, 3), spec)
    KVLayout("B K H N D", K=2, B=6, N=4, H=2, D=8, float16)
    """
    fitting = known_forms(tensor, spec, layers)
    if len(fitting) != 1:
        return None
    letters = fitting[0]
    steps = tensor.stride()
    order = sorted(range(len(letters)), key=lambda i: (-steps[i], "KBLNHDC".index(letters[i])))
    kept = "BLND" if is_latent(spec) else letters
    pattern = " ".join(letters[i] for i in order if letters[i] in kept).replace("C", "K D")
    sizes = dict(zip(letters, tensor.shape, strict=True))
    is_pair = "K" in pattern
    layout = KVLayout(
        pattern, L=sizes.get("L", 1), K=2 if is_pair else 1, B=sizes["B"], N=sizes["N"],
        H=sizes["H"] if "H" in pattern else 1, D=spec.head_size if is_pair else sizes["D"],
        D_v=getattr(spec, "head_size_v", None) if is_pair else None, dtype=spec.dtype,
        row_bytes=_padded_row(tensor, letters, order),
    )  # fmt: skip
    try:
        KVCache(layout, tensor)
    except ValueError:
        return None
    return layout


def known_forms(tensor: Tensor, spec: Any, layers: int | None = None) -> list[str]:
    """The engines' shapes that a tensor has, as letters by dimension; ``C`` is K and V of one head."""
    wanted = ("block_size", "num_kv_heads", "head_size", "dtype")
    if not all(hasattr(spec, name) for name in wanted) or tensor.dim() == 0 or 0 in tensor.shape:
        return []
    if tensor.element_size() != spec.dtype.itemsize:
        return []
    given, cell = tuple(tensor.shape), _cell_elements(spec)
    n, heads, d, first, second = states_of(spec), spec.num_kv_heads, spec.head_size, given[0], (*given, 0)[1]
    d_v = getattr(spec, "head_size_v", None)
    forms: list[tuple[tuple[int, ...], str]] = []
    if getattr(spec, "num_head_slots", None) is not None:
        return []  # K and V in slots of their own, or cells of several heads: only their backend knows which
    if is_latent(spec):
        row = d if cell is None else cell
        forms = [((first, n, row), "BND"), ((first, 1, n, row), "BHND")]
    elif cell is not None:
        forms = [((first, heads, n, cell), "BHND")]
    elif d_v != 0:
        both = d + (d if d_v is None else d_v)
        forms = [((first, heads, n, both), "BHNC"), ((first, n, heads, both), "BNHC")]
        if both == 2 * d:
            forms += [((first, 2, n, heads, d), "BKNHD"), ((2, second, n, heads, d), "KBNHD")]
    if layers is not None:
        # Layers come right after the blocks, or one later: where both would fit, it cannot be told.
        forms = [
            ((*shape[:i], layers, *shape[i:]), letters[:i] + "L" + letters[i:])
            for shape, letters in forms if letters[0] == "B" for i in (1, 2)
        ]  # fmt: skip
    # One head, or one token: both ways of writing [B, H, N, C] say the same then, and the strides decide.
    fitting = [letters for shape, letters in forms if shape == given]
    is_either = [letters.replace("L", "") for letters in fitting] == ["BHNC", "BNHC"] and 1 in (n, heads)
    return fitting[:1] if is_either else fitting


def is_latent(spec: Any) -> bool:
    """Whether a layer keeps one vector a token and no V (MLA, an indexer's keys), which all tensor ranks have."""
    return getattr(spec, "head_size_v", None) == 0 and getattr(spec, "num_kv_heads", None) == 1


def states_of(spec: Any) -> int:
    """Rows of a block: its tokens, or fewer where one row stands for several."""
    tokens_per_state = getattr(spec, "tokens_per_state", 1)
    return int(spec.block_size // tokens_per_state) if tokens_per_state > 0 else 1


def rows_are_tokens(spec: Any) -> bool:
    """Whether a latent page is a row a token, and not, as an indexer's, all keys and then all scales."""
    if getattr(spec, "tokens_per_state", 1) != 1:
        return False
    cell = getattr(spec, "state_content_bytes", None)
    if cell is None:
        return bool(spec.dtype.is_floating_point)
    return (spec.head_size, cell) in _PACKED_ROWS


def _cell_elements(spec: Any) -> int | None:
    """Elements of what a spec says it keeps of a token and head, where that is not K and V one after the other."""
    cell = getattr(spec, "state_content_bytes", None)
    if cell is None:
        return None
    elements, rest = divmod(cell, spec.dtype.itemsize)
    return 0 if rest else elements  # no shape has 0


def _padded_row(tensor: Tensor, letters: str, order: list[int]) -> int | None:
    """From block to block, where something lies between two pages."""
    at = letters.index("B")
    inside = math.prod(tensor.shape[i] for i in order[order.index(at) + 1 :])
    return tensor.stride(at) * tensor.element_size() if tensor.stride(at) > inside else None
