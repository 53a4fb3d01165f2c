#include "ops/triton_path.h"

#include <algorithm>
#include <utility>

#include "core/cuda_driver.h"
#include "ops/counters.h"
#include "ops/explain.h"
#include "ops/fault_ops.h"
#include "ops/named_errors.h"
#include "ops/triton_table.h"

namespace kvkernels {
namespace {

Tensor upload(const std::vector<int64_t>& table, int device) {
  if (device < 0) return int64_tensor({static_cast<int64_t>(table.size())}, table.data());
  return upload_bytes(table.data(), table.size() * sizeof(int64_t), device);
}

std::string refusal_of(const CopyCall& call, int device) {
  const std::string refusal = triton_refusal(device);
  if (!refusal.empty() || device < 0 || call.src.place.on_device == call.dst.place.on_device) return refusal;
  const Pools& host = call.src.place.on_device ? call.dst : call.src;
  const char* const list = call.src.place.on_device ? call.dst_list : call.src_list;
  if (!std::all_of(host.tensors.begin(), host.tensors.end(), is_pinned)) return text(list, " must be in pinned memory");
  for (const Tensor& tensor : host.tensors) {
    const std::string why = host_address_refusal(tensor.const_data_ptr(), call.src.place.on_device);
    if (!why.empty())
      return text(list, " must be pinned memory that a kernel can use at the host's address, got ", why);
  }
  return "";
}

}  // namespace

std::string triton_refusal(int device) { return call_triton_refusal(device); }

void run_triton(const CopyCall& call, const Work& work, int device, const void* fault, const std::string& reason) {
  TritonHead head;
  head.fault = static_cast<int64_t>(reinterpret_cast<uintptr_t>(fault));
  head.sm_budget = call.sm_budget;
  head.device = device;
  std::vector<int64_t> table;
  if (work.bytes > 0) table = triton_table(work, head);
  const int64_t launches = work.bytes > 0;
  const int64_t descriptors = work.bytes > 0 ? head.moves + work.pairs : 0;
  if (explaining()) {
    Explanation explanation = explanation_of(call.op, work, reason);
    explanation.executor = Executor::kTriton;
    explanation.launches = launches;
    explanation.descriptors = descriptors;
    explanation.device = text("{\"index\": ", device, head.is_chunked ? ", \"chunks\": " : ", \"tiles\": ", head.pieces,
                              ", \"width\": ", head.width, ", \"table_bytes\": ", table.size() * sizeof(int64_t), '}');
    return record(explanation);
  }
  if (work.bytes == 0) return;
  call_triton_copy(upload(table, device), {table.begin(), table.begin() + sizeof(TritonHead) / sizeof(int64_t)});
  count_issued(Executor::kTriton, launches, descriptors, work.bytes);
}

void carry_out_on_triton(const CopyCall& call, std::vector<Move> moves, PairList list,
                         const std::string& why_no_other) {
  const int device = std::max(call.src.place.device, call.dst.place.device);
  const auto refuse = [&](const std::string& why) {
    value_error(call.op, ": executor '", name_of(call.executor), "' cannot serve this call: ", why);
  };
  if (call.executor == Executor::kCpu) refuse("a tensor is on a cuda device");
  if (call.executor != Executor::kAuto && call.executor != Executor::kTriton) refuse(why_no_other);
  const std::string refusal = refusal_of(call, device);
  if (!refusal.empty() && call.executor == Executor::kTriton) refuse(refusal);
  if (!refusal.empty()) {
    throw std::runtime_error(text(call.op, ": tensors on a cuda device need CUDA code or the triton kernels: ",
                                  why_no_other, ", and executor 'triton' cannot serve this call: ", refusal));
  }
  named_errors(call.op, [&] {
    const Direction direction = direction_of(call.src.place, call.dst.place);
    Work work = call.ids_on_device ? lower_device_ids(std::move(moves), device_ids_of(call), direction)
                                   : lower(std::move(moves), std::move(list), call.src_limit.ids(), direction,
                                           {Executor::kTriton, 1, call.soon_read});
    run_triton(call, work, device, nullptr, call.executor == Executor::kAuto ? why_no_other : "named by the caller");
    recycle(std::move(work.segments));
  });
}

}  // namespace kvkernels
