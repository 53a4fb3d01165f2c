#include "core/overlap.h"

#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "core/text.h"

namespace kvkernels {
namespace {

// Intervals compared one by one before a call is refused as not provable (32 bytes each).
constexpr int64_t kComparableIntervals = int64_t{1} << 23;

// Regions compared all with all; a plan with more (thousands of runs that leave gaps) is seen pool by pool.
constexpr size_t kComparableRegions = 512;

// All that one pool's runs touch: `count` hulls of `width` bytes, `stride` apart.
struct Region {
  uintptr_t begin;
  int64_t width;
  int64_t stride;
  int64_t count;
  bool written;
  bool on_blocks;  // the stride is from block to block, not of a loop
  int64_t pool;

  uintptr_t end() const { return begin + static_cast<uintptr_t>((count - 1) * stride + width); }
};

// The part of a page that one run touches on one side.
struct Hull {
  int64_t begin;
  int64_t end;
};

struct SideView {
  int64_t pool;
  int64_t offset;
  int64_t subblocks;
  int64_t subblock_stride;
  int64_t strides[3];
};

SideView view_of(const Run& run, bool written, int64_t src_subblocks, int64_t dst_subblocks) {
  SideView view = written ? SideView{run.dst_pool, run.dst_offset, dst_subblocks, run.dst_subblock_stride, {}}
                          : SideView{run.src_pool, run.src_offset, src_subblocks, run.src_subblock_stride, {}};
  for (int i = 0; i < 3; ++i) view.strides[i] = written ? run.loops[i].dst_stride : run.loops[i].src_stride;
  return view;
}

void widen(Hull& hull, int64_t extent, int64_t stride) {
  if (extent == 1) return;
  int64_t& bound = stride < 0 ? hull.begin : hull.end;
  bound += (extent - 1) * stride;
}

// A pool of one block whose run is a nest (a tensor of concat_tp_shards) lies on the grid of its outermost loop.
int outermost_loop(const Run& run, const SideView& view) {
  int outermost = -1;
  for (int i = 0; i < 3; ++i) {
    if (run.loops[i].extent == 1) continue;
    if (outermost < 0 || std::abs(view.strides[i]) > std::abs(view.strides[outermost])) outermost = i;
  }
  return outermost;
}

Region region_of(const Run& run, const SideView& view, const Pool& pool, bool written) {
  const int grid = pool.blocks == 1 && view.subblocks == 1 ? outermost_loop(run, view) : -1;
  Hull hull{view.offset, view.offset + run.fragment_bytes};
  widen(hull, view.subblocks, view.subblock_stride);
  for (int i = 0; i < 3; ++i) {
    if (i != grid) widen(hull, run.loops[i].extent, view.strides[i]);
  }
  Region region{reinterpret_cast<uintptr_t>(pool.base) + static_cast<uintptr_t>(hull.begin),
                hull.end - hull.begin,
                pool.block_stride,
                pool.blocks,
                written,
                grid < 0,
                view.pool};
  if (grid >= 0) {
    region.stride = std::abs(view.strides[grid]);
    region.count = run.loops[grid].extent;
    if (view.strides[grid] < 0) region.begin -= static_cast<uintptr_t>((region.count - 1) * region.stride);
  }
  return region;
}

bool meets_span(const Region& a, const Region& b) { return a.begin < b.end() && b.begin < a.end(); }

int64_t floor_mod(int64_t value, int64_t modulus) {
  const int64_t rest = value % modulus;
  return rest < 0 ? rest + modulus : rest;
}

// Two combs of one stride never meet where their teeth stand in different parts of it (K and V of one tensor).
bool interleaves(const Region& a, const Region& b) {
  const int64_t stride = a.count > 1 ? a.stride : b.stride;
  if ((a.count > 1 && b.count > 1 && a.stride != b.stride) || stride <= 0) return false;
  const int64_t phase = floor_mod(static_cast<int64_t>(b.begin - a.begin), stride);
  return phase >= a.width && phase + b.width <= stride;
}

bool may_conflict(const Region& a, const Region& b) {
  if (!a.written && !b.written) return false;
  if (a.written && b.written && a.pool == b.pool) return false;  // verify_runs has compared these
  return meets_span(a, b) && !interleaves(a, b);
}

// Regions of one cluster share a stride and stand in parts of it that do not meet: the usual case of many layers in
// one tensor, told in one sort instead of comparing all with all.
bool interleave_all(std::vector<Region>& cluster) {
  const int64_t stride = cluster.front().stride;
  const uintptr_t origin = cluster.front().begin;
  if (stride <= 0) return false;
  for (const Region& region : cluster) {
    if (region.stride != stride) return false;
  }
  const auto phase = [&](const Region& region) {
    return floor_mod(static_cast<int64_t>(region.begin - origin), stride);
  };
  std::sort(cluster.begin(), cluster.end(), [&](const Region& a, const Region& b) { return phase(a) < phase(b); });
  for (size_t i = 0; i + 1 < cluster.size(); ++i) {
    if (phase(cluster[i]) + cluster[i].width > phase(cluster[i + 1])) return false;
  }
  return phase(cluster.back()) + cluster.back().width <= stride;
}

// The runs' regions in order of side, pool and address; those of one pool that touch are one, so that a plan of many
// runs costs no more than its pools. With `across_gaps` a pool's regions are one even where it leaves bytes out.
std::vector<Region> joined(const std::vector<Region>& regions, bool across_gaps) {
  std::vector<Region> result;
  for (const Region& region : regions) {
    if (!result.empty()) {
      Region& last = result.back();
      const auto distance = static_cast<int64_t>(region.begin - last.begin);
      if (last.written == region.written && last.pool == region.pool && last.stride == region.stride &&
          last.count == region.count && last.on_blocks == region.on_blocks && (across_gaps || distance <= last.width)) {
        last.width = std::max(last.width, distance + region.width);
        continue;
      }
    }
    result.push_back(region);
  }
  return result;
}

std::vector<Region> regions_of(const OverlapRequest& request) {
  std::vector<Region> regions;
  regions.reserve(2 * request.runs.size());
  for (const Run& run : request.runs) {
    for (const bool written : {false, true}) {
      const SideView view = view_of(run, written, request.src_subblocks, request.dst_subblocks);
      const Pool& pool = (written ? request.dst : request.src)[static_cast<size_t>(view.pool)];
      regions.push_back(region_of(run, view, pool, written));
    }
  }
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) {
    return std::tie(a.written, a.pool, a.begin) < std::tie(b.written, b.pool, b.begin);
  });
  regions = joined(regions, false);
  return regions.size() <= kComparableRegions ? regions : joined(regions, true);
}

