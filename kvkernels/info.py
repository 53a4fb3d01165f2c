"""What serves the ops here, and why: the first thing to read when a call is slower than expected."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from kvkernels import policy, triton
from kvkernels.common.text import ask
from kvkernels.explain import explain
from kvkernels.reference import NO_LIBRARY
from kvkernels.registration import LIBRARY, build_record, schemas
from kvkernels.version import __version__

_PLACES = ("cpu to cpu", "cpu to cuda", "cuda to cpu", "cuda to cuda")


def info() -> dict[str, Any]:
    """Report the library, the machine, and which executors serve each op.

    Returns
    -------
    dict
        Only what JSON has. ``compiled`` and ``why`` say whether the compiled library is loaded; ``ops`` has, for each
        op and each combination of devices, the ``executors`` that can serve it, the one that ``auto`` takes, and why.
        ``cuda`` has the ``policy`` by which ``auto`` goes on a GPU: its ``source``, its ``rows``, whose meaning
        ``kvkernels.policy`` has, ``refused``, why a file in the cache directory does not serve, and
        ``kernel_below_bytes``, the variable of that name where it is set. The ``policy`` of ``cpu`` has the numbers by
        which copies on the host go, and ``table``, which says where they are from.

    Notes
    -----
    Moves nothing and initialises CUDA only as far as ``torch.cuda.is_available()`` does.

    Examples
    --------
    >>> import kvkernels
    >>> kvkernels.info()["version"]
    '0.1.0'
    """
    available = torch.cuda.is_available()  # loads the driver, which the library then asks for its version
    build = {**build_record(), **json.loads(ask(torch.ops.kvkernels._build_info))}
    architectures = [a for a in str(build.get("architectures", "")).split(",") if a]
    in_force = policy.in_force()
    cuda = {
        "built": bool(build.get("cuda")),
        "version": build.get("cuda_version") or None,
        "architectures": architectures,
        "available": available,
        "driver_refusal": build.get("driver_refusal") or None,
        "policy": {**in_force, "kernel_below_bytes": os.environ.get("KVKERNELS_KERNEL_BELOW_BYTES")},
    }
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "compiled": LIBRARY.compiled,
        "why": LIBRARY.why,
        "library": str(LIBRARY.path) if LIBRARY.path else None,
        "compiler": build.get("compiler"),
        "cuda": cuda,
        "cpu": _cpu(build),
        "ops": {op: {place: _service(op, place, cuda) for place in _PLACES} for op in schemas.PUBLIC},
    }


def _cpu(build: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "instruction_set": build.get("instruction_set"),
        "tuning": build.get("tuning"),
        "torch_threads": torch.get_num_threads(),
        "policy": policy.cpu.in_force() or None,
    }


def _service(op: str, place: str, cuda: Mapping[str, Any]) -> dict[str, Any]:
    """Executors that can serve an op between two kinds of memory."""
    if place == "cpu to cpu":
        explanation = _explain_small(op)
        named = dict.fromkeys([explanation.executor, "reference"])
        return _entry(list(named), explanation.executor, explanation.reason)
    if op == "swap_blocks_batch":
        return _service_of_addresses(cuda)
    if not LIBRARY.compiled:
        return _entry(["reference"], "reference", NO_LIBRARY)
    if not cuda["built"] or cuda["driver_refusal"]:
        why = cuda["driver_refusal"] or "the library was built without CUDA code"
        if not triton.is_installed():
            return _entry(["reference"], None, why)
        return _entry(["triton", "reference"], "triton", why)
    python = ["triton", "reference"] if triton.is_installed() else ["reference"]
    if place == "cuda to cuda":
        return _entry(["kernel", "bulk", "dma", *python], "kernel", "one launch for all pools and pairs")
    return _entry(
        ["kernel", "bulk", "dma", "staged", *python],
        "kernel, dma or staged",
        "by the policy: kvkernels.explain says which row",
    )


def _service_of_addresses(cuda: Mapping[str, Any]) -> dict[str, Any]:
    """The same for raw addresses on a device."""
    if not LIBRARY.compiled:
        return _entry([], None, "the reference cannot tell a device's address from the host's")
    if not cuda["built"] or cuda["driver_refusal"]:
        return _entry([], None, cuda["driver_refusal"] or "the library was built without CUDA code")
    return _entry(
        ["kernel", "bulk", "dma"],
        "kernel or dma",
        "by the policy: kvkernels.explain says which row",
    )


def _entry(executors: list[str], auto: str | None, why: str) -> dict[str, Any]:
    return {"executors": executors, "auto": auto, "why": why}


@_disable_current_modes()  # such as FakeTensorMode, under which nothing has a value
def _explain_small(op: str) -> Any:
    """What a call of a few bytes on the CPU comes to."""
    page, other = (torch.zeros(1, 16, dtype=torch.uint8, device="cpu") for _ in range(2))
    id_zero, pair = (torch.zeros(shape, dtype=torch.int64, device="cpu") for shape in ((1,), (1, 2)))
    run = torch.tensor([[0, 0, 0, 0, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0]], device="cpu")
    from_page, to_other, size = (
        torch.tensor([number], device="cpu") for number in (page.data_ptr(), other.data_ptr(), 16)
    )
    arguments: dict[str, tuple[Any, ...]] = {
        "swap_blocks": (page, other, 16, pair),
        "swap_blocks_batch": (from_page, to_other, size),
        "gather_blocks": ([page], id_zero, other),
        "scatter_blocks": (page, id_zero, [other]),
        "copy_pages": ([page], [other], pair, run),
        "concat_tp_shards": ([page], 0),
        "concat_tp_shards_out": ([page], 0, other),
        "split_tp_shards": (page, 0, [other]),
    }
    return explain(op, *arguments[op])


def info_text(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    cuda, cpu = found["cuda"], found["cpu"]
    code = f"CUDA {cuda['version']} code for {', '.join(cuda['architectures'])}" if cuda["built"] else "no CUDA code"
    below = f", below {cuda['policy']['kernel_below_bytes']} bytes" if cuda["policy"]["kernel_below_bytes"] else ""
    lines = [
        f"kvkernels {found['version']}, torch {found['torch']}, Python {found['python']}, {found['machine']}",
        f"compiled: {'yes' if found['compiled'] else 'no'} ({found['why']})",
        f"library:  {found['library'] or 'none'}",
        f"cuda:     {code}; torch finds {'a' if cuda['available'] else 'no'} CUDA device",
        *([f"driver:   {cuda['driver_refusal']}"] if cuda["driver_refusal"] else []),
        f"policy:   {cuda['policy']['source']}, {len(cuda['policy']['rows'])} rows{below}",
        *([f"refused:  {cuda['policy']['refused']}"] if cuda["policy"]["refused"] else []),
        f"cpu:      {cpu['instruction_set'] or 'torch decides'}, tuned for: {cpu['tuning'] or 'nothing'}, "
        f"{cpu['torch_threads']} threads",
        *([f"table:    {cpu['policy']['table']}"] if cpu["policy"] else []),
        "",
    ]
    for op, places in found["ops"].items():
        lines.append(op)
        for place, service in places.items():
            lines.append(f"  {place:<13} {service['auto'] or 'none':<14} {service['why']}")
    return "\n".join(lines)
