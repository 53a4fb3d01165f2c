#include "geometry.h"

namespace kvkernels::sanitizer {
namespace {

constexpr int64_t kGapBytes = 32;
constexpr Loop kNoLoop{1, 0, 0};

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

int64_t next_offset(int64_t end, int64_t phase) { return (end == 0 ? 0 : round_up(end) + kGapBytes) + phase; }

PoolShape shape_of(int64_t subblock_bytes, int64_t subblocks) {
  PoolShape shape;
  shape.subblock_stride = subblocks == 1 ? 0 : round_up(subblock_bytes) + kGapBytes;
  shape.page_bytes = (subblocks - 1) * shape.subblock_stride + subblock_bytes;
  // Not where one more sub-block would be: an id would then need no division.
  shape.block_stride = round_up(shape.page_bytes) + 2 * kGapBytes;
  return shape;
}

}  // namespace

Geometry lay_out(const Fragments& fragments, int runs) {
  Geometry geometry;
  geometry.src.subblocks = fragments.src_subblocks;
  geometry.dst.subblocks = fragments.dst_subblocks;
  int64_t src_end[kPools] = {};
  int64_t dst_end[kPools] = {};
  for (int i = 0; i < runs; ++i) {
    const Phase phase = fragments.phases[static_cast<size_t>(i) % fragments.phases.size()];
    Run run{};
    run.src_pool = i % kPools;
    run.dst_pool = i / 2 % kPools;
    run.fragment_bytes = fragments.bytes[static_cast<size_t>(i) % fragments.bytes.size()];
    run.src_offset = next_offset(src_end[run.src_pool], phase.src);
    run.dst_offset = next_offset(dst_end[run.dst_pool], phase.dst);
    for (Loop& loop : run.loops) loop = kNoLoop;
    int64_t span_bytes = run.fragment_bytes;
    if (fragments.has_loops && i % 5 == 0) {
      const int64_t step = round_up(run.fragment_bytes) + kGapBytes;
      run.loops[1] = {2, 3 * step, step};
      run.loops[2] = {3, step, 2 * step};
      span_bytes += 5 * step;
    }
    src_end[run.src_pool] = run.src_offset + span_bytes;
    dst_end[run.dst_pool] = run.dst_offset + span_bytes;
    geometry.runs.push_back(run);
  }
  for (int64_t pool = 0; pool < kPools; ++pool) {
    geometry.src.pools[pool] = shape_of(src_end[pool], fragments.src_subblocks);
    geometry.dst.pools[pool] = shape_of(dst_end[pool], fragments.dst_subblocks);
  }
  for (Run& run : geometry.runs) {
    run.src_subblock_stride = geometry.src.pools[run.src_pool].subblock_stride;
    run.dst_subblock_stride = geometry.dst.pools[run.dst_pool].subblock_stride;
  }
  return geometry;
}

std::vector<Piece> pieces_of(const Geometry& geometry, const std::vector<Pair>& pairs) {
  std::vector<Piece> pieces;
  for (const Run& run : geometry.runs) {
    for (const Pair& pair : pairs) {
      const int64_t src = geometry.src.offset(run.src_pool, pair.src) + run.src_offset;
      const int64_t dst = geometry.dst.offset(run.dst_pool, pair.dst) + run.dst_offset;
      for (int64_t a = 0; a < run.loops[0].extent; ++a) {
        for (int64_t b = 0; b < run.loops[1].extent; ++b) {
          for (int64_t c = 0; c < run.loops[2].extent; ++c) {
            const auto steps = [&](int64_t Loop::* stride) {
              return a * (run.loops[0].*stride) + b * (run.loops[1].*stride) + c * (run.loops[2].*stride);
            };
            pieces.push_back({run.src_pool, run.dst_pool, src + steps(&Loop::src_stride),
                              dst + steps(&Loop::dst_stride), run.fragment_bytes});
          }
        }
      }
    }
  }
  return pieces;
}

}  // namespace kvkernels::sanitizer
