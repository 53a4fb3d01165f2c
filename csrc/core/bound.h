// What of a copy does not depend on its mapping: pools and runs, verified and bound to each other once, and used for
// every mapping after that.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/lower.h"
#include "core/plan.h"

namespace kvkernels {

struct BoundCopy {
  std::vector<Pool> src;
  std::vector<Pool> dst;
  std::vector<Run> runs;  // verified
  int64_t src_subblocks = 1;
  int64_t dst_subblocks = 1;
  Direction direction = Direction::kHostToHost;

  // What bind() makes of them:
  std::vector<Move> moves;
  MoveSums sums;
  // No destination's memory meets another pool's: whatever the mapping, no byte is read and written, or written twice.
  bool is_apart = false;
};

void bind(BoundCopy& copy);

// The last copies that were bound, by their whole content: a server's pools are the same for each transfer.
class BoundCopies {
 public:
  // The one with this content, or null.
  std::shared_ptr<const BoundCopy> find(const BoundCopy& content);
  void add(std::shared_ptr<const BoundCopy> copy);

 private:
  static constexpr size_t kMost = 16;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const BoundCopy>> copies_;  // the last used first
};

}  // namespace kvkernels
