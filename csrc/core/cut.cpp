#include "core/cut.h"

#include <algorithm>
#include <bit>
#include <optional>

#include "core/text.h"

namespace kvkernels {
namespace {

constexpr int64_t kLineBytes = 128;

uint64_t address_of(const std::byte* base) { return reinterpret_cast<uintptr_t>(base); }

int64_t widest_in(uint64_t bits) { return int64_t{1} << std::countr_zero(bits); }

struct Halves {
  Move low;
  Move high;
};

// The halves of the outermost loop, or where there is none of the fragment, at a multiple of `grain`; nothing where
// that is one piece.
std::optional<Halves> halves(const Move& move, int64_t grain) {
  Halves both{move, move};
  int outer = 0;
  while (outer < move.loop_count && move.loops[outer].extent == 1) ++outer;
  if (outer < move.loop_count) {
    const Loop& loop = move.loops[outer];
    const int64_t half = loop.extent / 2;
    both.low.loops[outer].extent = half;
    both.high.loops[outer].extent -= half;
    both.high.src.base += half * loop.src_stride;
    both.high.dst.base += half * loop.dst_stride;
    return both;
  }
  const int64_t half = (move.fragment_bytes / grain + 1) / 2 * grain;
  if (half == 0 || half >= move.fragment_bytes) return std::nullopt;
  both.low.fragment_bytes = half;
  both.high.fragment_bytes -= half;
  both.high.src.base += half;
  both.high.dst.base += half;
  return both;
}

}  // namespace

Cut::Ids Cut::ids_of(const Work& work, int64_t Segment::* column) {
  if (work.device_ids) {
    return {column == &Segment::src ? work.device_ids->src_limit : work.device_ids->dst_limit, 1};
  }
  Ids ids;
  uint64_t bits = 0;
  for (const Segment& segment : work.segments) {
    bits |= static_cast<uint64_t>(segment.*column) | static_cast<uint64_t>(segment.count > 1);
    ids.limit = std::max(ids.limit, segment.*column + segment.count);
  }
  ids.divisor = bits & (~bits + 1);
  return ids;
}

// Bits set in any distance between two of a side's fragments. Raw addresses, which stand as ids, keep their alignment
// by the ids' divisor.
uint64_t Cut::stride_bits(const Side& side, const Ids& ids, const Move& move, int64_t Loop::* stride) {
  uint64_t bits = 0;
  if (ids.limit > side.subblocks) {
    bits = static_cast<uint64_t>(side.block_stride) * (side.subblocks == 1 ? ids.divisor : 1);
  }
  if (side.subblocks > 1) bits |= static_cast<uint64_t>(side.subblock_stride);
  for (int i = 0; i < move.loop_count; ++i) bits |= static_cast<uint64_t>(move.loops[i].*stride);
  return bits;
}

Cut::Cut(const Work& work, const CutRule& rule)
    : src_ids_(ids_of(work, &Segment::src)),
      dst_ids_(ids_of(work, &Segment::dst)),
      is_on_src_(work.direction == Direction::kHostToDevice),
      joins_lines_(rule.joins_lines) {
  uint64_t differences = kVectorBytes;  // between addresses of the two sides, too
  uint64_t ends = 0;
  int64_t longest = 0;
  for (const Move& move : work.moves) {
    differences |= address_of(move.src.base) - address_of(move.dst.base);
    differences |= src_bits(move) | dst_bits(move);
    ends |= address_of(move.src.base) | static_cast<uint64_t>(move.fragment_bytes);
    longest = std::max(longest, move.fragment_bytes);
    has_loops_ = has_loops_ || move.loop_count > 0;
  }
  const int64_t whole_bytes = widest_in(differences | ends);
  element_bytes_ = widest_in(differences);
  if (rule.has_chunks && longest <= kMostChunks * whole_bytes) {
    chunk_bytes_ = element_bytes_ = whole_bytes;
    return;
  }
  is_ragged_ = whole_bytes < element_bytes_;
  tile_bytes_ = rule.tile_elements > 0 ? rule.tile_elements * element_bytes_ : rule.tile_bytes;
  if (rule.shrinks_tiles) tile_bytes_ = std::min(tile_bytes_, (longest + kLineBytes - 1) / kLineBytes * kLineBytes);
}

Shape Cut::shape() const {
  if (chunk_bytes_ == kVectorBytes) return Shape::kRow;
  return chunk_bytes_ > 0 || has_loops_ ? Shape::kBytes : Shape::kPage;
}

// Where a move's fragments differ in how they lie to cache lines, each gets as many tiles as the worst.
int64_t Cut::pieces_per_fragment(const Move& move) const {
  if (chunk_bytes_ > 0) return move.fragment_bytes / chunk_bytes_;
  if (joins_lines_ && move.fragment_bytes <= tile_bytes_) return 1;
  const bool varies = (is_on_src_ ? src_bits(move) : dst_bits(move)) % kLineBytes != 0;
  const uint64_t begin = address_of(is_on_src_ ? move.src.base : move.dst.base);
  const int64_t phase = varies ? kLineBytes - 1 : static_cast<int64_t>(begin % kLineBytes);
  return (move.fragment_bytes + phase + tile_bytes_ - 1) / tile_bytes_;
}

std::vector<Move> Cut::split(const std::vector<Move>& moves, int64_t limit) const {
  std::vector<Move> waiting(moves.rbegin(), moves.rend());
  std::vector<Move> out;
  out.reserve(moves.size());
  while (!waiting.empty()) {
    const Move move = waiting.back();
    waiting.pop_back();
    std::optional<Halves> both;
    if (pieces_per_pair(move) > limit) both = halves(move, std::max(chunk_bytes_, tile_bytes_));
    if (both) {
      waiting.insert(waiting.end(), {both->high, both->low});
    } else {
      out.push_back(move);
    }
  }
  return out;
}

std::string Cut::json() const {
  return text("{\"kernel\": \"", name_of(shape()), has_chunks() ? "\", \"chunk_bytes\": " : "\", \"tile_bytes\": ",
              has_chunks() ? chunk_bytes_ : tile_bytes_, '}');
}

}  // namespace kvkernels
