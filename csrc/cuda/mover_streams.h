// Streams of a mover's own on a device, and events between them and the engine's.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

namespace kvkernels {

// Belongs to a device, which is made current for every call but the constructor's, where it must be. Each call works
// while other threads' streams capture. Throws CudaError.
class DeviceEvent {
 public:
  DeviceEvent(int device, bool has_timing);
  ~DeviceEvent();
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  int device() const { return device_; }
  void record(cudaStream_t stream);
  bool has_passed() const;

  // What `stream` is asked for from now on comes after the last record.
  void hold(cudaStream_t stream) const;

  // Both have timing and were passed.
  float ms_since(const DeviceEvent& earlier) const;

  // Waits for it. Only for what is about to pass.
  void synchronize() const;

 private:
  const int device_;
  cudaEvent_t event_ = nullptr;
};

// What an event of somebody else stands for at this moment, whatever is recorded there later: as an event of our own,
// on `device`, which is current.
std::shared_ptr<DeviceEvent> snapshot_of(cudaEvent_t event, int device);

// A stream for each direction and priority, made at its first use; none of them blocks, or is blocked by, the legacy
// default stream. All calls but the destructor with the device current. Throws CudaError.
class MoverStreams {
 public:
  static constexpr int kDirections = 3;
  static constexpr int kPriorities = 3;

  explicit MoverStreams(int device) : device_(device) {}
  ~MoverStreams();  // everything in them must have passed
  MoverStreams(const MoverStreams&) = delete;
  MoverStreams& operator=(const MoverStreams&) = delete;

  // Priority 0 is the device's highest; the last is its lowest, which is torch's streams' own.
  cudaStream_t get(int direction, int priority);

  // When the device passed an event with timing, by the host's steady clock: from a common event that is recorded
  // anew now and then, since the device tells milliseconds in 24 bits.
  void begin_clock();
  int64_t ns_of(const DeviceEvent& event) const;

 private:
  const int device_;
  std::array<std::array<cudaStream_t, kPriorities>, kDirections> streams_{};
  cudaStream_t clock_stream_ = nullptr;
  std::shared_ptr<DeviceEvent> clock_;
  int64_t clock_ns_ = 0;
};

}  // namespace kvkernels
