// Launches the bulk copy kernel: compute capability 9.0 and later. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/bulk_body.h"

namespace kvkernels {

// Bytes of shared memory of a CTA, at most: what its rings hold, and their mbarriers.
constexpr int64_t kBulkSharedBytes = kBulkWarps * (int64_t{kRingBytes} + kGenerations * 8);

// Bytes of shared memory that a launch with tiles of this size needs.
size_t bulk_shared_bytes(uint32_t tile_bytes);

// As load_copy_kernels().
void load_bulk_kernels();

// As launch_copy(), with head.unit_bytes as the size of a tile. Throws CudaError.
void launch_bulk(const Head& head, const std::byte* tables, size_t table_bytes, int ctas, cudaStream_t stream);

}  // namespace kvkernels
