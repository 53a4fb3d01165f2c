#include "cuda/staged.h"

#include "cuda/dma.h"

namespace kvkernels {
namespace {

// Where a plan's ring is: no address of a process.
constexpr uintptr_t kNowhere = uintptr_t{1} << 62;

void add(Issued& total, int64_t launches, int64_t descriptors) {
  total.launches += launches;
  total.descriptors += descriptors;
}

}  // namespace

Issued run_staged(const Work& work, const Staging& staging, std::byte* ring, int sm_budget, const DeviceLimits& limits,
                  const Upload& upload, cudaStream_t stream) {
  Issued total;
  for (int64_t i = 0; i < staging.chunks(); ++i) {
    const StagingChunk chunk = staging_chunk(work, staging, i, ring);
    const KernelPlan plan = plan_kernel(chunk.in_device, nullptr, sm_budget, limits, false);
    const auto copies = static_cast<int64_t>(chunk.over_link.size());
    Issued issued;
    if (work.direction == Direction::kHostToDevice) {
      issued = dma_copy(chunk.over_link.data(), copies, false, stream);
      add(total, issued.launches, issued.descriptors);
    }
    issued = run_kernel(plan, upload, stream);
    add(total, issued.launches, issued.descriptors);
    if (work.direction == Direction::kDeviceToHost) {
      issued = dma_copy(chunk.over_link.data(), copies, false, stream);
      add(total, issued.launches, issued.descriptors);
    }
  }
  total.bytes = work.bytes;
  return total;
}

Issued plan_staged(const Work& work, const Staging& staging, int sm_budget, const DeviceLimits& limits,
                   cudaStream_t stream) {
  const Range ring{.begin = kNowhere,
                   .end = kNowhere + static_cast<uintptr_t>(staging.ring_bytes),
                   .memory = Range::Memory::kDevice,
                   .is_known = true,
                   .mapped = true};
  Issued total;
  for (int64_t i = 0; i < staging.chunks(); ++i) {
    const StagingChunk chunk = staging_chunk(work, staging, i, reinterpret_cast<std::byte*>(kNowhere));
    const KernelPlan plan = plan_kernel(chunk.in_device, nullptr, sm_budget, limits, false);
    const Issued copies = plan_dma(chunk.over_link.data(), static_cast<int64_t>(chunk.over_link.size()), stream, &ring);
    add(total, plan.launches + copies.launches, plan.descriptors + copies.descriptors);
  }
  total.bytes = work.bytes;
  return total;
}

}  // namespace kvkernels
