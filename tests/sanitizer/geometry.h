// What is copied: pools, the runs between their pages, and a plain host loop that says which byte goes where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/plan.h"

namespace kvkernels::sanitizer {

using Bytes = std::vector<std::byte>;

constexpr int64_t kPools = 2;   // of a side
constexpr int64_t kBlocks = 5;  // of a pool

// A pool ends with its last page: whatever is copied past that is outside its allocation.
//
//   | page | 32 or more bytes | page | 32 or more bytes | ... | page |
struct PoolShape {
  int64_t page_bytes = 0;
  int64_t block_stride = 0;
  int64_t subblock_stride = 0;

  size_t bytes() const { return static_cast<size_t>((kBlocks - 1) * block_stride + page_bytes); }
};

struct SideShape {
  PoolShape pools[kPools];
  int64_t subblocks = 1;

  int64_t ids() const { return kBlocks * subblocks; }
  int64_t offset(int64_t pool, int64_t id) const {
    return id / subblocks * pools[pool].block_stride + id % subblocks * pools[pool].subblock_stride;
  }
};

// Of a fragment's first byte, modulo 16, on either side.
struct Phase {
  int64_t src;
  int64_t dst;
};

// Sizes and alignments of the runs, each taken in turn.
struct Fragments {
  std::vector<int64_t> bytes;
  std::vector<Phase> phases;
  bool has_loops = false;  // every fifth run is 2 x 3 fragments, transposed
  int64_t src_subblocks = 1;
  int64_t dst_subblocks = 1;
};

struct Geometry {
  std::vector<Run> runs;
  SideShape src;
  SideShape dst;
};

// Places the runs' fragments one after the other in the pages, with gaps that nothing may touch.
Geometry lay_out(const Fragments& fragments, int runs);

// One contiguous copy, as offsets in pools.
struct Piece {
  int64_t src_pool;
  int64_t dst_pool;
  int64_t src_offset;
  int64_t dst_offset;
  int64_t bytes;
};

// All that the runs say for these pairs, fragment by fragment.
std::vector<Piece> pieces_of(const Geometry& geometry, const std::vector<Pair>& pairs);

}  // namespace kvkernels::sanitizer
