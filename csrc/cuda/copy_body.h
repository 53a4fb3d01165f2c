// What one thread of a copy kernel does. The kernels in copy_kernel.cu wrap these templates for the device; tests run
// the same templates on the host, thread by thread, with an Access of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/access.h"
#include "cuda/decode.h"
#include "cuda/host_device.h"
#include "cuda/tables.h"

namespace kvkernels {

constexpr int kRestDepth = 4;  // loads in flight of what is left of a tile, and of narrower elements

// The first `head` and the last `tail` bytes of a span, a lane a byte: fewer than 16 each.
template <class Access>
KVKERNELS_HOST_DEVICE void copy_ends(const std::byte* src, std::byte* dst, uint32_t bytes, uint32_t head, uint32_t tail,
                                     uint32_t lane) {
  const uint32_t tail_at = bytes - tail;
  uint8_t first = 0;
  uint8_t last = 0;
  if (lane < head) Access::load(first, src + lane);
  if (lane < tail) Access::load(last, src + tail_at + lane);
  if (lane < head) Access::store(dst + lane, first);
  if (lane < tail) Access::store(dst + tail_at + lane, last);
}

// One warp's copy in elements of V, which divides (src ^ dst): bytes up to the first whole element of the destination,
// elements, and the bytes left. kDepth loads are in flight before the first store.
template <class Access, class V, int kDepth>
KVKERNELS_HOST_DEVICE void copy_as(const std::byte* src, std::byte* dst, uint32_t bytes, uint32_t lane) {
  constexpr uint32_t kWidth = sizeof(V);
  constexpr uint32_t kStep = kWarpLanes * kWidth;
  uint32_t head = (0u - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(dst))) & (kWidth - 1);
  if (head > bytes) head = bytes;
  const uint32_t count = (bytes - head) / kWidth;
  const uint32_t tail = bytes - head - count * kWidth;
  const std::byte* from = src + head + lane * kWidth;
  std::byte* to = dst + head + lane * kWidth;
  uint32_t left = count;
  KVKERNELS_UNROLL(1)
  for (; left >= kDepth * kWarpLanes; left -= kDepth * kWarpLanes) {
    V v[kDepth];
    KVKERNELS_UNROLL(kDepth)
    for (int k = 0; k < kDepth; ++k) Access::load(v[k], from + k * kStep);
    KVKERNELS_UNROLL(kDepth)
    for (int k = 0; k < kDepth; ++k) Access::store(to + k * kStep, v[k]);
    from += kDepth * kStep;
    to += kDepth * kStep;
  }
  // More than one round is left only where the loop above goes deeper.
  KVKERNELS_UNROLL(1)
  for (; left > 0; left = kDepth > kRestDepth && left > kRestDepth * kWarpLanes ? left - kRestDepth * kWarpLanes : 0) {
    V v[kRestDepth]{};
    KVKERNELS_UNROLL(kRestDepth)
    for (uint32_t k = 0; k < kRestDepth; ++k) {
      if (lane + k * kWarpLanes < left) Access::load(v[k], from + k * kStep);
    }
    KVKERNELS_UNROLL(kRestDepth)
    for (uint32_t k = 0; k < kRestDepth; ++k) {
      if (lane + k * kWarpLanes < left) Access::store(to + k * kStep, v[k]);
    }
    from += kRestDepth * kStep;
    to += kRestDepth * kStep;
  }
  if (kWidth > 1) copy_ends<Access>(src, dst, bytes, head, tail, lane);
}

// The bits in which two addresses differ, modulo 16: 0 where whole vectors lie on both sides.
KVKERNELS_HOST_DEVICE uint32_t vector_difference(const std::byte* src, const std::byte* dst) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(src) ^ reinterpret_cast<uintptr_t>(dst)) & 15;
}

// For a vector_difference that is not 0.
template <class Access>
KVKERNELS_HOST_DEVICE void copy_shifted_span(const std::byte* src, std::byte* dst, uint32_t bytes, uint32_t difference,
                                             uint32_t lane) {
  if ((difference & 7) == 0) return copy_as<Access, uint64_t, kRestDepth>(src, dst, bytes, lane);
  if ((difference & 3) == 0) return copy_as<Access, uint32_t, kRestDepth>(src, dst, bytes, lane);
  if ((difference & 1) == 0) return copy_as<Access, uint16_t, kRestDepth>(src, dst, bytes, lane);
  copy_as<Access, uint8_t, kRestDepth>(src, dst, bytes, lane);
}

