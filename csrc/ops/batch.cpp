// swap_blocks_batch: raw addresses, as vLLM calls it.
#include "core/batch.h"

#include <utility>

#include "ops/copy_call.h"
#include "ops/counters.h"
#include "ops/cuda_path.h"
#include "ops/explain.h"
#include "ops/ops.h"

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

// The reference has no lowering of its own: it copies row by row.
void run_reference(const std::vector<Fragment>& fragments) {
  Explanation explanation{kOp, Executor::kReference, "named by the caller", Direction::kHostToHost, "reference"};
  std::vector<int64_t> copies;
  for (const Fragment& fragment : fragments) {
    explanation.bytes += fragment.bytes;
    copies.insert(copies.end(), {static_cast<int64_t>(reinterpret_cast<uintptr_t>(fragment.src)),
                                 static_cast<int64_t>(reinterpret_cast<uintptr_t>(fragment.dst)), fragment.bytes});
  }
  explanation.descriptors = explanation.pairs = static_cast<int64_t>(fragments.size());
  explanation.moves = 1;
  if (explaining()) return record(explanation);
  if (explanation.bytes == 0) return;
  call_batch_reference(int64_tensor({explanation.pairs, 3}, copies.data()));
  count_issued(Executor::kReference, 0, explanation.descriptors, explanation.bytes);
}

void run_on_host(std::vector<Fragment> fragments, Executor asked) {
  if (asked == Executor::kReference) return run_reference(fragments);
  if (asked == Executor::kStaged || asked == Executor::kTriton) refuse_addresses(kOp, asked);
  Choice choice{asked, "named by the caller"};
  // Of no address nobody can say where it is.
  if (!fragments.empty() || !addresses_may_be_cuda()) choice = choose_on_host(kOp, asked);
  if (asked == Executor::kAuto) choice = {Executor::kCpu, "no address is a cuda device's"};
  Work work = lower_fragments(std::move(fragments), Direction::kHostToHost, {choice.executor, torch_threads(), false});
  run_on_cpu(kOp, work, choice.reason);
  recycle(std::move(work.fragments));
}

}  // namespace

void refuse_addresses(const char* op, Executor executor) {
  value_error(op, ": executor '", name_of(executor), "' cannot serve this call: it takes tensors, and got addresses");
}

void swap_blocks_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes,
                       bool is_src_access_order_any, StrArgument executor, int64_t sm_budget) {
  const Executor asked = checked_executor(kOp, executor.take());
  check_sm_budget(kOp, sm_budget);
  const Column src = checked_column("src_ptrs", src_ptrs, true, -1);
  const Column dst = checked_column("dst_ptrs", dst_ptrs, true, src.rows);
  const Column bytes = checked_column("sizes", sizes, false, src.rows);
  AddressCall call{kOp, checked_rows(kOp, {src.values, dst.values, bytes.values, src.rows}), asked, sm_budget,
                   is_src_access_order_any};
  if (addresses_may_be_cuda() && carry_out_addresses_on_cuda(call)) return recycle(std::move(call.fragments));
  run_on_host(std::move(call.fragments), asked);
}

}  // namespace kvkernels
