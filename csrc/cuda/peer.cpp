#include "cuda/peer.h"

#include "cuda/device.h"
#include "cuda/error.h"

namespace kvkernels {
namespace {

// Destroyed before its stream has passed it, which CUDA allows.
class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() {
    if (cudaEventDestroy(event_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Events are recorded on their own device, and a default stream is that of the device which is current.
void follow(const DeviceStream& later, const DeviceStream& earlier) {
  const DeviceGuard on_earlier(earlier.device);
  const Event event;
  check(cudaEventRecord(event.get(), earlier.stream), "cudaEventRecord");
  const DeviceGuard on_later(later.device);
  check(cudaStreamWaitEvent(later.stream, event.get(), 0), "cudaStreamWaitEvent");
}

}  // namespace

PeerOrder::PeerOrder(const DeviceStream& source, const DeviceStream& destination)
    : source_(source), destination_(destination) {
  follow(source_, destination_);
}

void PeerOrder::finish() {
  is_finished_ = true;
  follow(destination_, source_);
}

PeerOrder::~PeerOrder() {
  if (is_finished_) return;
  try {
    finish();
  } catch (const CudaError&) {
    // The error that is on its way says that the destination is undefined.
  }
}

}  // namespace kvkernels
