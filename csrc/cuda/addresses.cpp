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

IdRanges id_ranges(const Work& work, const DeviceIds* ids) {
  if (ids) {
    const auto of = [&](const IdColumn& column, int64_t limit) {
      return IdRange{0, (column.width == 0 ? std::min(limit, ids->n) : limit) - 1};
    };
    return {of(ids->src, ids->src_limit), of(ids->dst, ids->dst_limit)};
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

ptrdiff_t device_offset(const char* name, const std::byte* begin, const std::byte* end, const DeviceLimits& limits,
                        PointerMap& pointers) {
  const Range first = pointers.find(begin);
  for (const std::byte* at = begin; at < end;) {
    const Range range = pointers.find(at);
    if (range.memory == Range::Memory::kPageable) {
      if (!limits.reads_pageable) refuse(name, "pageable host memory, which the device cannot read");
      // Where the device reads any host memory, it does so at the host's address.
      if (first.device_offset != 0) refuse(name, "host memory that the device sees at more than one offset");
      return 0;
    }
    if (!range.mapped) refuse(name, "host memory that is not mapped for the device");
    if (range.device_offset != first.device_offset) {
      refuse(name, "host memory that the device sees at more than one offset");
    }
    at = reinterpret_cast<const std::byte*>(range.end);
  }
  return first.device_offset;
}

void map_side(const char* name, Side& side, const Move& move, int64_t Loop::* stride, const IdRange& ids,
              const DeviceLimits& limits, PointerMap& pointers) {
  if (ids.high < ids.low) return;
  const Span span = touched(side, move, stride, ids);
  side.base += device_offset(name, side.base + span.low, side.base + span.high, limits, pointers);
}

}  // namespace

void map_for_device(Work& work, const DeviceIds* ids, const DeviceLimits& limits, PointerMap& pointers,
                    const SideNames& names) {
  const IdRanges ranges = id_ranges(work, ids);
  for (Move& move : work.moves) {
    if (work.direction == Direction::kHostToDevice) {
      map_side(names.src, move.src, move, &Loop::src_stride, ranges.src, limits, pointers);
    }
    if (work.direction == Direction::kDeviceToHost) {
      map_side(names.dst, move.dst, move, &Loop::dst_stride, ranges.dst, limits, pointers);
    }
  }
}

}  // namespace kvkernels
