#include <utility>

#include "ops/copy_call.h"
#include "ops/ops.h"

namespace kvkernels {
namespace {

// vLLM's rule: a contiguous tensor of any shape is a row of blocks; one with padded rows steps by its row stride. What
// counts inside a row is that its bytes are dense: head-first memory is often shown as token-first.
Pool block_pool(const Name& name, const Tensor& tensor, const TensorFacts& facts, int64_t block_bytes, bool written) {
  const char* op = "swap_blocks";
  int64_t blocks = 0;
  int64_t block_stride = block_bytes;
  const bool has_dense_rows = facts.dim() > 0 && facts.is_dense_from(1);
  int64_t row_bytes = facts.element_bytes();
  for (int64_t i = 1; i < facts.dim(); ++i) row_bytes *= facts.size(i);
  if (facts.is_contiguous_from(0) || (has_dense_rows && facts.stride(0) * facts.element_bytes() == row_bytes)) {
    const int64_t bytes = facts.numel() * facts.element_bytes();
    if (bytes % block_bytes != 0) {
      value_error(op, ": ", name, " must hold a whole number of blocks of ", block_bytes, " bytes, got ", bytes,
                  " bytes");
    }
    blocks = bytes / block_bytes;
  } else {
    block_stride = facts.stride(0) * facts.element_bytes();
    if (!has_dense_rows || row_bytes != block_bytes || block_stride <= row_bytes) {
      value_error(op, ": ", name, " must be contiguous or have rows of ", block_bytes,
                  " bytes at a larger stride, got shape ", facts.shape_text(), " and strides ", facts.strides_text());
    }
    blocks = facts.size(0);
  }
  void* base = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {static_cast<std::byte*>(base), blocks, block_stride, block_bytes};
}

}  // namespace

void swap_blocks(const Tensor& src, const Tensor& dst, int64_t block_size_in_bytes, const Tensor& block_mapping,
                 StrArgument executor, int64_t sm_budget) {
  const char* op = "swap_blocks";
  CopyCall call;
  call.op = op;
  call.executor = checked_executor(op, executor.take());
  call.sm_budget = sm_budget;
  check_sm_budget(op, sm_budget);
  if (block_size_in_bytes <= 0) value_error(op, ": block_size_in_bytes must be positive, got ", block_size_in_bytes);
  const TensorFacts src_facts = checked_tensor(op, Name{"src"}, src);
  const TensorFacts dst_facts = checked_tensor(op, Name{"dst"}, dst);
  call.ids_name = "block_mapping";
  merge_place(op, "src", src_facts, true, call.src.place);
  merge_place(op, "dst", dst_facts, true, call.dst.place);
  const Ids ids = checked_ids(op, "block_mapping", block_mapping, 2);
  if (ids.on_device) value_error(op, ": block_mapping must be on the cpu, got cuda:", ids.device);
  call.src.pools = {block_pool(Name{"src"}, src, src_facts, block_size_in_bytes, false)};
  call.dst.pools = {block_pool(Name{"dst"}, dst, dst_facts, block_size_in_bytes, true)};
  reread_addresses(call.src, {src});
  call.src.tensors = {&src, 1};
  call.dst.tensors = {&dst, 1};
  call.dst_is_list = false;
  call.take_ids(ids);
  call.runs = {{0, 0, 0, 0, block_size_in_bytes, 0, 0, {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}}}};
  call.src_limit = limit_of("src", call.src.pools, 1, false);
  call.dst_limit = limit_of("dst", call.dst.pools, 1, false);
  if (call.executor == Executor::kReference) {
    call.reference = [&](const Job&) { call_swap_reference(src, dst, block_size_in_bytes, block_mapping); };
  }
  carry_out(std::move(call));
}

}  // namespace kvkernels
