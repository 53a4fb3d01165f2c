"""What is built for an edit of a file and which tests are run on it, by path: those that kill most edits first."""

from __future__ import annotations

from typing import NamedTuple

PYTHON = "Python"  # no build; the library is there as it is
CPU = "cpu"  # the library without CUDA code
SIMGPU = "simgpu"  # the CUDA code on a stand-in for CUDA, without torch
STAND_IN = "stand-in"  # the same library with torch's CUDA build


class Step(NamedTuple):
    """One build and one call of pytest."""

    kind: str
    tests: tuple[str, ...]


def _files(names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names.split())


def _on_torch(names: str) -> tuple[str, ...]:
    return tuple(f"tests/torch_cuda/test_{name}.py" for name in names.split())


def _first(first: str, others: str) -> tuple[str, ...]:
    return _files(" ".join(dict.fromkeys(f"{first} {others}".split())))


def _ops(first: str) -> list[Step]:
    """For the file of an op: its own tests, then what holds for all."""
    return [Step(CPU, _first(first, OPS)), Step(STAND_IN, ON_A_DEVICE)]


def _layouts(first: str) -> list[Step]:
    return [Step(PYTHON, _first(first, LAYOUTS)), Step(PYTHON, (*_files("objects modes compile_layouts"), *DOCTESTS))]


def _reference(first: str) -> list[Step]:
    return [Step(PYTHON, _first(first, REFERENCE)), Step(PYTHON, _files("info modes refusals_random autograd"))]


DOCTESTS = ("tests/test_info.py::test_examples_in_docstrings",)
CALLS = _files(
    "errors explain swap_blocks batch concat gather_scatter copy_pages refusals threads prepared large_offsets"
)
CORE = Step(CPU, _files("core_cpp"))
HOST = Step(SIMGPU, _files("cuda_host cuda_grid staged cuda_failures kernel_body"))
ON_A_DEVICE = _on_torch(
    "link_executors addresses host_memory prepared rings memory graphs code triton old_driver devices"
)
OPS = "errors explain refusals gather_scatter swap_blocks copy_pages concat batch prepared autograd info"
REFERENCE = "reference errors refusals copy_pages gather_scatter swap_blocks batch concat explain prepared"
REMOTE = _files("remote_states remote_frames remote remote_files")
MOVER = _files("mover mover_ends mover_order mover_random mover_metrics mover_processes")
LAYOUTS = (
    "layout layout_parts plan convert slots canonical canonical_orders copy_groups page_mapping parallel "
    "parallel_states gallery"
)
RECORDS = _files("capture_records capture_files check_kv capture_server cli")
MOVER_ON_A_DEVICE = _on_torch("mover mover_order mover_races mover_failures mover_random")

