// No byte both read and written, none written twice: judged on the bytes that a call touches, not on tensors' spans.
#pragma once

#include <cstdint>
#include <vector>

#include "core/lower.h"

namespace kvkernels {

// One side's pools as the moves see them: the pool each move belongs to and its number of blocks.
struct OverlapRequest {
  const char* op;
  const char* argument;  // the mapping's name
  const char* dst_list;  // what an error calls the destinations
  const std::vector<Run>& runs;
  const std::vector<Pool>& src;
  const std::vector<Pool>& dst;
  int64_t src_subblocks;
  int64_t dst_subblocks;
  const std::vector<Segment>& segments;
};

// ValueError where a byte would be read and written, or written by two pools. Cheap where addresses prove that
// nothing meets; a bitmap where both sides lie on one grid of blocks; interval by interval otherwise.
void check_overlap(const OverlapRequest& request);

}  // namespace kvkernels
