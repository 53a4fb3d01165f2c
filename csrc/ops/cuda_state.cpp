#include "ops/cuda_state.h"

#include <optional>

#include "core/cuda_driver.h"
#include "cuda/fault.h"
#include "ops/fault_ops.h"
#include "ops/json.h"
#include "ops/named_errors.h"

namespace kvkernels {

std::string driver_refusal() {
  // A runtime runs on drivers of its major version and later; every call of it fails on others.
  constexpr int kMajor = CUDART_VERSION / 1000;
  static_assert(kMajor == 12 || kMajor == 13, "which driver release is the first for this version of CUDA?");
  const int found = cuda_driver_version();
  if (found == 0 || found / 1000 >= kMajor) return "";
  return text("this library's code for CUDA ", kMajor, " needs driver ", kMajor == 13 ? 580 : 525,
              " or later, and the driver found is for CUDA ", found / 1000, '.', found % 1000 / 10);
}

std::string take_fault_json(int device) {
  if (!cuda_in_use() || !driver_refusal().empty()) return "{}";
  return named_errors("check_device", [&]() -> std::string {
    const std::optional<FaultRecord> fault = take_fault(device);
    if (!fault) return "{}";
    const char* op = fault->op < kFaultOps.size() ? kFaultOps[fault->op] : "";
    return text("{\"count\": ", fault->count, ", \"first_row\": ", fault->first_row, ", \"op\": ", quoted(op), '}');
  });
}

}  // namespace kvkernels
