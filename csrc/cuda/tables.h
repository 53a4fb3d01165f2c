// The tables that a launch reads: written by kernel.cpp, read by every thread.
//
//   tables                      + moves_offset                  + pairs_offset
//   |                           |                               |
//   | Form | Form | ... | Form  | MoveEntry | ... | MoveEntry   | src dst | src dst | ... | src dst |
//
// Forms are shared: 80 layers of one shape are 80 entries and one form. The pairs are int32 or int64, and are not there
// where ids are on the device (Head::src_ids, dst_ids).
//
// A launch is `tiles` tiles, a warp's work each, move after move. A move's tiles are cut from its units, which are
// tiles or chunks, from outermost to innermost:
//
//   tiles   | move 0                                    | move 1 ...
//           0                                           moves[1].first_tile
//   units   | pair 0                        | pair 1 ... |
//           | loop 2, 1, 0: fragment 0 | fragment 1 ...  |      units_per_pair = parts x the loops' extents
//           | part 0 | part 1 | ...    |                        `parts` of a fragment
//
// A tile kernel's unit is a tile; a chunk kernel's is a chunk of unit_bytes, and kTileChunks of them are a tile, of
// which the last of a move may have fewer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/plan.h"
#include "cuda/divisor.h"
#include "cuda/host_device.h"

namespace kvkernels {

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kLineBytes = 128;
constexpr int kTileVectors = 8;  // 16-byte loads that a lane of the tile kernels has in flight before its first store
constexpr uint32_t kTileBytes = kWarpLanes * kTileVectors * 16;
constexpr int kLaneChunks = 4;  // chunks that a lane of the chunk kernels has in flight before its first store
constexpr uint32_t kTileChunks = kWarpLanes * kLaneChunks;

struct FormSide {
  int64_t block_stride;
  int64_t subblock_stride;
  WideDivisor subblocks;
  int64_t loop_strides[3];

  KVKERNELS_HOST_DEVICE int64_t offset(int64_t id) const {
    if (subblocks.divisor == 1) return id * block_stride;
    const int64_t block = subblocks.divide(id);
    return block * block_stride + (id - block * subblocks.divisor) * subblock_stride;
  }
};

// What many moves share: all but where they start. Loops are innermost first.
struct Form {
  FormSide src;
  FormSide dst;
  int64_t fragment_bytes;
  uint32_t units_per_pair;  // tiles or chunks
  uint32_t loop_count;
  Divisor parts;  // tiles or chunks of one fragment
  Divisor extents[3];
};

struct MoveEntry {
  const std::byte* src;
  std::byte* dst;
  uint32_t first_tile;
  uint32_t form;
};

// Per device: what ids on the device got wrong since the last check. All zero means nothing; the row is kept
// complemented so that zeroed memory is the empty state and the lowest row is the maximum.
struct Fault {
  unsigned long long count;
  unsigned long long complemented_row;
  unsigned int op;
  unsigned int unused;
};

// Everything a launch needs besides its tables, which are Form[], MoveEntry[] and, where ids are not on the device,
// pairs of ids as int32[2] or int64[2].
struct Head {
  const std::byte* tables;  // unused where the tables ride in the parameters
  uint32_t moves_offset;
  uint32_t pairs_offset;
  uint32_t moves;
  uint32_t pairs;
  uint32_t tiles;
  Divisor tiles_per_move;  // its divisor is 0 where moves differ
  uint32_t id_width;       // of the pairs in the tables; 0 where ids are on the device
  uint32_t unit_bytes;     // of a chunk: 16, 8, 4, 2 or 1; of a tile of the bulk kernel; 0 in the tile kernels
  uint32_t cut_on_src;     // tiles begin on cache lines of the source, not of the destination
  IdColumn src_ids;
  IdColumn dst_ids;
  int64_t first_row;
  int64_t src_limit;
  int64_t dst_limit;
  uint32_t skip_negative;
  uint32_t op;
  Fault* fault;  // null where another launch of the call records the same pairs
};

}  // namespace kvkernels
