#include "cpu/copy.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <span>
#include <vector>

#include "core/fragments.h"
#include "cpu/loops.h"
#include "cpu/stretch.h"

namespace kvkernels::cpu {

namespace {

// Lanes cut only fragments from this size on, and those at multiples of kPieceBytes.
constexpr int64_t kCutMinBytes = 64 << 10;

constexpr int64_t kFragments = 32;
static_assert(kZipMost <= kFragments, "each zipped move needs room for a fragment");
constexpr int64_t kBatch = 256;
constexpr int64_t kStrips = 64;

bool is_in_strips(const FragmentCursor& cursor) { return !cursor.listed() && goes_in_strips(cursor.move()); }

// A lane's tools.
struct Means {
  const Loops& loops;
  const Tuning& tuning;
  bool streaming;
};

// Hands out pieces in order: fragments, those above `piece_bytes` cut. Of several cursors, which have as many fragments
// each, it takes one fragment in turn.
class PieceSource {
 public:
  PieceSource(std::span<FragmentCursor> cursors, int64_t piece_bytes) : cursors_(cursors), piece_bytes_(piece_bytes) {}

  int64_t fill(Fragment* out, int64_t capacity) {
    int64_t written = 0;
    while (written < capacity && (taken_ < count_ || refill())) {
      Fragment& fragment = fragments_[taken_];
      const int64_t bytes = next_piece(fragment);
      out[written++] = {fragment.src, fragment.dst, bytes};
      if (bytes == fragment.bytes) {
        ++taken_;
      } else {
        fragment = {fragment.src + bytes, fragment.dst + bytes, fragment.bytes - bytes};
      }
    }
    return written;
  }

  int64_t descriptors() const { return descriptors_; }

 private:
  // Whole pieces that end on a destination line, but the last two are of about one size: a short one would leave
  // nothing to interleave with.
  int64_t next_piece(const Fragment& left) const {
    if (left.bytes <= piece_bytes_) return left.bytes;
    const int64_t to_line = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(left.dst) % kLineBytes);
    if (left.bytes >= 2 * piece_bytes_) return piece_bytes_ + to_line;
    return left.bytes / 2 / kLineBytes * kLineBytes + to_line;
  }

  bool refill() {
    FragmentCursor& first = cursors_.front();
    if (first.left() == 0) return false;
    if (cursors_.size() == 1) {
      if (is_in_strips(first)) return false;
      descriptors_ -= first.resumes() ? 1 : 0;
      count_ = first.next_of_move(fragments_, kFragments);
    } else {
      count_ = take_in_turns();
    }
    descriptors_ += count_;
    taken_ = 0;
    return true;
  }

  int64_t take_in_turns() {
    const auto cursors = static_cast<int64_t>(cursors_.size());
    Fragment of_one[kFragments];
    int64_t each = 0;
    for (int64_t i = 0; i < cursors; ++i) {
      each = cursors_[static_cast<size_t>(i)].next_of_move(of_one, kFragments / cursors);
      for (int64_t j = 0; j < each; ++j) fragments_[j * cursors + i] = of_one[j];
    }
    return each * cursors;
  }

