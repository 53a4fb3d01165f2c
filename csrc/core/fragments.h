// Walks the fragments of a Work in its order: move by move, pair by pair, loops outermost first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/lower.h"

namespace kvkernels {

// `count` fragments of one size at regular distances.
struct Strip {
  const std::byte* src;
  std::byte* dst;
  int64_t bytes;
  int64_t count;
  int64_t src_stride;
  int64_t dst_stride;
};

// Positions are bytes in that order, so that a lane can be handed any part of the work: a fragment that straddles
// `begin` or `end` is cut there.
class FragmentCursor {
 public:
  FragmentCursor(const Work& work, int64_t begin, int64_t end) : work_(work), left_(end - begin) {
    if (left_ > 0) seek(begin);
  }

  // Writes at most `capacity` fragments; 0 means that the work is done.
  int64_t next(Fragment* out, int64_t capacity) {
    int64_t written = 0;
    while (written < capacity && left_ > 0) written += next_of_move(out + written, capacity - written);
    return written;
  }

  // The same, but stops at the end of the current move, too.
  int64_t next_of_move(Fragment* out, int64_t capacity) {
    if (listed()) return take_listed(out, capacity);
    const size_t here = move_;
    int64_t written = 0;
    while (written < capacity && left_ > 0 && move_ == here) {
      if (work_.moves[here].loop_count == 0 && skip_ == 0) {
        written += take_pages(out + written, capacity - written);
        if (written == capacity || left_ == 0 || move_ != here) break;
      }
      Strip strip = take(capacity - written);
      for (; strip.count > 0; --strip.count) {
        out[written++] = {strip.src, strip.dst, strip.bytes};
        strip.src += strip.src_stride;
        strip.dst += strip.dst_stride;
      }
    }
    return written;
  }

  // The same, with neighbours along the innermost loop as one record: for fragments so small that a record each
  // would cost more than the copy. Not for listed ones.
  int64_t next_of_move(Strip* out, int64_t capacity) {
    const size_t here = move_;
    int64_t written = 0;
    while (written < capacity && left_ > 0 && move_ == here) out[written++] = take(left_);
    return written;
  }

  // Whether the next fragment begins before this cursor's part of the work, so that another one counts it.
  bool resumes() const { return skip_ > 0; }

  int64_t left() const { return left_; }

  // Whether the fragments are a caller's list, of which no move knows.
  bool listed() const { return !work_.fragments.empty(); }

  // What the next fragment belongs to; only while something is left, and where nothing is listed.
  const Move& move() const { return work_.moves[move_]; }

 private:
  const Segment& segment() const { return work_.segments[segment_]; }

  int64_t take_listed(Fragment* out, int64_t capacity) {
    int64_t written = 0;
    for (; written < capacity && left_ > 0; ++move_, ++written) {
      const Fragment& fragment = work_.fragments[move_];
      out[written] = {fragment.src + skip_, fragment.dst + skip_, std::min(fragment.bytes - skip_, left_)};
      left_ -= out[written].bytes;
      skip_ = 0;
    }
    return written;
  }

  // The next whole fragments of a move without loops, at most `capacity`: random pages are what is copied most, and
  // going through step() for each took 16 ns a page.
  int64_t take_pages(Fragment* out, int64_t capacity) {
    // Copies, because a write to `out` may otherwise change what they are copies of.
    const Side src = work_.moves[move_].src;
    const Side dst = work_.moves[move_].dst;
    const int64_t page_bytes = work_.moves[move_].fragment_bytes;
    const bool merges = work_.moves[move_].merges;
    const Segment* const segments = work_.segments.data();
    const size_t end = work_.segments.size();
    size_t at = segment_;
    int64_t within = within_;
    int64_t left = left_;
    int64_t written = 0;
    while (written < capacity && at < end) {
      const Segment segment = segments[at];
      const int64_t bytes = merges ? segment.count * page_bytes : page_bytes;
      if (bytes > left) break;
      out[written++] = {src.at(segment.src + within), dst.at(segment.dst + within), bytes};
      left -= bytes;
      if (merges || ++within == segment.count) {
        within = 0;
        ++at;
      }
    }
    left_ = left;
    within_ = within;
    segment_ = at;
    if (at == end) {
      segment_ = 0;
      ++move_;
    }
    if (left_ > 0) enter_pair();
    return written;
  }

