#include "ops/triton_table.h"

#include <algorithm>
#include <cstring>

#include "core/cut.h"
#include "cuda/divisor.h"

namespace kvkernels {
namespace {

constexpr int64_t kHeadColumns = 32;
constexpr int64_t kMoveColumns = 32;
constexpr int64_t kPairBytes = 2 * sizeof(int64_t);
// Triton's kernels have one width of elements for a call.
constexpr CutRule kRule{.tile_elements = 256, .joins_lines = false};
static_assert(sizeof(TritonHead) <= kHeadColumns * sizeof(int64_t));

int64_t address_of(const std::byte* base) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(base)); }

class TableWriter {
 public:
  TableWriter(const Work& work, TritonHead& head) : work_(work), cut_(work, kRule), head_(head) {
    fill_head();
    table_.reserve(static_cast<size_t>(kHeadColumns + head.moves * kMoveColumns + 2 * work.pairs));
    table_.resize(kHeadColumns);
  }

  std::vector<int64_t> write() {
    for (const Move& move : work_.moves) add(move);
    if (!head_.ids_on_device) add_pairs();
    std::memcpy(table_.data(), &head_, sizeof head_);
    return std::move(table_);
  }

 private:
  void fill_head() {
    static_assert(static_cast<int>(Shape::kPage) == 0 && static_cast<int>(Shape::kRow) == 1 &&
                      static_cast<int>(Shape::kBytes) == 2,
                  "as TritonHead::kernel counts them");
    head_.kernel = static_cast<int64_t>(cut_.shape());
    head_.width = cut_.element_bytes();
    head_.is_chunked = cut_.has_chunks();
    head_.is_ragged = cut_.is_ragged();
    head_.links_host = work_.direction != Direction::kDeviceToDevice;
    head_.cuts_on_src = cut_.is_on_src();
    head_.moves = static_cast<int64_t>(work_.moves.size());
    for (const Move& move : work_.moves) {
      head_.loop_levels = std::max<int64_t>(head_.loop_levels, move.loop_count);
      head_.has_subblocks |= move.src.subblocks > 1 || move.dst.subblocks > 1;
    }
    if (work_.device_ids) fill_ids(*work_.device_ids);
  }

  void fill_ids(const DeviceIds& ids) {
    head_.ids_on_device = 1;
    head_.src_ids = static_cast<int64_t>(reinterpret_cast<uintptr_t>(ids.src.data));
    head_.src_ids_stride_bytes = ids.src.stride_bytes;
    head_.src_ids_width = ids.src.width;
    head_.dst_ids = static_cast<int64_t>(reinterpret_cast<uintptr_t>(ids.dst.data));
    head_.dst_ids_stride_bytes = ids.dst.stride_bytes;
    head_.dst_ids_width = ids.dst.width;
    head_.src_limit = ids.src_limit;
    head_.dst_limit = ids.dst_limit;
    head_.skips_negative = ids.skip_negative;
    head_.fault_op = ids.op;
  }

  // The kernels multiply twice the number that is divided, so that a divisor of 1 is no exception.
  void add_divisor(int64_t divisor) {
    const WideDivisor wide = make_wide_divisor(divisor);
    const uint64_t multiplier = divisor == 1 ? 1ull << 63 : wide.multiplier;
    table_.insert(table_.end(),
                  {divisor, static_cast<int64_t>(multiplier), divisor == 1 ? 0 : static_cast<int64_t>(wide.shift) + 1});
  }

  void add_side(const Side& side) {
    table_.insert(table_.end(), {side.block_stride, side.subblock_stride});
    add_divisor(side.subblocks);
  }

  void add(const Move& move) {
    const int64_t pieces = cut_.pieces_per_fragment(move);
    table_.insert(table_.end(),
                  {address_of(move.src.base), address_of(move.dst.base), head_.pieces, move.fragment_bytes});
    add_divisor(pieces);
    for (int i = move.loop_count - 1; i >= move.loop_count - 3; --i) {
      const Loop loop = i >= 0 ? move.loops[i] : Loop{1, 0, 0};
      add_divisor(loop.extent);
      table_.insert(table_.end(), {loop.src_stride, loop.dst_stride});
    }
    add_side(move.src);
    add_side(move.dst);
    head_.pieces += cut_.pieces_per_pair(move) * work_.pairs;
  }

  void add_pairs() {
    const auto begin = static_cast<int64_t>(table_.size() * sizeof(int64_t));
    head_.src_ids = begin;
    head_.dst_ids = begin + kPairBytes / 2;
    head_.src_ids_stride_bytes = head_.dst_ids_stride_bytes = kPairBytes;
    head_.src_ids_width = head_.dst_ids_width = kPairBytes / 2;
    for (const Segment& segment : work_.segments) {
      for (int64_t i = 0; i < segment.count; ++i) table_.insert(table_.end(), {segment.src + i, segment.dst + i});
    }
  }

  const Work& work_;
  const Cut cut_;
  TritonHead& head_;
  std::vector<int64_t> table_;
};

}  // namespace

std::vector<int64_t> triton_table(const Work& work, TritonHead& head) { return TableWriter(work, head).write(); }

}  // namespace kvkernels