template <class Access>
KVKERNELS_HOST_DEVICE void copy_span(const std::byte* src, std::byte* dst, uint32_t bytes, uint32_t lane) {
  const uint32_t difference = vector_difference(src, dst);
  if (difference == 0) return copy_as<Access, Bytes16, kTileVectors>(src, dst, bytes, lane);
  copy_shifted_span<Access>(src, dst, bytes, difference, lane);
}

// A warp a tile, any size and alignment.
template <class Access, bool kLoops>
KVKERNELS_HOST_DEVICE void copy_tiles(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  const uint32_t lane = thread & (kWarpLanes - 1);
  KVKERNELS_UNROLL(1)
  for (uint32_t tile = thread / kWarpLanes; tile < head.tiles; tile += threads / kWarpLanes) {
    const Span span = find_span<Access, kLoops>(head, tables, tile, lane, kTileBytes);
    if (span.bytes > 0) copy_span<Access>(span.src, span.dst, span.bytes, lane);
  }
}

// A lane a chunk: every address and size is a multiple of V, so there are no ends to care for.
template <class Access, class V>
KVKERNELS_HOST_DEVICE void copy_chunks(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  const Form* forms = reinterpret_cast<const Form*>(tables);
  const MoveEntry* moves = reinterpret_cast<const MoveEntry*>(tables + head.moves_offset);
  const uint32_t lane = thread & (kWarpLanes - 1);
  KVKERNELS_UNROLL(1)
  for (uint32_t tile = thread / kWarpLanes; tile < head.tiles; tile += threads / kWarpLanes) {
    const uint32_t m = find_move(head, moves, tile);
    const Form& form = forms[moves[m].form];
    const uint32_t chunks = form.units_per_pair * head.pairs;
    const uint32_t unit = (tile - moves[m].first_tile) * kTileChunks + lane;
    const std::byte* src[kLaneChunks];
    std::byte* dst[kLaneChunks];
    KVKERNELS_UNROLL(kLaneChunks)
    for (uint32_t k = 0; k < kLaneChunks; ++k) {
      src[k] = nullptr;
      dst[k] = nullptr;
      if (unit + k * kWarpLanes >= chunks) continue;
      uint32_t index = form.parts.divide(unit + k * kWarpLanes);
      const uint32_t part = unit + k * kWarpLanes - index * form.parts.divisor;
      bool first = m == 0 && part == 0;
      int64_t src_offset = static_cast<int64_t>(part) * sizeof(V);
      int64_t dst_offset = src_offset;
      index = unwind_loops(form, index, src_offset, dst_offset, first);
      Pair pair;
      if (!find_pair<Access>(head, tables, index, first, pair)) continue;
      src[k] = moves[m].src + form.src.offset(pair.src) + src_offset;
      dst[k] = moves[m].dst + form.dst.offset(pair.dst) + dst_offset;
    }
    V v[kLaneChunks]{};
    KVKERNELS_UNROLL(kLaneChunks)
    for (int k = 0; k < kLaneChunks; ++k) {
      if (dst[k]) Access::load(v[k], src[k]);
    }
    KVKERNELS_UNROLL(kLaneChunks)
    for (int k = 0; k < kLaneChunks; ++k) {
      if (dst[k]) Access::store(dst[k], v[k]);
    }
  }
}

template <class Access>
KVKERNELS_HOST_DEVICE void copy_page(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  copy_tiles<Access, false>(head, tables, thread, threads);
}

template <class Access>
KVKERNELS_HOST_DEVICE void copy_row(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  copy_chunks<Access, Bytes16>(head, tables, thread, threads);
}

template <class Access>
KVKERNELS_HOST_DEVICE void copy_bytes(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  if (head.unit_bytes == 8) return copy_chunks<Access, uint64_t>(head, tables, thread, threads);
  if (head.unit_bytes == 4) return copy_chunks<Access, uint32_t>(head, tables, thread, threads);
  if (head.unit_bytes == 2) return copy_chunks<Access, uint16_t>(head, tables, thread, threads);
  if (head.unit_bytes == 1) return copy_chunks<Access, uint8_t>(head, tables, thread, threads);
  copy_tiles<Access, true>(head, tables, thread, threads);
}

}  // namespace kvkernels
