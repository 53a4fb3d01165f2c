#include "core/verify.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

#include "core/text.h"

namespace kvkernels {
namespace {

// More fragments than this in one page are refused rather than compared one by one (24 bytes each).
constexpr int64_t kComparableFragments = int64_t{1} << 24;

// A longer plan (512 KiB) is verified each time rather than kept.
constexpr int64_t kRememberedRuns = 4096;

// A loop as one side sees it.
struct Stride {
  int64_t extent;
  int64_t bytes;
};

// The three loops and the sub-block loop.
using Nest = std::array<Stride, 4>;

// An unused loop's stride says nothing, whatever it holds.
Stride used(int64_t extent, int64_t bytes) { return {extent, extent == 1 ? 0 : bytes}; }

Nest src_nest(const Run& run, int64_t subblocks) {
  return {used(subblocks, run.src_subblock_stride), used(run.loops[0].extent, run.loops[0].src_stride),
          used(run.loops[1].extent, run.loops[1].src_stride), used(run.loops[2].extent, run.loops[2].src_stride)};
}

Nest dst_nest(const Run& run, int64_t subblocks) {
  return {used(subblocks, run.dst_subblock_stride), used(run.loops[0].extent, run.loops[0].dst_stride),
          used(run.loops[1].extent, run.loops[1].dst_stride), used(run.loops[2].extent, run.loops[2].dst_stride)};
}

// Half-open range of the bytes that a nest touches.
struct Reach {
  int64_t begin;
  int64_t end;
};

Reach reach_of(const char* op, int64_t run, const Nest& nest, int64_t offset, int64_t fragment_bytes) {
  Reach reach{offset, 0};
  bool overflow = __builtin_add_overflow(offset, fragment_bytes, &reach.end);
  for (const Stride& loop : nest) {
    int64_t span = 0;
    overflow |= __builtin_mul_overflow(loop.extent - 1, loop.bytes, &span);
    int64_t& bound = span < 0 ? reach.begin : reach.end;
    overflow |= __builtin_add_overflow(bound, span, &bound);
  }
  if (overflow) value_error(op, ": runs[", run, "] must fit in int64, got an offset that overflows");
  return reach;
}

void check_inside(const char* op, int64_t run, const char* list, int64_t pool, int64_t page_bytes, const Reach& reach) {
  if (reach.begin < 0 || reach.end > page_bytes) {
    value_error(op, ": runs[", run, "] must stay inside ", Name{list, pool}, "'s page of ", page_bytes,
                " bytes, got bytes ", reach.begin, " to ", reach.end);
  }
}

void check_columns(const char* op, const Run* runs, int64_t count, const PageSizes& pages) {
  const auto src_pools = static_cast<int64_t>(pages.src.size());
  const auto dst_pools = static_cast<int64_t>(pages.dst.size());
  for (int64_t i = 0; i < count; ++i) {
    const Run& run = runs[i];
    const auto check_pool = [&](const char* column, int64_t pool, int64_t pools) {
      if (pool < 0 || pool >= pools) {
        value_error(op, ": runs[", i, "] ", column, " must be below ", pools, " and not negative, got ", pool);
      }
    };
    check_pool("src_pool", run.src_pool, src_pools);
    check_pool("dst_pool", run.dst_pool, dst_pools);
    if (run.fragment_bytes <= 0) {
      value_error(op, ": runs[", i, "] fragment_bytes must be positive, got ", run.fragment_bytes);
    }
    for (int loop = 0; loop < 3; ++loop) {
      if (run.loops[loop].extent <= 0) {
        value_error(op, ": runs[", i, "] extent ", loop, " must be positive, got ", run.loops[loop].extent);
      }
    }
    check_inside(op, i, "src", run.src_pool, pages.src[run.src_pool],
                 reach_of(op, i, src_nest(run, pages.src_subblocks), run.src_offset, run.fragment_bytes));
    check_inside(op, i, "dst", run.dst_pool, pages.dst[run.dst_pool],
                 reach_of(op, i, dst_nest(run, pages.dst_subblocks), run.dst_offset, run.fragment_bytes));
  }
}

// True where each loop steps over all that the loops inside it write: then no byte is written twice.
bool steps_clear(Nest nest, int64_t fragment_bytes) {
  std::sort(nest.begin(), nest.end(),
            [](const Stride& a, const Stride& b) { return std::abs(a.bytes) < std::abs(b.bytes); });
  int64_t covered = fragment_bytes;
  for (const Stride& loop : nest) {
    if (loop.extent == 1) continue;
    if (std::abs(loop.bytes) < covered) return false;
    covered += (loop.extent - 1) * std::abs(loop.bytes);
  }
  return true;
}

struct Written {
  int64_t begin;
  int64_t end;
  int64_t run;
};

[[noreturn]] void written_twice(const char* op, int64_t pool, int64_t first, int64_t second) {
  if (first > second) std::swap(first, second);
  value_error(op, ": runs must write each byte once, got runs[", first, "] and runs[", second, "] sharing bytes of ",
              Name{"dst", pool});
}

void check_disjoint(const char* op, int64_t pool, std::vector<Written>& written) {
  std::sort(written.begin(), written.end(),
            [](const Written& a, const Written& b) { return std::tie(a.begin, a.run) < std::tie(b.begin, b.run); });
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].begin < written[i - 1].end) written_twice(op, pool, written[i - 1].run, written[i].run);
  }
}

