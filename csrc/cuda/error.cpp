#include "cuda/error.h"

#include <string>

namespace kvkernels {
namespace {

[[noreturn]] void fail(cudaError_t code, const char* call, const char* detail, const char* suffix) {
  static_cast<void>(cudaGetLastError());
  throw CudaError(std::string(call) + detail + " failed: " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) +
                  ")" + suffix);
}

}  // namespace

void check(cudaError_t code, const char* call) {
  if (code != cudaSuccess) fail(code, call, "", "");
}

void check_copy(cudaError_t code, const char* call, const char* detail) {
  if (code != cudaSuccess) fail(code, call, detail, "; the destination is undefined");
}

}  // namespace kvkernels
