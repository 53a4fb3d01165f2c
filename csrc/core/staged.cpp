#include "core/staged.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "core/radix.h"
#include "core/text.h"

namespace kvkernels {
namespace {

constexpr int64_t kPlaneBytes = 256;  // planes of the ring begin at multiples of it, like allocations

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// One side of a move's loops with strides that count up, and where the first fragment is then.
struct HostSide {
  Side side;  // its base moved down to the lowest byte
  int64_t fragment_bytes;
  int64_t lowest = 0;                              // of the move's base, as the distance to side.base
  std::vector<std::pair<int64_t, int64_t>> loops;  // extent and stride

  HostSide(const Move& move, bool is_dst) : side(is_dst ? move.dst : move.src), fragment_bytes(move.fragment_bytes) {
    for (int i = 0; i < move.loop_count; ++i) {
      const Loop& loop = move.loops[i];
      const int64_t stride = is_dst ? loop.dst_stride : loop.src_stride;
      if (stride < 0) lowest -= (loop.extent - 1) * stride;
      loops.emplace_back(loop.extent, std::abs(stride));
    }
    side.base -= lowest;
    // Steps of at most a fragment leave no gap.
    for (size_t i = 0; i < loops.size();) {
      if (loops[i].second > fragment_bytes) {
        ++i;
        continue;
      }
      fragment_bytes += (loops[i].first - 1) * loops[i].second;
      loops.erase(loops.begin() + static_cast<std::ptrdiff_t>(i));
      i = 0;
    }
  }

  int64_t span() const {
    int64_t bytes = fragment_bytes;
    for (const auto& [extent, stride] : loops) bytes += (extent - 1) * stride;
    return bytes;
  }

  int64_t pieces() const {
    int64_t count = 1;
    for (const auto& [extent, stride] : loops) count *= extent;
    return count;
  }

  void add_pieces(int64_t offset, std::vector<Piece>& pieces, size_t level = 0) const {
    if (level == loops.size()) return pieces.push_back({offset, fragment_bytes});
    for (int64_t i = 0; i < loops[level].first; ++i) add_pieces(offset + i * loops[level].second, pieces, level + 1);
  }
};

bool same_steps(const Side& a, const Side& b) {
  return a.block_stride == b.block_stride && a.subblocks == b.subblocks &&
         (a.subblocks == 1 || a.subblock_stride == b.subblock_stride);
}

void join_pieces(std::vector<Piece>& pieces) {
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
  size_t kept = 0;
  for (const Piece& piece : pieces) {
    Piece& last = pieces[kept == 0 ? 0 : kept - 1];
    if (kept > 0 && piece.offset <= last.offset + last.bytes) {
      last.bytes = std::max(last.bytes, piece.offset + piece.bytes - last.offset);
    } else {
      pieces[kept++] = piece;
    }
  }
  pieces.resize(kept);
}

// Moves whose host bytes touch or interleave share a window.
void find_windows(const Work& work, bool is_dst, Staging& staging) {
  std::vector<HostSide> sides;
  std::vector<size_t> order;
  int64_t pieces = 0;
  for (const Move& move : work.moves) {
    order.push_back(sides.size());
    sides.emplace_back(move, is_dst);
    pieces += sides.back().pieces();
    if (pieces > kStagingMostPieces) {
      staging.refusal = text("a pair lies in more than ", kStagingMostPieces, " pieces in host memory");
      return;
    }
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return sides[a].side.base < sides[b].side.base; });
  staging.places.resize(sides.size());
  for (const size_t at : order) {
    const HostSide& side = sides[at];
    Window* window = staging.windows.empty() ? nullptr : &staging.windows.back();
    if (window == nullptr || !same_steps(window->host, side.side) ||
        side.side.base > window->host.base + window->bytes) {
      window = &staging.windows.emplace_back(Window{side.side, 0, 0, 0, {}});
    }
    const int64_t offset = side.side.base - window->host.base;
    window->bytes = std::max(window->bytes, offset + side.span());
    staging.places[at] = {staging.windows.size() - 1, offset + side.lowest};
    side.add_pieces(offset, window->pieces);
  }
  for (Window& window : staging.windows) {
    join_pieces(window.pieces);
    window.row_bytes = window.merges() ? window.bytes : round_up(window.bytes, kVectorBytes);
  }
}

void find_pairs(const Work& work, bool is_dst, Staging& staging) {
  int64_t largest = 0;
  for (const Segment& segment : work.segments) {
    for (int64_t i = 0; i < segment.count; ++i) {
      const HostPair pair =
          is_dst ? HostPair{segment.dst + i, segment.src + i} : HostPair{segment.src + i, segment.dst + i};
      largest = std::max(largest, pair.host);
      staging.pairs.push_back(pair);
    }
  }
  radix_sort(staging.pairs, static_cast<uint64_t>(largest) + 1,
             [](const HostPair& pair) { return static_cast<uint64_t>(pair.host); });
}

// As many rows as half the ring holds, or else all of it, and where each window's begin: at its host address's distance
// from a multiple of 16, so that kernels find fragments aligned where the pools' are.
void place_rows(int64_t ring_bytes, Staging& staging) {
  int64_t row_bytes = 0;
  for (const Window& window : staging.windows) row_bytes += window.row_bytes;
  const int64_t padding = static_cast<int64_t>(staging.windows.size()) * (kPlaneBytes + kVectorBytes);
  const auto rows_in = [&](int64_t bytes) {
    const int64_t rows = std::max<int64_t>(bytes - padding, 0) / row_bytes;
    return std::min<int64_t>(rows, static_cast<int64_t>(staging.pairs.size()));
  };
  staging.parts = rows_in(ring_bytes / 2) > 0 ? 2 : 1;
  staging.rows = rows_in(ring_bytes / staging.parts);
  if (staging.rows == 0) {
    staging.refusal = text("a pair spans ", row_bytes, " bytes of host memory, more than the ring's ", ring_bytes);
    return;
  }
  for (Window& window : staging.windows) {
    const auto phase = static_cast<int64_t>(reinterpret_cast<uintptr_t>(window.host.base) % kVectorBytes);
    window.ring_offset = round_up(staging.chunk_bytes, kPlaneBytes) + phase;
    staging.chunk_bytes = window.ring_offset + staging.rows * window.row_bytes;
  }
}

void count_copies(Staging& staging) {
  const auto pairs = static_cast<int64_t>(staging.pairs.size());
  int64_t runs = 1;
  for (size_t i = 1; i < staging.pairs.size(); ++i) runs += staging.pairs[i].host != staging.pairs[i - 1].host + 1;
  for (const Window& window : staging.windows) {
    staging.copies += window.merges() ? runs : pairs * static_cast<int64_t>(window.pieces.size());
    for (const Piece& piece : window.pieces) staging.host_bytes += pairs * piece.bytes;
  }
}

}  // namespace

