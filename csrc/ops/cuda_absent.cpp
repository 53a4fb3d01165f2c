// cuda_path.h in a build without CUDA code.
#include "ops/cuda_path.h"

namespace kvkernels {

void carry_out_on_cuda(const CopyCall& call, std::vector<Move>, PairList) {
  throw std::runtime_error(text(call.op,
                                ": tensors on a cuda device need CUDA code, which this build has not (no nvcc was "
                                "found, or KVKERNELS_CUDA=OFF); rebuild with KVKERNELS_CUDA=ON"));
}

bool addresses_may_be_cuda() { return false; }

bool carry_out_fragments_on_cuda(const char*, const std::vector<Fragment>&, bool) { return false; }

std::string take_fault_json(int) { return "{}"; }

}  // namespace kvkernels
