#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernel.h"

namespace kvkernels {
namespace {

struct IdRange {
  int64_t low = 0;
  int64_t high = -1;  // inclusive; below low where no id can occur
};

struct IdRanges {
  IdRange src;
  IdRange dst;
};

IdRanges id_ranges(const Work& work) {
  if (work.device_ids) {
    const DeviceIds& ids = *work.device_ids;
    const auto of = [&](const IdColumn& column, int64_t limit) {
      return IdRange{0, (column.width == 0 ? std::min(limit, ids.rows) : limit) - 1};
    };
    return {of(ids.src, ids.src_limit), of(ids.dst, ids.dst_limit)};
  }
  IdRanges ranges;
  ranges.src.low = ranges.dst.low = INT64_MAX;
  for (const Segment& segment : work.segments) {
    ranges.src.low = std::min(ranges.src.low, segment.src);
    ranges.dst.low = std::min(ranges.dst.low, segment.dst);
    ranges.src.high = std::max(ranges.src.high, segment.src + segment.count - 1);
    ranges.dst.high = std::max(ranges.dst.high, segment.dst + segment.count - 1);
  }
  return ranges;
}

struct Span {
  int64_t low;
  int64_t high;

  void stretch(int64_t steps, int64_t stride) {
    low += std::min<int64_t>(0, steps * stride);
    high += std::max<int64_t>(0, steps * stride);
  }
};

// The bytes, relative to the side's base, that a move can touch; with sub-blocks, over whole blocks.
Span touched(const Side& side, const Move& move, int64_t Loop::* stride, const IdRange& ids) {
  const int64_t first = ids.low / side.subblocks * side.block_stride;
  const int64_t last = ids.high / side.subblocks * side.block_stride;
  Span span{first, last + move.fragment_bytes};
  if (side.subblocks > 1) span.stretch(side.subblocks - 1, side.subblock_stride);
  for (int i = 0; i < move.loop_count; ++i) span.stretch(move.loops[i].extent - 1, move.loops[i].*stride);
  return span;
}

[[noreturn]] void refuse(const char* name, const char* reason) {
  throw std::invalid_argument(std::string(name) + " is in " + reason);
}

// What of the device and the caller decides whether pageable memory will do.
struct PageableAccess {
  bool reads;
  bool may_migrate;
  bool uses_host_page_tables;
};

// How far the device's addresses of [begin, end) are from the host's.
ptrdiff_t device_offset(const char* name, const std::byte* begin, const std::byte* end, const PageableAccess& pageable,
                        PointerMap& pointers) {
  // Asked first, so that memory without a known end ends where the last byte's begins.
  const Range last = pointers.find(end - 1);
  const ptrdiff_t offset = pointers.find(begin).device_offset;
  const auto check_range = [&](const Range& range) {
    if (range.memory == Range::Memory::kPageable) {
      if (!pageable.reads) refuse(name, "pageable host memory, which the device cannot read");
      if (!pageable.may_migrate && !pageable.uses_host_page_tables) {
        refuse(name, "pageable host memory, of which each page that a kernel touches moves to the device");
      }
    } else if (!range.mapped) {
      refuse(name, "host memory that is not mapped for the device");
    }
    // Where the device reads pageable memory, it does so at the host's address, and so with an offset of 0.
    if (range.device_offset != offset) refuse(name, "host memory that the device sees at more than one offset");
  };
  for (const std::byte* at = begin; at < end;) {
    const Range range = pointers.find(at);
    check_range(range);
    // Nothing is known of what follows.
    if (range.memory == Range::Memory::kPageable) break;
    at = reinterpret_cast<const std::byte*>(range.end);
  }
  check_range(last);
  return offset;
}

}  // namespace

void map_for_device(Work& work, const DeviceLimits& limits, PointerMap& pointers, const SideNames& names,
                    bool may_migrate) {
  if (work.direction != Direction::kHostToDevice && work.direction != Direction::kDeviceToHost) return;
  const bool is_dst = work.direction == Direction::kDeviceToHost;
  const PageableAccess pageable{limits.reads_pageable, may_migrate, limits.uses_host_page_tables};
  const IdRanges ranges = id_ranges(work);
  const IdRange& range = is_dst ? ranges.dst : ranges.src;
  if (range.high < range.low) return;
  for (Move& move : work.moves) {
    Side& side = is_dst ? move.dst : move.src;
    const auto span = touched(side, move, is_dst ? &Loop::dst_stride : &Loop::src_stride, range);
    side.base +=
        device_offset(is_dst ? names.dst : names.src, side.base + span.low, side.base + span.high, pageable, pointers);
  }
}

bool writes_read_only(const Work& work, PointerMap& pointers) {
  if (work.direction != Direction::kDeviceToHost) return false;
  const IdRange range = id_ranges(work).dst;
  if (range.high < range.low) return false;
  for (const Move& move : work.moves) {
    const auto span = touched(move.dst, move, &Loop::dst_stride, range);
    const std::byte* const end = move.dst.base + span.high;
    for (const std::byte* at = move.dst.base + span.low; at < end;) {
      const Range found = pointers.find(at);
      if (found.memory == Range::Memory::kPageable) break;
      if (found.memory == Range::Memory::kPinned && pointers.is_read_only(at)) return true;
      at = reinterpret_cast<const std::byte*>(found.end);
    }
  }
  return false;
}

}  // namespace kvkernels
