// Lowering: what was asked for (runs x pools x pairs) becomes what an executor is handed (moves x segments).
// This is the only place that decides; explain() prints what stands in Work.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "core/executor.h"
#include "core/pairs.h"
#include "core/plan.h"

namespace kvkernels {

enum class Direction { kHostToHost, kHostToDevice, kDeviceToHost, kDeviceToDevice };

// page:  one fragment a pair and no loop, any size and alignment; a device cuts it into tiles
// row:   fragments of a multiple of 16 bytes, at most 1 KiB, every address 16-byte aligned: bytes/16 lanes each
// bytes: everything else
enum class Shape { kPage, kRow, kBytes };

constexpr int64_t kRowMaxBytes = 1024;
constexpr int64_t kVectorBytes = 16;

std::string_view name_of(Direction);
std::string_view name_of(Shape);

// Where the fragments of one side of a move start, block by block.
struct Side {
  std::byte* base;
  int64_t block_stride;
  int64_t subblock_stride;  // unused where subblocks is 1
  int64_t subblocks;        // 1 where an id's address is base + id * block_stride

  std::byte* at(int64_t id) const {
    return subblocks == 1 ? base + id * block_stride
                          : base + id / subblocks * block_stride + id % subblocks * subblock_stride;
  }
};

// A run bound to its pools, simplified: loops that continue the fragment are folded into it, loops that continue
// each other are one, loops of extent 1 are gone, and the slower side's smallest stride is innermost.
struct Move {
  Side src;
  Side dst;
  int64_t fragment_bytes;
  int loop_count;  // 0 to 3
  Loop loops[3];   // outermost first
  bool merges;     // the pages of a segment lie end to end on both sides: a segment is one fragment

  int64_t fragments_per_pair() const {
    int64_t fragments = 1;
    for (int i = 0; i < loop_count; ++i) fragments *= loops[i].extent;
    return fragments;
  }
  int64_t bytes_per_pair() const { return fragments_per_pair() * fragment_bytes; }
};

// A mapping whose values only the device knows. A pair outside the limits is skipped and recorded (cuda/fault.h).
struct DeviceIds {
  IdColumn src;
  IdColumn dst;
  int64_t rows = 0;
  int64_t src_limit = 0;
  int64_t dst_limit = 0;
  bool skip_negative = false;
  uint32_t op = 1;  // what take_fault reports; never 0
};

// All that an executor needs.
struct Work {
  Executor executor = Executor::kAuto;
  Direction direction = Direction::kHostToHost;
  Shape shape = Shape::kPage;
  std::vector<Move> moves;
  std::vector<Segment> segments;
  std::optional<DeviceIds> device_ids;  // instead of segments, where the ids live on the device
  std::vector<Fragment> fragments;      // instead of moves x segments, where a caller gave raw addresses and sizes
  int64_t pairs = 0;        // sum of the segments' counts; the rows of the mapping where ids live on the device
  int64_t bytes = 0;        // pairs x bytes_per_pair, summed over moves
  int64_t descriptors = 0;  // fragments that a FragmentCursor over everything yields
  int lanes = 1;            // cpu: threads
  bool streaming = false;   // cpu: stores that bypass the caches
};

// The runs bound to their pools. `slow_side_is_dst`: the side slower to reach gets the smallest stride innermost.
std::vector<Move> bind_runs(const std::vector<Run>& runs, const std::vector<Pool>& src, const std::vector<Pool>& dst,
                            int64_t src_subblocks, int64_t dst_subblocks, Direction direction);

struct LowerOptions {
  Executor executor = Executor::kCpu;  // already chosen
  int threads = 1;                     // that the CPU executor may use
  bool soon_read = false;              // the destination is a buffer that the caller reads next, not a pool
  bool writes_rows = false;            // the CPU's streaming stores gain more from order than its loads
};

// What moves come to, whatever the pairs.
struct MoveSums {
  Shape shape = Shape::kPage;
  int64_t bytes_per_pair = 0;
  int64_t fragments_per_pair = 0;     // of the moves that do not merge
  int64_t fragments_per_segment = 0;  // of those that do
};
MoveSums sums_of(const std::vector<Move>& moves);

// Moves and checked pairs to a Work for one executor.
Work lower(std::vector<Move> moves, const MoveSums& sums, PairList pairs, int64_t src_ids, Direction direction,
           const LowerOptions& options);
Work lower(std::vector<Move> moves, PairList pairs, int64_t src_ids, Direction direction, const LowerOptions& options);

// Fragments as a caller listed them, already checked: those that continue each other become one.
Work lower_fragments(std::vector<Fragment> fragments, Direction direction, const LowerOptions& options);

// How many sizes the fragments have, counted no further than kMostSizes + 1.
constexpr int kMostSizes = 8;
int count_sizes(const std::vector<Fragment>& fragments);

// Listed fragments of at most kMostSizes sizes as a kernel takes them: for each size one move, whose ids are addresses.
// All lie below 2^63, as what a device reaches does.
std::vector<Work> addresses_as_ids(const std::vector<Fragment>& fragments, Direction direction);

// The same where the ids live on the device.
Work lower_device_ids(std::vector<Move> moves, const DeviceIds& ids, Direction direction);

}  // namespace kvkernels
