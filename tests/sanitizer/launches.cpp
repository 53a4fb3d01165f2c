#include "launches.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>

namespace kvkernels::sanitizer {
namespace {

struct Kernels {
  std::map<const void*, KernelUse> by_stub;
  Direction direction = Direction::kDeviceToDevice;
  int64_t launches = 0;
};

// Filled before main() begins, in an order that no file's own variables could rely on.
Kernels& kernels() {
  static Kernels instance;
  return instance;
}

void count(const void* stub) {
  Kernels& all = kernels();
  ++all.launches;
  const auto found = all.by_stub.find(stub);
  if (found == all.by_stub.end()) return;
  KernelUse& use = found->second;
  ++(all.direction == Direction::kHostToDevice   ? use.h2d
     : all.direction == Direction::kDeviceToHost ? use.d2h
                                                 : use.d2d);
}

}  // namespace

void count_launches_as(Direction direction) { kernels().direction = direction; }

int64_t launches() { return kernels().launches; }

std::vector<KernelUse> kernel_uses() {
  std::vector<KernelUse> uses;
  for (const auto& [stub, use] : kernels().by_stub) uses.push_back(use);
  std::sort(uses.begin(), uses.end(), [](const KernelUse& a, const KernelUse& b) { return a.name < b.name; });
  return uses;
}

}  // namespace kvkernels::sanitizer

extern "C" {

void __real___cudaRegisterFunction(void** module, const char* stub, char* kernel, const char* name, int threads,
                                   uint3* thread, uint3* block, dim3* block_size, dim3* grid_size, int* warp);

void __wrap___cudaRegisterFunction(void** module, const char* stub, char* kernel, const char* name, int threads,
                                   uint3* thread, uint3* block, dim3* block_size, dim3* grid_size, int* warp) {
  kvkernels::sanitizer::kernels().by_stub[stub].name = name;
  __real___cudaRegisterFunction(module, stub, kernel, name, threads, thread, block, block_size, grid_size, warp);
}

cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments);

cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  const cudaError_t code = __real_cudaLaunchKernelExC(config, stub, arguments);
  if (code == cudaSuccess) kvkernels::sanitizer::count(stub);
  return code;
}

}  // extern "C"
