#include "cuda/mover_streams.h"

#include <chrono>

#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace kvkernels {
namespace {

// After so long a float of milliseconds since the common event is off by a microsecond.
constexpr int64_t kClockNs = 10'000'000'000;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void destroy_stream(cudaStream_t stream) {
  if (stream != nullptr && cudaStreamDestroy(stream) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

// For the length of a call.
struct OnDevice {
  explicit OnDevice(int device) : guard(device) {}
  DeviceGuard guard;
  RelaxedCapture relaxed;
};

}  // namespace

DeviceEvent::DeviceEvent(int device, bool has_timing) : device_(device) {
  const RelaxedCapture relaxed;
  const unsigned flags = has_timing ? cudaEventDefault : cudaEventDisableTiming;
  check(cudaEventCreateWithFlags(&event_, flags), "cudaEventCreateWithFlags");
}

// Also where the device is broken, or CUDA gone with the process.
DeviceEvent::~DeviceEvent() {
  try {
    const OnDevice there(device_);
    if (cudaEventDestroy(event_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  } catch (const CudaError&) {
    if (cudaEventDestroy(event_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
}

void DeviceEvent::record(cudaStream_t stream) {
  const OnDevice there(device_);
  check(cudaEventRecord(event_, stream), "cudaEventRecord");
}

bool DeviceEvent::has_passed() const {
  const OnDevice there(device_);
  const cudaError_t code = cudaEventQuery(event_);
  if (code == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  check(code, "cudaEventQuery");
  return true;
}

void DeviceEvent::hold(cudaStream_t stream) const {
  const RelaxedCapture relaxed;
  check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

float DeviceEvent::ms_since(const DeviceEvent& earlier) const {
  const OnDevice there(device_);
  float ms = 0;
  check(cudaEventElapsedTime(&ms, earlier.event_, event_), "cudaEventElapsedTime");
  return ms;
}

void DeviceEvent::synchronize() const {
  const OnDevice there(device_);
  check(cudaEventSynchronize(event_), "cudaEventSynchronize");
}

// By way of a stream that ends here: one that is kept would order one submit's events behind another's. It may be
// destroyed while it waits.
std::shared_ptr<DeviceEvent> snapshot_of(cudaEvent_t event, int device) {
  const RelaxedCapture relaxed;
  auto snapshot = std::make_shared<DeviceEvent>(device, false);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  try {
    check(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
    snapshot->record(stream);
  } catch (...) {
    destroy_stream(stream);
    throw;
  }
  destroy_stream(stream);
  return snapshot;
}

MoverStreams::~MoverStreams() {
  clock_.reset();
  try {
    const OnDevice there(device_);
    destroy_stream(clock_stream_);
    for (const auto& of_direction : streams_) {
      for (const cudaStream_t stream : of_direction) destroy_stream(stream);
    }
  } catch (const CudaError&) {
    // The device is broken: its streams go with the process.
  }
}

cudaStream_t MoverStreams::get(int direction, int priority) {
  cudaStream_t& stream = streams_[static_cast<size_t>(direction)][static_cast<size_t>(priority)];
  if (stream != nullptr) return stream;
  const RelaxedCapture relaxed;
  int least = 0;
  int greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  // The least is the engine's: loads are one above it, so that a kernel of theirs gets the next free SM.
  const int wanted = priority == 0 ? greatest : least - (kPriorities - 1 - priority);
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, wanted), "cudaStreamCreateWithPriority");
  return stream;
}

void MoverStreams::begin_clock() {
  const int64_t now = now_ns();
  if (clock_ != nullptr && now - clock_ns_ < kClockNs) return;
  const RelaxedCapture relaxed;
  if (clock_stream_ == nullptr) {
    check(cudaStreamCreateWithFlags(&clock_stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  auto clock = std::make_shared<DeviceEvent>(device_, true);
  clock->record(clock_stream_);
  clock->synchronize();
  clock_ns_ = now_ns();
  clock_ = std::move(clock);
}

int64_t MoverStreams::ns_of(const DeviceEvent& event) const {
  return clock_ns_ + static_cast<int64_t>(static_cast<double>(event.ms_since(*clock_)) * 1e6);
}

}  // namespace kvkernels
