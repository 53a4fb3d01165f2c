// Launches one copy kernel. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/tables.h"

namespace kvkernels {

enum class KernelVariant { kPage, kRow, kBytes, kBulk };  // kBulk is bulk_kernel.h's

constexpr int kMaxThreads = 1024;

// `tables` (host memory, at most kLargeTables bytes, read before the call returns) ride in the parameters; null means
// that head.tables is their address on the device.
cudaError_t launch_copy(KernelVariant variant, const Head& head, const std::byte* tables, size_t table_bytes, int ctas,
                        int threads, cudaStream_t stream);

// Loads them all on the current device, which has code for them. Throws CudaError.
void load_copy_kernels();

// What the code of these kernels that the driver takes on the current device was compiled for, 90 for compute
// capability 9.0, from which it may have been translated for a later one; 0 where the library has none that runs there.
// Throws CudaError.
int code_capability();

}  // namespace kvkernels
