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

enum class PairState { kGood, kSkipped, kBad };

// The ids of pair `n`, and whether they may be copied.
template <class Access>
KVKERNELS_HOST_DEVICE PairState find_pair(const Head& head, const std::byte* tables, uint32_t n, Pair& pair) {
  const std::byte* pairs = tables + head.pairs_offset;
  if (head.id_width == 4) {
    const int32_t* ids = reinterpret_cast<const int32_t*>(pairs) + 2 * n;
    pair = {ids[0], ids[1]};
    return PairState::kGood;
  }
  if (head.id_width == 8) {
    const int64_t* ids = reinterpret_cast<const int64_t*>(pairs) + 2 * n;
    pair = {ids[0], ids[1]};
    return PairState::kGood;
  }
  const int64_t row = head.first_row + n;
  pair = {load_id<Access>(head.src_ids, row), load_id<Access>(head.dst_ids, row)};
  if (head.skip_negative && (pair.src < 0 || pair.dst < 0)) return PairState::kSkipped;
  const bool good = pair.src >= 0 && pair.src < head.src_limit && pair.dst >= 0 && pair.dst < head.dst_limit;
  return good ? PairState::kGood : PairState::kBad;
}

// The move that a tile is of.
KVKERNELS_HOST_DEVICE uint32_t find_move(const Head& head, const MoveEntry* moves, uint32_t tile) {
  if (head.tiles_per_move.divisor != 0) return head.tiles_per_move.divide(tile);
  // The last that begins at or before it.
  uint32_t low = 0;
  for (uint32_t count = head.moves; count > 1;) {
    const uint32_t half = count >> 1;
    if (moves[low + half].first_tile <= tile) low += half;
    count -= half;
  }
  return low;
}

// Turns a fragment's index within its move into the offsets of its loops, and returns the pair's index.
KVKERNELS_HOST_DEVICE uint32_t unwind_loops(const Form& form, uint32_t index, int64_t& src, int64_t& dst) {
  KVKERNELS_UNROLL(3)
  for (int i = 0; i < 3; ++i) {
    if (static_cast<uint32_t>(i) >= form.loop_count) break;
    const uint32_t next = form.extents[i].divide(index);
    const uint32_t step = index - next * form.extents[i].divisor;
    src += static_cast<int64_t>(step) * form.src.loop_strides[i];
    dst += static_cast<int64_t>(step) * form.dst.loop_strides[i];
    index = next;
  }
  return index;
}

// Where a fragment is copied from and to.
struct Ends {
  const std::byte* src;
  std::byte* dst;  // null where the pair must not be copied
};

// The fragment `index` of a move, counted over all pairs. A bad pair is recorded by who finds its first fragment of the
// first move, where `records` is true: for one thread of each fragment.
template <class Access, bool kLoops>
KVKERNELS_HOST_DEVICE Ends find_fragment(const Head& head, const std::byte* tables, const MoveEntry& move,
                                         const Form& form, uint32_t index, bool records) {
  int64_t src_offset = 0;
  int64_t dst_offset = 0;
  const uint32_t n = kLoops ? unwind_loops(form, index, src_offset, dst_offset) : index;
  Pair pair;
  const PairState state = find_pair<Access>(head, tables, n, pair);
  if (state == PairState::kGood) {
    return {move.src + form.src.offset(pair.src) + src_offset, move.dst + form.dst.offset(pair.dst) + dst_offset};
  }
  if (state == PairState::kBad && records && head.fault && move.first_tile == 0 &&
      index * form.parts.divisor == n * form.units_per_pair) {
    Access::record(head.fault, head.op, head.first_row + n);
  }
  return {nullptr, nullptr};
}

// What one warp copies.
struct Span {
  const std::byte* src;
  std::byte* dst;
  uint32_t bytes;  // 0 where the pair is bad, or the fragment needs fewer tiles than it was given
};

// A tile's span. Tiles are cut at cache lines, so only a fragment's own ends are ragged. `records` is true for one
// thread of a tile.
template <class Access, bool kLoops>
KVKERNELS_HOST_DEVICE Span find_span(const Head& head, const std::byte* tables, uint32_t tile, bool records,
                                     uint32_t tile_bytes) {
  const Form* forms = reinterpret_cast<const Form*>(tables);
  const MoveEntry* moves = reinterpret_cast<const MoveEntry*>(tables + head.moves_offset);
  const MoveEntry& move = moves[find_move(head, moves, tile)];
  const Form& form = forms[move.form];
  const uint32_t unit = tile - move.first_tile;
  const uint32_t index = form.parts.divide(unit);
  const uint32_t part = unit - index * form.parts.divisor;
  const Ends ends = find_fragment<Access, kLoops>(head, tables, move, form, index, records && part == 0);
  if (ends.dst == nullptr) return {nullptr, nullptr, 0};
  int64_t begin = 0;
  int64_t end = form.fragment_bytes;
  if (form.parts.divisor > 1) {
    const uintptr_t cut =
        head.cut_on_src ? reinterpret_cast<uintptr_t>(ends.src) : reinterpret_cast<uintptr_t>(ends.dst);
    const int64_t phase = static_cast<int64_t>(cut & (kLineBytes - 1));
    const int64_t at = static_cast<int64_t>(part) * tile_bytes - phase;
    begin = at < 0 ? 0 : at;
    end = at + tile_bytes < end ? at + tile_bytes : end;
    if (begin >= end) return {nullptr, nullptr, 0};
  }
  return {ends.src + begin, ends.dst + begin, static_cast<uint32_t>(end - begin)};
}

}  // namespace kvkernels
