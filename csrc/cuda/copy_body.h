// What one thread of a copy kernel does. The kernels in copy_kernel.cu wrap these templates for the device; tests run
// the same templates on the host, thread by thread, with an Access of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/access.h"
#include "cuda/decode.h"
#include "cuda/host_device.h"
#include "cuda/tables.h"
#include "cuda/warp.h"

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
    const Span span = find_span<Access, kLoops>(head, tables, tile, lane == 0, kTileBytes);
    if (span.bytes > 0) copy_span<Access>(span.src, span.dst, span.bytes, lane);
  }
}

// What is in a tile of chunks: some of one move's.
struct ChunkTile {
  const MoveEntry& move;
  const Form& form;
  uint32_t begin;
  uint32_t end;
};

KVKERNELS_HOST_DEVICE ChunkTile find_chunks(const Head& head, const std::byte* tables, uint32_t tile) {
  const Form* forms = reinterpret_cast<const Form*>(tables);
  const MoveEntry* moves = reinterpret_cast<const MoveEntry*>(tables + head.moves_offset);
  const MoveEntry& move = moves[find_move(head, moves, tile)];
  const Form& form = forms[move.form];
  const uint32_t chunks = form.units_per_pair * head.pairs;
  const uint32_t begin = (tile - move.first_tile) * kTileChunks;
  return {move, form, begin, begin + kTileChunks < chunks ? begin + kTileChunks : chunks};
}

// A tile of at most 32 fragments, of which each lane finds one for all of them:
//
//   chunks     | 0   1 ... 31 | 32  33 ... 63 | 64  65 ... 95 | 96  97 ... 127 |    of lanes 0 to 31, four times
//   fragments  first | first + 1       | first + 2       | first + 3       | ...    found by lanes 0, 1, 2, ...
//              | part 0 is before the tile
template <class Access, class V>
KVKERNELS_HOST_DEVICE void copy_few_fragments(const Head& head, const std::byte* tables, const ChunkTile& tile,
                                              uint32_t lane) {
  const Form& form = tile.form;
  const uint32_t parts = form.parts.divisor;
  const uint32_t first = form.parts.divide(tile.begin);
  const uint32_t last = form.parts.divide(tile.end - 1);
  const auto fragments = of_each_lane<Ends>(lane, [&](uint32_t of, bool is_own) {
    // The lanes past the last find it again.
    const uint32_t index = first + of < last ? first + of : last;
    const bool records = is_own && first + of <= last && index * parts >= tile.begin;
    return find_fragment<Access, true>(head, tables, tile.move, form, index, records);
  });
  const uint32_t mine = tile.begin - first * parts + lane;  // my first chunk, counted from part 0 of the first fragment
  const uint32_t past_end = computed_once(tile.end - first * parts);
  const std::byte* src[kLaneChunks];
  std::byte* dst[kLaneChunks];
  bool copies[kLaneChunks];
  KVKERNELS_UNROLL(kLaneChunks)
  for (uint32_t k = 0; k < kLaneChunks; ++k) {
    const uint32_t chunk = computed_once(mine + k * kWarpLanes);
    const uint32_t nth = form.parts.divide(chunk);
    const uint64_t offset = uint64_t{computed_once(chunk - nth * parts)} * sizeof(V);
    const Ends ends = fragments.of(nth);
    src[k] = ends.src + offset;
    dst[k] = ends.dst + offset;
    copies[k] = chunk < past_end && ends.dst != nullptr;
  }
  V v[kLaneChunks]{};
  KVKERNELS_UNROLL(kLaneChunks)
  for (int k = 0; k < kLaneChunks; ++k) {
    if (copies[k]) Access::load(v[k], src[k]);
  }
  KVKERNELS_UNROLL(kLaneChunks)
  for (int k = 0; k < kLaneChunks; ++k) {
    if (copies[k]) Access::store(dst[k], v[k]);
  }
}

// A tile of more fragments than lanes, whose fragments are one to three chunks: a lane finds those of its own chunks.
template <class Access, class V>
KVKERNELS_HOST_DEVICE void copy_many_fragments(const Head& head, const std::byte* tables, const ChunkTile& tile,
                                               uint32_t lane) {
  const Form& form = tile.form;
  KVKERNELS_UNROLL(1)
  for (uint32_t unit = tile.begin + lane; unit < tile.end; unit += kWarpLanes) {
    const uint32_t index = form.parts.divide(unit);
    const uint32_t part = unit - index * form.parts.divisor;
    const Ends ends = find_fragment<Access, true>(head, tables, tile.move, form, index, part == 0);
    if (ends.dst == nullptr) continue;
    V v;
    Access::load(v, ends.src + part * sizeof(V));
    Access::store(ends.dst + part * sizeof(V), v);
  }
}

// A lane a chunk: every address and size is a multiple of V, so there are no ends to care for.
template <class Access, class V>
KVKERNELS_HOST_DEVICE void copy_chunks(const Head& head, const std::byte* tables, uint32_t thread, uint32_t threads) {
  const uint32_t lane = thread & (kWarpLanes - 1);
  KVKERNELS_UNROLL(1)
  for (uint32_t number = thread / kWarpLanes; number < head.tiles; number += threads / kWarpLanes) {
    const ChunkTile tile = find_chunks(head, tables, number);
    if (tile.form.parts.divisor < kLaneChunks) {
      copy_many_fragments<Access, V>(head, tables, tile, lane);
    } else {
      copy_few_fragments<Access, V>(head, tables, tile, lane);
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
