#include "cuda/error.h"

#include <string>

namespace kvkernels {
namespace {

thread_local bool moved = false;

[[noreturn]] void fail(cudaError_t code, const char* call, const char* detail) {
  static_cast<void>(cudaGetLastError());
  throw CudaError(std::string(call) + detail + " failed: " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) +
                  ")");
}

}  // namespace

void check(cudaError_t code, const char* call) {
  if (code != cudaSuccess) fail(code, call, "");
}

void check_copy(cudaError_t code, const char* call, const char* detail) {
  moved = true;
  if (code != cudaSuccess) fail(code, call, detail);
}

void begin_op() { moved = false; }

bool may_have_moved() { return moved; }

}  // namespace kvkernels
