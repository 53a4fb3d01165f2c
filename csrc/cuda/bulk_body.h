// What one warp of the bulk kernel does: its tiles go through a ring of stages in shared memory, by bulk copies of the
// asynchronous proxy. Each lane finds a tile and issues its copies, so that what a warp does for one tile it does for
// as many as the ring has stages a generation; what bulk copies cannot copy, the lanes do together.
//
//              cp.async.bulk                        cp.async.bulk
//   source  ==================>  ring of stages  ==================>  destination
//              counted by the                       counted by the lane's
//              generation's mbarrier                bulk groups
//
//               lane 0   lane 1   lane 2   ...                   a generation of tiles after the other:
//   generation | stage  | stage  | stage  | ... | loading          0: load 0
//   generation | stage  | stage  | stage  | ... | loading          1: load 1
//   generation | stage  | stage  | stage  | ... | being stored     2: load 2, store 0     3: load 3, store 1 ...
//
// Tests run copy_bulk on the host with an Access and a Ring of their own, and the compiled kernel on a simulator.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/copy_body.h"
#include "cuda/warp.h"

namespace kvkernels {

// Each warp has a ring of its own, so nothing of a CTA waits for another warp.
constexpr int kBulkWarps = 4;
constexpr uint32_t kRingBytes = 48 << 10;  // of a warp: 192 KiB of the 227 KiB that a CTA of 9.0 and 10.0 can have
// Two load while the third is found, stored from and loaded again.
constexpr uint32_t kGenerations = 3;
constexpr uint32_t kBulkTileBytes = 8 << 10;  // at most: tiles hold a fragment each where they can

// The lanes of a warp that have a tile in each generation.
KVKERNELS_HOST_DEVICE uint32_t bulk_lanes(uint32_t tile_bytes) {
  const uint32_t lanes = kRingBytes / kGenerations / tile_bytes;
  return lanes < kWarpLanes ? lanes : kWarpLanes;
}

KVKERNELS_HOST_DEVICE uint32_t bulk_ring_bytes(uint32_t tile_bytes) {
  return kGenerations * bulk_lanes(tile_bytes) * tile_bytes;
}

// A tile as bulk copies take it: multiples of 16 bytes at multiples of 16. The ends are the rest.
struct BulkSpan {
  Span span;
  uint32_t first;   // bytes before the middle
  uint32_t middle;  // 0 where there is none, or the two sides lie differently

  KVKERNELS_HOST_DEVICE bool is_whole() const { return middle == span.bytes; }
};

KVKERNELS_HOST_DEVICE BulkSpan cut_for_bulk(const Span& span) {
  uint32_t first = (0u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(span.dst))) & 15;
  if (first > span.bytes) first = span.bytes;
  const bool is_alike = vector_difference(span.src, span.dst) == 0;
  return {span, first, is_alike ? (span.bytes - first) & ~15u : 0};
}

// What a tile's middle leaves, by all lanes of the warp.
template <class Access>
KVKERNELS_HOST_DEVICE void copy_around(const BulkSpan& tile, uint32_t lane) {
  const Span& span = tile.span;
  const uint32_t difference = vector_difference(span.src, span.dst);
  if (difference != 0) return copy_shifted_span<Access>(span.src, span.dst, span.bytes, difference, lane);
  const uint32_t last = span.bytes - tile.first - tile.middle;
  copy_ends<Access>(span.src, span.dst, span.bytes, tile.first, last, lane);
}

// A warp's tiles, a generation at a time. `ring` is the lane's own part of it.
template <class Access, class Ring>
KVKERNELS_HOST_DEVICE void copy_bulk(const Head& head, const std::byte* tables, Ring& ring, uint32_t thread,
                                     uint32_t threads) {
  const uint32_t lane = thread & (kWarpLanes - 1);
  const uint32_t warps = threads / kWarpLanes;
  const uint32_t lanes = bulk_lanes(head.unit_bytes);
  KVKERNELS_UNROLL(1)
  for (uint32_t begin = thread / kWarpLanes; begin < head.tiles; begin += lanes * warps) {
    const auto tiles = of_each_lane<BulkSpan>(lane, [&](uint32_t of, bool is_own) -> BulkSpan {
      const uint32_t tile = begin + of * warps;
      if (of >= lanes || tile >= head.tiles) return {{nullptr, nullptr, 0}, 0, 0};
      return cut_for_bulk(find_span<Access, true>(head, tables, tile, is_own, head.unit_bytes));
    });
    const BulkSpan mine = tiles.mine();
    ring.copy(mine.span.src + mine.first, mine.span.dst + mine.first, mine.middle);
    // The warp waits for these, and the bulk copies are on their way.
    uint32_t ragged = tiles.where([](const BulkSpan& tile) { return !tile.is_whole(); });
    KVKERNELS_UNROLL(1)
    for (; ragged != 0; ragged &= ragged - 1) copy_around<Access>(tiles.of(lowest_bit(ragged)), lane);
  }
  ring.finish();
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// One lane's part of its warp's ring. All lanes call all of it together. No other thread touches a lane's stages; the
// mbarriers, one a generation, are the warp's.
class BulkRing {
 public:
  __device__ __forceinline__ BulkRing(std::byte* stages, uint64_t* full, uint32_t lane, uint32_t stage_bytes)
      : stage_(shared_address(stages) + lane * stage_bytes),
        generation_bytes_(bulk_lanes(stage_bytes) * stage_bytes),
        full_(shared_address(full)) {
    if (lane == 0) {
      for (uint32_t i = 0; i < kGenerations; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full_ + 8 * i), "n"(kWarpLanes) : "memory");
      }
      // The asynchronous proxy must see them, and so must the other proxy's completions.
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
  }

  // Loads a tile into the next generation's stage, and stores the one that was loaded two before. `bytes` may be 0.
  __device__ __forceinline__ void copy(const std::byte* src, std::byte* dst, uint32_t bytes) {
    // What was stored last was loaded into this stage.
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    const uint32_t full = full_ + 8 * newest_;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes) : "memory");
    if (bytes > 0) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       stage_ + newest_ * generation_bytes_),
                   "l"(GlobalAccess::global(src)), "r"(bytes), "r"(full)
                   : "memory");
    }
    if (++newest_ == kGenerations) newest_ = 0;
    if (loading_ == kGenerations - 1) {
      store(older_);
    } else {
      ++loading_;
    }
    older_ = newer_;
    newer_ = {dst, bytes};
  }

  // Stores what is still loading, and waits until all stores are done: the CTA's shared memory ends with it.
  __device__ __forceinline__ void finish() {
    if (loading_ > 1) store(older_);
    if (loading_ > 0) store(newer_);
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }

 private:
  // What a stage is to be stored to.
  struct Target {
    std::byte* dst = nullptr;
    uint32_t bytes = 0;
  };

  static __device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  // Of the oldest generation.
  __device__ __forceinline__ void store(const Target& target) {
    wait_until_full();
    if (target.bytes > 0) {
      asm volatile(
          "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(GlobalAccess::global(target.dst)),
          "r"(stage_ + oldest_ * generation_bytes_), "r"(target.bytes)
          : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (++oldest_ < kGenerations) return;
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

  const uint32_t stage_;  // of the first generation
  const uint32_t generation_bytes_;
  const uint32_t full_;
  Target older_;  // of the two generations that load
  Target newer_;
  uint32_t loading_ = 0;
  uint32_t newest_ = 0;
  uint32_t oldest_ = 0;
  uint32_t parity_ = 0;  // of the mbarriers' phase that ends when the oldest generation is full
};

#endif

}  // namespace kvkernels
