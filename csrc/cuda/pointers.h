// What memory an address is in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvkernels {

struct Range {
  enum class Memory { kPageable, kPinned, kDevice, kManaged };

  uintptr_t begin = 0;  // of the allocation or registration; of pageable memory only the byte asked about is known
  uintptr_t end = 0;
  Memory memory = Memory::kPageable;
  int device = -1;
  bool mapped = false;          // the current device can address it
  ptrdiff_t device_offset = 0;  // what to add to an address for the device; not 0 on WSL2 and the like
};

// Asks the driver once an allocation. Lives no longer than a call: memory can be freed and its addresses used again.
class PointerMap {
 public:
  // Throws CudaError where the driver cannot say.
  Range find(const void* address);

  // Memory that is known without asking, or not there yet; apart from what was found before.
  void assume(const Range& range);

 private:
  std::vector<Range> ranges_;  // ordered by begin
  Range last_;
};

}  // namespace kvkernels
