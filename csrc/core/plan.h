// The words every floor shares: pools, runs, pairs and segments. See docs/design.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvkernels {

// A tensor whose dimension 0 is the block id.
//
//   base            base + block_stride
//   |<- page ->|pad|<- page ->|pad| ...          `blocks` of them
struct Pool {
  std::byte* base;
  int64_t blocks;
  int64_t block_stride;  // bytes from one block to the next; at least page_bytes
  int64_t page_bytes;
};

struct Loop {
  int64_t extent;
  int64_t src_stride;
  int64_t dst_stride;
};

// One row of the `runs` tensor, column by column: a nest of three loops (outermost first, an unused one has
// extent 1) over one fragment size. Offsets are bytes from the start of a page.
struct Run {
  int64_t src_pool;
  int64_t dst_pool;
  int64_t src_offset;
  int64_t dst_offset;
  int64_t fragment_bytes;
  int64_t src_subblock_stride;
  int64_t dst_subblock_stride;
  Loop loops[3];
};

constexpr int kRunColumns = 16;
static_assert(sizeof(Run) == kRunColumns * sizeof(int64_t), "a Run is one row of the runs tensor");

// One copy asked for. With sub-blocks, an id names block id / subblocks, sub-block id % subblocks.
struct Pair {
  int64_t src;
  int64_t dst;
};

// The pairs (src + i, dst + i) for i < count: what coalescing makes of neighbouring pairs.
struct Segment {
  int64_t src;
  int64_t dst;
  int64_t count;
};

// One contiguous copy.
struct Fragment {
  const std::byte* src;
  std::byte* dst;
  int64_t bytes;
};

// A column of ids as a caller gave it: int32 or int64, any stride, on the host or on a device.
// width 0 means that row i's id is i itself (gather's rows of `out`).
struct IdColumn {
  const void* data = nullptr;
  int64_t stride_bytes = 0;
  int width = 0;  // 8, 4 or 0
};

}  // namespace kvkernels
