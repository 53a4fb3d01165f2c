#include "cuda/device.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "cuda/bulk_kernel.h"
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

void check_driver(CUresult code, const char* call) { check(static_cast<cudaError_t>(code), call); }

// The device's primary context, which torch and the runtime use, too; kept to the end, like the runtime does.
CUcontext primary_context(int ordinal) {
  static std::mutex mutex;
  static std::map<int, CUcontext> kept;
  static const auto get_device = driver_function<PFN_cuDeviceGet_v2000>("cuDeviceGet");
  static const auto retain = driver_function<PFN_cuDevicePrimaryCtxRetain_v7000>("cuDevicePrimaryCtxRetain");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = kept.find(ordinal);
  if (found != kept.end()) return found->second;
  CUdevice device = 0;
  CUcontext context = nullptr;
  check_driver(get_device(&device, ordinal), "cuDeviceGet");
  check_driver(retain(&context, device), "cuDevicePrimaryCtxRetain");
  return kept[ordinal] = context;
}

CUresult set_context(CUcontext context) {
  static const auto set = driver_function<PFN_cuCtxSetCurrent_v4000>("cuCtxSetCurrent");
  return set(context);
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
  limits.uses_host_page_tables = attribute(cudaDevAttrPageableMemoryAccessUsesHostPageTables, device) != 0;
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const RelaxedCapture relaxed;  // it loads the code
  limits.code_capability = code_capability();
  if (limits.code_capability > 0) {
    load_copy_kernels();
    load_bulk_kernels();
  }
  return known[device] = limits;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// The driver's context rather than the runtime's device: the runtime follows the one that is current, and its own idea
// of the thread's device stays what it was.
DeviceGuard::DeviceGuard(int device) {
  static const auto get = driver_function<PFN_cuCtxGetCurrent_v4000>("cuCtxGetCurrent");
  check_driver(get(&before_), "cuCtxGetCurrent");
  if (before_ != nullptr && current_device() == device) return;
  check_driver(set_context(primary_context(device)), "cuCtxSetCurrent");
  switched_ = true;
}

// Setting back what was current a moment ago cannot fail for a reason that the next call would not report.
DeviceGuard::~DeviceGuard() {
  if (switched_) static_cast<void>(set_context(before_));
}

void* driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &status),
        "cudaGetDriverEntryPointByVersion");
  return status == cudaDriverEntryPointSuccess ? function : nullptr;
}

}  // namespace kvkernels
