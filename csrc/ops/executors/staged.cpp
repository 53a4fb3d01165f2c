#include "cuda/staged.h"

#include <algorithm>

#include "ops/cuda_site.h"
#include "ops/executors/room.h"

namespace kvkernels {
namespace {

class StagedPlan : public Plan {
 public:
  StagedPlan(const Job& job, CudaSite& site) : job_(job), site_(site), staging_(site.staging(job)) {}

  void describe(Explanation& explanation) const override {
    const Issued planned = plan_staged(job_.work, staging_, grid_budget(job_.sm_budget), site_.limits());
    explanation.launches = planned.launches;
    explanation.descriptors = planned.descriptors;
    const int64_t ring_bytes = staging_.chunk_bytes * std::min<int64_t>(staging_.chunks(), staging_.parts);
    explanation.device =
        text('{', site_.json(), ", \"ring_bytes\": ", ring_bytes, ", \"chunks\": ", staging_.chunks(), '}');
  }

  Issued run() override {
    const RingLease lease = lease_ring();
    // Freed after the last launch.
    Uploads uploads(site_.device());
    return run_staged(job_.work, staging_, lease.ring(), grid_budget(job_.sm_budget), site_.limits(),
                      uploads.function(), site_.stream());
  }

 private:
  // Where there is no memory for a ring, `auto` takes something else.
  RingLease lease_ring() {
    try {
      return RingLease(site_.device(), site_.stream());
    } catch (const NoMemoryForRing& error) {
      if (job_.asked != Executor::kAuto) throw;
      site_.note_no_ring();
      throw TakeAnother(error.what());
    }
  }

  const Job& job_;
  CudaSite& site_;
  const Staging& staging_;
};

std::string refusal(const Job& job, Site& site) {
  if (job.has_addresses) return "it takes tensors, and got addresses";
  if (!site.has_cuda()) return cuda_refusal(job, site);
  if (job.work.device_ids) return "the ids are on the device";
  const std::string no_code = cuda_of(site).no_code();
  if (!no_code.empty() || job.work.bytes == 0) return no_code;
  if (job.asked == Executor::kAuto && !cuda_of(site).may_have_ring()) {
    return "there was no memory for its ring on the device a moment ago";
  }
  return cuda_of(site).staging(job).refusal;
}

std::unique_ptr<Plan> plan(const Job& job, Site& site) { return std::make_unique<StagedPlan>(job, cuda_of(site)); }

}  // namespace

const Room staged_room{refusal, plan};

}  // namespace kvkernels
