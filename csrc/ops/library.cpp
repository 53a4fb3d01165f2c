// Every op's schema and the C++ function for it, in one place.
//
// Python defines the ops (kvkernels/registration/schemas.py): torch before 2.12 takes no tags from C++, and their
// numbers differ from one torch to the next. The functions below were written for these schemas, which Python compares
// with its own before it defines anything, so that a library of another version is refused and not called with other
// arguments.
#include "ops/counters.h"
#include "ops/ops.h"
#include "ops/policy_ops.h"

extern "C" __attribute__((visibility("default"))) const char* kvkernels_schemas() {
  return R"schemas(swap_blocks(Tensor(b!) src, Tensor(a!) dst, int block_size_in_bytes, Tensor block_mapping, str executor="auto", int sm_budget=0) -> ()
swap_blocks_batch(Tensor src_ptrs, Tensor(a!) dst_ptrs, Tensor sizes, bool is_src_access_order_any=False, str executor="auto", int sm_budget=0) -> ()
gather_blocks(Tensor(b!)[] pools, Tensor block_ids, Tensor(a!) out, str executor="auto", int sm_budget=0) -> ()
scatter_blocks(Tensor(b!) buffer, Tensor block_ids, Tensor(a!)[] pools, str executor="auto", int sm_budget=0) -> ()
copy_pages(Tensor(b!)[] src, Tensor(a!)[] dst, Tensor mapping, Tensor runs, int src_subblocks_per_block=1, int dst_subblocks_per_block=1, bool skip_negative=False, str executor="auto", int sm_budget=0) -> ()
concat_tp_shards(Tensor[] shards, int dim, str executor="auto", int sm_budget=0) -> Tensor
concat_tp_shards_out(Tensor[] shards, int dim, Tensor(a!) out, str executor="auto", int sm_budget=0) -> ()
split_tp_shards(Tensor input, int dim, Tensor(a!)[] out, str executor="auto", int sm_budget=0) -> ()
_prepare(Tensor[] src, Tensor[] dst, Tensor runs, int src_subblocks_per_block, int dst_subblocks_per_block, bool skip_negative, str executor, int sm_budget) -> int
_run_prepared(int prepared, Tensor mapping) -> ()
_release_prepared(int prepared) -> ()
_copy_pages_reference(Tensor[] src, Tensor(a!)[] dst, Tensor mapping, Tensor runs, int src_subblocks_per_block, int dst_subblocks_per_block, bool skip_negative) -> ()
_swap_blocks_reference(Tensor src, Tensor(a!) dst, int block_size_in_bytes, Tensor block_mapping) -> ()
_swap_blocks_batch_reference(Tensor copies) -> ()
_concat_tp_shards_reference(Tensor[] shards, int dim, Tensor(a!) out) -> ()
_split_tp_shards_reference(Tensor input, int dim, Tensor(a!)[] out) -> ()
_first_requiring_grad(Tensor[] tensors) -> int
_note_writes(Tensor[] tensors) -> ()
_peer_refusal(int device, int peer, bool enables) -> Tensor
_triton_refusal(int device) -> Tensor
_triton_copy(Tensor table, int[] head) -> ()
_explain_begin() -> ()
_explain_end() -> Tensor
_counters() -> Tensor
_reset_counters() -> ()
_build_info() -> Tensor
_check_device(int device) -> Tensor
_policy(bool is_default) -> Tensor
_set_policy(Tensor rows, str source) -> ()
_cpu_numbers() -> Tensor
_set_cpu_numbers(Tensor numbers, str source) -> ()
)schemas";
}

namespace {

template <auto function, class... Arguments>
kvkernels::Tensor as_tensor(Arguments... arguments) {
  return kvkernels::text_tensor(function(arguments...));
}

}  // namespace

// One kernel for all devices: which device a call is on is for the checks to say, in our words, and an empty list or
// an op without tensors has no other dispatch key.
STABLE_TORCH_LIBRARY_IMPL(kvkernels, CompositeExplicitAutograd, m) {
  m.impl("swap_blocks", TORCH_BOX(&kvkernels::swap_blocks));
  m.impl("swap_blocks_batch", TORCH_BOX(&kvkernels::swap_blocks_batch));
  m.impl("gather_blocks", TORCH_BOX(&kvkernels::gather_blocks));
  m.impl("scatter_blocks", TORCH_BOX(&kvkernels::scatter_blocks));
  m.impl("copy_pages", TORCH_BOX(&kvkernels::copy_pages));
  m.impl("concat_tp_shards", TORCH_BOX(&kvkernels::concat_tp_shards));
  m.impl("concat_tp_shards_out", TORCH_BOX(&kvkernels::concat_tp_shards_out));
  m.impl("split_tp_shards", TORCH_BOX(&kvkernels::split_tp_shards));
  m.impl("_prepare", TORCH_BOX(&kvkernels::prepare));
  m.impl("_run_prepared", TORCH_BOX(&kvkernels::run_prepared));
  m.impl("_release_prepared", TORCH_BOX(&kvkernels::release_prepared));
  m.impl("_explain_begin", TORCH_BOX(&kvkernels::explain_begin));
  m.impl("_explain_end", TORCH_BOX(&as_tensor<&kvkernels::explain_end>));
  m.impl("_counters", TORCH_BOX(&as_tensor<&kvkernels::counters_json>));
  m.impl("_reset_counters", TORCH_BOX(&kvkernels::reset_counters));
  m.impl("_build_info", TORCH_BOX(&as_tensor<&kvkernels::build_info>));
  m.impl("_check_device", TORCH_BOX((&as_tensor<&kvkernels::check_device, int64_t>)));
  m.impl("_policy", TORCH_BOX((&as_tensor<&kvkernels::policy_json, bool>)));
  m.impl("_set_policy", TORCH_BOX(&kvkernels::set_policy));
  m.impl("_cpu_numbers", TORCH_BOX(&as_tensor<&kvkernels::cpu_numbers_json>));
  m.impl("_set_cpu_numbers", TORCH_BOX(&kvkernels::set_cpu_numbers));
}
