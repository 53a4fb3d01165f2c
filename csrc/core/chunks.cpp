#include "core/chunks.h"

#include <algorithm>

namespace kvkernels {

WorkChunks::WorkChunks(const Work& work, int64_t chunk_bytes) {
  if (work.bytes == 0) return;
  first_pairs_.reserve(work.segments.size());
  int64_t pairs = 0;
  for (const Segment& segment : work.segments) {
    first_pairs_.push_back(pairs);
    pairs += segment.count;
  }
  for (size_t begin = 0; begin < work.moves.size();) {
    int64_t bytes = 0;
    size_t end = begin;
    for (; end < work.moves.size(); ++end) {
      const int64_t more = work.moves[end].bytes_per_pair();
      if (end > begin && bytes + more > chunk_bytes) break;
      bytes += more;
    }
    const std::vector<Move> moves(work.moves.begin() + static_cast<std::ptrdiff_t>(begin),
                                  work.moves.begin() + static_cast<std::ptrdiff_t>(end));
    const int64_t each = std::max<int64_t>(1, chunk_bytes / std::max<int64_t>(1, bytes));
    groups_.push_back({begin, end, sums_of(moves), each, count_});
    count_ += (work.pairs + each - 1) / each;
    begin = end;
  }
}

Work WorkChunks::chunk(const Work& work, int64_t index) const {
  const auto after = std::upper_bound(groups_.begin(), groups_.end(), index,
                                      [](int64_t wanted, const Group& group) { return wanted < group.first_chunk; });
  const Group& group = *std::prev(after);
  const int64_t begin = (index - group.first_chunk) * group.pairs_per_chunk;
  const int64_t end = std::min(work.pairs, begin + group.pairs_per_chunk);
  Work part;
  part.executor = work.executor;
  part.direction = work.direction;
  part.shape = group.sums.shape;
  part.moves.assign(work.moves.begin() + static_cast<std::ptrdiff_t>(group.begin),
                    work.moves.begin() + static_cast<std::ptrdiff_t>(group.end));
  auto at = static_cast<size_t>(std::prev(std::upper_bound(first_pairs_.begin(), first_pairs_.end(), begin)) -
                                first_pairs_.begin());
  for (int64_t pair = begin; pair < end; ++at) {
    const Segment& segment = work.segments[at];
    const int64_t skipped = pair - first_pairs_[at];
    const int64_t count = std::min(segment.count - skipped, end - pair);
    part.segments.push_back({segment.src + skipped, segment.dst + skipped, count});
    pair += count;
  }
  part.pairs = end - begin;
  part.bytes = part.pairs * group.sums.bytes_per_pair;
  part.descriptors = part.pairs * group.sums.fragments_per_pair +
                     static_cast<int64_t>(part.segments.size()) * group.sums.fragments_per_segment;
  return part;
}

}  // namespace kvkernels
