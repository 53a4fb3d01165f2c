"""Random spoiling of valid calls never does more than raise, and the compiled ops and the reference agree on each."""

from __future__ import annotations

from typing import Any

import torch
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from refusals import I64_MAX, I64_MIN, VALID, Arguments, bytes_of, outcome, tensors_of
from torch import Tensor

ODD_NUMBERS = st.sampled_from([-1, 0, 1, 2, 5, 6, 7, 8, 1 << 31, 1 << 32, 1 << 62, I64_MAX, I64_MIN, I64_MIN + 1, -8])


def spoilt_tensor(draw: st.DrawFn, t: Tensor) -> Tensor:
    """Another dtype, shape, stride, device or value; perhaps one that is just as valid."""
    kind = draw(st.sampled_from(["value", "value", "dtype", "shape", "strides", "meta", "sparse", "freed", "narrow"]))
    if not _is_intact(t):
        return t
    if kind == "value" and t.numel() and t.dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(t.dtype)
        t[tuple(draw(st.integers(0, n - 1)) for n in t.shape)] = min(max(draw(ODD_NUMBERS), limits.min), limits.max)
    elif kind == "dtype":
        return torch.zeros(t.shape, dtype=draw(st.sampled_from([torch.int32, torch.float32, torch.int64, torch.uint8])))
    elif kind == "shape":
        return torch.zeros(draw(st.lists(st.integers(0, 7), max_size=4)), dtype=t.dtype)
    elif kind == "strides":
        strides = [draw(st.integers(0, 12)) for _ in t.shape]
        return torch.ones(600, dtype=t.dtype).as_strided(t.shape, strides)
    elif kind == "meta":
        return t.to("meta")
    elif kind == "sparse" and t.dim():
        return t.to_sparse()
    elif kind == "freed":
        t.untyped_storage().resize_(draw(st.integers(0, t.untyped_storage().nbytes())))
    elif kind == "narrow" and t.dim():
        return t.narrow(0, 0, draw(st.integers(0, t.shape[0])))
    return t


class Spoiling:
    def __init__(self, op: str, arguments: Arguments, count: int) -> None:
        self.op = op
        self.arguments = arguments
        self.count = count

    def __repr__(self) -> str:
        """Without the values: a tensor that is not inside its storage cannot be printed."""
        seen = {name: describe(value) for name, value in self.arguments.items()}
        return f"Spoiling({self.op}, {seen}, count={self.count})"


def describe(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.device.type == "meta" or value.layout != torch.strided:
        return f"{value.layout} {value.device} {value.dtype} {list(value.shape)}"
    values = value.flatten().tolist() if _inside(value) and value.dtype == torch.int64 else ""
    return f"{value.dtype} {list(value.shape)} {value.stride()} of {value.untyped_storage().nbytes()} bytes {values}"


@st.composite
def spoilings(draw: st.DrawFn) -> Spoiling:
    op = draw(st.sampled_from([op for op in VALID if op != "swap_blocks_batch"]))
    torch.manual_seed(draw(st.integers(0, 3)))
    arguments = VALID[op]()
    count = draw(st.integers(1, 3))
    for _ in range(count):
        name = draw(st.sampled_from(list(arguments)))
        value = arguments[name]
        if isinstance(value, int):
            arguments[name] = draw(ODD_NUMBERS)
        elif isinstance(value, Tensor):
            arguments[name] = spoilt_tensor(draw, value)
        elif draw(st.booleans()) and value:
            i = draw(st.integers(0, len(value) - 1))
            value[i] = spoilt_tensor(draw, value[i])
        else:
            data = [t for t in tensors_of(arguments) if t.dtype == torch.uint8]
            more = st.lists(st.sampled_from(data), max_size=1) if data else st.just([])
            arguments[name] = value[: draw(st.integers(0, 2))] + draw(more)
    if draw(st.integers(0, 7)) == 0:
        # An exception crosses into Python as a C string, which a NUL ends.
        characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
        arguments["executor"] = draw(st.text(characters, max_size=4))
    return Spoiling(op, arguments, count)


def copied(arguments: Arguments) -> Arguments:
    """The same tensors over storages of their own, those that share one still sharing it."""
    storages: dict[int, Any] = {}

    def copy(t: Tensor) -> Tensor:
        if t.device.type != "cpu" or t.layout != torch.strided:
            return t.clone()
        storage = t.untyped_storage()
        if _inside(t):
            twin = storages.setdefault(storage._cdata, storage.clone())
            return torch.empty(0, dtype=t.dtype).set_(twin, t.storage_offset(), t.shape, t.stride())
        # torch makes no tensor outside its storage: the storage shrinks under it. Its strides are of no interest.
        made = torch.zeros(t.shape, dtype=t.dtype)
        made.untyped_storage().resize_(min(storage.nbytes(), made.nbytes - 1))
        return made

    return {
        name: copy(v) if isinstance(v, Tensor) else [copy(t) for t in v] if isinstance(v, list) else v
        for name, v in arguments.items()
    }


def _is_intact(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided and _inside(t)


def _inside(t: Tensor) -> bool:
    if t.numel() == 0:
        return True
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


@examples(600)
@given(spoilings())
def test_anything_at_all_raises_cleanly_or_copies_what_the_reference_copies(spoiling: Spoiling) -> None:
    op = spoiling.op
    ours, theirs = copied(spoiling.arguments), copied(spoiling.arguments)
    error, text = outcome("torch.ops", op, ours)
    reference_error, reference_text = outcome("reference", op, theirs)
    assert error == reference_error, (text, reference_text)
    assert bytes_of(ours) == bytes_of(theirs)
    if spoiling.count == 1:
        assert text == reference_text
