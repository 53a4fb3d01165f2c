#include "core/pairs.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "core/radix.h"

namespace kvkernels {
namespace {

// Up to here the destinations seen are bits (4 MiB of them, kept for the thread); above, the pairs are sorted.
constexpr int64_t kBitmapIds = int64_t{1} << 25;
// A spare list above this many segments (24 MiB) is given back to the system.
constexpr size_t kSpareSegments = size_t{1} << 20;

thread_local std::vector<uint64_t> seen_bits;
thread_local std::vector<Segment> spare_segments;

template <class Id>
struct Strided {
  const std::byte* data;
  int64_t stride_bytes;
  int64_t operator()(int64_t row) const {
    Id id;
    std::memcpy(&id, data + row * stride_bytes, sizeof(id));
    return id;
  }
};

struct RowNumber {
  int64_t operator()(int64_t row) const { return row; }
};

template <class Use>
auto with_reader(const IdColumn& column, Use&& use) {
  const auto* data = static_cast<const std::byte*>(column.data);
  if (column.width == 8) return use(Strided<int64_t>{data, column.stride_bytes});
  if (column.width == 4) return use(Strided<int32_t>{data, column.stride_bytes});
  return use(RowNumber{});
}

[[noreturn]] void out_of_range(const PairRequest& request, int64_t row, int64_t src, int64_t dst) {
  const bool src_is_bad = src < 0 || src >= request.src_limit.ids();
  const IdLimit& limit = src_is_bad ? request.src_limit : request.dst_limit;
  std::string where = text(request.argument, '[', row);
  if (request.src.width != 0 && request.dst.width != 0) where += src_is_bad ? ", 0" : ", 1";
  std::string blocks = text(limit.blocks, " blocks");
  if (limit.subblocks > 1) blocks += text(" of ", limit.subblocks, " sub-blocks");
  index_error(request.op, ": ", where, "] = ", src_is_bad ? src : dst, " is out of range for ", limit.pool, " with ",
              blocks);
}

class Coalescer {
 public:
  explicit Coalescer(std::vector<Segment>& segments) : segments_(segments) {}

  void add(int64_t src, int64_t dst) {
    if (src == current_.src + current_.count && dst == current_.dst + current_.count && current_.count > 0) {
      ++current_.count;
    } else if (src == current_.src - 1 && dst == current_.dst - 1 && current_.count > 0) {
      // Free lists hand blocks out downwards as often as upwards.
      current_ = {src, dst, current_.count + 1};
    } else {
      flush();
      current_ = {src, dst, 1};
    }
  }
  void flush() {
    if (current_.count > 0) segments_.push_back(current_);
    current_.count = 0;
  }

 private:
  std::vector<Segment>& segments_;
  Segment current_{0, 0, 0};
};

// Clears the bits by the list of what was set, so that a call costs nothing for the ids it does not name; all of them
// where the list is the longer way.
class SeenDestinations {
 public:
  SeenDestinations(int64_t ids, const std::vector<Segment>& segments)
      : segments_(segments), words_(static_cast<size_t>((ids + 63) / 64)) {
    if (seen_bits.size() < words_) seen_bits.resize(words_);
    bits_ = seen_bits.data();
  }
  SeenDestinations(const SeenDestinations&) = delete;
  SeenDestinations& operator=(const SeenDestinations&) = delete;
  ~SeenDestinations() {
    // Of a call that is being refused the list may lack some; the next call must not take them for its own.
    if (std::uncaught_exceptions() > exceptions_ || words_ < 2 * segments_.size()) {
      std::fill_n(bits_, words_, 0);
      return;
    }
    for (const Segment& segment : segments_) {
      for (int64_t id = segment.dst; id < segment.dst + segment.count; ++id) bits_[id >> 6] = 0;
    }
  }

  bool test_and_set(int64_t id) {
    uint64_t& word = bits_[id >> 6];
    const uint64_t bit = uint64_t{1} << (id & 63);
    const bool seen = (word & bit) != 0;
    word |= bit;
    return seen;
  }