struct Meeting {
  Region a;
  Region b;
};

// The regions that addresses alone do not show to be apart.
std::vector<Meeting> find_meetings(std::vector<Region> regions) {
  std::vector<Meeting> meetings;
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  size_t first = 0;
  while (first < regions.size()) {
    uintptr_t end = regions[first].end();
    bool any_written = regions[first].written;
    size_t last = first + 1;
    for (; last < regions.size() && regions[last].begin < end; ++last) {
      end = std::max(end, regions[last].end());
      any_written |= regions[last].written;
    }
    if (last - first > 1 && any_written) {
      std::vector<Region> cluster(regions.begin() + static_cast<std::ptrdiff_t>(first),
                                  regions.begin() + static_cast<std::ptrdiff_t>(last));
      if (!interleave_all(cluster)) {
        for (size_t i = 0; i < cluster.size(); ++i) {
          for (size_t j = i + 1; j < cluster.size(); ++j) {
            if (may_conflict(cluster[i], cluster[j])) meetings.push_back({cluster[i], cluster[j]});
          }
        }
      }
    }
    first = last;
  }
  return meetings;
}

class BlockSet {
 public:
  explicit BlockSet(int64_t blocks) : bits_(static_cast<size_t>((blocks + 63) / 64)), blocks_(blocks) {}
  void insert(int64_t block) { bits_[static_cast<size_t>(block >> 6)] |= uint64_t{1} << (block & 63); }
  bool contains(int64_t block) const {
    return block >= 0 && block < blocks_ && (bits_[static_cast<size_t>(block >> 6)] >> (block & 63) & 1) != 0;
  }

 private:
  std::vector<uint64_t> bits_;
  int64_t blocks_;
};

int64_t floor_div(int64_t value, int64_t divisor) { return (value - floor_mod(value, divisor)) / divisor; }

// Where a read and a written pool lie on one grid of blocks, source block i lies over destination block i + shift for
// one or two shifts. Many layers moved inside their own cache share one shift.
bool collect_shifts(const std::vector<Meeting>& meetings, std::vector<int64_t>& shifts) {
  constexpr size_t kShifts = 16;
  for (const Meeting& meeting : meetings) {
    const Region& read = meeting.a.written ? meeting.b : meeting.a;
    const Region& written = meeting.a.written ? meeting.a : meeting.b;
    if (read.written || !read.on_blocks || !written.on_blocks || read.stride != written.stride || read.stride <= 0) {
      return false;
    }
    const auto distance = static_cast<int64_t>(read.begin - written.begin);
    const int64_t shift = floor_div(distance, written.stride);
    const int64_t phase = floor_mod(distance, written.stride);
    const auto add = [&](int64_t value) {
      if (std::find(shifts.begin(), shifts.end(), value) == shifts.end()) shifts.push_back(value);
    };
    if (phase < written.width) add(shift);
    if (phase + read.width > written.stride) add(shift + 1);
    if (shifts.size() > kShifts) return false;
  }
  return true;
}

// Most pools have no sub-blocks, and a division costs more than the rest of the loop that asks.
int64_t block_of(int64_t id, int64_t subblocks) { return subblocks == 1 ? id : id / subblocks; }

