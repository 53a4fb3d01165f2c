// What kind of stream the caller is on.
#pragma once

#include <cuda_runtime_api.h>

namespace kvkernels {

// Throws CudaError where the stream is the legacy default stream and another stream's capture would be broken by any
// work put there (cudaErrorStreamCaptureImplicit); that capture stays intact.
bool is_capturing(cudaStream_t stream);

// The legacy default stream, by either of its names: batched copies refuse it.
bool is_legacy(cudaStream_t stream);

}  // namespace kvkernels
