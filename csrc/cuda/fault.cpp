#include "cuda/fault.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <shared_mutex>

#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace kvkernels {
namespace {

std::shared_mutex mutex;
std::map<int, Fault*> words;

// A stream of its own that does not block: the legacy one would wait for, or break, other streams' captures.
class PrivateStream {
 public:
  PrivateStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~PrivateStream() {
    if (cudaStreamDestroy(stream_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;

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
  if (words.count(device) == 0) words[device] = allocate();
}

}  // namespace

FaultWord::FaultWord(int device) : lock_(mutex) {
  auto found = words.find(device);
  if (found == words.end()) {
    lock_.unlock();
    allocate_once(device);
    lock_.lock();
    found = words.find(device);
  }
  word_ = found->second;
}

std::optional<FaultRecord> take_fault(int device) {
  const std::lock_guard<std::shared_mutex> lock(mutex);
  const auto found = words.find(device);
  if (found == words.end()) return std::nullopt;
  DeviceGuard guard(device);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  Fault fault{};
  check(cudaMemcpy(&fault, found->second, sizeof fault, cudaMemcpyDeviceToHost), "cudaMemcpy");
  if (fault.count == 0) return std::nullopt;
  PrivateStream().zero(found->second);
  return FaultRecord{fault.count, ~fault.complemented_row, fault.op};
}

}  // namespace kvkernels
