// Copies of small fragments over a host link by way of a ring on the device: see core/staged.h.
#pragma once

#include <cuda_runtime_api.h>

#include "core/lower.h"
#include "core/staged.h"
#include "cuda/issued.h"
#include "cuda/kernel.h"

namespace kvkernels {

// Chunk after chunk in the stream's order: to the host, a kernel fills the ring and the copy engine empties it; to the
// device, the other way round. Never synchronises except where CUDA does for pageable memory. `ring` has
// staging.ring_bytes on the current device, at a multiple of 256, until the stream has passed. Not on a capturing
// stream: the ring would have to outlive the graph. Throws CudaError.
Issued run_staged(const Work& work, const Staging& staging, std::byte* ring, int sm_budget, const DeviceLimits& limits,
                  const Upload& upload, cudaStream_t stream);

// What run_staged will issue, as long as the driver does not refuse a batch.
Issued plan_staged(const Work& work, const Staging& staging, int sm_budget, const DeviceLimits& limits,
                   cudaStream_t stream);

}  // namespace kvkernels
