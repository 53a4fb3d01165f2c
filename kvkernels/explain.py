"""What a call would come to, what was really issued, and which ids a device refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from kvkernels import ops, triton
from kvkernels.common.arguments import integer
from kvkernels.common.text import ask
from kvkernels.registration import schemas  # the private ops exist once it is imported

_private = torch.ops.kvkernels


@dataclass(frozen=True)
class Explanation:
    """The lowering's own output for one call.

    Attributes
    ----------
    op : str
        The op's name.
    executor : str
        ``cpu``, ``kernel``, ``bulk``, ``dma``, ``staged``, ``triton`` or ``reference``: what would carry the call out.
    reason : str
        Why this executor.
    direction : str
        The kinds of memory on the two sides.
    shape : str
        ``page`` (whole fragments), ``row`` (16-byte multiples up to 1 KiB, aligned), ``bytes`` (everything else), or
        ``reference``, which lowers to none of them.
    launches : int
        Kernel launches or copy calls to the CUDA runtime.
    descriptors : int
        Contiguous copies, after neighbours were joined.
    bytes : int
        Bytes moved.
    pairs : int
        Distinct pairs of pages.
    moves : int
        Runs after simplification.
    lanes : int
        Threads of the ``cpu`` executor.
    streaming : bool
        Whether its stores bypass the caches.
    table : str
        Where what decides on such calls came from: compiled in, a file, and where and when that was measured.
    device : dict
        What only the executors on a device say.
    """

    op: str
    executor: str
    reason: str
    direction: str
    shape: str
    launches: int
    descriptors: int
    bytes: int
    pairs: int
    moves: int
    lanes: int = 1
    streaming: bool = False
    table: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)


_FIELDS = tuple(f.name for f in fields(Explanation))


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Check and lower a call as the op would, move nothing, and say what it would come to.

    Parameters
    ----------
    op : str or function
        An op's name, or its function in ``kvkernels``.
    *args, **kwargs
        Its arguments.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        ``op`` is none of the ops.
    IndexError, ValueError, RuntimeError
        What the op itself raises for these arguments.

    Notes
    -----
    Nothing is read from or written to the tensors' memory but ids on the host, and nothing is put on a stream.

    Examples
    --------
    >>> import torch, kvkernels
    >>> pool, out = torch.zeros(8, 64), torch.empty(2, 256, dtype=torch.uint8)
    >>> kvkernels.explain("gather_blocks", [pool], torch.tensor([5, 1]), out).bytes
    512
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in schemas.PUBLIC:
        raise ValueError(f"explain: op must be one of {', '.join(schemas.PUBLIC)}, got {name}")
    return explain_call(name, partial(getattr(ops, name), *args, **kwargs))


def explain_call(name: str, call: Callable[[], Any]) -> Explanation:
    """What one op that ``call`` makes would come to; errors call it ``name``."""
    _private._explain_begin()
    try:
        call()
    finally:
        text = ask(_private._explain_end)
    said = json.loads(text)
    if not said:
        raise ValueError(f"explain: {name} must be called on tensors with values, got a mode that only traces calls")
    return Explanation(*[said[name] for name in _FIELDS])


def counters() -> dict[str, dict[str, int]]:
    """What each executor has issued in this process.

    Returns
    -------
    dict
        ``{executor: {"calls", "launches", "descriptors", "bytes"}}``.
    """
    return dict(json.loads(ask(_private._counters)))


def reset_counters() -> None:
    """Set every counter to 0."""
    _private._reset_counters()


def check_device(device: int | str | torch.device) -> None:
    """Raise if an op has met ids out of range on a CUDA device since the last check.

    Parameters
    ----------
    device : int, str or torch.device
        A CUDA device, ``0`` or ``"cuda:0"``.

    Raises
    ------
    IndexError
        Pairs were skipped; the message has the op, how many, and the first row.

    Notes
    -----
    Waits for the ops' calls with ids on the device, on all streams and in replayed graphs, and clears the record. Works
    while a stream captures, unless Triton serves for want of code of the library, and may miss what a graph that is
    replayed meanwhile meets. Ids on the host are checked by the op itself, before anything moves.
    """
    is_name = isinstance(device, (str, torch.device))
    place = torch.device(device) if is_name else torch.device("cuda", integer("check_device: device", device))
    if place.type != "cuda":
        raise ValueError(f"check_device: device must be a cuda device, got {place}")
    index = torch.cuda.current_device() if place.index is None else place.index
    fault = json.loads(ask(_private._check_device, index)) or triton.take_fault(index)
    if fault:
        raise IndexError(
            f"{fault['op']}: {fault['count']} pairs had ids out of range on cuda:{index}, "
            f"the first in row {fault['first_row']}"
        )
