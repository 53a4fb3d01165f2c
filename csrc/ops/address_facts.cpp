#include "ops/address_facts.h"

#include <algorithm>

#include "core/cuda_driver.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/pointers.h"
#include "ops/arguments.h"
#include "ops/cuda_state.h"
#include "ops/named_errors.h"

namespace kvkernels {
namespace {

void note_range(const char* op, const char* argument, const Range& range, int& device, AddressFacts& facts) {
  if (range.memory == Range::Memory::kDevice) {
    check_one_device(op, {device >= 0, device}, {true, range.device});
    device = range.device;
  }
  if (range.memory == Range::Memory::kPageable) {
    facts.pageable = argument;
  } else if (!range.mapped) {
    facts.unreachable = text(argument, " is in host memory that is not mapped for the device");
  } else if (range.device_offset != 0) {
    facts.unreachable = text(argument, " is in host memory that the device sees at another address");
  }
}

// The device that copies are for; -1 where all addresses are the host's. What it asks needs no context.
int device_of(const std::vector<Fragment>& fragments) {
  PointerMap pointers(false);
  bool is_managed = false;
  for (const Fragment& copy : fragments) {
    const std::byte* const ends[] = {copy.src, copy.src + copy.bytes - 1, copy.dst, copy.dst + copy.bytes - 1};
    for (const std::byte* const end : ends) {
      const Range range = pointers.find(end);
      if (range.memory == Range::Memory::kDevice) return range.device;
      is_managed = is_managed || range.memory == Range::Memory::kManaged;
    }
  }
  return is_managed ? current_device() : -1;
}

}  // namespace

Direction AddressFacts::direction() const {
  if (!src_on_host && !dst_on_host) return Direction::kDeviceToDevice;
  return dst_on_device && !dst_on_host ? Direction::kHostToDevice : Direction::kDeviceToHost;
}

AddressFacts facts_of_addresses(const char* op, const std::vector<Fragment>& fragments) {
  AddressFacts facts;
  PointerMap pointers;
  const auto note = [&](const char* argument, const std::byte* begin, int64_t bytes, bool& on_device, bool& on_host,
                        int& device) {
    // A fragment may cross from one registration into the next; of pageable memory one look is enough.
    for (auto at = reinterpret_cast<uintptr_t>(begin), end = at + static_cast<uintptr_t>(bytes); at < end;) {
      const Range range = pointers.find(reinterpret_cast<const std::byte*>(at));
      const bool is_device = range.memory == Range::Memory::kDevice || range.memory == Range::Memory::kManaged;
      (is_device ? on_device : on_host) = true;
      note_range(op, argument, range, device, facts);
      facts.dst_is_read_only =
          facts.dst_is_read_only || (&on_host == &facts.dst_on_host && range.memory == Range::Memory::kPinned &&
                                     pointers.is_read_only(reinterpret_cast<const void*>(at)));
      if (range.memory == Range::Memory::kPageable) return;
      at = range.end;
    }
  };
  // Side by side, because neighbours in the list are mostly of one allocation, which is then known.
  for (const Fragment& copy : fragments)
    note("src_ptrs", copy.src, copy.bytes, facts.src_on_device, facts.src_on_host, facts.src_device);
  for (const Fragment& copy : fragments)
    note("dst_ptrs", copy.dst, copy.bytes, facts.dst_on_device, facts.dst_on_host, facts.dst_device);
  if (facts.peer() >= 0 && (facts.src_on_host || facts.dst_on_host)) {
    check_one_device(op, {true, facts.src_device}, {true, facts.dst_device});
  }
  return facts;
}

int device_of_addresses(const char* op, const std::vector<Fragment>& fragments) {
  if (!cuda_in_use()) return -1;
  const std::string why_not = driver_refusal();
  if (why_not.empty()) return named_errors(op, [&] { return device_of(fragments); });
  const auto touches_device = [](const Fragment& fragment) {
    return is_on_device(fragment.src) || is_on_device(fragment.src + fragment.bytes - 1) ||
           is_on_device(fragment.dst) || is_on_device(fragment.dst + fragment.bytes - 1);
  };
  if (std::none_of(fragments.begin(), fragments.end(), touches_device)) return -1;
  throw std::runtime_error(text(op, ": addresses on a cuda device need CUDA code that runs: ", why_not));
}

}  // namespace kvkernels
