// What kernels found wrong with ids that live on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <shared_mutex>

#include "cuda/tables.h"

namespace kvkernels {

struct FaultRecord {
  uint64_t count;      // pairs skipped since the last take_fault
  uint64_t first_row;  // the lowest row among those of the op that failed first
  uint32_t op;         // DeviceIds::op of that op
};

struct FaultWatch;

// The device's word, for launches that may write it; zeroed, allocated at first use, never freed, and never on a
// capturing stream. `device` must be current. While it is held, take_fault waits: it clears nothing that a launch
// writes after it has read.
class FaultWord {
 public:
  explicit FaultWord(int device);
  Fault* get() const;

  // Launches that may write the word are on the stream, or in the graph that it captures: take_fault waits for them,
  // and for each replay. Throws CudaError.
  void note_launches(cudaStream_t stream);

 private:
  std::shared_lock<std::shared_mutex> lock_;
  FaultWatch* watch_ = nullptr;
};

// Waits for all launches that were noted, reads the word and clears it; nothing where no pair was skipped. Works while
// a stream captures, and leaves its capture intact: to synchronise the device would not.
std::optional<FaultRecord> take_fault(int device);

}  // namespace kvkernels
