// swap_blocks_batch: raw addresses, as vLLM calls it.
#include "core/batch.h"

#include <utility>

#include "core/cuda_driver.h"
#include "ops/copy_call.h"
#include "ops/cuda_state.h"
#include "ops/ops.h"
#include "ops/path.h"

namespace kvkernels {
namespace {

const char* const kOp = "swap_blocks_batch";

struct Column {
  IdColumn values;
  int64_t rows;
};

Column checked_column(const char* name, const Tensor& tensor, bool is_address, int64_t expected_rows) {
  const TensorFacts facts = checked_tensor(kOp, Name{name}, tensor);
  const bool is_wide = facts.dtype() == aoti_torch_dtype_int64();
  const bool other = facts.dtype() == (is_address ? aoti_torch_dtype_uint64() : aoti_torch_dtype_int32());
  if (!is_wide && !other) {
    value_error(kOp, ": ", name, is_address ? " must be int64 or uint64, got " : " must be int64 or int32, got ",
                facts.dtype_text());
  }
  if (facts.dim() != 1 || (expected_rows >= 0 && facts.size(0) != expected_rows)) {
    value_error(kOp, ": ", name, " must have shape ", expected_rows < 0 ? "[n]" : text('[', expected_rows, ']'),
                ", got ", facts.shape_text());
  }
  if (!facts.is_cpu()) value_error(kOp, ": ", name, " must be on the cpu, got ", facts.device_text());
  return {{tensor.const_data_ptr(), facts.stride(0) * facts.element_bytes(), static_cast<int>(facts.element_bytes())},
          facts.size(0)};
}

Tensor copies_of(const std::vector<Fragment>& fragments) {
  std::vector<int64_t> copies;
  for (const Fragment& fragment : fragments) {
    copies.insert(copies.end(), {static_cast<int64_t>(reinterpret_cast<uintptr_t>(fragment.src)),
                                 static_cast<int64_t>(reinterpret_cast<uintptr_t>(fragment.dst)), fragment.bytes});
  }
  return int64_tensor({static_cast<int64_t>(fragments.size()), 3}, copies.data());
}

}  // namespace

void swap_blocks_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes,
                       bool is_src_access_order_any, StrArgument executor, int64_t sm_budget) {
  const Executor asked = checked_executor(kOp, executor.take());
  check_sm_budget(kOp, sm_budget);
  const Column src = checked_column("src_ptrs", src_ptrs, true, -1);
  const Column dst = checked_column("dst_ptrs", dst_ptrs, true, src.rows);
  const Column bytes = checked_column("sizes", sizes, false, src.rows);
  Job job;
  job.op = kOp;
  job.asked = asked;
  job.sm_budget = sm_budget;
  job.any_source_order = is_src_access_order_any;
  job.has_addresses = true;
  job.listed = checked_rows(kOp, {src.values, dst.values, bytes.values, src.rows});
  job.is_nowhere = job.listed.empty() && cuda_in_use();
  job.device = device_of_addresses(kOp, job.listed);
  // A kernel may take the rows as they are, and the reference does; the processor needs no second list.
  const bool keeps_rows = job.device >= 0 || asked == Executor::kReference;
  const LowerOptions options{job.device < 0 ? Executor::kCpu : Executor::kDma, torch_threads(), false};
  job.work = keeps_rows ? lower_fragments(job.listed, Direction::kHostToHost, options)
                        : lower_fragments(std::move(job.listed), Direction::kHostToHost, options);
  job.reference = [](const Job& job) { call_batch_reference(copies_of(job.listed)); };
  carry_out(std::move(job));
}

}  // namespace kvkernels
