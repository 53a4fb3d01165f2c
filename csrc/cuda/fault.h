// What kernels found wrong with ids that live on the device.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/copy_body.h"

namespace kvkernels {

struct FaultRecord {
  uint64_t count;      // pairs skipped since the last take_fault
  uint64_t first_row;  // the lowest row among those of the op that failed first
  uint32_t op;         // DeviceIds::op of that op
};

// The device's word, zeroed; allocated at first use, never freed, and never on a capturing stream. `device` must be
// current.
Fault* fault_word(int device);

// Synchronises the device, reads the word and clears it; nothing where no pair was skipped.
std::optional<FaultRecord> take_fault(int device);

}  // namespace kvkernels
