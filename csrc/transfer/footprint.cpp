#include "transfer/footprint.h"

#include <algorithm>
#include <bit>

namespace kvkernels::transfer {
namespace {

// What is remembered at most: a server's pools are few, and one that makes new ones must not fill memory.
constexpr size_t kMostKnown = 256;
constexpr size_t kMostMeetings = 4096;

int64_t floor_div(int64_t value, int64_t divisor) {
  const int64_t quotient = value / divisor;
  return quotient - (value % divisor < 0 ? 1 : 0);
}

// Blocks of `a` whose numbers, plus `shift`, are blocks of `b`.
bool share_shifted(const BlockSet& a, const BlockSet& b, int64_t shift) {
  const int64_t first = std::max(a.begin(), floor_div(b.begin() - shift, 64) * 64);
  const int64_t last = std::min(a.end(), b.end() - shift);
  for (int64_t block = first; block < last; block += 64) {
    const uint64_t bits = a.bits_at(block);
    if (bits != 0 && (bits & b.bits_at(block + shift)) != 0) return true;
  }
  return false;
}

bool share_any_stride(const Meeting& meeting, const BlockSet& a, const BlockSet& b) {
  for (int64_t first = a.begin(); first < a.end(); first += 64) {
    for (uint64_t bits = a.bits_at(first); bits != 0; bits &= bits - 1) {
      const int64_t begin = meeting.delta + (first + std::countr_zero(bits)) * meeting.a_stride;
      const int64_t low = floor_div(begin - meeting.b_page_bytes, meeting.b_stride) + 1;
      const int64_t high = floor_div(begin + meeting.a_page_bytes - 1, meeting.b_stride);
      if (b.has_any(low, high)) return true;
    }
  }
  return false;
}

// Of one stride and standing in parts of it that do not meet, as K and V of one tensor do.
bool never_meet(const Meeting& m) {
  if (m.a_stride != m.b_stride) return false;
  const int64_t phase = m.delta - floor_div(m.delta, m.b_stride) * m.b_stride;
  return phase >= m.b_page_bytes && phase + m.a_page_bytes <= m.a_stride;
}

}  // namespace

BlockSet::BlockSet(const std::vector<Segment>& segments, bool is_dst, int64_t subblocks) {
  if (segments.empty()) return;
  int64_t least = INT64_MAX;
  int64_t most = 0;
  for (const Segment& segment : segments) {
    const int64_t id = is_dst ? segment.dst : segment.src;
    least = std::min(least, id);
    most = std::max(most, id + segment.count - 1);
  }
  first_word_ = least / subblocks / 64;
  words_.resize(static_cast<size_t>(most / subblocks / 64 - first_word_ + 1));
  for (const Segment& segment : segments) {
    const int64_t id = is_dst ? segment.dst : segment.src;
    const int64_t last = subblocks == 1 ? id + segment.count - 1 : (id + segment.count - 1) / subblocks;
    for (int64_t block = subblocks == 1 ? id : id / subblocks; block <= last;) {
      const int64_t count = std::min<int64_t>(64 - block % 64, last - block + 1);
      const uint64_t ones = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
      words_[static_cast<size_t>(block / 64 - first_word_)] |= ones << (block % 64);
      block += count;
    }
  }
}

uint64_t BlockSet::word(int64_t index) const {
  const int64_t at = index - first_word_;
  return at < 0 || at >= static_cast<int64_t>(words_.size()) ? 0 : words_[static_cast<size_t>(at)];
}

uint64_t BlockSet::bits_at(int64_t block) const {
  const int64_t index = floor_div(block, 64);
  const int64_t within = block - index * 64;
  if (within == 0) return word(index);
  return word(index) >> within | word(index + 1) << (64 - within);
}

bool BlockSet::has_any(int64_t first, int64_t last) const {
  first = std::max(first, begin());
  last = std::min(last, end() - 1);
  for (int64_t block = first; block <= last; block += 64) {
    const int64_t count = std::min<int64_t>(64, last - block + 1);
    const uint64_t ones = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    if ((bits_at(block) & ones) != 0) return true;
  }
  return false;
}

bool share_pages(const Meeting& meeting, const BlockSet& a, const BlockSet& b) {
  if (meeting.a_stride != meeting.b_stride) return share_any_stride(meeting, a, b);
  const int64_t shift = floor_div(meeting.delta, meeting.b_stride);
  const int64_t phase = meeting.delta - shift * meeting.b_stride;
  return (phase < meeting.b_page_bytes && share_shifted(a, b, shift)) ||
         (phase + meeting.a_page_bytes > meeting.a_stride && share_shifted(a, b, shift + 1));
}

bool Footprint::meets(uintptr_t first, uintptr_t last) const {
  return std::any_of(pools.begin(), pools.end(),
                     [&](const PoolSpan& pool) { return pool.begin < last && first < pool.end; });
}

Footprint footprint_of(const BoundCopy& copy, bool is_dst) {
  const std::vector<Pool>& pools = is_dst ? copy.dst : copy.src;
  std::vector<bool> is_used(pools.size());
  for (const Run& run : copy.runs) is_used[static_cast<size_t>(is_dst ? run.dst_pool : run.src_pool)] = true;
  Footprint footprint;
  footprint.subblocks = is_dst ? copy.dst_subblocks : copy.src_subblocks;
  for (size_t i = 0; i < pools.size(); ++i) {
    const Pool& pool = pools[i];
    if (!is_used[i] || pool.blocks == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(pool.base);
    const auto bytes = static_cast<uintptr_t>((pool.blocks - 1) * pool.block_stride + pool.page_bytes);
    footprint.pools.push_back({begin, begin + bytes, pool.block_stride, pool.page_bytes});
  }
  std::sort(footprint.pools.begin(), footprint.pools.end());
  if (!footprint.pools.empty()) footprint.begin = footprint.pools.front().begin;
  for (const PoolSpan& pool : footprint.pools) footprint.end = std::max(footprint.end, pool.end);
  return footprint;
}

std::vector<Meeting> meetings_of(const Footprint& a, const Footprint& b) {
  std::vector<Meeting> found;
  if (a.begin >= b.end || b.begin >= a.end) return found;
  std::vector<const PoolSpan*> open[2];  // pools that the sweep is inside of
  size_t next[2] = {0, 0};
  while (next[0] < a.pools.size() || next[1] < b.pools.size()) {
    const bool is_b =
        next[0] == a.pools.size() || (next[1] < b.pools.size() && b.pools[next[1]].begin < a.pools[next[0]].begin);
    const PoolSpan& here = is_b ? b.pools[next[1]++] : a.pools[next[0]++];
    auto& others = open[is_b ? 0 : 1];
    std::erase_if(others, [&](const PoolSpan* other) { return other->end <= here.begin; });
    for (const PoolSpan* other : others) {
      const PoolSpan& of_a = is_b ? *other : here;
      const PoolSpan& of_b = is_b ? here : *other;
      const Meeting meeting{static_cast<int64_t>(of_a.begin - of_b.begin), of_a.stride, of_a.page_bytes, of_b.stride,
                            of_b.page_bytes};
      // Neighbours are alike, and what is left is made unique below.
      if ((found.empty() || found.back() != meeting) && !never_meet(meeting)) found.push_back(meeting);
    }
    open[is_b ? 1 : 0].push_back(&here);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

std::shared_ptr<const Footprint> Footprints::find(const std::shared_ptr<const BoundCopy>& copy, bool is_dst) {
  if (known_.size() >= kMostKnown) {
    std::erase_if(known_, [](const auto& known) { return known.second.copy.expired(); });
    if (known_.size() >= kMostKnown) known_.clear();
  }
  Known& known = known_[copy.get()];
  if (known.copy.expired()) known = {copy, {}};  // also where a copy that is gone had the same address
  std::shared_ptr<const Footprint>& side = known.sides[is_dst ? 1 : 0];
  if (!side) {
    auto made = std::make_shared<Footprint>(footprint_of(*copy, is_dst));
    made->id = ++last_id_;
    side = std::move(made);
  }
  return side;
}

const std::vector<Meeting>& Footprints::meetings(const Footprint& a, const Footprint& b) {
  if (meetings_.size() >= kMostMeetings) meetings_.clear();
  const auto [found, is_new] = meetings_.try_emplace({a.id, b.id});
  if (is_new) found->second = meetings_of(a, b);
  return found->second;
}

}  // namespace kvkernels::transfer