Staging plan_staging(const Work& work, int64_t ring_bytes) {
  Staging staging;
  const bool is_dst = work.direction == Direction::kDeviceToHost;
  if (work.direction != Direction::kHostToDevice && !is_dst) {
    staging.refusal = "no side is in host memory";
    return staging;
  }
  find_windows(work, is_dst, staging);
  if (!staging.refusal.empty()) return staging;
  find_pairs(work, is_dst, staging);
  place_rows(ring_bytes, staging);
  if (staging.refusal.empty()) count_copies(staging);
  return staging;
}

StagingChunk staging_chunk(const Work& work, const Staging& staging, int64_t chunk, std::byte* place) {
  const bool is_dst = work.direction == Direction::kDeviceToHost;
  const auto begin = static_cast<size_t>(chunk * staging.rows);
  const size_t end = std::min(begin + static_cast<size_t>(staging.rows), staging.pairs.size());
  StagingChunk result;
  Work& in_device = result.in_device;
  in_device.executor = Executor::kKernel;
  in_device.direction = Direction::kDeviceToDevice;
  in_device.pairs = static_cast<int64_t>(end - begin);
  for (size_t i = 0; i < work.moves.size(); ++i) {
    const Staging::Place& at = staging.places[i];
    const Window& window = staging.windows[at.window];
    Move move = work.moves[i];
    (is_dst ? move.dst : move.src) = {place + window.ring_offset + at.offset, window.row_bytes, 0, 1};
    move.merges = false;
    in_device.bytes += in_device.pairs * move.bytes_per_pair();
    in_device.moves.push_back(move);
  }
  for (size_t i = begin; i < end; ++i) {
    const auto row = static_cast<int64_t>(i - begin);
    const int64_t id = staging.pairs[i].device;
    in_device.segments.push_back(is_dst ? Segment{id, row, 1} : Segment{row, id, 1});
  }
  for (const Window& window : staging.windows) {
    std::byte* at = place + window.ring_offset;
    for (size_t i = begin; i < end; ++i, at += window.row_bytes) {
      std::byte* const host = window.host.at(staging.pairs[i].host);
      for (const Piece& piece : window.pieces) {
        Fragment copy = {host + piece.offset, at + piece.offset, piece.bytes};
        if (is_dst) copy = {at + piece.offset, host + piece.offset, piece.bytes};
        Fragment* last = result.over_link.empty() ? nullptr : &result.over_link.back();
        if (last != nullptr && last->src + last->bytes == copy.src && last->dst + last->bytes == copy.dst) {
          last->bytes += copy.bytes;
        } else {
          result.over_link.push_back(copy);
        }
      }
    }
  }
  return result;
}

}  // namespace kvkernels
