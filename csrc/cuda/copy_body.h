// What one thread of a copy kernel does. The kernels in copy_kernel.cu wrap these templates for the device; tests run
// the same templates on the host, thread by thread, with an Access of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/plan.h"
#include "cuda/divisor.h"

// Host compilers do not know the pragma.
#ifdef __CUDA_ARCH__
#define KVKERNELS_PRAGMA(text) _Pragma(#text)
#define KVKERNELS_UNROLL(count) KVKERNELS_PRAGMA(unroll count)
#else
#define KVKERNELS_UNROLL(count)
#endif

namespace kvkernels {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kLineBytes = 128;
constexpr int kTileVectors = 8;  // 16-byte loads that a lane of the tile kernels has in flight before its first store
constexpr uint32_t kTileBytes = kWarpLanes * kTileVectors * 16;
constexpr int kRestDepth = 4;   // the same for what is left of a tile and for narrower elements
constexpr int kLaneChunks = 4;  // chunks that a lane of the chunk kernels has in flight before its first store
constexpr uint32_t kTileChunks = kWarpLanes * kLaneChunks;

struct FormSide {
  int64_t block_stride;
  int64_t subblock_stride;
  WideDivisor subblocks;
  int64_t loop_strides[3];

  KVKERNELS_HOST_DEVICE int64_t offset(int64_t id) const {
    if (subblocks.divisor == 1) return id * block_stride;
    const int64_t block = subblocks.divide(id);
    return block * block_stride + (id - block * subblocks.divisor) * subblock_stride;
  }
};

// What many moves share: all but where they start. Loops are innermost first.
struct Form {
  FormSide src;
  FormSide dst;
  int64_t fragment_bytes;
  uint32_t units_per_pair;  // tiles or chunks
  uint32_t loop_count;
  Divisor parts;  // tiles or chunks of one fragment
  Divisor extents[3];
};

struct MoveEntry {
  const std::byte* src;
  std::byte* dst;
  uint32_t first_tile;
  uint32_t form;
};

// Per device: what ids on the device got wrong since the last check. All zero means nothing; the row is kept
// complemented so that zeroed memory is the empty state and the lowest row is the maximum.
struct Fault {
  unsigned long long count;
  unsigned long long complemented_row;
  unsigned int op;
  unsigned int unused;
};

// Everything a launch needs besides its tables, which are Form[], MoveEntry[] and, where ids are not on the device,
// pairs of ids as int32[2] or int64[2].
struct Head {
  const std::byte* tables;  // unused where the tables ride in the parameters
  uint32_t moves_offset;
  uint32_t pairs_offset;
  uint32_t moves;
  uint32_t pairs;
  uint32_t tiles;
  uint32_t id_width;    // of the pairs in the tables; 0 where ids are on the device
  uint32_t unit_bytes;  // of a chunk: 16, 8, 4, 2 or 1; of a tile of the bulk kernel; 0 in the tile kernels
  uint32_t cut_on_src;  // tiles begin on cache lines of the source, not of the destination
  IdColumn src_ids;
  IdColumn dst_ids;
  int64_t first_row;
  int64_t src_limit;
  int64_t dst_limit;
  uint32_t skip_negative;
  uint32_t op;
  Fault* fault;  // null where another launch of the call records the same pairs
};

// What loads, stores and atomics mean. Not `.nc`: that would promise that nobody writes the source while the kernel
// runs, and host pools are refilled at any time.
struct GlobalAccess {
#ifdef __CUDACC__
  static KVKERNELS_HOST_DEVICE uint64_t global(const void* address) {
#ifdef __CUDA_ARCH__
    return __cvta_generic_to_global(address);
#else
    return reinterpret_cast<uint64_t>(address);
#endif
  }
#endif

#ifdef __CUDA_ARCH__
  static __device__ __forceinline__ void load(Bytes16& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint64_t& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint32_t& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint16_t& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint8_t& v, const std::byte* address) {
    uint32_t wide;
    asm volatile("ld.global.L1::no_allocate.u8 %0, [%1];" : "=r"(wide) : "l"(global(address)));
    v = static_cast<uint8_t>(wide);
  }
  static __device__ __forceinline__ void store(std::byte* address, const Bytes16& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global(address)), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint64_t v) {
    asm volatile("st.global.cs.u64 [%0], %1;" ::"l"(global(address)), "l"(v) : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint32_t v) {
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(global(address)), "r"(v) : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint16_t v) {
    asm volatile("st.global.cs.u16 [%0], %1;" ::"l"(global(address)), "h"(v) : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint8_t v) {
    asm volatile("st.global.cs.u8 [%0], %1;" ::"l"(global(address)), "r"(static_cast<uint32_t>(v)) : "memory");
  }
  // The first op to fail owns the row: a row of another op's mapping would mislead.
  static __device__ __forceinline__ void record(Fault* fault, unsigned int op, int64_t row) {
    atomicAdd(&fault->count, 1ull);
    const unsigned int owner = atomicCAS(&fault->op, 0u, op);
    if (owner == 0 || owner == op) atomicMax(&fault->complemented_row, ~static_cast<unsigned long long>(row));
  }
#else
  template <class V>
  static KVKERNELS_HOST_DEVICE void load(V& v, const std::byte* address) {
    v = *reinterpret_cast<const V*>(address);
  }
  template <class V>
  static KVKERNELS_HOST_DEVICE void store(std::byte* address, const V& v) {
    *reinterpret_cast<V*>(address) = v;
  }
  static KVKERNELS_HOST_DEVICE void record(Fault* fault, unsigned int op, int64_t row) {
    const unsigned long long complemented = ~static_cast<unsigned long long>(row);
    ++fault->count;
    if (fault->op == 0) fault->op = op;
    if (fault->op == op && fault->complemented_row < complemented) fault->complemented_row = complemented;
  }
#endif
};

template <class Access>
KVKERNELS_HOST_DEVICE int64_t load_id(const IdColumn& column, int64_t row) {
  if (column.width == 0) return row;
  const std::byte* address = static_cast<const std::byte*>(column.data) + row * column.stride_bytes;
  if (column.width == 8) {
    uint64_t id;
    Access::load(id, address);
    return static_cast<int64_t>(id);
  }
  uint32_t id;
  Access::load(id, address);
  return static_cast<int32_t>(id);
}

// The ids of pair `n`; false where the pair must not be copied. `records` is true for exactly one thread a pair.
template <class Access>
KVKERNELS_HOST_DEVICE bool find_pair(const Head& head, const std::byte* tables, uint32_t n, bool records, Pair& pair) {
  const std::byte* pairs = tables + head.pairs_offset;
  if (head.id_width == 4) {
    const int32_t* ids = reinterpret_cast<const int32_t*>(pairs) + 2 * n;
    pair = {ids[0], ids[1]};
    return true;
  }
  if (head.id_width == 8) {
    const int64_t* ids = reinterpret_cast<const int64_t*>(pairs) + 2 * n;
    pair = {ids[0], ids[1]};
    return true;
  }
  const int64_t row = head.first_row + n;
  pair = {load_id<Access>(head.src_ids, row), load_id<Access>(head.dst_ids, row)};
  if (head.skip_negative && (pair.src < 0 || pair.dst < 0)) return false;
  if (pair.src >= 0 && pair.src < head.src_limit && pair.dst >= 0 && pair.dst < head.dst_limit) return true;
  if (records && head.fault) Access::record(head.fault, head.op, row);
  return false;
}

// The last move that begins at or before `tile`.
KVKERNELS_HOST_DEVICE uint32_t find_move(const Head& head, const MoveEntry* moves, uint32_t tile) {
  uint32_t low = 0;
  for (uint32_t count = head.moves; count > 1;) {
    const uint32_t half = count >> 1;
    if (moves[low + half].first_tile <= tile) low += half;
    count -= half;
  }
  return low;
}

// Turns a fragment's index within its move into the offsets of its loops and leaves the pair's index.
KVKERNELS_HOST_DEVICE uint32_t unwind_loops(const Form& form, uint32_t index, int64_t& src, int64_t& dst, bool& first) {
  KVKERNELS_UNROLL(3)
  for (int i = 0; i < 3; ++i) {
    if (static_cast<uint32_t>(i) >= form.loop_count) break;
    const uint32_t next = form.extents[i].divide(index);
    const uint32_t step = index - next * form.extents[i].divisor;
    src += static_cast<int64_t>(step) * form.src.loop_strides[i];
    dst += static_cast<int64_t>(step) * form.dst.loop_strides[i];
    first = first && step == 0;
    index = next;
  }
  return index;
}

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

// What one warp copies.
struct Span {
  const std::byte* src;
  std::byte* dst;
  uint32_t bytes;  // 0 where the pair is bad, or the fragment needs fewer tiles than it was given
};

// A tile's span. Tiles are cut at cache lines, so only a fragment's own ends are ragged.
template <class Access, bool kLoops>
KVKERNELS_HOST_DEVICE Span find_span(const Head& head, const std::byte* tables, uint32_t tile, uint32_t lane,
                                     uint32_t tile_bytes) {
  const Form* forms = reinterpret_cast<const Form*>(tables);
  const MoveEntry* moves = reinterpret_cast<const MoveEntry*>(tables + head.moves_offset);
  const uint32_t m = find_move(head, moves, tile);
  const Form& form = forms[moves[m].form];
  const uint32_t unit = tile - moves[m].first_tile;
  uint32_t index = form.parts.divide(unit);
  const uint32_t part = unit - index * form.parts.divisor;
  bool first = m == 0 && part == 0 && lane == 0;
  int64_t src_offset = 0;
  int64_t dst_offset = 0;
  if (kLoops) index = unwind_loops(form, index, src_offset, dst_offset, first);
  Pair pair;
  if (!find_pair<Access>(head, tables, index, first, pair)) return {nullptr, nullptr, 0};
  const std::byte* src = moves[m].src + form.src.offset(pair.src) + src_offset;
  std::byte* dst = moves[m].dst + form.dst.offset(pair.dst) + dst_offset;
  int64_t begin = 0;
  int64_t end = form.fragment_bytes;
  if (form.parts.divisor > 1) {
    const uintptr_t cut = head.cut_on_src ? reinterpret_cast<uintptr_t>(src) : reinterpret_cast<uintptr_t>(dst);
    const int64_t phase = static_cast<int64_t>(cut & (kLineBytes - 1));
    const int64_t at = static_cast<int64_t>(part) * tile_bytes - phase;
    begin = at < 0 ? 0 : at;
    end = at + tile_bytes < end ? at + tile_bytes : end;
    if (begin >= end) return {nullptr, nullptr, 0};
  }
  return {src + begin, dst + begin, static_cast<uint32_t>(end - begin)};
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