void append_fragments(const Run& run, int64_t index, const Nest& nest, std::vector<Written>& written) {
  for (int64_t sub = 0; sub < nest[0].extent; ++sub) {
    for (int64_t i = 0; i < nest[1].extent; ++i) {
      for (int64_t j = 0; j < nest[2].extent; ++j) {
        for (int64_t k = 0; k < nest[3].extent; ++k) {
          const int64_t begin =
              run.dst_offset + sub * nest[0].bytes + i * nest[1].bytes + j * nest[2].bytes + k * nest[3].bytes;
          written.push_back({begin, begin + run.fragment_bytes, index});
        }
      }
    }
  }
}

// A run's nest with every stride positive, outermost loop last, so that it can be taken off.
struct Combed {
  int64_t begin;
  int64_t fragment_bytes;
  std::vector<Stride> loops;

  Combed(const Run& run, const Nest& nest) : begin(run.dst_offset), fragment_bytes(run.fragment_bytes) {
    for (const Stride& loop : nest) {
      if (loop.extent == 1) continue;
      if (loop.bytes < 0) begin += (loop.extent - 1) * loop.bytes;
      loops.push_back({loop.extent, std::abs(loop.bytes)});
    }
    std::sort(loops.begin(), loops.end(), [](const Stride& a, const Stride& b) { return a.bytes < b.bytes; });
  }
  int64_t width() const {
    int64_t bytes = fragment_bytes;
    for (const Stride& loop : loops) bytes += (loop.extent - 1) * loop.bytes;
    return bytes;
  }
};

