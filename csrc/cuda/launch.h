// Launches a kernel whose tables come in one of three ways: in small or in large parameters, or uploaded.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>

#include "cuda/error.h"
#include "cuda/tables.h"

namespace kvkernels {

// Bytes of tables that ride in a launch's parameters: 32,000 compile for every target, and each launch copies all that
// its kernel takes, so that small tables have a kernel of their own.
constexpr size_t kSmallParams = 4096;
constexpr size_t kLargeParams = 32000;

template <size_t kBytes>
struct Params {
  Head head;
  alignas(16) std::byte tables[kBytes - sizeof(Head)];
};

struct HeadOnly {
  Head head;
};

static_assert(sizeof(Params<kSmallParams>) == kSmallParams && sizeof(Params<kLargeParams>) == kLargeParams,
              "parameters must have no padding");

constexpr size_t kSmallTables = sizeof(Params<kSmallParams>::tables);
constexpr size_t kLargeTables = sizeof(Params<kLargeParams>::tables);

// One kernel for each way.
struct KernelTrio {
  const void* small;
  const void* large;
  const void* table;

  // The one that launch() takes.
  const void* of(const std::byte* tables, size_t table_bytes) const {
    if (tables == nullptr) return table;
    return table_bytes <= kSmallTables ? small : large;
  }
};

// Code is loaded when it is first asked about. A launch that finds none would load it in the middle of a capture, or of
// serving.
inline void load(const KernelTrio& kernels) {
  for (const void* kernel : {kernels.small, kernels.large, kernels.table}) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  }
}

struct LaunchSize {
  int ctas;
  int threads;
  size_t shared_bytes;
};

// cudaLaunchKernelExC returns this launch's own error; <<<>>> would leave it to whoever asks next.
inline cudaError_t launch_one(const void* kernel, void* params, const LaunchSize& size, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size.ctas));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = size.shared_bytes;
  config.stream = stream;
  void* arguments[] = {params};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

template <size_t kBytes>
cudaError_t launch_inline(const void* kernel, const Head& head, const std::byte* tables, size_t table_bytes,
                          const LaunchSize& size, cudaStream_t stream) {
  Params<kBytes> params;
  params.head = head;
  std::memcpy(params.tables, tables, table_bytes);
  std::memset(params.tables + table_bytes, 0, sizeof(params.tables) - table_bytes);
  return launch_one(kernel, &params, size, stream);
}

// `tables` (host memory, at most kLargeTables bytes, read before the call returns) ride in the parameters; null means
// that head.tables is their address on the device.
inline cudaError_t launch(const KernelTrio& kernels, const Head& head, const std::byte* tables, size_t table_bytes,
                          const LaunchSize& size, cudaStream_t stream) {
  const void* kernel = kernels.of(tables, table_bytes);
  if (tables == nullptr) {
    HeadOnly params{head};
    return launch_one(kernel, &params, size, stream);
  }
  if (table_bytes > kLargeTables) return cudaErrorInvalidValue;
  return table_bytes <= kSmallTables ? launch_inline<kSmallParams>(kernel, head, tables, table_bytes, size, stream)
                                     : launch_inline<kLargeParams>(kernel, head, tables, table_bytes, size, stream);
}

}  // namespace kvkernels
