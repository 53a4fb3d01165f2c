#include "core/lower.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <utility>

#include "core/policy.h"

namespace kvkernels {

std::string_view name_of(Direction direction) {
  switch (direction) {
    case Direction::kHostToHost:
      return "h2h";
    case Direction::kHostToDevice:
      return "h2d";
    case Direction::kDeviceToHost:
      return "d2h";
    case Direction::kDeviceToDevice:
      return "d2d";
  }
  return "";
}

std::string_view name_of(Shape shape) {
  switch (shape) {
    case Shape::kPage:
      return "page";
    case Shape::kRow:
      return "row";
    case Shape::kBytes:
      return "bytes";
  }
  return "";
}

namespace {

// Shorter fragments lose more to sources apart than streaming stores gain from destinations in order.
constexpr int64_t kWrittenInOrderBytes = 256;

// Consecutive sub-blocks that also continue from block to block need no division: the id counts them directly.
Side bind_side(const Pool& pool, int64_t offset, int64_t subblocks, int64_t subblock_stride) {
  const bool continues = subblocks > 1 && subblocks * subblock_stride == pool.block_stride;
  if (subblocks == 1 || continues) return {pool.base + offset, continues ? subblock_stride : pool.block_stride, 0, 1};
  return {pool.base + offset, pool.block_stride, subblock_stride, subblocks};
}

void drop_loop(Move& move, int index) {
  for (int i = index; i + 1 < move.loop_count; ++i) move.loops[i] = move.loops[i + 1];
  --move.loop_count;
}

// A loop whose steps continue the fragment on both sides makes it longer.
bool fold_into_fragment(Move& move) {
  for (int i = 0; i < move.loop_count; ++i) {
    if (move.loops[i].src_stride == move.fragment_bytes && move.loops[i].dst_stride == move.fragment_bytes) {
      move.fragment_bytes *= move.loops[i].extent;
      drop_loop(move, i);
      return true;
    }
  }
  return false;
}

// A loop that continues where another one ends is the same loop, longer.
bool merge_two_loops(Move& move) {
  for (int outer = 0; outer < move.loop_count; ++outer) {
    for (int inner = 0; inner < move.loop_count; ++inner) {
      const Loop& a = move.loops[outer];
      Loop& b = move.loops[inner];
      if (outer == inner || a.src_stride != b.extent * b.src_stride || a.dst_stride != b.extent * b.dst_stride)
        continue;
      b.extent *= a.extent;
      drop_loop(move, outer);
      return true;
    }
  }
  return false;
}

// Largest stride of the slow side outermost. (Three loops: std::sort is no shorter and makes gcc 12 warn.)
void order_loops(Move& move, bool slow_side_is_dst) {
  const auto stride = [&](int i) {
    return std::abs(slow_side_is_dst ? move.loops[i].dst_stride : move.loops[i].src_stride);
  };
  for (int i = 1; i < move.loop_count; ++i) {
    for (int j = i; j > 0 && stride(j - 1) < stride(j); --j) std::swap(move.loops[j - 1], move.loops[j]);
  }
}

bool merges_pairs(const Move& move) {
  return move.loop_count == 0 && move.src.subblocks == 1 && move.dst.subblocks == 1 &&
         move.src.block_stride == move.fragment_bytes && move.dst.block_stride == move.fragment_bytes;
}

Move bind(const Run& run, const Pool& src, const Pool& dst, int64_t src_subblocks, int64_t dst_subblocks) {
  Move move{bind_side(src, run.src_offset, src_subblocks, run.src_subblock_stride),
            bind_side(dst, run.dst_offset, dst_subblocks, run.dst_subblock_stride),
            run.fragment_bytes,
            0,
            {},
            false};
  for (const Loop& loop : run.loops) {
    if (loop.extent > 1) move.loops[move.loop_count++] = loop;
  }
  while (fold_into_fragment(move) || merge_two_loops(move)) {
  }
  return move;
}

bool same_steps(const Side& a, const Side& b) {
  return a.block_stride == b.block_stride && a.subblocks == b.subblocks &&
         (a.subblocks == 1 || a.subblock_stride == b.subblock_stride);
}

// Pools that are neighbours on both sides (the layers of a page-first buffer) are one longer fragment.
bool continues(const Move& a, const Move& b) {
  return a.loop_count == 0 && b.loop_count == 0 && same_steps(a.src, b.src) && same_steps(a.dst, b.dst) &&
         b.src.base == a.src.base + a.fragment_bytes && b.dst.base == a.dst.base + a.fragment_bytes;
}

bool is_vector_multiple(int64_t value) { return value % kVectorBytes == 0; }

bool side_is_aligned(const Side& side) {
  return reinterpret_cast<uintptr_t>(side.base) % kVectorBytes == 0 && is_vector_multiple(side.block_stride) &&
         (side.subblocks == 1 || is_vector_multiple(side.subblock_stride));
}

bool is_aligned(const Move& move) {
  bool aligned = side_is_aligned(move.src) && side_is_aligned(move.dst) && is_vector_multiple(move.fragment_bytes);
  for (int i = 0; i < move.loop_count; ++i) {
    aligned &= is_vector_multiple(move.loops[i].src_stride) && is_vector_multiple(move.loops[i].dst_stride);
  }
  return aligned;
}

bool is_row(const Move& move) { return is_aligned(move) && move.fragment_bytes <= kRowMaxBytes; }

Shape shape_of(const std::vector<Move>& moves) {
  bool rows = true;
  bool pages = true;
  for (const Move& move : moves) {
    rows = rows && is_row(move);
    pages = pages && move.loop_count == 0;
  }
  if (moves.empty()) return Shape::kPage;
  return rows ? Shape::kRow : pages ? Shape::kPage : Shape::kBytes;
}

}  // namespace

std::vector<Move> bind_runs(const std::vector<Run>& runs, const std::vector<Pool>& src, const std::vector<Pool>& dst,
                            int64_t src_subblocks, int64_t dst_subblocks, Direction direction) {
  // The host link is the slow side of a GPU's copy; of two sides on one kind of memory, reads stall and writes do not.
  const bool slow_side_is_dst = direction == Direction::kDeviceToHost;
  std::vector<Move> moves;
  moves.reserve(runs.size());
  for (const Run& run : runs) {
    Move move = bind(run, src[run.src_pool], dst[run.dst_pool], src_subblocks, dst_subblocks);
    if (!moves.empty() && continues(moves.back(), move)) {
      moves.back().fragment_bytes += move.fragment_bytes;
      continue;
    }
    order_loops(move, slow_side_is_dst);
    moves.push_back(move);
  }
  for (Move& move : moves) move.merges = merges_pairs(move);
  return moves;
}

MoveSums sums_of(const std::vector<Move>& moves) {
  MoveSums sums;
  sums.shape = shape_of(moves);
  for (const Move& move : moves) {
    sums.bytes_per_pair += move.bytes_per_pair();
    (move.merges ? sums.fragments_per_segment : sums.fragments_per_pair) += move.fragments_per_pair();
  }
  return sums;
}

Work lower(std::vector<Move> moves, PairList pairs, int64_t src_ids, Direction direction, const LowerOptions& options) {
  const MoveSums sums = sums_of(moves);
  return lower(std::move(moves), sums, std::move(pairs), src_ids, direction, options);
}

Work lower(std::vector<Move> moves, const MoveSums& sums, PairList pairs, int64_t src_ids, Direction direction,
           const LowerOptions& options) {
  Work work;
  work.executor = options.executor;
  work.direction = direction;
  work.shape = sums.shape;
  work.pairs = pairs.pairs;
  work.bytes = work.pairs * sums.bytes_per_pair;
  const int64_t page_bytes = moves.empty() ? 0 : moves.front().fragment_bytes;
  // A copy engine pays for each descriptor far more than a sort does; the CPU gains only where sources are pages apart.
  if (options.executor == Executor::kDma ||
      (options.executor == Executor::kCpu && cpu_policy().sorts(page_bytes, work.bytes))) {
    sort_by_source(pairs, src_ids);
  }
  const auto segments = static_cast<int64_t>(pairs.segments.size());
  work.descriptors = work.pairs * sums.fragments_per_pair + segments * sums.fragments_per_segment;
  if (options.executor == Executor::kCpu) {
    work.lanes = cpu_policy().lanes_for(work.bytes, options.threads);
    work.streaming = cpu_policy().streams(work.bytes, options.soon_read);
    if (work.streaming && options.writes_rows) {
      for (Move& move : moves) {
        if (move.fragment_bytes >= kWrittenInOrderBytes) order_loops(move, true);
      }
    }
  }
  work.moves = std::move(moves);
  work.segments = std::move(pairs.segments);
  return work;
}

Work lower_fragments(std::vector<Fragment> fragments, Direction direction, const LowerOptions& options) {
  Work work;
  work.executor = options.executor;
  work.direction = direction;
  work.pairs = static_cast<int64_t>(fragments.size());
  size_t kept = 0;
  for (const Fragment fragment : fragments) {
    if (fragment.bytes == 0) continue;
    work.bytes += fragment.bytes;
    if (kept > 0) {
      Fragment& last = fragments[kept - 1];
      if (last.src + last.bytes == fragment.src && last.dst + last.bytes == fragment.dst) {
        last.bytes += fragment.bytes;
        continue;
      }
    }
    fragments[kept++] = fragment;
  }
  fragments.resize(kept);
  work.fragments = std::move(fragments);
  work.descriptors = static_cast<int64_t>(kept);
  if (options.executor == Executor::kCpu) {
    work.lanes = cpu_policy().lanes_for(work.bytes, options.threads);
    work.streaming = cpu_policy().streams(work.bytes, options.soon_read);
  }
  return work;
}

int count_sizes(const std::vector<Fragment>& fragments) {
  int64_t sizes[kMostSizes];
  int count = 0;
  for (const Fragment& fragment : fragments) {
    if (std::find(sizes, sizes + count, fragment.bytes) != sizes + count) continue;
    if (count == kMostSizes) return kMostSizes + 1;
    sizes[count++] = fragment.bytes;
  }
  return count;
}

std::vector<Work> addresses_as_ids(const std::vector<Fragment>& fragments, Direction direction) {
  std::vector<Work> works;
  uintptr_t bits = kVectorBytes;
  for (const Fragment& fragment : fragments) {
    bits |= reinterpret_cast<uintptr_t>(fragment.src) | reinterpret_cast<uintptr_t>(fragment.dst);
    const auto has_size = [&](const Work& work) { return work.moves.front().fragment_bytes == fragment.bytes; };
    auto work = std::find_if(works.begin(), works.end(), has_size);
    if (work == works.end()) {
      work = works.insert(works.end(), Work{});
      work->direction = direction;
      work->moves = {Move{{}, {}, fragment.bytes, 0, {}, false}};
    }
    ++work->pairs;
  }
  // Ids count in steps of what divides all addresses, from which the kernels' access width follows.
  const int step = std::countr_zero(bits);
  const Side addresses{nullptr, int64_t{1} << step, 0, 1};
  for (Work& work : works) {
    Move& move = work.moves.front();
    move.src = move.dst = addresses;
    work.shape = shape_of(work.moves);
    work.bytes = work.pairs * move.fragment_bytes;
    work.descriptors = work.pairs;
    work.segments.reserve(static_cast<size_t>(work.pairs));
    for (const Fragment& fragment : fragments) {
      if (fragment.bytes != move.fragment_bytes) continue;
      work.segments.push_back({static_cast<int64_t>(reinterpret_cast<uintptr_t>(fragment.src) >> step),
                               static_cast<int64_t>(reinterpret_cast<uintptr_t>(fragment.dst) >> step), 1});
    }
  }
  return works;
}

Work lower_device_ids(std::vector<Move> moves, const DeviceIds& ids, Direction direction) {
  Work work;
  work.executor = Executor::kKernel;
  work.direction = direction;
  work.shape = shape_of(moves);
  work.device_ids = ids;
  work.pairs = ids.rows;
  for (const Move& move : moves) {
    work.bytes += ids.rows * move.bytes_per_pair();
    work.descriptors += ids.rows * move.fragments_per_pair();
  }
  work.moves = std::move(moves);
  return work;
}

}  // namespace kvkernels
