// cuda_path.h in a build without CUDA code, where Python's kernels are left.
#include <utility>

#include "core/cuda_driver.h"
#include "ops/cuda_path.h"
#include "ops/triton_path.h"

namespace kvkernels {

void carry_out_on_cuda(const CopyCall& call, std::vector<Move> moves, PairList list) {
  carry_out_on_triton(call, std::move(moves), std::move(list),
                      "this build has no CUDA code (no nvcc was found, or KVKERNELS_CUDA=OFF)");
}

std::string driver_refusal() { return ""; }

bool addresses_may_be_cuda() { return cuda_in_use(); }

bool carry_out_addresses_on_cuda(const AddressCall& call) {
  throw std::runtime_error(text(call.op,
                                ": src_ptrs and dst_ptrs must be told apart as host or device addresses, got a build "
                                "without CUDA code, which cannot ask the driver; rebuild with KVKERNELS_CUDA=ON"));
}

std::string take_fault_json(int) { return "{}"; }

}  // namespace kvkernels
