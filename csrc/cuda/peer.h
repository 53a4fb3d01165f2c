// A copy from one device to another: it runs on the source's device, in its stream, and is ordered with the
// destination's stream as well.
#pragma once

#include <cuda_runtime_api.h>

namespace kvkernels {

struct DeviceStream {
  int device;
  cudaStream_t stream;
};

// While it lives: the copy in `source`'s stream, behind everything that the destination's stream had to do. From then
// on: whatever follows in the destination's stream, behind the copy. Streams that are captured must be both, by one
// graph. The source's device is current.
class PeerOrder {
 public:
  // Throws CudaError.
  PeerOrder(const DeviceStream& source, const DeviceStream& destination);

  // After the last piece of the copy was issued. Throws CudaError.
  void finish();

  // Does it where an error kept its caller from it: pieces may be on their way.
  ~PeerOrder();
  PeerOrder(const PeerOrder&) = delete;
  PeerOrder& operator=(const PeerOrder&) = delete;

 private:
  DeviceStream source_;
  DeviceStream destination_;
  bool is_finished_ = false;
};

}  // namespace kvkernels
