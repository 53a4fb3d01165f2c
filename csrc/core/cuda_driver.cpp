#include "core/cuda_driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdint>

namespace kvkernels {
namespace {

// The driver where this process has it loaded, which it is from then on.
void* loaded_driver() {
  static std::atomic<void*> kept = nullptr;
  if (void* const driver = kept.load()) return driver;
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  kept.store(driver);
  return driver;
}

template <class Function>
Function* driver_symbol(const char* name) {
  void* const driver = loaded_driver();
  return driver == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(driver, name));
}

}  // namespace

bool cuda_in_use() {
  constexpr int kNotInitialized = 3;  // CUDA_ERROR_NOT_INITIALIZED
  const auto current = driver_symbol<int(void**)>("cuCtxGetCurrent");
  void* context = nullptr;
  // Any other error is an earlier call's, which only a driver in use can have.
  return current != nullptr && current(&context) != kNotInitialized;
}

int cuda_driver_version() {
  const auto ask = driver_symbol<int(int*)>("cuDriverGetVersion");
  int version = 0;
  return ask != nullptr && ask(&version) == 0 ? version : 0;
}

bool is_on_device(const void* address) {
  constexpr int kMemoryType = 2;         // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
  constexpr unsigned kDeviceMemory = 2;  // CU_MEMORYTYPE_DEVICE, which managed memory is, too
  const auto ask = driver_symbol<int(void*, int, uint64_t)>("cuPointerGetAttribute");
  unsigned type = 0;
  const auto at = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(address));
  return ask != nullptr && ask(&type, kMemoryType, at) == 0 && type == kDeviceMemory;
}

std::string host_address_refusal(const void* address, bool writes) {
  constexpr int kDevicePointer = 3;  // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
  constexpr int kAccessFlags = 16;   // CU_POINTER_ATTRIBUTE_ACCESS_FLAGS
  constexpr unsigned kReadOnly = 1;  // CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READ
  const auto ask = driver_symbol<int(void*, int, uint64_t)>("cuPointerGetAttribute");
  if (ask == nullptr) return "";
  const auto host = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(address));
  uint64_t seen_at = host;
  if (ask(&seen_at, kDevicePointer, host) == 0 && seen_at != host) return "the device sees it at another address";
  unsigned access = 0;
  if (writes && ask(&access, kAccessFlags, host) == 0 && access == kReadOnly) {
    return "it is registered as read-only for the device";
  }
  return "";
}

}  // namespace kvkernels
