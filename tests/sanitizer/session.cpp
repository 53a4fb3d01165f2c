#include "session.h"

#include <cstdio>
#include <stdexcept>
#include <utility>

#include "core/gpu_policy.h"
#include "core/text.h"
#include "cuda/bulk_kernel.h"
#include "cuda/error.h"
#include "cuda/pointers.h"
#include "cuda/stream.h"
#include "launches.h"

namespace kvkernels::sanitizer {
namespace {

std::string describe(const std::optional<FaultRecord>& fault) {
  if (!fault) return "no bad pair";
  return text(fault->count, " bad pairs, the first in row ", fault->first_row, ", of op ", fault->op);
}

bool same(const std::optional<FaultRecord>& a, const std::optional<FaultRecord>& b) {
  if (!a || !b) return a.has_value() == b.has_value();
  return a->count == b->count && a->first_row == b->first_row && a->op == b->op;
}

BulkFacts bulk_facts(const DeviceLimits& limits) {
  return {limits.capability, limits.code_capability, limits.shared_bytes, kBulkSharedBytes};
}

}  // namespace

Session::Session(Plant plant) : plant_(plant), limits_(device_limits(current_device())) {
  if (limits_.code_capability == 0) {
    throw std::runtime_error(text("this program has no code for compute capability ", limits_.capability / 10, '.',
                                  limits_.capability % 10));
  }
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
}

Session::~Session() {
  if (cudaStreamDestroy(stream_) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

std::string Session::bulk_refusal() const {
  Move move{};
  move.fragment_bytes = kBulkMinBytes;
  return kvkernels::bulk_refusal({move}, bulk_facts(limits_));
}

KernelPlan Session::launch(Work work, int sm_budget) {
  PointerMap pointers;
  map_for_device(work, limits_, pointers);
  return launch_mapped(work, sm_budget);
}

KernelPlan Session::launch_mapped(const Work& work, int sm_budget) {
  if (work.executor == Executor::kBulk) {
    const std::string refusal = kvkernels::bulk_refusal(work.moves, bulk_facts(limits_));
    if (!refusal.empty()) throw std::runtime_error("bulk: " + refusal);
  }
  KernelPlan plan = plan_kernel(work, sm_budget, limits_, is_capturing(stream_));
  count_launches_as(work.direction);
  run_kernel(plan, upload(), stream_);
  return plan;
}

Upload Session::upload() {
  return [this](const void* host, size_t bytes) {
    const Buffer& buffer = uploads_.emplace_back(Memory::kDevice, bytes);
    check(cudaMemcpyAsync(buffer.data(), host, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
    return buffer.data();
  };
}

void Session::finish() {
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  uploads_.clear();
}

void Session::judge(const std::string& name, const Trial& trial, const std::vector<Pair>& pairs,
                    const std::optional<FaultRecord>& fault) {
  std::string first;
  const int64_t wrong = trial.count_wrong_bytes(pairs, plant_, first);
  const std::optional<FaultRecord> recorded = take_fault(current_device());
  ++cases_;
  wrong_bytes_ += wrong;
  wrong_cases_ += wrong > 0 || !same(recorded, fault);
  if (wrong > 0) {
    std::printf("WRONG %s: %lld bytes; %s\n", name.c_str(), static_cast<long long>(wrong), first.c_str());
  }
  if (!same(recorded, fault)) {
    std::printf("WRONG %s: the kernels recorded %s, and there was %s\n", name.c_str(), describe(recorded).c_str(),
                describe(fault).c_str());
  }
}

}  // namespace kvkernels::sanitizer
