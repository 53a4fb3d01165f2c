#include <algorithm>
#include <cstring>
#include <utility>

#include "core/verify.h"
#include "ops/copy_call.h"
#include "ops/ops.h"

namespace kvkernels {
namespace {

// The rows of the runs tensor, copied: what is verified is what is used.
std::vector<Run> read_runs(const char* op, const Tensor& tensor) {
  const TensorFacts facts(tensor);
  if (facts.dtype() != aoti_torch_dtype_int64() || !facts.is_cpu() || facts.dim() != 2 ||
      facts.size(1) != kRunColumns) {
    value_error(op, ": runs must be int64 of shape [r, 16] on the cpu, got ", facts.dtype_text(), " of shape ",
                facts.shape_text(), " on ", facts.device_text());
  }
  checked_tensor(op, Name{"runs"}, tensor);
  std::vector<Run> runs(static_cast<size_t>(facts.size(0)));
  const auto* data = static_cast<const std::byte*>(tensor.const_data_ptr());
  if (facts.stride(0) == kRunColumns && facts.stride(1) == 1) {
    if (!runs.empty()) std::memcpy(runs.data(), data, runs.size() * sizeof(Run));
    return runs;
  }
  for (size_t row = 0; row < runs.size(); ++row) {
    int64_t columns[kRunColumns];
    for (int64_t column = 0; column < kRunColumns; ++column) {
      const int64_t element = static_cast<int64_t>(row) * facts.stride(0) + column * facts.stride(1);
      std::memcpy(&columns[column], data + element * facts.element_bytes(), sizeof(int64_t));
    }
    std::memcpy(&runs[row], columns, sizeof(columns));
  }
  return runs;
}

void check_subblocks(const char* op, const char* argument, const char* list, int64_t subblocks, const Pools& pools) {
  if (subblocks <= 0) value_error(op, ": ", argument, " must be positive, got ", subblocks);
  int64_t most = 0;
  for (const Pool& pool : pools.pools) most = std::max(most, pool.blocks);
  int64_t ids = 0;
  if (__builtin_mul_overflow(most, subblocks, &ids)) {
    value_error(op, ": ", argument, " must leave ", list, "'s ids in int64, got ", subblocks, " for ", most, " blocks");
  }
}

PageSizes page_sizes(const CopyCall& call) {
  PageSizes pages;
  for (const Pool& pool : call.src.pools) pages.src.push_back(pool.page_bytes);
  for (const Pool& pool : call.dst.pools) pages.dst.push_back(pool.page_bytes);
  pages.src_subblocks = call.src_subblocks;
  pages.dst_subblocks = call.dst_subblocks;
  return pages;
}

}  // namespace

CopyCall checked_copy(const char* op, const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                      const Tensor* mapping, const Tensor& runs, int64_t src_subblocks, int64_t dst_subblocks,
                      const std::string& executor, int64_t sm_budget) {
  CopyCall call;
  call.op = op;
  call.executor = checked_executor(op, executor);
  check_sm_budget(op, sm_budget);
  call.sm_budget = sm_budget;
  call.src = checked_pools(op, "src", src, false);
  call.dst = checked_pools(op, "dst", dst, true);
  reread_addresses(call.src, src);
  if (mapping != nullptr) call.take_mapping("mapping", *mapping);
  check_subblocks(op, "src_subblocks_per_block", "src", src_subblocks, call.src);
  check_subblocks(op, "dst_subblocks_per_block", "dst", dst_subblocks, call.dst);
  call.src_subblocks = src_subblocks;
  call.dst_subblocks = dst_subblocks;
  call.src_limit = limit_of("src", call.src.pools, src_subblocks);
  call.dst_limit = limit_of("dst", call.dst.pools, dst_subblocks);
  call.runs = read_runs(op, runs);
  call.bound = bound_before(call);
  if (!call.bound) verify_runs(op, call.runs.data(), static_cast<int64_t>(call.runs.size()), page_sizes(call));
  return call;
}

void copy_pages(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& mapping,
                const Tensor& runs, int64_t src_subblocks_per_block, int64_t dst_subblocks_per_block,
                bool skip_negative, StrArgument executor, int64_t sm_budget) {
  const char* op = "copy_pages";
  CopyCall call = checked_copy(op, src, dst, &mapping, runs, src_subblocks_per_block, dst_subblocks_per_block,
                               executor.take(), sm_budget);
  call.skip_negative = skip_negative;
  if (call.executor == Executor::kReference) {
    if (call.ids_on_device)
      value_error(op, ": executor 'reference' cannot serve this call: its ids must be on the cpu");
    call.reference = [&](const Job&) {
      call_reference(src, dst, mapping, runs, src_subblocks_per_block, dst_subblocks_per_block, skip_negative);
    };
  }
  carry_out(std::move(call));
}

}  // namespace kvkernels
