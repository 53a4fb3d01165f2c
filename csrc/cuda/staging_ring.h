// The device memory by way of which `staged` copies, and what orders its use.
//
//   the caller's stream:   kernel into half 0 | kernel into half 1        | kernel into half 0 ...
//   the ring's own:                           | copies out of half 0      | copies out of half 1 ...
//
// To the device, the copies fill and the kernels empty. A half is filled once its last contents were taken, whoever put
// them there: events say so, and they hold across calls, streams, and streams that are gone and whose handles are used
// again. So a ring may go from one stream to another at any time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "core/staged.h"
#include "cuda/error.h"

namespace kvkernels {

// Rings of a device at most: one for each of so many streams, and what comes after takes the one that was idle longest.
constexpr size_t kMostRings = 4;

// For how many calls that would like a ring none is asked for after there was no memory for one.
constexpr int64_t kCallsWithoutRing = 256;

// There is no memory for a ring on the device.
struct NoMemoryForRing : CudaError {
  using CudaError::CudaError;
};

class StagingRing {
 public:
  // On the current device, of kStagingRingBytes. Throws NoMemoryForRing or another CudaError.
  static std::unique_ptr<StagingRing> make();
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  // Where a chunk lies: in the halves in turn, or, of chunks that take more than a half, always in both.
  std::byte* place(const Staging& staging, int64_t chunk) const;

  // The stream of the copies over the link.
  cudaStream_t copies() const { return copies_; }

  // The copies come after what `stream` was asked for so far.
  void follow(cudaStream_t stream);

  // Round a chunk: its place is free; it is filled; it is there; it was taken. Each is about the work that a stream was
  // asked for so far, or will be.
  void wait_until_free(const Staging& staging, int64_t chunk, cudaStream_t stream);
  void mark_filled(int64_t chunk, cudaStream_t stream);
  void wait_until_filled(int64_t chunk, cudaStream_t stream);
  void mark_free(const Staging& staging, int64_t chunk, cudaStream_t stream);

  // After an error: `stream` comes after all that the ring's own was asked for, and the ring is free after `stream`.
  void abandon(cudaStream_t stream) noexcept;

 private:
  StagingRing() = default;

  std::byte* memory_ = nullptr;
  cudaStream_t copies_ = nullptr;
  cudaEvent_t begun_ = nullptr;
  cudaEvent_t filled_[2] = {};
  cudaEvent_t free_[2] = {};
};

// A ring, while a call is issued by way of it: no other call has it meanwhile.
class RingLease {
 public:
  // The ring of the stream on the current device, made at its first use. Rings are never given back. Throws as
  // StagingRing::make() where there is none to be shared either.
  RingLease(int device, cudaStream_t stream);
  StagingRing& ring() const { return *ring_; }

 private:
  StagingRing* ring_;
  std::unique_lock<std::mutex> lock_;
};

// Whether there is a ring on the device, or it is worth asking for one: not for a while after there was no memory.
// `counts`: this is one of the calls of that while.
bool ring_may_be_had(int device, bool counts);

}  // namespace kvkernels
