// Launches one copy kernel. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/copy_body.h"

namespace kvkernels {

enum class KernelVariant { kPage, kRow, kBytes, kBulk };  // kBulk is bulk_kernel.h's

constexpr int kMaxThreads = 1024;

// `tables` (host memory, at most kLargeTables bytes, read before the call returns) ride in the parameters; null means
// that head.tables is their address on the device.
cudaError_t launch_copy(KernelVariant variant, const Head& head, const std::byte* tables, size_t table_bytes, int ctas,
                        int threads, cudaStream_t stream);

}  // namespace kvkernels
