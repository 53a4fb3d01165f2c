// What kernels found wrong with ids that live on the device.
#pragma once

#include <cstdint>
#include <optional>
#include <shared_mutex>

#include "cuda/copy_body.h"

namespace kvkernels {

struct FaultRecord {
  uint64_t count;      // pairs skipped since the last take_fault
  uint64_t first_row;  // the lowest row among those of the op that failed first
  uint32_t op;         // DeviceIds::op of that op
};

// The device's word, for launches that may write it; zeroed, allocated at first use, never freed, and never on a
// capturing stream. `device` must be current. While it is held, take_fault waits: it clears nothing that a launch
// writes after it has read.
class FaultWord {
 public:
  explicit FaultWord(int device);
  Fault* get() const { return word_; }

 private:
  std::shared_lock<std::shared_mutex> lock_;
  Fault* word_ = nullptr;
};

// Synchronises the device, reads the word and clears it; nothing where no pair was skipped.
std::optional<FaultRecord> take_fault(int device);

}  // namespace kvkernels
