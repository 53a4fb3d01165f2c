#include "cpu/stretch.h"

#include <algorithm>
#include <vector>

#include "cpu/loops.h"

namespace kvkernels::cpu {
namespace {

// Neighbours along the innermost loop are copied as strips up to this size; pages without loops only below a line.
constexpr int64_t kStripMaxBytes = 256;

// Moves are zipped only if they have loops (random pages of many pools at once lose more on the way to their sources)
// and fragments of these sizes. Strips fill rows as well by themselves.
constexpr int64_t kReadZipMinBytes = 256;
constexpr int64_t kWriteZipMinBytes = kStripMaxBytes + 1;
constexpr int64_t kZipMaxBytes = kPieceBytes;

// One side of moves, and from which size on they are zipped there.
struct ZipSide {
  Side Move::* side;
  int64_t Loop::* stride;
  int64_t min_bytes;
};
constexpr ZipSide kReads = {&Move::src, &Loop::src_stride, kReadZipMinBytes};
constexpr ZipSide kWrites = {&Move::dst, &Loop::dst_stride, kWriteZipMinBytes};

bool zips(const Move& move, const ZipSide& by) {
  return move.loop_count > 0 && move.fragment_bytes >= by.min_bytes && move.fragment_bytes <= kZipMaxBytes;
}

// Whether `next` takes the part of each row of one side that follows the one `move` takes.
bool takes_next_part(const Move& move, const Move& next, const ZipSide& by) {
  const Side& mine = move.*by.side;
  const Side& its = next.*by.side;
  bool same = zips(move, by) && zips(next, by) && its.base == mine.base + move.fragment_bytes &&
              its.block_stride == mine.block_stride && its.subblocks == mine.subblocks &&
              its.subblock_stride == mine.subblock_stride && next.loop_count == move.loop_count;
  for (int i = 0; same && i < move.loop_count; ++i) {
    same = next.loops[i].extent == move.loops[i].extent && next.loops[i].*by.stride == move.loops[i].*by.stride;
  }
  return same;
}

size_t zip_end(const std::vector<Move>& moves, size_t first, const ZipSide& by) {
  size_t last = first + 1;
  while (last < moves.size() && last < first + kZipMost && takes_next_part(moves[last - 1], moves[last], by)) ++last;
  return last;
}

size_t zip_end(const std::vector<Move>& moves, size_t first, bool writes_rows) {
  const size_t reads = zip_end(moves, first, kReads);
  return writes_rows ? std::max(reads, zip_end(moves, first, kWrites)) : reads;
}

}  // namespace

bool goes_in_strips(const Move& move) {
  if (move.merges) return false;
  return move.fragment_bytes < kLineBytes || (move.loop_count > 0 && move.fragment_bytes <= kStripMaxBytes);
}

Stretch stretch_from(const Work& work, size_t first, bool writes_rows) {
  const std::vector<Move>& moves = work.moves;
  Stretch stretch = {first, moves.size(), 0, 0};
  if (work.streaming) {
    size_t last = zip_end(moves, first, writes_rows);
    const bool zipped = last > first + 1;
    while (!zipped && last < moves.size() && zip_end(moves, last, writes_rows) == last + 1) ++last;
    stretch.last = last;
    for (size_t i = first; zipped && i < last; ++i) stretch.row_bytes += moves[i].fragment_bytes;
  }
  for (size_t i = first; i < stretch.last; ++i) stretch.bytes += work.pairs * moves[i].bytes_per_pair();
  return stretch;
}

}  // namespace kvkernels::cpu
