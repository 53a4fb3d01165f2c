"""The one Python copy of the op schemas and tags; a test compares it with what the compiled library registers."""

from __future__ import annotations

import torch

NAMESPACE = "kvkernels"

# Sources that are pages say that they are written, (b!), and are not. Inductor drops a clone whose value is elsewhere,
# and would hand an op one tensor twice where its caller wrote `op(x.clone(), x)`; of two that are written it keeps
# both. The sources of concat_tp_shards_out and split_tp_shards may be expanded, which nothing may write: their checks,
# which see addresses on any device, find one tensor on both sides and refuse it.
PUBLIC = {
    "swap_blocks": (
        "(Tensor(b!) src, Tensor(a!) dst, int block_size_in_bytes, Tensor block_mapping, "
        'str executor="auto", int sm_budget=0) -> ()'
    ),
    "swap_blocks_batch": (
        "(Tensor src_ptrs, Tensor(a!) dst_ptrs, Tensor sizes, bool is_src_access_order_any=False, "
        'str executor="auto", int sm_budget=0) -> ()'
    ),
    "gather_blocks": (
        '(Tensor(b!)[] pools, Tensor block_ids, Tensor(a!) out, str executor="auto", int sm_budget=0) -> ()'
    ),
    "scatter_blocks": (
        '(Tensor(b!) buffer, Tensor block_ids, Tensor(a!)[] pools, str executor="auto", int sm_budget=0) -> ()'
    ),
    "copy_pages": (
        "(Tensor(b!)[] src, Tensor(a!)[] dst, Tensor mapping, Tensor runs, int src_subblocks_per_block=1, "
        'int dst_subblocks_per_block=1, bool skip_negative=False, str executor="auto", int sm_budget=0) -> ()'
    ),
    "concat_tp_shards": '(Tensor[] shards, int dim, str executor="auto", int sm_budget=0) -> Tensor',
    "concat_tp_shards_out": ('(Tensor[] shards, int dim, Tensor(a!) out, str executor="auto", int sm_budget=0) -> ()'),
    "split_tp_shards": '(Tensor input, int dim, Tensor(a!)[] out, str executor="auto", int sm_budget=0) -> ()',
}

PRIVATE = {
    "_explain_begin": "() -> ()",
    "_explain_end": "() -> Tensor",
    "_counters": "() -> Tensor",
    "_reset_counters": "() -> ()",
    "_build_info": "() -> Tensor",
    "_check_device": "(int device) -> Tensor",
    "_prepare": (
        "(Tensor[] src, Tensor[] dst, Tensor runs, int src_subblocks_per_block, int dst_subblocks_per_block, "
        "bool skip_negative, str executor, int sm_budget) -> int"
    ),
    "_run_prepared": "(int prepared, Tensor mapping) -> ()",
    "_release_prepared": "(int prepared) -> ()",
    "_policy": "(bool is_default) -> Tensor",
    "_set_policy": "(Tensor rows, str source) -> ()",
    "_cpu_numbers": "() -> Tensor",
    "_set_cpu_numbers": "(Tensor numbers, str source) -> ()",
    "_copy_pages_reference": (
        "(Tensor[] src, Tensor(a!)[] dst, Tensor mapping, Tensor runs, int src_subblocks_per_block, "
        "int dst_subblocks_per_block, bool skip_negative) -> ()"
    ),
    "_swap_blocks_reference": ("(Tensor src, Tensor(a!) dst, int block_size_in_bytes, Tensor block_mapping) -> ()"),
    "_swap_blocks_batch_reference": "(Tensor copies) -> ()",
    "_concat_tp_shards_reference": "(Tensor[] shards, int dim, Tensor(a!) out) -> ()",
    "_split_tp_shards_reference": "(Tensor input, int dim, Tensor(a!)[] out) -> ()",
    "_first_requiring_grad": "(Tensor[] tensors) -> int",
    "_note_writes": "(Tensor[] tensors) -> ()",
    "_peer_refusal": "(int device, int peer, bool enables) -> Tensor",
    "_triton_refusal": "(int device) -> Tensor",
    "_triton_copy": "(Tensor table, int[] head) -> ()",
}

# What a compiled graph holds of the functions over layouts; kvkernels/layout/traced.py defines and implements them.
TRACED = {
    "_convert_blocks": (
        "(Tensor(b!)[] src, Tensor(a!)[] dst, Tensor mapping, str src_layouts, str dst_layouts, int? layer, "
        "bool allow_partial, int? unit_tokens, bool skip_negative, str executor, int sm_budget) -> ()"
    ),
    "_slots_to_buffer": (
        "(Tensor(b!)[] cache, Tensor slots, Tensor(a!)[] buffer, str layouts, str pattern, int skip_first, "
        "str executor, int sm_budget) -> ()"
    ),
    "_slots_to_cache": (
        "(Tensor(a!)[] cache, Tensor slots, Tensor(b!)[] buffer, str layouts, str pattern, int skip_first, "
        "str executor, int sm_budget) -> ()"
    ),
}
TRACED_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe)

# A CUDA graph freezes the values of a mapping that lives on the host, so inductor must not capture these unasked.
TAKES_HOST_IDS = frozenset({"swap_blocks", "swap_blocks_batch", "gather_blocks", "scatter_blocks", "copy_pages"})

# Kernels that Python provides even where the library is compiled: C++ calls them, after its own checks.
PYTHON_KERNELS = (
    "_copy_pages_reference",
    "_swap_blocks_reference",
    "_swap_blocks_batch_reference",
    "_concat_tp_shards_reference",
    "_split_tp_shards_reference",
    "_first_requiring_grad",
    "_note_writes",
    "_peer_refusal",
    "_triton_refusal",
    "_triton_copy",
)


def tags(op: str) -> tuple[torch.Tag, ...]:
    """Tags of a public op; private ops have none."""
    if op not in PUBLIC:
        return ()
    always = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    return (*always, torch.Tag.cudagraph_unsafe) if op in TAKES_HOST_IDS else always
