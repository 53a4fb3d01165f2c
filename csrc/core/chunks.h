// A device's work in chunks: works of their own, each some pairs of some moves.
#pragma once

#include <cstdint>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

// Pairs are kept whole where all moves of one fit in a chunk; where they do not, moves are taken apart, layer by layer.
// A single page larger than a chunk is a chunk.
class WorkChunks {
 public:
  WorkChunks(const Work& work, int64_t chunk_bytes);

  int64_t count() const { return count_; }

  // Of the work that was cut.
  Work chunk(const Work& work, int64_t index) const;

  // Whether chunks have all moves of the work.
  bool keeps_moves() const { return groups_.size() <= 1; }

 private:
  // Neighbouring moves, in chunks of so many pairs.
  struct Group {
    size_t begin;
    size_t end;
    MoveSums sums;
    int64_t pairs_per_chunk;
    int64_t first_chunk;
  };
  std::vector<Group> groups_;
  std::vector<int64_t> first_pairs_;  // of the segments
  int64_t count_ = 0;
};

}  // namespace kvkernels