PLANS = {
    "csrc/core": [Step(CPU, CALLS), HOST, CORE],
    "csrc/core/cuda_driver": [HOST, CORE],
    "csrc/core/gpu_policy": [HOST, CORE],
    "csrc/core/chunks": [CORE, Step(STAND_IN, MOVER_ON_A_DEVICE)],
    "csrc/core/staged": [HOST, CORE],
    "csrc/cpu": [Step(CPU, CALLS), Step(CPU, (*CORE.tests, *_files("streaming policy_cpu")))],
    "csrc/cuda/peer": [Step(STAND_IN, _on_torch("peers devices"))],
    "csrc/cuda/mover_streams": [Step(STAND_IN, MOVER_ON_A_DEVICE)],
    "csrc/cuda": [HOST, Step(SIMGPU, _files("cuda_time ptx_bulk ptx_kernels"))],
    "csrc/host": [Step(CPU, _files("memory_mapping memory_pinned memory_shared tune"))],
    "csrc/ops": _ops("errors refusals"),
    "csrc/ops/address_facts": [Step(STAND_IN, _on_torch("addresses old_driver devices") + _files("batch"))],
    "csrc/ops/autograd": _ops("autograd"),
    "csrc/ops/batch": _ops("batch"),
    "csrc/ops/build_info": _ops("info"),
    "csrc/ops/concat": _ops("concat"),
    "csrc/ops/copy_pages": _ops("copy_pages"),
    "csrc/ops/counters": _ops("explain threads"),
    "csrc/ops/cuda_": [Step(STAND_IN, ON_A_DEVICE)],
    "csrc/ops/executors": [Step(STAND_IN, ON_A_DEVICE), Step(CPU, CALLS)],
    "csrc/ops/executors/cpu": _ops("explain"),
    "csrc/ops/executors/reference": _ops("explain"),
    "csrc/ops/explain": _ops("explain"),
    "csrc/ops/fork": _ops("fork"),
    "csrc/ops/gather": _ops("gather_scatter"),
    "csrc/ops/library": _ops("info compile"),
    "csrc/ops/held": _ops("prepared mover"),
    "csrc/ops/mover": [Step(CPU, MOVER)],
    "csrc/ops/policy_ops": _ops("policy policy_cpu"),
    "csrc/ops/mover_device": [Step(STAND_IN, MOVER_ON_A_DEVICE)],
    "csrc/ops/prepared": _ops("prepared"),
    "csrc/ops/swap": _ops("swap_blocks"),
    "csrc/ops/triton_table": [Step(STAND_IN, _on_torch("triton link_executors"))],
    "csrc/transfer": [Step(CPU, (*MOVER, *CORE.tests)), Step(STAND_IN, MOVER_ON_A_DEVICE)],
    "csrc/transfer/dispatch": [Step(STAND_IN, MOVER_ON_A_DEVICE), CORE],
    "kvkernels": [Step(PYTHON, _files("info docs explain names"))],
    "kvkernels/capture": [Step(PYTHON, _files("capture_packing capture_requests"))],
    "kvkernels/common": [Step(PYTHON, _files("integers errors autograd info modes lazy_bits compile"))],
    "kvkernels/layout": _layouts(""),
    "kvkernels/layout/agree": _layouts("plan layout_parts convert"),
    "kvkernels/layout/axes": _layouts("convert layout_parts plan"),
    "kvkernels/layout/blocks": _layouts("plan copy_groups slots integers"),
    "kvkernels/layout/cache": _layouts("layout layout_parts"),
    "kvkernels/layout/canonical": _layouts("canonical canonical_orders page_mapping parallel"),
    "kvkernels/layout/convert": _layouts("convert"),
    "kvkernels/layout/fits": _layouts("layout layout_parts"),
    "kvkernels/layout/forms": _layouts("page_mapping parallel canonical_orders"),
    "kvkernels/layout/geometry": _layouts("layout layout_parts convert"),
    "kvkernels/layout/groups": _layouts("copy_groups"),
    "kvkernels/layout/layout": _layouts("layout layout_parts"),
    "kvkernels/layout/mapping": _layouts("parallel parallel_states page_mapping"),
    "kvkernels/layout/memory": _layouts("layout canonical objects"),
    "kvkernels/layout/nests": _layouts("plan convert"),
    "kvkernels/layout/page_runs": _layouts("page_mapping canonical"),
    "kvkernels/layout/parallel": _layouts("parallel integers"),
    "kvkernels/layout/pattern": _layouts("layout layout_parts"),
    "kvkernels/layout/picture": _layouts("layout"),
    "kvkernels/layout/pieces": _layouts("convert plan layout_parts"),
    "kvkernels/layout/plan": _layouts("plan convert"),
    "kvkernels/layout/pools": _layouts("layout layout_parts"),
    "kvkernels/layout/rules": _layouts("layout layout_parts"),
    "kvkernels/layout/shards": _layouts("layout layout_parts convert"),
    "kvkernels/layout/slots": _layouts("slots"),
    "kvkernels/layout/specs": _layouts("canonical copy_groups parallel_states"),
    "kvkernels/layout/views": _layouts("layout layout_parts"),
    "kvkernels/layout/words": _layouts("layout objects"),
    "kvkernels/connectors": [Step(PYTHON, _files("connectors_books connectors_groups connectors_worker docs"))],
    "kvkernels/memory": [Step(PYTHON, _files("memory_pool memory_prefix memory_scheduler docs"))],
    "kvkernels/memory/chains": [Step(PYTHON, _files("memory_prefix memory_random memory_scheduler"))],
    "kvkernels/memory/handle": [Step(PYTHON, _files("memory_pool memory_processes"))],
    "kvkernels/memory/hashes": [Step(PYTHON, _files("memory_hashes"))],
    "kvkernels/memory/mapping": [Step(PYTHON, _files("memory_mapping memory_pinned memory_shared"))],
    "kvkernels/memory/pinned": [Step(PYTHON, _files("memory_pinned memory_shared"))],
    "kvkernels/memory/pages": [Step(PYTHON, _files("memory_pool")), Step(STAND_IN, _on_torch("memory_pool"))],
    "kvkernels/memory/pool": [Step(PYTHON, _files("memory_pool memory_random memory_threads"))],
    "kvkernels/memory/prefix": [Step(PYTHON, _files("memory_prefix memory_random memory_threads"))],
    "kvkernels/memory/registration": [Step(PYTHON, _files("memory_pinned")), Step(STAND_IN, _on_torch("pinned"))],
    "kvkernels/memory/reservations": [Step(PYTHON, _files("memory_prefix memory_random"))],
    "kvkernels/memory/scheduler": [Step(PYTHON, _files("memory_scheduler memory_random"))],
    "kvkernels/memory/shared": [Step(PYTHON, _files("memory_shared memory_pinned"))],
    "kvkernels/names": [Step(PYTHON, (*_files("names"), *DOCTESTS))],
    "kvkernels/policy": [Step(PYTHON, _files("policy policy_files policy_cpu"))],
    "kvkernels/observe": [Step(PYTHON, _files("observe_access"))],
    "kvkernels/prepared": [Step(PYTHON, _files("prepared_groups prepared docs modes"))],
    "kvkernels/reference": _reference(""),
    "kvkernels/reference/checks": _reference("errors refusals swap_blocks concat compile"),
    "kvkernels/reference/ledger": _reference("explain info"),
    "kvkernels/reference/overlap": _reference("overlap"),
    "kvkernels/reference/prepared": _reference("prepared"),
    "kvkernels/registration": [Step(PYTHON, _files("info compile lazy_bits errors modes"))],
    "kvkernels/transfer": [Step(PYTHON, (*MOVER, *_files("docs")))],
    "kvkernels/transfer/calibrate": [Step(PYTHON, _files("tune"))],
    "kvkernels_cli": [Step(PYTHON, _files("cli"))],
    "kvkernels_records": [Step(PYTHON, RECORDS)],
    "kvkernels_records/access": [Step(PYTHON, _files("observe_access cli"))],
    "kvkernels_records/grid": [Step(PYTHON, _files("observe_access"))],
    "kvkernels_records/known": [Step(PYTHON, _files("observe_access"))],
    "kvkernels/transfer/remote": [Step(PYTHON, REMOTE), Step(PYTHON, _files("remote_faults"))],
    "kvkernels/transfer/remote/files": [Step(PYTHON, _files("remote_files"))],
    "kvkernels/triton": [Step(PYTHON, _files("triton triton_interpreter triton_ptx"))],
}


def plan_of(path: str) -> list[Step]:
    """The steps for a file: those of the longest beginning of its path."""
    return PLANS[max((start for start in PLANS if path.startswith(start)), key=len)]
