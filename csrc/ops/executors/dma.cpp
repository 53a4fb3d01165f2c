#include "cuda/dma.h"

#include "ops/cuda_site.h"
#include "ops/executors/room.h"

namespace kvkernels {
namespace {

class DmaPlan : public Plan {
 public:
  DmaPlan(const Job& job, CudaSite& site) : job_(job), site_(site) {}

  void describe(Explanation& explanation) const override {
    const Issued planned = plan_dma(job_.work, site_.stream());
    explanation.launches = planned.launches;
    explanation.descriptors = planned.descriptors;
    explanation.device = text('{', site_.json(), '}');
  }

  Issued run() override { return dma_copy(job_.work, job_.any_source_order, site_.stream()); }

 private:
  const Job& job_;
  CudaSite& site_;
};

std::string refusal(const Job& job, Site& site) {
  if (!site.has_cuda()) return cuda_refusal(job, site);
  return job.work.device_ids ? "the ids are on the device" : "";
}

std::unique_ptr<Plan> plan(const Job& job, Site& site) { return std::make_unique<DmaPlan>(job, cuda_of(site)); }

}  // namespace

const Room dma_room{refusal, plan};

}  // namespace kvkernels
