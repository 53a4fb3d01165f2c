// cuda_path.h in a build without CUDA code, where Python's kernels are left.
#include <utility>

#include "ops/cuda_path.h"
#include "ops/triton_path.h"

namespace kvkernels {

void carry_out_on_cuda(const CopyCall& call, std::vector<Move> moves, PairList list) {
  carry_out_on_triton(call, std::move(moves), std::move(list),
                      "this build has no CUDA code (no nvcc was found, or KVKERNELS_CUDA=OFF)");
}

bool addresses_may_be_cuda() { return false; }

bool carry_out_fragments_on_cuda(const char*, const std::vector<Fragment>&, bool) { return false; }

std::string take_fault_json(int) { return "{}"; }

}  // namespace kvkernels
