// CUDA return codes as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace kvkernels {

// The message has no op name: the op layer puts it in front.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws CudaError "<call> failed: <name> (<string>)" and clears the runtime's last error, so that it is not blamed on
// a later call. A driver's CUresult has the same numbers and may be cast.
void check(cudaError_t code, const char* call);

// The same for a call that moves bytes. `detail` follows the call's name.
void check_copy(cudaError_t code, const char* call, const char* detail = "");

// Whether an error of an op on this thread leaves the destination undefined: check_copy() was called since begin_op(),
// so that bytes may be on their way, whatever it is that failed.
void begin_op();
bool may_have_moved();

}  // namespace kvkernels
