// Division by a number known before the launch, as one multiplication: devices have no integer division.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/host_device.h"

namespace kvkernels {

// n / divisor for n < 2^31 and 1 <= divisor < 2^31. With s = ceil(log2 divisor), the multiplier is
// ceil(2^(31+s) / divisor), which fits in 32 bits.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  KVKERNELS_HOST_DEVICE uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
};

// The same for n < 2^63, on the upper half of a 128-bit product; divisor 1 is the caller's to skip.
struct WideDivisor {
  int64_t divisor;
  uint64_t multiplier;
  uint32_t shift;
  uint32_t unused;

  KVKERNELS_HOST_DEVICE int64_t divide(int64_t n) const {
#ifdef __CUDA_ARCH__
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), multiplier) >> shift);
#else
    __extension__ typedef unsigned __int128 Product;
    return static_cast<int64_t>(static_cast<uint64_t>((static_cast<Product>(n) * multiplier) >> 64) >> shift);
#endif
  }
};

inline Divisor make_divisor(int64_t divisor) {
  const uint64_t d = static_cast<uint64_t>(divisor);
  const uint32_t shift = 31 + static_cast<uint32_t>(std::bit_width(d - 1));
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(((1ull << shift) + d - 1) / d), shift};
}

inline WideDivisor make_wide_divisor(int64_t divisor) {
  if (divisor == 1) return {1, 0, 0, 0};
  __extension__ typedef unsigned __int128 Wide;
  const uint64_t d = static_cast<uint64_t>(divisor);
  const uint32_t bits = static_cast<uint32_t>(std::bit_width(d - 1));
  return {divisor, static_cast<uint64_t>(((static_cast<Wide>(1) << (63 + bits)) + d - 1) / d), bits - 1, 0};
}

}  // namespace kvkernels
