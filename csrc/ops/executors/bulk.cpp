#include "core/gpu_policy.h"
#include "ops/cuda_site.h"
#include "ops/executors/kernel.h"

namespace kvkernels {
namespace {

std::string refusal(const Job& job, Site& site) {
  const std::string reason = kernel_refusal(job, site);
  if (!reason.empty() || !site.has_cuda() || job.work.bytes == 0) return reason;
  std::vector<Move> moves;
  for (const Work& work : cuda_of(site).mapped(job)) moves.insert(moves.end(), work.moves.begin(), work.moves.end());
  return bulk_refusal(moves, cuda_of(site).bulk());
}

}  // namespace

const Room bulk_room{refusal, kernel_plan};

}  // namespace kvkernels
