#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "cuda/copy_kernel.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace kvkernels {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceLimits limits;
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.reads_pageable = attribute(cudaDevAttrPageableMemoryAccess, device) != 0;
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const RelaxedCapture relaxed;  // the question may load the code
  limits.code_capability = code_capability();
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

void* driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &status),
        "cudaGetDriverEntryPointByVersion");
  return status == cudaDriverEntryPointSuccess ? function : nullptr;
}

}  // namespace kvkernels
