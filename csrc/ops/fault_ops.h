// The ops that take ids on a device, by the code that a kernel records; kvkernels/triton/table.py has the same list.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

namespace kvkernels {

constexpr std::array<const char*, 5> kFaultOps{"", "gather_blocks", "scatter_blocks", "copy_pages", "PreparedCopy.run"};

inline uint32_t fault_code(std::string_view op) {
  const auto found = std::find(kFaultOps.begin(), kFaultOps.end(), op);
  return static_cast<uint32_t>(found == kFaultOps.end() ? 0 : found - kFaultOps.begin());
}

}  // namespace kvkernels
