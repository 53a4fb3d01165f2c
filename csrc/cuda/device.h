// The current device, its limits, and the driver's entry points.
#pragma once

#include <cstdint>

namespace kvkernels {

struct DeviceLimits {
  int sm_count = 1;
  int capability = 0;                     // 90 for compute capability 9.0
  int code_capability = 0;                // what its code was compiled for; 0 where the library has none for it
  int64_t shared_bytes = 0;               // of shared memory that a CTA may ask for
  bool reads_pageable = false;            // kernels may read and write pageable host memory
  int64_t max_items = (1ll << 31) - 256;  // tiles or chunks of one launch: indices are 32-bit and divided by magic
};

// Asks the runtime once a device, which must be current.
DeviceLimits device_limits(int device);

// Makes `device` current until it goes out of scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  bool switched_;
};

int current_device();

// The driver's function in the version that CUDA `version` (12080 for 12.8) had; null where the driver lacks it.
void* driver_function(const char* name, unsigned version);

}  // namespace kvkernels
