#include <cstring>

#include "cuda/copy_kernel.h"

namespace kvkernels {
namespace {

struct HeadOnly {
  Head head;
};

static_assert(sizeof(Params<kSmallParams>) == kSmallParams && sizeof(Params<kLargeParams>) == kLargeParams,
              "parameters must have no padding");

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

constexpr int kSmall = 0;
constexpr int kLarge = 1;
constexpr int kTable = 2;

const void* kernel_of(KernelVariant variant, int tables) {
  static const void* const kernels[3][3] = {
      {reinterpret_cast<const void*>(kvkernels_copy_page_small),
       reinterpret_cast<const void*>(kvkernels_copy_page_large),
       reinterpret_cast<const void*>(kvkernels_copy_page_table)},
      {reinterpret_cast<const void*>(kvkernels_copy_row_small), reinterpret_cast<const void*>(kvkernels_copy_row_large),
       reinterpret_cast<const void*>(kvkernels_copy_row_table)},
      {reinterpret_cast<const void*>(kvkernels_copy_bytes_small),
       reinterpret_cast<const void*>(kvkernels_copy_bytes_large),
       reinterpret_cast<const void*>(kvkernels_copy_bytes_table)},
  };
  return kernels[static_cast<int>(variant)][tables];
}

// cudaLaunchKernelExC returns this launch's own error; <<<>>> would leave it to whoever asks next.
cudaError_t launch(const void* kernel, void* params, int ctas, int threads, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  void* arguments[] = {params};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

template <size_t kBytes>
cudaError_t launch_inline(const void* kernel, const Head& head, const std::byte* tables, size_t table_bytes, int ctas,
                          int threads, cudaStream_t stream) {
  Params<kBytes> params;
  params.head = head;
  std::memcpy(params.tables, tables, table_bytes);
  std::memset(params.tables + table_bytes, 0, sizeof(params.tables) - table_bytes);
  return launch(kernel, &params, ctas, threads, stream);
}

}  // namespace

cudaError_t launch_copy(KernelVariant variant, const Head& head, const std::byte* tables, size_t table_bytes, int ctas,
                        int threads, cudaStream_t stream) {
  if (tables == nullptr) {
    HeadOnly params{head};
    return launch(kernel_of(variant, kTable), &params, ctas, threads, stream);
  }
  if (table_bytes > kLargeTables) return cudaErrorInvalidValue;
  return table_bytes <= kSmallTables
             ? launch_inline<kSmallParams>(kernel_of(variant, kSmall), head, tables, table_bytes, ctas, threads, stream)
             : launch_inline<kLargeParams>(kernel_of(variant, kLarge), head, tables, table_bytes, ctas, threads,
                                           stream);
}

}  // namespace kvkernels
