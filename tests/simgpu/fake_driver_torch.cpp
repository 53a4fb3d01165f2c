// libcuda.so.1 of the stand-in: what torch asks of the driver beside what csrc/cuda does, and the refusal of the rest.
#include <cuda.h>

#include <cstdio>
#include <set>

#include "fake.h"

int fake::refuse_call(const char* call) {
  Lock lock(mutex());
  static auto* const said = new std::set<std::string>;
  if (said->insert(call).second) std::fprintf(stderr, "stand-in: %s is not there\n", call);
  log(call, {{"refused", 1}});
  return CUDA_ERROR_NOT_SUPPORTED;
}

// Torch asks whether a device is in use before it touches it; here all are from the start.
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  if (const int code = fake::enter("cuDevicePrimaryCtxGetState")) return static_cast<CUresult>(code);
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}
