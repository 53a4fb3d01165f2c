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

KernelPlan plan_ring_kernel(const StagingChunk& chunk, int sm_budget, const DeviceLimits& limits) {
  return plan_kernel(chunk.in_device, sm_budget > 0 ? sm_budget : kStagingCtas, limits, false);
}

class Transfer {
 public:
  Transfer(const Work& work, const Staging& staging, StagingRing& ring, cudaStream_t stream)
      : staging_(staging), loads_(work.direction == Direction::kHostToDevice), ring_(ring), stream_(stream) {}

  // What was asked for before the call may have written what the copies read.
  void begin() {
    if (loads_) ring_.follow(stream_);
  }

  void pass(int64_t index, const StagingChunk& chunk, const KernelPlan& plan, const Upload& upload) {
    const cudaStream_t filler = loads_ ? ring_.copies() : stream_;
    const cudaStream_t taker = loads_ ? stream_ : ring_.copies();
    ring_.wait_until_free(staging_, index, filler);
    loads_ ? copy(chunk) : launch(plan, upload);
    ring_.mark_filled(index, filler);
    ring_.wait_until_filled(index, taker);
    loads_ ? launch(plan, upload) : copy(chunk);
    ring_.mark_free(staging_, index, taker);
  }

  // The copies are in order: after the last is after all.
  void finish() {
    if (!loads_) ring_.wait_until_free(staging_, staging_.chunks() - 1, stream_);
  }

  const Issued& issued() const { return issued_; }

 private:
  void copy(const StagingChunk& chunk) {
    const auto copies = static_cast<int64_t>(chunk.over_link.size());
    const Issued done = dma_copy(chunk.over_link.data(), copies, false, ring_.copies());
    add(issued_, done.launches, done.descriptors);
  }

  void launch(const KernelPlan& plan, const Upload& upload) {
    const Issued done = run_kernel(plan, upload, stream_);
    add(issued_, done.launches, done.descriptors);
  }

  const Staging& staging_;
  const bool loads_;
  StagingRing& ring_;
  const cudaStream_t stream_;
  Issued issued_;
};

}  // namespace

Issued run_staged(const Work& work, const Staging& staging, StagingRing& ring, int sm_budget,
                  const DeviceLimits& limits, const Upload& upload, cudaStream_t stream) {
  Transfer transfer(work, staging, ring, stream);
  try {
    transfer.begin();
    for (int64_t i = 0; i < staging.chunks(); ++i) {
      const StagingChunk chunk = staging_chunk(work, staging, i, ring.place(staging, i));
      transfer.pass(i, chunk, plan_ring_kernel(chunk, sm_budget, limits), upload);
    }
    transfer.finish();
  } catch (...) {
    ring.abandon(stream);
    throw;
  }
  Issued total = transfer.issued();
  total.bytes = work.bytes;
  return total;
}

Issued plan_staged(const Work& work, const Staging& staging, int sm_budget, const DeviceLimits& limits) {
  const Range ring{.begin = kNowhere,
                   .end = kNowhere + static_cast<uintptr_t>(staging.chunk_bytes),
                   .memory = Range::Memory::kDevice,
                   .is_known = true,
                   .mapped = true};
  Issued total;
  for (int64_t i = 0; i < staging.chunks(); ++i) {
    const StagingChunk chunk = staging_chunk(work, staging, i, reinterpret_cast<std::byte*>(kNowhere));
    const KernelPlan plan = plan_ring_kernel(chunk, sm_budget, limits);
    const Issued copies = plan_ring_copies(chunk.over_link.data(), static_cast<int64_t>(chunk.over_link.size()), ring);
    add(total, plan.launches + copies.launches, plan.descriptors + copies.descriptors);
  }
  total.bytes = work.bytes;
  return total;
}

}  // namespace kvkernels
