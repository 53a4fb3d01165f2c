// What memory an address is in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvkernels {

struct Range {
  enum class Memory { kPageable, kPinned, kDevice, kManaged };

  // Of the allocation or registration. Of pageable memory only the byte asked about is known. Where the driver does not
  // say, from the address asked about to the next range that is known, which need not be the next that there is.
  uintptr_t begin = 0;
  uintptr_t end = 0;
  Memory memory = Memory::kPageable;
  int device = -1;
  bool is_known = false;        // begin and end are the driver's
  bool mapped = false;          // the current device can address it
  ptrdiff_t device_offset = 0;  // what to add to an address for the device; not 0 on WSL2 and the like
};

// Asks the driver once an allocation, and makes no context by that. Lives no longer than a call: memory can be freed
// and its addresses used again.
class PointerMap {
 public:
  // What is `mapped`, and where, is a context's answer: without one, only what the memory is can be asked.
  explicit PointerMap(bool has_context = true) : has_context_(has_context) {}

  // Throws CudaError where the driver cannot say.
  Range find(const void* address);

  // Whether the host memory there was registered as read-only for the device; false where the driver does not say.
  static bool is_read_only(const void* address);

  // Memory that is known without asking, or not there yet; apart from what was found before.
  void assume(const Range& range);

 private:
  bool has_context_;
  std::vector<Range> ranges_;  // ordered by begin
  Range last_;
};

}  // namespace kvkernels
