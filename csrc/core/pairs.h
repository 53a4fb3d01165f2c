// Reads a mapping once: every id checked, every destination named once, neighbours coalesced.
#pragma once

#include <cstdint>
#include <vector>

#include "core/plan.h"
#include "core/text.h"

namespace kvkernels {

// The ids that may be named on one side, and what an error calls them.
struct IdLimit {
  Name pool;
  int64_t blocks;
  int64_t subblocks = 1;

  int64_t ids() const { return blocks * subblocks; }
};

struct PairRequest {
  const char* op;
  const char* argument;  // `block_mapping`, `mapping`, `block_ids`
  IdColumn src;
  IdColumn dst;
  int64_t rows;
  IdLimit src_limit;
  IdLimit dst_limit;
  bool skip_negative = false;  // a pair with a negative id is left out
};

struct PairList {
  std::vector<Segment> segments;
  int64_t pairs = 0;
};

// IndexError for an id out of range, ValueError where two sources are given for one destination; an identical pair
// repeated counts once. Ids are read once: what was checked is what is copied, whatever happens to the mapping.
PairList read_pairs(const PairRequest& request);

// Sorts by source id and coalesces anew.
void sort_by_source(PairList& list, int64_t src_ids);

// Keeps a segment list's memory for this thread's next call, which would otherwise fault its pages in again.
void recycle(std::vector<Segment>&& segments);

}  // namespace kvkernels