bool hulls_are_apart(std::vector<Combed>& runs) {
  std::sort(runs.begin(), runs.end(), [](const Combed& a, const Combed& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < runs.size(); ++i) {
    if (runs[i].begin < runs[i - 1].begin + runs[i - 1].width()) return false;
  }
  return true;
}

// Takes the outermost loop off every run, leaving where in a step it writes. False where the runs do not share that
// loop's stride, or one reaches from its step into the next.
bool take_off_outermost(std::vector<Combed>& runs) {
  if (runs.front().loops.empty() || runs.front().loops.back().bytes == 0) return false;
  const int64_t stride = runs.front().loops.back().bytes;
  const int64_t origin = runs.front().begin;
  for (Combed& run : runs) {
    if (run.loops.empty() || run.loops.back().bytes != stride) return false;
    run.loops.pop_back();
    run.begin = (run.begin - origin) % stride;
    if (run.begin + run.width() > stride) return false;
  }
  return true;
}

// True where no two runs meet, told without a look at each fragment: shards that lie beside each other in every row
// share the loop over the rows. Runs are in ascending order whenever a loop is taken off.
bool runs_are_apart(std::vector<Combed> runs) {
  while (!hulls_are_apart(runs)) {
    if (!take_off_outermost(runs)) return false;
  }
  return true;
}

// The runs that write one pool: first by their nests, then, where those tell nothing, fragment by fragment.
void check_pool_written_once(const char* op, const Run* runs, const std::vector<int64_t>& members,
                             const PageSizes& pages) {
  const int64_t pool = runs[members.front()].dst_pool;
  std::vector<Combed> combed;
  bool clear = true;
  int64_t fragments = 0;
  for (const int64_t index : members) {
    const Run& run = runs[index];
    const Nest nest = dst_nest(run, pages.dst_subblocks);
    // A nest that writes more than its page must write some byte twice; this also bounds the enumeration below.
    int64_t bytes = run.fragment_bytes;
    int64_t count = 1;
    for (const Stride& loop : nest) {
      if (__builtin_mul_overflow(bytes, loop.extent, &bytes) || bytes > pages.dst[pool]) {
        written_twice(op, pool, index, index);
      }
      count *= loop.extent;
    }
    fragments += count;
    clear &= steps_clear(nest, run.fragment_bytes);
    combed.emplace_back(run, nest);
  }
  if (clear && runs_are_apart(std::move(combed))) return;
  if (fragments > kComparableFragments) {
    throw NotComparable(text(op, ": runs must have at most ", kComparableFragments,
                             " fragments in a page where they interleave, got ", fragments, " in ", Name{"dst", pool}));
  }
  std::vector<Written> written;
  written.reserve(static_cast<size_t>(fragments));
  for (const int64_t index : members)
    append_fragments(runs[index], index, dst_nest(runs[index], pages.dst_subblocks), written);
  check_disjoint(op, pool, written);
}

void check_written_once(const char* op, const Run* runs, int64_t count, const PageSizes& pages) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return runs[a].dst_pool < runs[b].dst_pool; });
  std::vector<int64_t> members;
  for (size_t i = 0; i < order.size(); ++i) {
    members.push_back(order[i]);
    if (i + 1 == order.size() || runs[order[i + 1]].dst_pool != runs[order[i]].dst_pool) {
      check_pool_written_once(op, runs, members, pages);
      members.clear();
    }
  }
}

// Plans that passed, by their whole content: a plan is made once and used for every transfer after it.
class Verified {
 public:
  using Key = std::vector<int64_t>;

  bool contains(const Key& key) {
    const std::lock_guard lock(mutex_);
    return keys_.count(key) != 0;
  }
  void insert(Key key) {
    const std::lock_guard lock(mutex_);
    const auto [position, is_new] = keys_.insert(std::move(key));
    if (!is_new) return;
    order_.push_back(position);
    if (order_.size() > kPlans) {
      keys_.erase(order_.front());
      order_.pop_front();
    }
  }

 private:
  static constexpr size_t kPlans = 128;
  std::mutex mutex_;
  std::set<Key> keys_;
  std::deque<std::set<Key>::iterator> order_;
};

Verified::Key key_of(const Run* runs, int64_t count, const PageSizes& pages) {
  Verified::Key key;
  key.reserve(4 + pages.src.size() + pages.dst.size() + static_cast<size_t>(count) * kRunColumns);
  key = {pages.src_subblocks, pages.dst_subblocks, static_cast<int64_t>(pages.src.size()), count};
  key.insert(key.end(), pages.src.begin(), pages.src.end());
  key.insert(key.end(), pages.dst.begin(), pages.dst.end());
  const auto* columns = reinterpret_cast<const int64_t*>(runs);
  key.insert(key.end(), columns, columns + count * kRunColumns);
  return key;
}

}  // namespace

void verify_runs(const char* op, const Run* runs, int64_t count, const PageSizes& pages) {
  // Never destroyed: other threads may still be in an op when the process's statics go.
  static Verified& verified = *new Verified;
  Verified::Key key = key_of(runs, count, pages);
  if (verified.contains(key)) return;
  check_columns(op, runs, count, pages);
  check_written_once(op, runs, count, pages);
  if (count <= kRememberedRuns) verified.insert(std::move(key));
}

}  // namespace kvkernels
