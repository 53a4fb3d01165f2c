// A build without CUDA code, where Python's kernels are left.
#include <stdexcept>

#include "core/cuda_driver.h"
#include "core/text.h"
#include "ops/cuda_state.h"
#include "ops/executors/room.h"
#include "ops/mover_device.h"

namespace kvkernels {
namespace {

std::string refusal(const Job& job, Site& site) {
  const bool takes_tensors = job.asked == Executor::kStaged;
  if (job.has_addresses && takes_tensors) return "it takes tensors, and got addresses";
  return cuda_refusal(job, site);
}

std::unique_ptr<Plan> plan(const Job&, Site&) { throw std::logic_error("a job that is refused has no plan"); }

}  // namespace

const Room kernel_room{refusal, plan};
const Room bulk_room{refusal, plan};
const Room dma_room{refusal, plan};
const Room staged_room{refusal, plan};

std::unique_ptr<Site> device_site(Job& job, bool) {
  return site_without_cuda(job, "this build has no CUDA code (no nvcc was found, or KVKERNELS_CUDA=OFF)");
}

void begin_issuing() {}
bool may_have_issued() { return false; }

std::string driver_refusal() { return ""; }

int device_of_addresses(const char* op, const std::vector<Fragment>&) {
  if (!cuda_in_use()) return -1;
  throw std::runtime_error(text(op,
                                ": src_ptrs and dst_ptrs must be told apart as host or device addresses, got a build "
                                "without CUDA code, which cannot ask the driver; rebuild with KVKERNELS_CUDA=ON"));
}

std::string take_fault_json(int) { return "{}"; }

std::shared_ptr<MoverDevices> mover_devices(int, int64_t) {
  throw std::runtime_error("device must be the cpu, got a cuda device, and a library that was built without CUDA code");
}

}  // namespace kvkernels
