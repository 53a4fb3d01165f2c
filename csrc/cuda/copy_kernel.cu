#include "cuda/copy_body.h"
#include "cuda/copy_kernel.h"
#include "cuda/error.h"
#include "cuda/launch.h"

namespace kvkernels {
namespace {

__device__ __forceinline__ uint32_t global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ uint32_t grid_threads() { return gridDim.x * blockDim.x; }

}  // namespace

// Three ways for the tables to arrive: in small or in large parameters, or uploaded. Plain C names are what profilers
// and tests see.
#define KVKERNELS_COPY_KERNEL(variant)                                                              \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)                                      \
      kvkernels_copy_##variant##_small(const __grid_constant__ Params<kSmallParams> params) {       \
    copy_##variant<GlobalAccess>(params.head, params.tables, global_thread(), grid_threads());      \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)                                      \
      kvkernels_copy_##variant##_large(const __grid_constant__ Params<kLargeParams> params) {       \
    copy_##variant<GlobalAccess>(params.head, params.tables, global_thread(), grid_threads());      \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)                                      \
      kvkernels_copy_##variant##_table(const __grid_constant__ HeadOnly params) {                   \
    copy_##variant<GlobalAccess>(params.head, params.head.tables, global_thread(), grid_threads()); \
  }

KVKERNELS_COPY_KERNEL(page)
KVKERNELS_COPY_KERNEL(row)
KVKERNELS_COPY_KERNEL(bytes)

namespace {

KernelTrio kernels_of(KernelVariant variant) {
  const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  switch (variant) {
    case KernelVariant::kPage:
      return {address(kvkernels_copy_page_small), address(kvkernels_copy_page_large),
              address(kvkernels_copy_page_table)};
    case KernelVariant::kRow:
      return {address(kvkernels_copy_row_small), address(kvkernels_copy_row_large), address(kvkernels_copy_row_table)};
    default:
      return {address(kvkernels_copy_bytes_small), address(kvkernels_copy_bytes_large),
              address(kvkernels_copy_bytes_table)};
  }
}

}  // namespace

cudaError_t launch_copy(KernelVariant variant, const Head& head, const std::byte* tables, size_t table_bytes, int ctas,
                        int threads, cudaStream_t stream) {
  return launch(kernels_of(variant), head, tables, table_bytes, {ctas, threads, 0}, stream);
}

void load_copy_kernels() {
  for (KernelVariant variant : {KernelVariant::kPage, KernelVariant::kRow, KernelVariant::kBytes}) {
    load(kernels_of(variant));
  }
}

int code_capability() {
  cudaFuncAttributes attributes{};
  const cudaError_t code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kvkernels_copy_page_small));
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction ||
      code == cudaErrorUnsupportedPtxVersion) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  check(code, "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

}  // namespace kvkernels
