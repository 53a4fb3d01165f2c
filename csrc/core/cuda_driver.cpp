#include "core/cuda_driver.h"

#include <dlfcn.h>

namespace kvkernels {

bool cuda_in_use() {
  constexpr int kNotInitialized = 3;  // CUDA_ERROR_NOT_INITIALIZED
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (driver == nullptr) return false;
  const auto current = reinterpret_cast<int (*)(void**)>(dlsym(driver, "cuCtxGetCurrent"));
  void* context = nullptr;
  // Any other error is an earlier call's, which only a driver in use can have.
  const bool in_use = current != nullptr && current(&context) != kNotInitialized;
  dlclose(driver);
  return in_use;
}

}  // namespace kvkernels
