// Every schema and its registration, in one place.
#include "ops/counters.h"
#include "ops/ops.h"

// Autograd and functionalization need nothing else: every write is annotated. needs_exact_strides keeps inductor from
// handing over re-strided copies of padded pools; cudagraph_unsafe marks what takes host mappings, whose values a
// captured graph would freeze.
STABLE_TORCH_LIBRARY(kvkernels, m) {
  const std::vector<at::Tag> host_mapping{at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides,
                                          at::Tag::cudagraph_unsafe};
  const std::vector<at::Tag> capturable{at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def("swap_blocks(Tensor src, Tensor(a!) dst, int block_size_in_bytes, Tensor block_mapping) -> ()", host_mapping);
  m.def(
      "swap_blocks_batch(Tensor src_ptrs, Tensor(a!) dst_ptrs, Tensor sizes, bool is_src_access_order_any=False) -> ()",
      host_mapping);
  m.def("gather_blocks(Tensor[] pools, Tensor block_ids, Tensor(a!) out, str executor=\"auto\", int sm_budget=0) -> ()",
        host_mapping);
  m.def(
      "scatter_blocks(Tensor buffer, Tensor block_ids, Tensor(a!)[] pools, str executor=\"auto\", int sm_budget=0) -> "
      "()",
      host_mapping);
  m.def(
      "copy_pages(Tensor[] src, Tensor(a!)[] dst, Tensor mapping, Tensor runs, int src_subblocks_per_block=1, "
      "int dst_subblocks_per_block=1, bool skip_negative=False, str executor=\"auto\", int sm_budget=0) -> ()",
      host_mapping);
  m.def("concat_tp_shards(Tensor[] shards, int dim) -> Tensor", capturable);
  m.def("concat_tp_shards_out(Tensor[] shards, int dim, Tensor(a!) out) -> ()", capturable);
  m.def("split_tp_shards(Tensor input, int dim, Tensor(a!)[] out) -> ()", capturable);

  m.def(
      "_copy_pages_reference(Tensor[] src, Tensor(a!)[] dst, Tensor mapping, Tensor runs, int src_subblocks_per_block, "
      "int dst_subblocks_per_block, bool skip_negative) -> ()");
  m.def("_triton_refusal(int device) -> str");
  m.def("_triton_copy(Tensor table, int[] head) -> ()");
  m.def("_explain_begin() -> ()");
  m.def("_explain_end() -> str");
  m.def("_counters() -> str");
  m.def("_reset_counters() -> ()");
  m.def("_build_info() -> str");
  m.def("_check_device(int device) -> str");
}

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
  m.impl("_explain_begin", TORCH_BOX(&kvkernels::explain_begin));
  m.impl("_explain_end", TORCH_BOX(&kvkernels::explain_end));
  m.impl("_counters", TORCH_BOX(&kvkernels::counters_json));
  m.impl("_reset_counters", TORCH_BOX(&kvkernels::reset_counters));
  m.impl("_build_info", TORCH_BOX(&kvkernels::build_info));
  m.impl("_check_device", TORCH_BOX(&kvkernels::check_device));
}
