#include "cuda/fault.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace kvkernels {

// A device's word, and events that say when what may write it is done.
struct FaultWatch {
  Fault* word = nullptr;
  std::mutex mutex;
  std::map<cudaStream_t, cudaEvent_t> by_stream;
  // One for each captured call: a node of its graph, recorded by each replay. Never destroyed: nobody says when a graph
  // is.
  std::vector<cudaEvent_t> in_graphs;
};

namespace {

std::shared_mutex mutex;
std::map<int, FaultWatch> watches;

cudaEvent_t make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return event;
}

// A stream of its own that does not block: the legacy one would wait for, or break, other streams' captures.
class PrivateStream {
 public:
  PrivateStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~PrivateStream() {
    if (cudaStreamDestroy(stream_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;

  void wait(cudaEvent_t event) { check(cudaStreamWaitEvent(stream_, event, 0), "cudaStreamWaitEvent"); }

  Fault read(const Fault* word) {
    Fault fault{};
    check(cudaMemcpyAsync(&fault, word, sizeof fault, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return fault;
  }

  void zero(Fault* word) {
    check(cudaMemsetAsync(word, 0, sizeof(Fault), stream_), "cudaMemsetAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

 private:
  cudaStream_t stream_ = nullptr;
};

Fault* allocate() {
  RelaxedCapture relaxed;
  PrivateStream stream;
  void* word = nullptr;
  check(cudaMalloc(&word, sizeof(Fault)), "cudaMalloc");
  try {
    stream.zero(static_cast<Fault*>(word));
  } catch (...) {
    if (cudaFree(word) != cudaSuccess) static_cast<void>(cudaGetLastError());
    throw;
  }
  return static_cast<Fault*>(word);
}

void allocate_once(int device) {
  const std::lock_guard<std::shared_mutex> lock(mutex);
  if (watches.count(device) != 0) return;
  Fault* const word = allocate();
  watches[device].word = word;
}

}  // namespace

FaultWord::FaultWord(int device) : lock_(mutex) {
  auto found = watches.find(device);
  if (found == watches.end()) {
    lock_.unlock();
    allocate_once(device);
    lock_.lock();
    found = watches.find(device);
  }
  watch_ = &found->second;
}

Fault* FaultWord::get() const { return watch_->word; }

void FaultWord::note_launches(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(watch_->mutex);
  if (is_capturing(stream)) {
    const cudaEvent_t event = watch_->in_graphs.emplace_back(make_event());
    check(cudaEventRecordWithFlags(event, stream, cudaEventRecordExternal), "cudaEventRecordWithFlags");
    return;
  }
  const auto found = watch_->by_stream.find(stream);
  const cudaEvent_t event = found != watch_->by_stream.end() ? found->second : make_event();
  watch_->by_stream[stream] = event;
  // The handle may have been another stream's, whose launches must not be forgotten.
  check(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
  check(cudaEventRecord(event, stream), "cudaEventRecord");
}

std::optional<FaultRecord> take_fault(int device) {
  const std::lock_guard<std::shared_mutex> lock(mutex);
  const auto found = watches.find(device);
  if (found == watches.end()) return std::nullopt;
  FaultWatch& watch = found->second;
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  PrivateStream stream;
  for (const auto& [launched_on, event] : watch.by_stream) stream.wait(event);
  for (const cudaEvent_t event : watch.in_graphs) stream.wait(event);
  const Fault fault = stream.read(watch.word);
  if (fault.count == 0) return std::nullopt;
  stream.zero(watch.word);
  return FaultRecord{fault.count, ~fault.complemented_row, fault.op};
}

}  // namespace kvkernels
