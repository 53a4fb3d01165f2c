#include "cuda/grid.h"

#include <algorithm>

#include "cuda/bulk_body.h"
#include "cuda/copy_body.h"
#include "cuda/copy_kernel.h"

namespace kvkernels {
namespace {

constexpr int64_t kMostCtaWarps = kMaxThreads / kWarpLanes;
static_assert(kMaxThreads % kWarpLanes == 0, "a CTA is whole warps");
static_assert(kCtasPerSm * kCtaWarps == kMostCtaWarps, "the kernels' registers are those of so many threads an SM");

int64_t divide_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

}  // namespace

int64_t warp_bytes_in_flight(const Work& work, const Cut& cut) {
  int64_t longest = 0;
  int64_t fewest_pieces = kLaneChunks;
  for (const Move& move : work.moves) {
    longest = std::max(longest, move.fragment_bytes);
    fewest_pieces = std::min(fewest_pieces, cut.pieces_per_fragment(move));
  }
  if (work.executor == Executor::kBulk) {
    const auto tile_bytes = static_cast<uint32_t>(cut.tile_bytes());
    return (kGenerations - 1) * bulk_lanes(tile_bytes) * std::min<int64_t>(tile_bytes, longest);
  }
  // Of fragments of fewer chunks a lane copies one after the other.
  if (cut.has_chunks()) return cut.chunk_bytes() * kWarpLanes * (fewest_pieces < kLaneChunks ? 1 : kLaneChunks);
  const int64_t loads = cut.element_bytes() == kVectorBytes ? kTileVectors : kRestDepth;
  return std::min(longest, loads * cut.element_bytes() * kWarpLanes);
}

Grid most_of_grid(const Work& work, const Cut& cut, int sm_budget, const DeviceLimits& limits) {
  const bool is_bulk = work.executor == Executor::kBulk;
  const bool links_host = work.direction != Direction::kDeviceToDevice;
  // A CTA of the bulk kernel has all of an SM's shared memory.
  Grid grid{is_bulk ? limits.sm_count : limits.sm_count * kCtasPerSm, is_bulk ? kBulkWarps : kCtaWarps};
  if (sm_budget > 0) grid.ctas = std::min(sm_budget, limits.sm_count);
  int64_t warps = grid.ctas * kMostCtaWarps;
  if (links_host) {
    const bool is_coherent = limits.reads_pageable && limits.uses_host_page_tables;
    warps = divide_up(is_coherent ? kCoherentLinkBytes : kLinkBytes, warp_bytes_in_flight(work, cut));
    if (sm_budget <= 0) grid.ctas = std::min({grid.ctas, divide_up(warps, grid.cta_warps), kMostLinkCtas});
  }
  if (sm_budget > 0 && !is_bulk) grid.cta_warps = std::clamp(divide_up(warps, grid.ctas), kCtaWarps, kMostCtaWarps);
  return grid;
}

}  // namespace kvkernels
