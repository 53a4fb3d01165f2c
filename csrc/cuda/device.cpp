#include "cuda/device.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <map>
#include <mutex>

#include "cuda/error.h"

namespace kvkernels {

DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceLimits limits;
  int reads_pageable = 0;
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&limits.sm_count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&reads_pageable, cudaDevAttrPageableMemoryAccess, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  limits.reads_pageable = reads_pageable != 0;
  limits.capability = 10 * major + minor;
  return known[device] = limits;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

DeviceGuard::DeviceGuard(int device) : before_(current_device()), switched_(before_ != device) {
  if (switched_) check(cudaSetDevice(device), "cudaSetDevice");
}

// Setting back a device that was current a moment ago cannot fail for a reason that the next call would not report.
DeviceGuard::~DeviceGuard() {
  if (switched_ && cudaSetDevice(before_) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

bool cuda_in_use() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (driver == nullptr) return false;
  const auto current = reinterpret_cast<CUresult (*)(CUcontext*)>(dlsym(driver, "cuCtxGetCurrent"));
  CUcontext context = nullptr;
  // Any other error is an earlier call's, which only a driver in use can have.
  const bool in_use = current != nullptr && current(&context) != CUDA_ERROR_NOT_INITIALIZED;
  dlclose(driver);
  return in_use;
}

void* driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &status),
        "cudaGetDriverEntryPointByVersion");
  return status == cudaDriverEntryPointSuccess ? function : nullptr;
}

}  // namespace kvkernels
