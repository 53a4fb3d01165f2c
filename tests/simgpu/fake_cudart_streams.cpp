// libcudart.so.13 of the stand-in: events, and what streams do beside copies and launches. Everything is done at once,
// so that every event is complete.
#include <chrono>
#include <mutex>
#include <set>

#include "fake.h"
#include "fake_cudart.h"

using fake::done;

namespace {

using Clock = std::chrono::steady_clock;

struct Event {
  bool has_timing = true;
  bool is_recorded = false;
  Clock::time_point recorded_at;
};

std::set<Event*>& events() {
  static auto* const instance = new std::set<Event*>;
  return *instance;
}

Event* find(cudaEvent_t event) {
  const auto found = events().find(reinterpret_cast<Event*>(event));
  return found == events().end() ? nullptr : *found;
}

using Lock = std::lock_guard<std::recursive_mutex>;

// The greatest priority is the lowest number.
constexpr int kLeastPriority = 0;
constexpr int kGreatestPriority = -5;

}  // namespace

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventCreateWithFlags")) return done(code);
  auto* const event = new Event;
  event->has_timing = (flags & cudaEventDisableTiming) == 0;
  events().insert(event);
  *out = reinterpret_cast<cudaEvent_t>(event);
  return done(0);
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, cudaEventDefault); }

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock(fake::mutex());
  const int code = fake::enter("cudaEventDestroy");
  Event* const found = find(event);
  if (found == nullptr) return done(cudaErrorInvalidResourceHandle);
  events().erase(found);
  delete found;
  return done(code);
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventRecord")) return done(code);
  Event* const found = find(event);
  if (found == nullptr) return done(cudaErrorInvalidResourceHandle);
  found->is_recorded = true;
  found->recorded_at = Clock::now();
  return done(0);
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventQuery")) return done(code);
  return done(find(event) == nullptr ? cudaErrorInvalidResourceHandle : cudaSuccess);
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventSynchronize")) return done(code);
  return done(find(event) == nullptr ? cudaErrorInvalidResourceHandle : cudaSuccess);
}

EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventElapsedTime")) return done(code);
  const Event* const from = find(start);
  const Event* const to = find(end);
  if (from == nullptr || to == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (!from->has_timing || !to->has_timing || !from->is_recorded || !to->is_recorded) {
    return done(cudaErrorInvalidResourceHandle);
  }
  *ms = std::chrono::duration<float, std::milli>(to->recorded_at - from->recorded_at).count();
  return done(0);
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamWaitEvent")) return done(code);
  return done(find(event) == nullptr ? cudaErrorInvalidResourceHandle : cudaSuccess);
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return done(fake::enter("cudaStreamQuery")); }

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  if (const int code = fake::enter("cudaStreamGetPriority")) return done(code);
  *priority = kLeastPriority;
  return done(0);
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (const int code = fake::enter("cudaDeviceGetStreamPriorityRange")) return done(code);
  if (least != nullptr) *least = kLeastPriority;
  if (greatest != nullptr) *greatest = kGreatestPriority;
  return done(0);
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  if (const int code = fake::enter("cudaLaunchHostFunc")) return done(code);
  if (function == nullptr) return done(cudaErrorInvalidValue);
  function(data);
  return done(0);
}
