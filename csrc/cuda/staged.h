// Copies of small fragments over a host link by way of a ring on the device: see core/staged.h.
#pragma once

#include <cuda_runtime_api.h>

#include "core/issued.h"
#include "core/lower.h"
#include "core/staged.h"
#include "cuda/kernel.h"
#include "cuda/staging_ring.h"

namespace kvkernels {

// CTAs of the kernels between the pools and the ring where the caller names none: inside the device they have but to
// keep up with the link, and the rest of it is the model's.
constexpr int kStagingCtas = 16;

// Chunk after chunk, ordered on `stream` as a whole: to the host, a kernel fills a half of the ring on it and the copy
// engine empties the half on the ring's own stream, beside the next chunk's kernel; to the device, the other way round.
// Never synchronises except where CUDA does for pageable memory. Not on a capturing stream: the ring serves other calls
// before a graph's replay. Throws CudaError.
Issued run_staged(const Work& work, const Staging& staging, StagingRing& ring, int sm_budget,
                  const DeviceLimits& limits, const Upload& upload, cudaStream_t stream);

// What run_staged will issue, as long as the driver does not refuse a batch.
Issued plan_staged(const Work& work, const Staging& staging, int sm_budget, const DeviceLimits& limits);

}  // namespace kvkernels
