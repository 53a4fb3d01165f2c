// What a transfer touches: pages of pools, by block. Two that touch one page, of which one writes, are kept in order.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/bound.h"
#include "core/plan.h"

namespace kvkernels::transfer {

// The blocks that one side of a mapping names, a bit each from the least one on.
class BlockSet {
 public:
  BlockSet() = default;
  BlockSet(const std::vector<Segment>& segments, bool is_dst, int64_t subblocks);

  int64_t begin() const { return first_word_ * 64; }
  int64_t end() const { return (first_word_ + static_cast<int64_t>(words_.size())) * 64; }

  // The bits of 64 blocks from `block` on.
  uint64_t bits_at(int64_t block) const;
  bool has_any(int64_t first, int64_t last) const;  // of first to last, both included

 private:
  uint64_t word(int64_t index) const;

  int64_t first_word_ = 0;
  std::vector<uint64_t> words_;
};

// Two pools whose memory meets: block i of a begins `delta + i * a_stride` bytes after b's base.
struct Meeting {
  int64_t delta;
  int64_t a_stride;
  int64_t a_page_bytes;
  int64_t b_stride;
  int64_t b_page_bytes;

  auto operator<=>(const Meeting&) const = default;
};

// Whether some page of `a` shares a byte with one of `b`.
bool share_pages(const Meeting& meeting, const BlockSet& a, const BlockSet& b);

struct PoolSpan {
  uintptr_t begin;
  uintptr_t end;
  int64_t stride;
  int64_t page_bytes;

  auto operator<=>(const PoolSpan&) const = default;
};

// The pools of one side of a bound copy that its runs use.
struct Footprint {
  int64_t id = 0;
  int64_t subblocks = 1;
  std::vector<PoolSpan> pools;  // by address
  uintptr_t begin = 0;
  uintptr_t end = 0;

  bool meets(uintptr_t first, uintptr_t last) const;  // any byte of the pools in [first, last), gaps in rows included
};

Footprint footprint_of(const BoundCopy& copy, bool is_dst);

// In how many different ways pools of the two meet: one, where 160 layers are at the same distance from each other.
std::vector<Meeting> meetings_of(const Footprint& a, const Footprint& b);

// Footprints and how they meet, found once for copies that come again. Not safe to call from several threads.
class Footprints {
 public:
  std::shared_ptr<const Footprint> find(const std::shared_ptr<const BoundCopy>& copy, bool is_dst);
  const std::vector<Meeting>& meetings(const Footprint& a, const Footprint& b);

 private:
  struct Known {
    std::weak_ptr<const BoundCopy> copy;
    std::shared_ptr<const Footprint> sides[2];
  };
  struct Pairs {
    size_t operator()(const std::pair<int64_t, int64_t>& pair) const {
      return static_cast<size_t>(pair.first * 0x9E3779B97F4A7C15 + pair.second);
    }
  };
  int64_t last_id_ = 0;
  std::unordered_map<const BoundCopy*, Known> known_;
  std::unordered_map<std::pair<int64_t, int64_t>, std::vector<Meeting>, Pairs> meetings_;
};

}  // namespace kvkernels::transfer
