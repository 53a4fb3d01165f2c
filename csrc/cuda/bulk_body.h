// What one warp of the bulk kernel does: its tiles go through a ring of stages in shared memory, by bulk copies of the
// asynchronous proxy. One lane issues them; the others copy what bulk copies cannot.
//
//              cp.async.bulk                        cp.async.bulk
//   source  ==================>  ring of stages  ==================>  destination
//              counted by the                       counted by the lane's
//              stage's mbarrier                     bulk groups
//
//   stages, oldest first:   | being stored | being stored | loading | loading | ... | loading |
//                             at most kUnreadStores         all but kUnreadStores of the stages
//
// Tests run copy_bulk on the host with an Access and a Ring of their own, and the compiled kernel on a simulator.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/copy_body.h"

namespace kvkernels {

// Each warp has a ring of its own, so nothing of a CTA waits for another warp. Four issuing lanes, because one that
// decodes a tile between two copies is slow for tiles of 512 bytes.
constexpr int kBulkWarps = 4;
constexpr uint32_t kRingBytes = 48 << 10;  // of a warp: 192 KiB of the 227 KiB that a CTA of 9.0 and 10.0 can have
constexpr uint32_t kMaxStages = 32;
constexpr uint32_t kUnreadStores = 2;         // stores that may still read their stage while the next load is issued
constexpr uint32_t kBulkTileBytes = 8 << 10;  // at most: tiles hold a fragment each where they can

KVKERNELS_HOST_DEVICE uint32_t stages_of(uint32_t tile_bytes) {
  const uint32_t stages = kRingBytes / tile_bytes;
  return stages < kMaxStages ? stages : kMaxStages;
}

// A warp a tile, any size and alignment. `ring` is the first lane's.
template <class Access, class Ring>
KVKERNELS_HOST_DEVICE void copy_bulk(const Head& head, const std::byte* tables, Ring& ring, uint32_t thread,
                                     uint32_t threads) {
  const uint32_t lane = thread & (kWarpLanes - 1);
  KVKERNELS_UNROLL(1)
  for (uint32_t tile = thread / kWarpLanes; tile < head.tiles; tile += threads / kWarpLanes) {
    const Span span = find_span<Access, true>(head, tables, tile, lane, head.unit_bytes);
    if (span.bytes == 0) continue;
    const uint32_t difference = vector_difference(span.src, span.dst);
    if (difference != 0) {
      copy_shifted_span<Access>(span.src, span.dst, span.bytes, difference, lane);
      continue;
    }
    // Bulk copies take multiples of 16 bytes at multiples of 16. The ends come second: the warp waits for them.
    uint32_t first = (0u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(span.dst))) & 15;
    if (first > span.bytes) first = span.bytes;
    const uint32_t middle = (span.bytes - first) & ~15u;
    if (lane == 0 && middle > 0) ring.copy(span.src + first, span.dst + first, middle);
    copy_ends<Access>(span.src, span.dst, span.bytes, first, span.bytes - first - middle, lane);
  }
  if (lane == 0) ring.finish();
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// What a stage is to be stored to.
struct Target {
  std::byte* dst;
  uint32_t bytes;
};

// One lane's ring. No other thread touches its stages, mbarriers or targets.
class BulkRing {
 public:
  __device__ __forceinline__ BulkRing(std::byte* stages, uint64_t* full, Target* targets, uint32_t stage_bytes)
      : stages_(shared_address(stages)),
        full_(shared_address(full)),
        targets_(targets),
        stage_bytes_(stage_bytes),
        stage_count_(stages_of(stage_bytes)) {}

  __device__ __forceinline__ void begin() {
    for (uint32_t i = 0; i < stage_count_; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_ + 8 * i) : "memory");
    }
    // The asynchronous proxy must see them, and so must the other proxy's completions.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  // Loads into the next stage. It is free: at most kUnreadStores stores still read theirs, and they and the loads on
  // their way are fewer than the stages.
  __device__ __forceinline__ void copy(const std::byte* src, std::byte* dst, uint32_t bytes) {
    if (loading_ == stage_count_ - kUnreadStores) store_oldest();
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kUnreadStores) : "memory");
    targets_[newest_] = {dst, bytes};
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full_ + 8 * newest_), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     stages_ + newest_ * stage_bytes_),
                 "l"(GlobalAccess::global(src)), "r"(bytes), "r"(full_ + 8 * newest_)
                 : "memory");
    if (++newest_ == stage_count_) newest_ = 0;
    ++loading_;
  }

  // Stores what is still loading, and waits until all stores are done: the CTA's shared memory ends with it.
  __device__ __forceinline__ void finish() {
    while (loading_ > 0) store_oldest();
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }

 private:
  static __device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  __device__ __forceinline__ void store_oldest() {
    wait_until_full();
    const Target target = targets_[oldest_];
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(GlobalAccess::global(target.dst)),
                 "r"(stages_ + oldest_ * stage_bytes_), "r"(target.bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    --loading_;
    if (++oldest_ < stage_count_) return;
    oldest_ = 0;
    parity_ ^= 1;
  }

  __device__ __forceinline__ void wait_until_full() {
    for (uint32_t is_full = 0; is_full == 0;) {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(is_full)
          : "r"(full_ + 8 * oldest_), "r"(parity_)
          : "memory");
    }
  }

  const uint32_t stages_;
  const uint32_t full_;
  Target* const targets_;
  const uint32_t stage_bytes_;
  const uint32_t stage_count_;
  uint32_t newest_ = 0;
  uint32_t oldest_ = 0;
  uint32_t loading_ = 0;
  uint32_t parity_ = 0;  // of the mbarriers' phase that ends when the oldest stage is full
};

#endif

}  // namespace kvkernels
