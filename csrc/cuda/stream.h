// What kind of stream the caller is on.
#pragma once

#include <cuda_runtime_api.h>

namespace kvkernels {

// Throws CudaError where the stream is the legacy default stream and another stream's capture would be broken by any
// work put there (cudaErrorStreamCaptureImplicit); that capture stays intact.
bool is_capturing(cudaStream_t stream);

// The legacy default stream, by either of its names: batched copies refuse it.
bool is_legacy(cudaStream_t stream);

// Until it goes out of scope, this thread may allocate and load code while one of its streams captures.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace kvkernels
