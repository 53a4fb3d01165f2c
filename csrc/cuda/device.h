// The current device, its limits, and the driver's entry points.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include "cuda/error.h"

namespace kvkernels {

struct DeviceLimits {
  int sm_count = 1;
  int capability = 0;                     // 90 for compute capability 9.0
  int code_capability = 0;                // what its code was compiled for; 0 where the library has none for it
  int64_t shared_bytes = 0;               // of shared memory that a CTA may ask for
  bool reads_pageable = false;            // kernels may read and write pageable host memory
  bool uses_host_page_tables = false;     // and do so where it is; elsewhere its pages move
  int64_t max_items = (1ll << 31) - 256;  // tiles or chunks of one launch: indices are 32-bit and divided by magic
};

// Asks the runtime once a device, which must be current, and loads all kernels on it.
DeviceLimits device_limits(int device);

// Makes `device` current until it goes out of scope, and then the context that was, which may have been none:
// cudaSetDevice would make one for such a thread, on GPU 0, of half a gigabyte.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext before_ = nullptr;
  bool switched_ = false;
};

int current_device();

// The driver's function in the version that CUDA `version` (12080 for 12.8) had; null where the driver lacks it.
void* driver_function(const char* name, unsigned version);

// One that every driver has which this library's runtime accepts. Throws CudaError.
template <class Function>
Function driver_function(const char* name) {
  void* const function = driver_function(name, 12000);
  if (function == nullptr) throw CudaError(std::string(name) + " failed: the driver lacks it");
  return reinterpret_cast<Function>(function);
}

}  // namespace kvkernels
