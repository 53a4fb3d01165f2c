// libcudart.so.13 of the stand-in: streams and events.
#include <algorithm>
#include <set>

#include "fake.h"
#include "fake_cudart.h"
#include "fake_graph.h"
#include "fake_time.h"

extern "C" int64_t fake_calls(const char* call);

using fake::done;
using fake::Event;
using fake::Lock;
using fake::Stream;

namespace {

std::set<Event*>& events() {
  static auto* const instance = new std::set<Event*>;
  return *instance;
}

Event* find_event(cudaEvent_t handle) {
  const auto found = events().find(reinterpret_cast<Event*>(handle));
  return found == events().end() ? nullptr : *found;
}

bool forbids_unsafe_call() { return fake::forbids_unsafe_call(fake::thread_capture_mode()); }

// The greatest priority is the lowest number.
constexpr int kLeastPriority = 0;
constexpr int kGreatestPriority = -5;

cudaError_t create_stream(const char* call, cudaStream_t* out, unsigned flags, int priority) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter(call)) return done(code);
  priority = std::max(kGreatestPriority, std::min(kLeastPriority, priority));
  fake::log(call, {{"device", fake::current_device()}, {"flags", flags}, {"priority", priority}});
  *out = static_cast<cudaStream_t>(fake::make_stream((flags & cudaStreamNonBlocking) == 0, priority));
  return done(0);
}

}  // namespace

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return create_stream("cudaStreamCreate", out, cudaStreamDefault, kLeastPriority);
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return create_stream("cudaStreamCreateWithFlags", out, flags, kLeastPriority);
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  return create_stream("cudaStreamCreateWithPriority", out, flags, priority);
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamGetPriority")) return done(code);
  const Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  *priority = stream->priority;
  return done(0);
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (const int code = fake::enter("cudaDeviceGetStreamPriorityRange")) return done(code);
  if (least != nullptr) *least = kLeastPriority;
  if (greatest != nullptr) *greatest = kGreatestPriority;
  return done(0);
}

// Does not wait for what the stream still has to do.
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(fake::mutex());
  const int code = fake::enter("cudaStreamDestroy");
  if (!fake::destroy_stream(handle)) return done(cudaErrorInvalidResourceHandle);
  return done(code);
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamSynchronize")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (fake::is_capturing(*stream)) return done(fake::refuse_to_wait(*stream));
  if (forbids_unsafe_call()) return done(cudaErrorStreamCaptureUnsupported);
  ++fake::counters().stream_synchronisations;
  return done(fake::finish_stream(*stream));
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamQuery")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (fake::is_capturing(*stream)) return done(fake::refuse_to_wait(*stream));
  if (forbids_unsafe_call()) return done(cudaErrorStreamCaptureUnsupported);
  if (fake::is_finished(*stream)) return done(0);
  fake::nudge(*stream);
  return done(fake::context_error() != 0 ? fake::context_error() : cudaErrorNotReady);
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaStreamWaitEvent")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  const Event* const found = find_event(event);
  if (stream == nullptr || found == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (const int code = fake::refusal(*stream)) return done(code);
  if (stream->capture != nullptr || found->capture != nullptr) return done(fake::wait_in_capture(*stream, *found));
  // For tests of whether the wait is needed.
  if (fake_calls("cudaStreamWaitEvent") == fake::setting("forgotten_wait")) return done(0);
  // The recording there is now: a later one is not waited for.
  return done(fake::submit(*stream, {.kind = "wait"}, nullptr, {found->recorded}));
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaLaunchHostFunc")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (function == nullptr) return done(cudaErrorInvalidValue);
  if (const int code = fake::refusal(*stream)) return done(code);
  const auto call = [function, data] {
    function(data);
    return 0;
  };
  return done(fake::submit(*stream, {.kind = "host function", .action = call}));
}

EXPORT cudaError_t cudaDeviceSynchronize() {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaDeviceSynchronize")) return done(code);
  fake::log("cudaDeviceSynchronize", {{"device", fake::current_device()}});
  for (Stream* stream : fake::streams()) {
    if (fake::is_capturing(*stream)) return done(fake::refuse_to_wait(*stream));
  }
  ++fake::counters().device_synchronisations;
  return done(fake::finish_device(fake::current_device()));
}

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

// Does not wait for the event.
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock(fake::mutex());
  const int code = fake::enter("cudaEventDestroy");
  Event* const found = find_event(event);
  if (found == nullptr) return done(cudaErrorInvalidResourceHandle);
  events().erase(found);
  delete found;
  return done(code);
}

namespace {

// In a stream that captures, an event for the graph's other nodes; or, if it is external, a node that records the event
// for everyone at each launch.
cudaError_t record_event(const char* call, cudaEvent_t event, cudaStream_t handle, bool is_external) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter(call)) return done(code);
  Stream* const stream = fake::find_stream(handle);
  Event* const found = find_event(event);
  if (stream == nullptr || found == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (const int code = fake::refusal(*stream)) return done(code);
  if (is_external && !fake::is_capturing(*stream)) return done(cudaErrorInvalidValue);
  if (!is_external) {
    found->is_recorded = true;
    found->capture = stream->capture;
    found->captured_after = stream->captured_after;
    if (stream->capture != nullptr) return done(0);
  }
  const auto at = std::make_shared<Event::Clock::time_point>();
  fake::Work work{.kind = "record"};
  work.action = [at] {
    *at = Event::Clock::now();
    return 0;
  };
  work.note_id = [event, at](int64_t id) {
    Event* const recorded = find_event(event);
    if (recorded == nullptr) return;
    recorded->is_recorded = true;
    recorded->recorded = id;
    recorded->completed_at = at;
  };
  return done(fake::submit(*stream, std::move(work)));
}

}  // namespace

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return record_event("cudaEventRecordWithFlags", event, stream, (flags & cudaEventRecordExternal) != 0);
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return record_event("cudaEventRecord", event, stream, false);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventQuery")) return done(code);
  const Event* const found = find_event(event);
  if (found == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (found->capture != nullptr) return done(cudaErrorCapturedEvent);
  if (forbids_unsafe_call()) return done(cudaErrorStreamCaptureUnsupported);
  if (fake::is_finished(found->recorded)) return done(0);
  fake::nudge(found->recorded);
  return done(fake::context_error() != 0 ? fake::context_error() : cudaErrorNotReady);
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventSynchronize")) return done(code);
  const Event* const found = find_event(event);
  if (found == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (found->capture != nullptr) return done(cudaErrorCapturedEvent);
  if (forbids_unsafe_call()) return done(cudaErrorStreamCaptureUnsupported);
  ++fake::counters().event_synchronisations;
  return done(fake::finish(found->recorded));
}

EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaEventElapsedTime")) return done(code);
  const Event* const both[] = {find_event(start), find_event(end)};
  for (const Event* event : both) {
    if (event == nullptr || !event->has_timing || !event->is_recorded) return done(cudaErrorInvalidResourceHandle);
    if (event->capture != nullptr) return done(cudaErrorCapturedEvent);
  }
  for (const Event* event : both) {
    if (!fake::is_finished(event->recorded)) return done(cudaErrorNotReady);
  }
  *ms = std::chrono::duration<float, std::milli>(*both[1]->completed_at - *both[0]->completed_at).count();
  return done(0);
}

EXPORT int64_t fake_events() {
  Lock lock(fake::mutex());
  return static_cast<int64_t>(events().size());
}