  std::span<FragmentCursor> cursors_;
  int64_t piece_bytes_;
  Fragment fragments_[kFragments];
  int64_t taken_ = 0;
  int64_t count_ = 0;
  int64_t descriptors_ = 0;
};

// Several cursors' pieces follow each other in memory.
Issued copy_pieces(std::span<FragmentCursor> cursors, const Means& means) {
  Issued issued;
  PieceSource source(cursors, means.tuning.piece_bytes);
  const auto copy = cursors.size() > 1 ? means.loops.copy_in_order : means.loops.copy_pieces;
  Fragment pieces[kBatch];
  int64_t held = 0;
  while (true) {
    held += source.fill(pieces + held, kBatch - held);
    if (held == 0) break;
    // A buffer that could not be filled holds the last pieces.
    const int64_t count = held < kBatch ? held : held - kLookahead;
    copy(pieces, count, held, means.streaming, means.tuning);
    for (int64_t i = 0; i < count; ++i) issued.bytes += pieces[i].bytes;
    std::copy(pieces + count, pieces + held, pieces);
    held -= count;
  }
  issued.descriptors = source.descriptors();
  return issued;
}

Issued copy_strips(FragmentCursor& cursor, const Means& means) {
  Issued issued;
  Strip strips[kStrips];
  issued.descriptors -= cursor.resumes() ? 1 : 0;
  while (cursor.left() > 0 && is_in_strips(cursor)) {
    const int64_t count = cursor.next_of_move(strips, kStrips);
    means.loops.copy_strips(strips, count, means.streaming, means.tuning);
    for (int64_t i = 0; i < count; ++i) {
      issued.descriptors += strips[i].count;
      issued.bytes += strips[i].count * strips[i].bytes;
    }
  }
  return issued;
}

void add(Issued& total, const Issued& part) {
  total.descriptors += part.descriptors;
  total.bytes += part.bytes;
}

// Of several cursors, which have as many fragments each at the same places of their loops, a strip in turn.
Issued copy_strips_in_turns(std::span<FragmentCursor> cursors, const Means& means) {
  Issued issued;
  Strip strips[kZipMost];
  while (cursors.front().left() > 0) {
    int64_t count = 0;
    for (FragmentCursor& cursor : cursors) count += cursor.next_of_move(strips + count, 1);
    means.loops.copy_strips(strips, count, means.streaming, means.tuning);
    for (int64_t i = 0; i < count; ++i) {
      issued.descriptors += strips[i].count;
      issued.bytes += strips[i].count * strips[i].bytes;
    }
  }
  return issued;
}

// A part of the work, from one position to another.
Issued copy_in_order(const Work& work, const Means& means, int64_t begin, int64_t end) {
  Issued issued;
  FragmentCursor cursor(work, begin, end);
  while (cursor.left() > 0) {
    add(issued, is_in_strips(cursor) ? copy_strips(cursor, means) : copy_pieces({&cursor, 1}, means));
  }
  return issued;
}

// The rows of a zipped stretch between two positions, which are row boundaries.
Issued copy_zipped(const Work& work, const Means& means, const Stretch& stretch, int64_t stretch_begin, int64_t begin,
                   int64_t end) {
  const int64_t first_row = (begin - stretch_begin) / stretch.row_bytes;
  const int64_t last_row = (end - stretch_begin) / stretch.row_bytes;
  std::vector<FragmentCursor> cursors;
  cursors.reserve(stretch.last - stretch.first);
  int64_t move_begin = stretch_begin;
  for (size_t i = stretch.first; i < stretch.last; ++i) {
    const Move& move = work.moves[i];
    cursors.emplace_back(work, move_begin + first_row * move.fragment_bytes,
                         move_begin + last_row * move.fragment_bytes);
    move_begin += work.pairs * move.bytes_per_pair();
  }
  const bool short_ones = std::all_of(cursors.begin(), cursors.end(), is_in_strips);
  return short_ones ? copy_strips_in_turns(cursors, means) : copy_pieces(cursors, means);
}

Issued copy_range(const Work& work, const Means& means, int64_t begin, int64_t end) {
  Issued issued;
  if (work.moves.size() <= 1) {
    issued = copy_in_order(work, means, begin, end);
  } else {
    int64_t at = 0;
    for (size_t first = 0; first < work.moves.size() && at < end;) {
      const Stretch stretch = stretch_from(work, first, means.tuning.writes_rows);
      const int64_t low = std::max(begin, at);
      const int64_t high = std::min(end, at + stretch.bytes);
      if (low < high) {
        add(issued, stretch.row_bytes > 0 ? copy_zipped(work, means, stretch, at, low, high)
                                          : copy_in_order(work, means, low, high));
      }
      at += stretch.bytes;
      first = stretch.last;
    }
  }
  if (work.streaming) means.loops.fence();
  return issued;
}

// Where to cut instead of `offset` bytes into fragments of `fragment_bytes`: at or before it, where that costs nothing.
int64_t cut_near(int64_t offset, int64_t fragment_bytes) {
  const int64_t inside = offset % fragment_bytes;
  return offset - (fragment_bytes >= kCutMinBytes ? inside % kPieceBytes : inside);
}

// The first byte of `lane`, as a position of FragmentCursor or, in a zipped stretch, of its rows.
int64_t lane_begin(const Work& work, const Means& means, int lane) {
  if (lane == work.lanes) return work.bytes;
  const int64_t even = work.bytes / work.lanes * lane;
  int64_t begin = 0;
  for (const Fragment& fragment : work.fragments) {
    if (even < begin + fragment.bytes) return begin + cut_near(even - begin, fragment.bytes);
    begin += fragment.bytes;
  }
  for (size_t first = 0; first < work.moves.size();) {
    const Stretch stretch = stretch_from(work, first, means.tuning.writes_rows);
    first = stretch.last;
    if (even >= begin + stretch.bytes) {
      begin += stretch.bytes;
      continue;
    }
    if (stretch.row_bytes > 0) return begin + cut_near(even - begin, stretch.row_bytes);
    for (size_t i = stretch.first; i < stretch.last; ++i) {
      const int64_t bytes = work.pairs * work.moves[i].bytes_per_pair();
      if (even < begin + bytes) return begin + cut_near(even - begin, work.moves[i].fragment_bytes);
      begin += bytes;
    }
  }
  return work.bytes;
}

struct Lanes {
  const Work& work;
  const Means& means;
  std::atomic<int64_t> descriptors{0};
  std::atomic<int64_t> bytes{0};
};

void copy_lane(void* context, int lane) {
  Lanes& lanes = *static_cast<Lanes*>(context);
  const Issued issued = copy_range(lanes.work, lanes.means, lane_begin(lanes.work, lanes.means, lane),
                                   lane_begin(lanes.work, lanes.means, lane + 1));
  lanes.descriptors.fetch_add(issued.descriptors, std::memory_order_relaxed);
  lanes.bytes.fetch_add(issued.bytes, std::memory_order_relaxed);
}

}  // namespace

Issued copy(const Work& work, ParallelFor parallel, Isa isa, const Tuning& tuning) {
  const Means means{loops_for(isa), tuning, work.streaming};
  if (work.lanes <= 1) return copy_range(work, means, 0, work.bytes);
  Lanes lanes{work, means};
  parallel(work.lanes, &lanes, copy_lane);
  return {0, lanes.descriptors.load(std::memory_order_relaxed), lanes.bytes.load(std::memory_order_relaxed)};
}

Issued copy(const Work& work, ParallelFor parallel) {
  const Tuning& tuned = tuning();
  return copy(work, parallel, selected_isa(), tuned);
}

Issued copy_lane_of(const Work& work, int lane, const Tuning& tuning) {
  const Means means{loops_for(selected_isa()), tuning, work.streaming};
  return copy_range(work, means, lane_begin(work, means, lane), lane_begin(work, means, lane + 1));
}

bool writes_rows() { return tuning().writes_rows; }

}  // namespace kvkernels::cpu
