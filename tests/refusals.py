"""A valid call of every op, the doors it can go through, and what is asked of one that is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import torch
from torch import Tensor

import kvkernels
from kvkernels import reference

I64_MAX, I64_MIN = (1 << 63) - 1, -(1 << 63)
RUN = [0, 0, 0, 0, 8, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
Arguments = dict[str, Any]


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def swap_arguments() -> Arguments:
    return {
        "src": noise(6, 8),
        "dst": noise(6, 8),
        "block_size_in_bytes": 8,
        "block_mapping": torch.tensor([[0, 1], [5, 2], [5, 0]]),
    }


def gather_arguments() -> Arguments:
    return {"pools": [noise(6, 8), noise(5, 3)], "block_ids": torch.tensor([4, 1, 4]), "out": noise(3, 11)}


def scatter_arguments() -> Arguments:
    return {"buffer": noise(3, 11), "block_ids": torch.tensor([4, 1, 0]), "pools": [noise(6, 8), noise(5, 3)]}


def copy_arguments() -> Arguments:
    return {
        "src": [noise(6, 16), noise(7, 8)],
        "dst": [noise(6, 16), noise(8, 24)],
        "mapping": torch.tensor([[0, 1], [5, 2]]),
        "runs": torch.tensor([RUN, [1, 1, 0, 8, 4, 0, 0, 2, 4, 8, 1, 0, 0, 1, 0, 0]]),
    }


def batch_arguments() -> Arguments:
    memory = noise(96)
    start = memory.data_ptr()
    return {
        "src_ptrs": torch.tensor([start, start + 8, start + 3]),
        "dst_ptrs": torch.tensor([start + 48, start + 64, start + 80]),
        "sizes": torch.tensor([8, 5, 1]),
        "memory": memory,
    }


def concat_arguments() -> Arguments:
    return {"shards": [noise(2, 3), noise(2, 4)], "dim": 1}


def concat_out_arguments() -> Arguments:
    return {**concat_arguments(), "out": noise(2, 7)}


def split_arguments() -> Arguments:
    return {"input": noise(2, 7), "dim": -1, "out": [noise(2, 3), noise(2, 4)]}


VALID: dict[str, Callable[[], Arguments]] = {
    "swap_blocks": swap_arguments,
    "swap_blocks_batch": batch_arguments,
    "gather_blocks": gather_arguments,
    "scatter_blocks": scatter_arguments,
    "copy_pages": copy_arguments,
    "concat_tp_shards": concat_arguments,
    "concat_tp_shards_out": concat_out_arguments,
    "split_tp_shards": split_arguments,
}
Path = tuple[str, int | None]


def tensor_paths(op: str) -> list[Path]:
    paths: list[Path] = []
    for name, value in VALID[op]().items():
        if isinstance(value, list):
            paths += [(name, i) for i in range(len(value))]
        elif isinstance(value, Tensor) and name != "memory":
            paths.append((name, None))
    return paths


EVERY_TENSOR = [(op, path) for op in VALID for path in tensor_paths(op)]


def name_of(path: Path) -> str:
    name, index = path
    return name if index is None else f"{name}[{index}]"


def get(arguments: Arguments, path: Path) -> Tensor:
    name, index = path
    return arguments[name] if index is None else arguments[name][index]


def put(arguments: Arguments, path: Path, value: Any) -> None:
    name, index = path
    if index is None:
        arguments[name] = value
    else:
        arguments[name][index] = value


def call_ops(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.kvkernels, op)(**arguments)


def call_reference(op: str, arguments: Arguments) -> Any:
    with cases.addresses_are_the_hosts():
        return getattr(reference, op)(**arguments)


def call_explain(op: str, arguments: Arguments) -> Any:
    return kvkernels.explain(op, **arguments)


DOORS = {"torch.ops": call_ops, "reference": call_reference, "explain": call_explain}


def tensors_of(arguments: Arguments) -> Iterator[Tensor]:
    for value in arguments.values():
        yield from [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []


def bytes_of(arguments: Arguments) -> list[bytes]:
    """Every byte of every storage on the host, so also what lies between a tensor's elements."""
    found = []
    for t in tensors_of(arguments):
        if t.device.type == "cpu" and t.layout == torch.strided:
            found.append(bytes(torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()))
    return found


def without_memory(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name != "memory"}


def outcome(door: str, op: str, arguments: Arguments) -> tuple[type[Exception] | None, str]:
    """What a call raises, after checking that a refused one wrote nothing."""
    before = bytes_of(arguments)
    try:
        DOORS[door](op, without_memory(arguments))
    except (IndexError, ValueError) as error:
        assert bytes_of(arguments) == before, f"{door} wrote before it raised {error}"
        return type(error), str(error)
    return None, ""


def refused(op: str, spoil: Callable[[Arguments], None], error: type[Exception], text: str) -> None:
    """Every door raises exactly this, writes nothing, and leaves nothing behind that the next call trips over."""
    for door in DOORS:
        torch.manual_seed(1)
        arguments = VALID[op]()
        spoil(arguments)
        assert outcome(door, op, arguments) == (error, f"{op}: {text}"), door
        assert outcome(door, op, VALID[op]()) == (None, "")
