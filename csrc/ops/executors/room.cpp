#include "ops/executors/room.h"

#include "core/text.h"

namespace kvkernels {

const Room& room_of(Executor executor) {
  switch (executor) {
#define KVKERNELS_EXECUTOR(constant, name) \
  case Executor::constant:                 \
    return name##_room;
#include "core/executors.inc"
#undef KVKERNELS_EXECUTOR
    case Executor::kAuto:
      break;
  }
  throw std::logic_error("auto is a choice of executors and none itself");
}

std::string cuda_refusal(const Job& job, const Site& site) {
  if (job.is_nowhere) return "";
  if (site.is_host()) return "it needs a tensor on a cuda device";
  return site.why_no_cuda();
}

}  // namespace kvkernels
