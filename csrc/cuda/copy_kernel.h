// Launches one copy kernel. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/copy_body.h"

namespace kvkernels {

enum class KernelVariant { kPage, kRow, kBytes };

constexpr int kMaxThreads = 1024;

// Bytes of tables that ride in a launch's parameters: drivers before 12.1 take 4 KB, and 32,000 bytes compile for every
// target.
constexpr size_t kSmallParams = 4096;
constexpr size_t kLargeParams = 32000;

template <size_t kBytes>
struct Params {
  Head head;
  alignas(16) std::byte tables[kBytes - sizeof(Head)];
};

constexpr size_t kSmallTables = sizeof(Params<kSmallParams>::tables);
constexpr size_t kLargeTables = sizeof(Params<kLargeParams>::tables);

// `tables` (host memory, at most kLargeTables bytes, read before the call returns) ride in the parameters; null means
// that head.tables is their address on the device.
cudaError_t launch_copy(KernelVariant variant, const Head& head, const std::byte* tables, size_t table_bytes, int ctas,
                        int threads, cudaStream_t stream);

}  // namespace kvkernels
