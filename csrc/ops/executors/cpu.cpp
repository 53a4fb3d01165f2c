#include "cpu/copy.h"
#include "ops/executors/room.h"

namespace kvkernels {
namespace {

class CpuPlan : public Plan {
 public:
  explicit CpuPlan(const Work& work) : work_(work) {}
  void describe(Explanation&) const override {}
  Issued run() override { return cpu::copy(work_, parallel_lanes); }

 private:
  const Work& work_;
};

std::string refusal(const Job& job, Site& site) {
  if (site.is_host()) return "";
  return job.has_addresses ? "an address is on a cuda device" : "a tensor is on a cuda device";
}

std::unique_ptr<Plan> plan(const Job& job, Site&) { return std::make_unique<CpuPlan>(job.work); }

}  // namespace

const Room cpu_room{refusal, plan};

}  // namespace kvkernels