 private:
  const std::vector<Segment>& segments_;
  size_t words_;
  uint64_t* bits_;
  int exceptions_ = std::uncaught_exceptions();
};

struct NothingSeen {
  bool test_and_set(int64_t) { return false; }
};

// One pass. False where a destination came twice, which needs a closer look; the segments then hold what came before.
// Never inlined: among its eight siblings in read_pairs the loop's counters end up in memory, a third slower.
template <class Src, class Dst, class Seen>
[[gnu::noinline]] bool scan(const PairRequest& request, Src src_of, Dst dst_of, Seen& seen, PairList& list) {
  const auto src_ids = static_cast<uint64_t>(request.src_limit.ids());
  const auto dst_ids = static_cast<uint64_t>(request.dst_limit.ids());
  const int64_t rows = request.rows;
  Coalescer coalescer(list.segments);
  int64_t pairs = 0;
  bool unique = true;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t src = src_of(row);
    const int64_t dst = dst_of(row);
    if (static_cast<uint64_t>(src) >= src_ids || static_cast<uint64_t>(dst) >= dst_ids) [[unlikely]] {
      if (request.skip_negative && (src < 0 || dst < 0)) continue;
      out_of_range(request, row, src, dst);
    }
    if (seen.test_and_set(dst)) [[unlikely]] {
      unique = false;
      break;
    }
    coalescer.add(src, dst);
    ++pairs;
  }
  coalescer.flush();
  list.pairs = pairs;
  return unique;
}

void coalesce(const std::vector<Pair>& pairs, PairList& list) {
  list.segments.clear();
  list.pairs = static_cast<int64_t>(pairs.size());
  Coalescer coalescer(list.segments);
  for (const Pair& pair : pairs) coalescer.add(pair.src, pair.dst);
  coalescer.flush();
}

template <class Src, class Dst>
void scan_sorted(const PairRequest& request, Src src_of, Dst dst_of, PairList& list) {
  std::vector<Pair> pairs;
  pairs.reserve(static_cast<size_t>(request.rows));
  for (int64_t row = 0; row < request.rows; ++row) {
    const Pair pair{src_of(row), dst_of(row)};
    if (pair.src < 0 || pair.src >= request.src_limit.ids() || pair.dst < 0 || pair.dst >= request.dst_limit.ids()) {
      if (request.skip_negative && (pair.src < 0 || pair.dst < 0)) continue;
      out_of_range(request, row, pair.src, pair.dst);
    }
    pairs.push_back(pair);
  }
  radix_sort(pairs, static_cast<uint64_t>(request.dst_limit.ids()),
             [](const Pair& pair) { return static_cast<uint64_t>(pair.dst); });
  size_t kept = 0;
  for (const Pair& pair : pairs) {
    if (kept > 0 && pairs[kept - 1].dst == pair.dst) {
      if (pairs[kept - 1].src == pair.src) continue;
      value_error(request.op, ": ", request.argument,
                  " must name each destination once, got two sources for destination ", pair.dst);
    }
    pairs[kept++] = pair;
  }
  pairs.resize(kept);
  coalesce(pairs, list);
}

}  // namespace

PairList read_pairs(const PairRequest& request) {
  PairList list;
  list.segments = std::exchange(spare_segments, {});
  list.segments.clear();
  if (request.rows == 0) return list;
  with_reader(request.src, [&](auto src_of) {
    with_reader(request.dst, [&](auto dst_of) {
      bool unique = false;
      if (request.dst.width == 0) {
        NothingSeen seen;
        unique = scan(request, src_of, dst_of, seen, list);
      } else if (request.dst_limit.ids() <= kBitmapIds) {
        SeenDestinations seen(request.dst_limit.ids(), list.segments);
        unique = scan(request, src_of, dst_of, seen, list);
      }
      if (!unique) scan_sorted(request, src_of, dst_of, list);
    });
  });
  return list;
}

void sort_by_source(PairList& list, int64_t src_ids) {
  if (list.segments.empty()) return;
  const auto earlier = [](const Segment& a, const Segment& b) { return a.src < b.src; };
  if (!std::is_sorted(list.segments.begin(), list.segments.end(), earlier)) {
    radix_sort(list.segments, static_cast<uint64_t>(src_ids),
               [](const Segment& segment) { return static_cast<uint64_t>(segment.src); });
  }
  size_t last = 0;
  for (size_t i = 1; i < list.segments.size(); ++i) {
    Segment& previous = list.segments[last];
    const Segment& segment = list.segments[i];
    if (segment.src == previous.src + previous.count && segment.dst == previous.dst + previous.count) {
      previous.count += segment.count;
    } else {
      list.segments[++last] = segment;
    }
  }
  list.segments.resize(last + 1);
}

void recycle(std::vector<Segment>&& segments) {
  if (segments.capacity() > spare_segments.capacity() && segments.capacity() <= kSpareSegments) {
    spare_segments = std::move(segments);
  }
}

}  // namespace kvkernels
