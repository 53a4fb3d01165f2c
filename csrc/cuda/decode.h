// From the number of a tile or a chunk to the addresses that it is copied between.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/host_device.h"
#include "cuda/tables.h"

namespace kvkernels {

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

}  // namespace kvkernels
