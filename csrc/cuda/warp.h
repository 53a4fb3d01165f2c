// What the lanes of a warp make for each other.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/host_device.h"
#include "cuda/tables.h"

namespace kvkernels {

// A value of each lane, for all of them to read: `make(lane, is_own)` is lane `lane`'s. The device makes each once, in
// its lane, and reading is a shuffle, which all lanes do together. The host, which runs one thread after the other,
// makes the value again for who reads it. Lanes count modulo 32. What only the lane itself may do, `make` does where
// `is_own` is true.
template <class Value, class Make>
class OfEachLane {
 public:
  static_assert(sizeof(Value) % sizeof(uint32_t) == 0, "shuffles move 32 bits");

#ifdef __CUDA_ARCH__
  __device__ __forceinline__ OfEachLane(uint32_t lane, const Make& make) : mine_(make(lane, true)) {}

  __device__ __forceinline__ Value of(uint32_t lane) const {
    uint32_t words[sizeof(Value) / sizeof(uint32_t)];
    memcpy(words, &mine_, sizeof words);
    KVKERNELS_UNROLL(8)
    for (uint32_t& word : words) word = __shfl_sync(0xffffffff, word, static_cast<int>(lane));
    Value value;
    memcpy(&value, words, sizeof value);
    return value;
  }

 private:
  const Value mine_;
#else
  KVKERNELS_HOST_DEVICE OfEachLane(uint32_t lane, const Make& make) : make_(make) { make(lane, true); }

  KVKERNELS_HOST_DEVICE Value of(uint32_t lane) const { return make_(lane % kWarpLanes, false); }

 private:
  const Make make_;
#endif
};

template <class Value, class Make>
KVKERNELS_HOST_DEVICE OfEachLane<Value, Make> of_each_lane(uint32_t lane, const Make& make) {
  return OfEachLane<Value, Make>(lane, make);
}

}  // namespace kvkernels
