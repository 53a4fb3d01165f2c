// How moves are cut into pieces for the lanes of a device. Every kernel's pieces are decided here, CUDA's and Triton's;
// what writes a table for one only says where they are.
//
//   fragment in chunks:  | 16 | 16 | 16 | 16 |               one width, a lane each
//   fragment in tiles:   | .. |  4096  |  4096  | ..... |    from cache line to cache line of one side, a warp each
//
// Short fragments are cut into chunks, all of a call's or none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

// Longer fragments are cut into tiles: beyond so many chunks those need less arithmetic a byte.
constexpr int64_t kMostChunks = 64;

// What an executor's kernels can do.
struct CutRule {
  bool has_chunks = true;
  int64_t tile_bytes = 0;      // of a tile at most, where its elements have any width; a multiple of a cache line
  int64_t tile_elements = 0;   // else of a tile, all tiles' elements having one width
  bool shrinks_tiles = false;  // to what holds the longest fragment
  bool joins_lines = true;     // a fragment that fits is one tile, wherever it begins
};

class Cut {
 public:
  Cut(const Work& work, const CutRule& rule);

  // Which kernel: row for chunks of 16 bytes, page for tiles of moves without loops, bytes for everything else.
  Shape shape() const;
  bool has_chunks() const { return chunk_bytes_ > 0; }
  int64_t chunk_bytes() const { return chunk_bytes_; }      // 16, 8, 4, 2 or 1; 0 where there are tiles
  int64_t tile_bytes() const { return tile_bytes_; }        // 0 where there are chunks
  int64_t element_bytes() const { return element_bytes_; }  // what both sides' addresses agree in, at most 16
  bool is_ragged() const { return is_ragged_; }             // some fragment begins or ends inside an element
  bool is_on_src() const { return is_on_src_; }  // tiles begin on cache lines of the source, not of the destination

  int64_t pieces_per_fragment(const Move& move) const;
  int64_t pieces_per_pair(const Move& move) const { return pieces_per_fragment(move) * move.fragments_per_pair(); }

  // The moves, or parts of them, each with at most `limit` pieces a pair.
  std::vector<Move> split(const std::vector<Move>& moves, int64_t limit) const;

  // {"kernel": "row", "chunk_bytes": 16} or {"kernel": "page", "tile_bytes": 4096}
  std::string json() const;

 private:
  // What is known of a side's ids: they are below `limit`, and `divisor` is the largest power of two that divides all.
  struct Ids {
    int64_t limit = 0;
    uint64_t divisor = 0;
  };

  static Ids ids_of(const Work& work, int64_t Segment::* column);
  static uint64_t stride_bits(const Side& side, const Ids& ids, const Move& move, int64_t Loop::* stride);
  uint64_t src_bits(const Move& move) const { return stride_bits(move.src, src_ids_, move, &Loop::src_stride); }
  uint64_t dst_bits(const Move& move) const { return stride_bits(move.dst, dst_ids_, move, &Loop::dst_stride); }

  const Ids src_ids_;
  const Ids dst_ids_;
  const bool is_on_src_;
  const bool joins_lines_;
  bool has_loops_ = false;
  bool is_ragged_ = false;
  int64_t chunk_bytes_ = 0;
  int64_t tile_bytes_ = 0;
  int64_t element_bytes_ = 0;
};

}  // namespace kvkernels
