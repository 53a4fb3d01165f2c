#include "cpu/loops.h"
#include "ops/cuda_state.h"
#include "ops/json.h"
#include "ops/ops.h"

namespace kvkernels {

std::string build_info() {
#ifdef KVKERNELS_WITH_CUDA
  const char* cuda = "true";
  const char* cuda_version = KVKERNELS_CUDA_VERSION;
  const char* architectures = KVKERNELS_CUDA_ARCHITECTURES;
#else
  const char* cuda = "false";
  const char* cuda_version = "";
  const char* architectures = "";
#endif
  return text("{\"cuda\": ", cuda, ", \"cuda_version\": ", quoted(cuda_version),
              ", \"architectures\": ", quoted(architectures), ", \"driver_refusal\": ", quoted(driver_refusal()),
              ", \"compiler\": ", quoted(text("gcc-compatible ", __VERSION__)),
              ", \"instruction_set\": ", quoted(cpu::instruction_set()),
              ", \"tuning\": ", quoted(cpu::tuning().processors), '}');
}

std::string check_device(int64_t device) { return take_fault_json(static_cast<int>(device)); }

}  // namespace kvkernels
