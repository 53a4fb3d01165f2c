// The current device, its limits, and the driver's entry points.
#pragma once

#include <cstdint>

namespace kvkernels {

struct DeviceLimits {
  int sm_count = 1;
  int capability = 0;                     // 90 for compute capability 9.0
  bool reads_pageable = false;            // kernels may read and write pageable host memory
  int64_t max_items = (1ll << 31) - 256;  // tiles or chunks of one launch: indices are 32-bit and divided by magic
};

// Asks the runtime once a device.
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

// True only where this process has initialised CUDA already; never initialises it, so a call that concerns the CPU
// alone creates no context.
bool cuda_in_use();

// The driver's function in the version that CUDA `version` (12080 for 12.8) had; null where the driver lacks it.
void* driver_function(const char* name, unsigned version);

}  // namespace kvkernels
