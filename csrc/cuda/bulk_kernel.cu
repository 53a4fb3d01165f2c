#include "cuda/bulk_body.h"
#include "cuda/bulk_kernel.h"
#include "cuda/error.h"
#include "cuda/launch.h"

namespace kvkernels {
namespace {

constexpr int kBulkThreads = kBulkWarps * kWarpLanes;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void run_warp(const Head& head, const std::byte* tables) {
  extern __shared__ __align__(128) std::byte stages[];
  __shared__ uint64_t full[kBulkWarps][kGenerations];
  const uint32_t warp = threadIdx.x / kWarpLanes;
  const uint32_t ring_bytes = bulk_ring_bytes(head.unit_bytes);
  BulkRing ring(stages + warp * ring_bytes, full[warp], threadIdx.x % kWarpLanes, head.unit_bytes);
  copy_bulk<GlobalAccess>(head, tables, ring, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

#else

// Older images have the kernels' names alone. Nothing launches them there; whatever did must not pass for a copy.
__device__ __forceinline__ void run_warp(const Head&, const std::byte*) { __trap(); }

#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(kBulkThreads, 1)
    kvkernels_copy_bulk_small(const __grid_constant__ Params<kSmallParams> params) {
  run_warp(params.head, params.tables);
}
extern "C" __global__ void __launch_bounds__(kBulkThreads, 1)
    kvkernels_copy_bulk_large(const __grid_constant__ Params<kLargeParams> params) {
  run_warp(params.head, params.tables);
}
extern "C" __global__ void __launch_bounds__(kBulkThreads, 1)
    kvkernels_copy_bulk_table(const __grid_constant__ HeadOnly params) {
  run_warp(params.head, params.head.tables);
}

size_t bulk_shared_bytes(uint32_t tile_bytes) { return static_cast<size_t>(kBulkWarps) * bulk_ring_bytes(tile_bytes); }

namespace {

const KernelTrio kKernels{reinterpret_cast<const void*>(kvkernels_copy_bulk_small),
                          reinterpret_cast<const void*>(kvkernels_copy_bulk_large),
                          reinterpret_cast<const void*>(kvkernels_copy_bulk_table)};

}  // namespace

void load_bulk_kernels() { load(kKernels); }

void launch_bulk(const Head& head, const std::byte* tables, size_t table_bytes, int ctas, cudaStream_t stream) {
  const size_t shared_bytes = bulk_shared_bytes(head.unit_bytes);
  // More than 48 KiB has to be asked for, on each device; asking again is cheap.
  check(cudaFuncSetAttribute(kKernels.of(tables, table_bytes), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBulkWarps * kRingBytes)),
        "cudaFuncSetAttribute");
  check_copy(launch(kKernels, head, tables, table_bytes, {ctas, kBulkThreads, shared_bytes}, stream),
             "cudaLaunchKernelExC");
}

}  // namespace kvkernels
