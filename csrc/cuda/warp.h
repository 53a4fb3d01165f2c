// What the lanes of a warp make for each other.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cuda/host_device.h"
#include "cuda/tables.h"

namespace kvkernels {

// The lowest bit that is set.
KVKERNELS_HOST_DEVICE uint32_t lowest_bit(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__ffs(static_cast<int>(bits)) - 1);
#else
  return static_cast<uint32_t>(std::countr_zero(bits));
#endif
}

// A value of each lane, for all of them to read: `make(lane, is_own)` is lane `lane`'s. The device makes each once, in
// its lane, and reading is a shuffle or a vote, which all lanes do together. The host, which runs one thread after the
// other, makes the values again for who reads them. What only the lane itself may do, `make` does where `is_own` is
// true.
template <class Value, class Make>
class OfEachLane {
 public:
  KVKERNELS_HOST_DEVICE OfEachLane(uint32_t lane, const Make& make) : make_(make), mine_(make(lane, true)) {}

  KVKERNELS_HOST_DEVICE const Value& mine() const { return mine_; }

  // Lanes count modulo 32.
  KVKERNELS_HOST_DEVICE Value of(uint32_t lane) const {
#ifdef __CUDA_ARCH__
    static_assert(sizeof(Value) % sizeof(uint32_t) == 0, "shuffles move 32 bits");
    uint32_t words[sizeof(Value) / sizeof(uint32_t)];
    memcpy(words, &mine_, sizeof words);
    KVKERNELS_UNROLL(8)
    for (uint32_t& word : words) word = __shfl_sync(0xffffffff, word, static_cast<int>(lane));
    Value value;
    memcpy(&value, words, sizeof value);
    return value;
#else
    return make_(lane % kWarpLanes, false);
#endif
  }

  // A bit for each lane whose value is such a one.
  template <class Test>
  KVKERNELS_HOST_DEVICE uint32_t where(const Test& test) const {
#ifdef __CUDA_ARCH__
    return __ballot_sync(0xffffffff, test(mine_));
#else
    uint32_t lanes = 0;
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) lanes |= uint32_t{test(of(lane))} << lane;
    return lanes;
#endif
  }

 private:
  const Make make_;
  const Value mine_;
};

template <class Value, class Make>
KVKERNELS_HOST_DEVICE OfEachLane<Value, Make> of_each_lane(uint32_t lane, const Make& make) {
  return OfEachLane<Value, Make>(lane, make);
}

}  // namespace kvkernels
