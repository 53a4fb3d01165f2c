#include "cuda/staging_ring.h"

#include <algorithm>
#include <map>
#include <vector>

#include "cuda/stream.h"

namespace kvkernels {
namespace {

struct Kept {
  std::unique_ptr<StagingRing> ring;
  cudaStream_t stream = nullptr;
  uint64_t last_use = 0;
  std::mutex in_use;
};

struct DeviceRings {
  std::vector<std::unique_ptr<Kept>> rings;
  uint64_t uses = 0;
  int64_t calls_without = 0;          // that are still to come
  int64_t calls_without_another = 0;  // the same for one more ring
};

std::mutex mutex;

// Never destroyed: at the end of the process CUDA is gone before this would be.
DeviceRings& rings_of(int device) {
  static auto* const devices = new std::map<int, DeviceRings>;
  return (*devices)[device];
}

Kept& add_ring(DeviceRings& device) {
  auto kept = std::make_unique<Kept>();
  kept->ring = StagingRing::make();
  return *device.rings.emplace_back(std::move(kept));
}

Kept& idle_longest(DeviceRings& device) {
  return **std::min_element(device.rings.begin(), device.rings.end(),
                            [](const auto& a, const auto& b) { return a->last_use < b->last_use; });
}

// The stream's; else a new one; else another stream's.
Kept& ring_for(DeviceRings& device, cudaStream_t stream) {
  for (const auto& kept : device.rings) {
    if (kept->stream == stream) return *kept;
  }
  if (device.rings.size() == kMostRings) return idle_longest(device);
  if (device.calls_without_another > 0) {
    --device.calls_without_another;
    return idle_longest(device);
  }
  try {
    return add_ring(device);
  } catch (const NoMemoryForRing&) {
    if (device.rings.empty()) {
      device.calls_without = kCallsWithoutRing;
      throw;
    }
    device.calls_without_another = kCallsWithoutRing;
    return idle_longest(device);
  }
}

// Streams and events are memory, too.
void check_memory(cudaError_t code, const char* call) {
  if (code != cudaErrorMemoryAllocation) return check(code, call);
  static_cast<void>(cudaGetLastError());
  throw NoMemoryForRing(std::string(call) + " failed: " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) +
                        ")");
}

cudaEvent_t make_event() {
  cudaEvent_t event = nullptr;
  check_memory(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

void destroy_event(cudaEvent_t event) {
  if (event != nullptr && cudaEventDestroy(event) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

void record(cudaEvent_t event, cudaStream_t stream) { check(cudaEventRecord(event, stream), "cudaEventRecord"); }

// Waits for the last record; for nothing where there was none.
void wait(cudaStream_t stream, cudaEvent_t event) {
  check(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
}

}  // namespace

std::unique_ptr<StagingRing> StagingRing::make() {
  const RelaxedCapture relaxed;
  std::unique_ptr<StagingRing> ring(new StagingRing);
  void* memory = nullptr;
  check_memory(cudaMalloc(&memory, static_cast<size_t>(kStagingRingBytes)), "cudaMalloc");
  ring->memory_ = static_cast<std::byte*>(memory);
  check_memory(cudaStreamCreateWithFlags(&ring->copies_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  ring->begun_ = make_event();
  for (cudaEvent_t& event : ring->filled_) event = make_event();
  for (cudaEvent_t& event : ring->free_) event = make_event();
  return ring;
}

// Only of a ring that was not finished.
StagingRing::~StagingRing() {
  destroy_event(begun_);
  for (cudaEvent_t event : filled_) destroy_event(event);
  for (cudaEvent_t event : free_) destroy_event(event);
  if (copies_ != nullptr && cudaStreamDestroy(copies_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  if (memory_ != nullptr && cudaFree(memory_) != cudaSuccess) static_cast<void>(cudaGetLastError());
}

std::byte* StagingRing::place(const Staging& staging, int64_t chunk) const {
  return memory_ + (staging.parts == 2 ? chunk % 2 * (kStagingRingBytes / 2) : 0);
}

void StagingRing::follow(cudaStream_t stream) {
  record(begun_, stream);
  wait(copies_, begun_);
}

void StagingRing::wait_until_free(const Staging& staging, int64_t chunk, cudaStream_t stream) {
  wait(stream, free_[chunk % 2]);
  if (staging.parts == 1) wait(stream, free_[1 - chunk % 2]);
}

void StagingRing::mark_filled(int64_t chunk, cudaStream_t stream) { record(filled_[chunk % 2], stream); }

void StagingRing::wait_until_filled(int64_t chunk, cudaStream_t stream) { wait(stream, filled_[chunk % 2]); }

void StagingRing::mark_free(const Staging& staging, int64_t chunk, cudaStream_t stream) {
  record(free_[chunk % 2], stream);
  if (staging.parts == 1) record(free_[1 - chunk % 2], stream);
}

void StagingRing::abandon(cudaStream_t stream) noexcept {
  bool is_ordered = cudaEventRecord(begun_, copies_) == cudaSuccess;
  is_ordered = is_ordered && cudaStreamWaitEvent(stream, begun_, 0) == cudaSuccess;
  for (cudaEvent_t event : free_) is_ordered = is_ordered && cudaEventRecord(event, stream) == cudaSuccess;
  // Where not even that works, nothing must be on its way.
  if (!is_ordered) {
    static_cast<void>(cudaStreamSynchronize(copies_));
    static_cast<void>(cudaStreamSynchronize(stream));
    static_cast<void>(cudaGetLastError());
  }
}

RingLease::RingLease(int device, cudaStream_t stream) {
  Kept* kept = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    DeviceRings& rings = rings_of(device);
    kept = &ring_for(rings, stream);
    kept->stream = stream;
    kept->last_use = ++rings.uses;
    rings.calls_without = 0;
  }
  lock_ = std::unique_lock(kept->in_use);
  ring_ = kept->ring.get();
}

bool ring_may_be_had(int device, bool counts) {
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceRings& rings = rings_of(device);
  if (!rings.rings.empty() || rings.calls_without == 0) return true;
  if (counts) --rings.calls_without;
  return false;
}

}  // namespace kvkernels
