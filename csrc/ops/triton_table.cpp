#include "ops/triton_table.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/divisor.h"

namespace kvkernels {
namespace {

constexpr int64_t kHeadColumns = 32;
constexpr int64_t kMoveColumns = 32;
constexpr int64_t kPairBytes = 2 * sizeof(int64_t);
constexpr int64_t kTileLanes = 256;
constexpr int64_t kLineBytes = 128;
constexpr int64_t kMaxChunks = 64;  // of a fragment: beyond them tiles need less arithmetic a byte
static_assert(sizeof(TritonHead) <= kHeadColumns * sizeof(int64_t));

// Bits set in any distance between two of a side's fragments, of which ids below `limit` choose.
uint64_t stride_bits(const Side& side, int64_t limit, const Move& move, int64_t Loop::* stride) {
  auto bits = limit > side.subblocks ? static_cast<uint64_t>(side.block_stride) : 0;
  if (side.subblocks > 1) bits |= static_cast<uint64_t>(side.subblock_stride);
  for (int i = 0; i < move.loop_count; ++i) bits |= static_cast<uint64_t>(move.loops[i].*stride);
  return bits;
}

uint64_t address_of(const std::byte* base) { return reinterpret_cast<uintptr_t>(base); }

int64_t widest_in(uint64_t bits) { return 1ll << std::countr_zero(bits); }

class TableWriter {
 public:
  TableWriter(const Work& work, TritonHead& head) : work_(work), head_(head) {
    cut();
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
  // Chooses the kernel and the width of its elements, from what is common to all fragments of the call.
  void cut() {
    uint64_t differences = kVectorBytes;  // between addresses of the two sides, too
    uint64_t ends = 0;
    int64_t largest = 0;
    for (const Move& move : work_.moves) {
      differences |= address_of(move.src.base) - address_of(move.dst.base);
      differences |= bits_of(move.src, move) | bits_of(move.dst, move);
      ends |= address_of(move.src.base) | static_cast<uint64_t>(move.fragment_bytes);
      largest = std::max(largest, move.fragment_bytes);
      head_.loop_levels = std::max<int64_t>(head_.loop_levels, move.loop_count);
      head_.has_subblocks |= move.src.subblocks > 1 || move.dst.subblocks > 1;
    }
    const int64_t whole_width = widest_in(differences | ends);
    head_.is_chunked = largest <= kMaxChunks * whole_width;
    head_.width = head_.is_chunked ? whole_width : widest_in(differences);
    head_.is_ragged = whole_width < head_.width;
    head_.kernel = head_.is_chunked && head_.width == kVectorBytes ? 1
                   : head_.is_chunked || head_.loop_levels > 0     ? 2
                                                                   : 0;
    head_.links_host = work_.direction != Direction::kDeviceToDevice;
    head_.cuts_on_src = work_.direction == Direction::kHostToDevice;
    head_.moves = static_cast<int64_t>(work_.moves.size());
  }

  uint64_t bits_of(const Side& side, const Move& move) const {
    return &side == &move.src ? stride_bits(side, head_.src_limit, move, &Loop::src_stride)
                              : stride_bits(side, head_.dst_limit, move, &Loop::dst_stride);
  }

  // Tiles begin on cache lines, so an unaligned fragment may need one more; where a move's fragments differ in
  // alignment, each gets as many as the worst.
  int64_t parts(const Move& move) const {
    if (head_.is_chunked) return move.fragment_bytes / head_.width;
    const Side& side = head_.cuts_on_src ? move.src : move.dst;
    const uint64_t bits = bits_of(side, move);
    const auto phase =
        bits % kLineBytes != 0 ? kLineBytes - 1 : static_cast<int64_t>(address_of(side.base) % kLineBytes);
    const int64_t tile_bytes = kTileLanes * head_.width;
    return (move.fragment_bytes + phase + tile_bytes - 1) / tile_bytes;
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
    const int64_t parts_per_fragment = parts(move);
    table_.insert(table_.end(), {static_cast<int64_t>(address_of(move.src.base)),
                                 static_cast<int64_t>(address_of(move.dst.base)), head_.units, move.fragment_bytes});
    add_divisor(parts_per_fragment);
    for (int i = move.loop_count - 1; i >= move.loop_count - 3; --i) {
      const Loop loop = i >= 0 ? move.loops[i] : Loop{1, 0, 0};
      add_divisor(loop.extent);
      table_.insert(table_.end(), {loop.src_stride, loop.dst_stride});
    }
    add_side(move.src);
    add_side(move.dst);
    head_.units += parts_per_fragment * move.fragments_per_pair() * work_.pairs;
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
  TritonHead& head_;
  std::vector<int64_t> table_;
};

}  // namespace

void TritonHead::take_ids(const IdColumn& src, const IdColumn& dst) {
  ids_on_device = 1;
  src_ids = static_cast<int64_t>(reinterpret_cast<uintptr_t>(src.data));
  src_ids_stride_bytes = src.stride_bytes;
  src_ids_width = src.width;
  dst_ids = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst.data));
  dst_ids_stride_bytes = dst.stride_bytes;
  dst_ids_width = dst.width;
}

std::vector<int64_t> triton_table(const Work& work, TritonHead& head) { return TableWriter(work, head).write(); }

}  // namespace kvkernels