  // The next fragments, at most `limit`, that lie at regular distances; something is left.
  Strip take(int64_t limit) {
    const Move& move = work_.moves[move_];
    const int64_t whole = move.merges ? segment().count * move.fragment_bytes : move.fragment_bytes;
    Strip strip = {src_ + skip_, dst_ + skip_, std::min(whole - skip_, left_), 1, 0, 0};
    if (move.loop_count > 0 && strip.bytes == whole) {
      const int inner = move.loop_count - 1;
      const Loop& loop = move.loops[inner];
      strip.count = std::min(limit, loop.extent - index_[inner]);
      if (strip.count * whole > left_) strip.count = left_ / whole;
      strip.src_stride = loop.src_stride;
      strip.dst_stride = loop.dst_stride;
      index_[inner] += strip.count - 1;
      src_ += (strip.count - 1) * loop.src_stride;
      dst_ += (strip.count - 1) * loop.dst_stride;
    }
    left_ -= strip.count * strip.bytes;
    skip_ = 0;
    if (left_ > 0) step();
    return strip;
  }

  void enter_pair() {
    const Move& move = work_.moves[move_];
    src_ = move.src.at(segment().src + within_);
    dst_ = move.dst.at(segment().dst + within_);
    index_[0] = index_[1] = index_[2] = 0;
  }

  void seek(int64_t position) {
    move_ = 0;
    if (listed()) {
      while (position >= work_.fragments[move_].bytes) position -= work_.fragments[move_++].bytes;
      skip_ = position;
      return;
    }
    while (position >= work_.pairs * work_.moves[move_].bytes_per_pair()) {
      position -= work_.pairs * work_.moves[move_].bytes_per_pair();
      ++move_;
    }
    const Move& move = work_.moves[move_];
    int64_t pair = position / move.bytes_per_pair();
    position -= pair * move.bytes_per_pair();
    segment_ = 0;
    while (pair >= segment().count) {
      pair -= segment().count;
      ++segment_;
    }
    within_ = move.merges ? 0 : pair;
    enter_pair();
    if (move.merges) {
      skip_ = pair * move.fragment_bytes + position;
      return;
    }
    int64_t fragment = position / move.fragment_bytes;
    skip_ = position - fragment * move.fragment_bytes;
    for (int i = move.loop_count - 1; i >= 0; --i) {
      index_[i] = fragment % move.loops[i].extent;
      fragment /= move.loops[i].extent;
      src_ += index_[i] * move.loops[i].src_stride;
      dst_ += index_[i] * move.loops[i].dst_stride;
    }
  }

  void step() {
    const Move& move = work_.moves[move_];
    for (int i = move.loop_count - 1; i >= 0; --i) {
      src_ += move.loops[i].src_stride;
      dst_ += move.loops[i].dst_stride;
      if (++index_[i] < move.loops[i].extent) return;
      index_[i] = 0;
      src_ -= move.loops[i].extent * move.loops[i].src_stride;
      dst_ -= move.loops[i].extent * move.loops[i].dst_stride;
    }
    if (!move.merges && ++within_ < segment().count) return enter_pair();
    within_ = 0;
    if (++segment_ == work_.segments.size()) {
      segment_ = 0;
      ++move_;
    }
    enter_pair();
  }

  const Work& work_;
  int64_t left_;
  size_t move_ = 0;  // or the listed fragment
  size_t segment_ = 0;
  int64_t within_ = 0;  // pair inside the segment
  int64_t index_[3] = {0, 0, 0};
  int64_t skip_ = 0;  // bytes of the current fragment that belong to the lane before
  const std::byte* src_ = nullptr;
  std::byte* dst_ = nullptr;
};

}  // namespace kvkernels