// True where no block that is read lies over one that is written.
bool blocks_apart(const OverlapRequest& request, const std::vector<Meeting>& meetings) {
  std::vector<int64_t> shifts;
  if (!collect_shifts(meetings, shifts)) return false;
  int64_t blocks = 0;
  for (const Pool& pool : request.dst) blocks = std::max(blocks, pool.blocks);
  BlockSet written(blocks);
  for (const Segment& segment : request.segments) {
    for (int64_t id = segment.dst; id < segment.dst + segment.count; ++id)
      written.insert(block_of(id, request.dst_subblocks));
  }
  for (const int64_t shift : shifts) {
    for (const Segment& segment : request.segments) {
      for (int64_t id = segment.src; id < segment.src + segment.count; ++id) {
        if (written.contains(block_of(id, request.src_subblocks) + shift)) return false;
      }
    }
  }
  return true;
}

struct Interval {
  uintptr_t begin;
  uintptr_t end;
  int64_t pool;
  int64_t id;  // -1 - id where it is read, so that one word says both
  bool written() const { return id >= 0; }
};

void append_intervals(const Run& run, const SideView& view, const Pool& pool, bool written, int64_t id,
                      std::vector<Interval>& intervals) {
  const uintptr_t page =
      reinterpret_cast<uintptr_t>(pool.base) +
      static_cast<uintptr_t>(id / view.subblocks * pool.block_stride +
                             id % view.subblocks * (view.subblocks == 1 ? 0 : view.subblock_stride) + view.offset);
  const Loop* loops = run.loops;
  for (int64_t i = 0; i < loops[0].extent; ++i) {
    for (int64_t j = 0; j < loops[1].extent; ++j) {
      for (int64_t k = 0; k < loops[2].extent; ++k) {
        const uintptr_t begin = page + static_cast<uintptr_t>((loops[0].extent == 1 ? 0 : i * view.strides[0]) +
                                                              (loops[1].extent == 1 ? 0 : j * view.strides[1]) +
                                                              (loops[2].extent == 1 ? 0 : k * view.strides[2]));
        intervals.push_back(
            {begin, begin + static_cast<uintptr_t>(run.fragment_bytes), view.pool, written ? id : -1 - id});
      }
    }
  }
}

[[noreturn]] void conflict(const OverlapRequest& request, const Interval& a, const Interval& b) {
  if (a.written() && b.written()) {
    value_error(request.op, ": ", request.dst_list, " must not overlap where they are written, got ",
                Name{request.dst_list, std::min(a.pool, b.pool)}, " and ",
                Name{request.dst_list, std::max(a.pool, b.pool)}, " sharing bytes");
  }
  const Interval& written = a.written() ? a : b;
  const Interval& read = a.written() ? b : a;
  value_error(request.op, ": ", request.argument, " must not write what it reads, got destination ", written.id,
              " overlapping source ", -1 - read.id);
}

// The pools that stand in some meeting; all others are known to be apart from everything.
class Meeters {
 public:
  Meeters(const OverlapRequest& request, const std::vector<Meeting>& meetings)
      : read_(request.src.size()), written_(request.dst.size()) {
    for (const Meeting& meeting : meetings) {
      for (const Region& region : {meeting.a, meeting.b}) {
        (region.written ? written_ : read_)[static_cast<size_t>(region.pool)] = true;
      }
    }
  }
  bool has(bool written, int64_t pool) const { return (written ? written_ : read_)[static_cast<size_t>(pool)]; }

 private:
  std::vector<bool> read_;
  std::vector<bool> written_;
};

// Every fragment of the pools that meet, in address order.
void compare_intervals(const OverlapRequest& request, const Meeters& meeters) {
  std::vector<Interval> intervals;
  for (const Run& run : request.runs) {
    const int64_t fragments = run.loops[0].extent * run.loops[1].extent * run.loops[2].extent;
    for (const bool written : {false, true}) {
      const SideView view = view_of(run, written, request.src_subblocks, request.dst_subblocks);
      if (!meeters.has(written, view.pool)) continue;
      const Pool& pool = (written ? request.dst : request.src)[static_cast<size_t>(view.pool)];
      for (const Segment& segment : request.segments) {
        if (static_cast<int64_t>(intervals.size()) + segment.count * fragments > kComparableIntervals) {
          value_error(request.op, ": src and ", request.dst_list, " must be shown not to overlap, got more than ",
                      kComparableIntervals, " fragments to compare");
        }
        for (int64_t i = 0; i < segment.count; ++i) {
          append_intervals(run, view, pool, written, (written ? segment.dst : segment.src) + i, intervals);
        }
      }
    }
  }
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  const Interval* last_written = nullptr;  // of those before, the one that ends last
  const Interval* last_any = nullptr;
  for (const Interval& interval : intervals) {
    const Interval* before = interval.written() ? last_any : last_written;
    if (before != nullptr && interval.begin < before->end) conflict(request, *before, interval);
    if (last_any == nullptr || interval.end > last_any->end) last_any = &interval;
    if (interval.written() && (last_written == nullptr || interval.end > last_written->end)) last_written = &interval;
  }
}

}  // namespace

void check_overlap(const OverlapRequest& request) {
  if (request.segments.empty() || request.runs.empty()) return;
  const std::vector<Meeting> meetings = find_meetings(regions_of(request));
  if (meetings.empty() || blocks_apart(request, meetings)) return;
  compare_intervals(request, Meeters(request, meetings));
}

}  // namespace kvkernels
