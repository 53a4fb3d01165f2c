#include "cuda/kernel.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>

#include "cuda/bulk_body.h"
#include "cuda/bulk_kernel.h"
#include "cuda/error.h"
#include "cuda/fault.h"

namespace kvkernels {
namespace {

constexpr int64_t kMaxLanes = 64;  // of a fragment in the chunk kernels: 1 KiB in 16-byte chunks
constexpr int64_t kWarpsPerCta = kMaxThreads / kWarpLanes;  // at most
static_assert(kMaxThreads % kWarpLanes == 0, "a CTA is whole warps");
constexpr int64_t kMinWarpsPerCta = 4;  // small copies are spread over the budget's SMs rather than packed into one

// Bits set in any distance between two of a side's fragments. `id_scale` divides every id, so raw addresses that stand
// as ids of a stride of 1 keep their alignment.
uint64_t stride_bits(const Side& side, const Move& move, int64_t Loop::* stride, uint64_t id_scale) {
  uint64_t bits = static_cast<uint64_t>(side.block_stride);
  if (side.subblocks > 1) {
    bits |= static_cast<uint64_t>(side.subblock_stride);
  } else {
    bits *= id_scale;
  }
  for (int i = 0; i < move.loop_count; ++i) bits |= static_cast<uint64_t>(move.loops[i].*stride);
  return bits;
}

// The largest power of two that divides every id of a column; 0 where all are 0, and 1 where nothing is known.
uint64_t id_scale(const Work& work, int64_t Segment::* column) {
  if (work.segments.empty()) return 1;
  uint64_t bits = 0;
  for (const Segment& segment : work.segments) {
    bits |= static_cast<uint64_t>(segment.*column) | static_cast<uint64_t>(segment.count > 1);
  }
  return bits & (~bits + 1);
}

// How a move is cut: into chunks of one width where its fragments are small, else into tiles.
class Cutter {
 public:
  explicit Cutter(const Work& work)
      : cut_on_src_(work.direction == Direction::kHostToDevice),
        src_scale_(id_scale(work, &Segment::src)),
        dst_scale_(id_scale(work, &Segment::dst)),
        is_bulk_(work.executor == Executor::kBulk) {
    uint64_t bits = kVectorBytes;
    int64_t largest = 0;
    for (const Move& move : work.moves) {
      bits |= reinterpret_cast<uintptr_t>(move.src.base) | reinterpret_cast<uintptr_t>(move.dst.base) | src_bits(move) |
              dst_bits(move) | static_cast<uint64_t>(move.fragment_bytes);
      largest = std::max(largest, move.fragment_bytes);
      has_loops_ = has_loops_ || move.loop_count > 0;
    }
    const int64_t width = 1ll << std::countr_zero(bits);
    if (is_bulk_) {
      tile_bytes_ = bulk_tile_bytes(largest);
    } else if (largest <= kMaxLanes * width) {
      chunk_width_ = width;
    }
  }

  bool cut_on_src() const { return cut_on_src_; }
  int64_t chunk_width() const { return chunk_width_; }
  int64_t tile_bytes() const { return tile_bytes_; }
  int64_t unit_bytes() const { return is_bulk_ ? tile_bytes_ : chunk_width_; }  // as Head has it

  KernelVariant variant() const {
    if (is_bulk_) return KernelVariant::kBulk;
    if (chunk_width_ == kVectorBytes) return KernelVariant::kRow;
    return chunk_width_ > 0 || has_loops_ ? KernelVariant::kBytes : KernelVariant::kPage;
  }

  // Chunks or tiles of one fragment. Tiles begin on cache lines, so an unaligned fragment may need one more; where
  // fragments differ in alignment, each gets as many as the worst.
  int64_t parts(const Move& move) const {
    if (chunk_width_ > 0) return move.fragment_bytes / chunk_width_;
    if (move.fragment_bytes <= tile_bytes_) return 1;
    const Side& side = cut_on_src_ ? move.src : move.dst;
    const bool varies = (cut_on_src_ ? src_bits(move) : dst_bits(move)) % kLineBytes != 0;
    const int64_t phase =
        varies ? kLineBytes - 1 : static_cast<int64_t>(reinterpret_cast<uintptr_t>(side.base) % kLineBytes);
    return (move.fragment_bytes + phase + tile_bytes_ - 1) / tile_bytes_;
  }

  int64_t units_per_pair(const Move& move) const { return parts(move) * move.fragments_per_pair(); }

  int64_t tiles(const Move& move, int64_t pairs) const {
    const int64_t units = units_per_pair(move) * pairs;
    return chunk_width_ > 0 ? (units + kTileChunks - 1) / kTileChunks : units;
  }

 private:
  uint64_t src_bits(const Move& move) const { return stride_bits(move.src, move, &Loop::src_stride, src_scale_); }
  uint64_t dst_bits(const Move& move) const { return stride_bits(move.dst, move, &Loop::dst_stride, dst_scale_); }

  bool cut_on_src_;
  uint64_t src_scale_;
  uint64_t dst_scale_;
  bool is_bulk_;
  bool has_loops_ = false;
  int64_t chunk_width_ = 0;
  int64_t tile_bytes_ = kTileBytes;
};

// Splits a move until one pair of it has at most `limit` units.
void split(const Move& move, const Cutter& cutter, int64_t limit, std::vector<Move>& out) {
  if (cutter.units_per_pair(move) <= limit) return out.push_back(move);
  Move low = move;
  Move high = move;
  const auto loop = std::find_if(move.loops, move.loops + move.loop_count, [](const Loop& l) { return l.extent > 1; });
  if (loop != move.loops + move.loop_count) {
    const int64_t half = loop->extent / 2;
    low.loops[loop - move.loops].extent = half;
    high.loops[loop - move.loops].extent -= half;
    high.src.base += half * loop->src_stride;
    high.dst.base += half * loop->dst_stride;
  } else {
    const int64_t grain = cutter.chunk_width() > 0 ? cutter.chunk_width() : cutter.tile_bytes();
    const int64_t half = (move.fragment_bytes / grain + 1) / 2 * grain;
    if (half == 0 || half >= move.fragment_bytes) return out.push_back(move);
    low.fragment_bytes = half;
    high.fragment_bytes -= half;
    high.src.base += half;
    high.dst.base += half;
  }
  split(low, cutter, limit, out);
  split(high, cutter, limit, out);
}

FormSide form_side(const Side& side, const Move& move, int64_t Loop::* stride) {
  FormSide form{};
  form.block_stride = side.block_stride;
  form.subblock_stride = side.subblocks > 1 ? side.subblock_stride : 0;
  form.subblocks = make_wide_divisor(side.subblocks);
  for (int i = 0; i < move.loop_count; ++i) form.loop_strides[i] = move.loops[move.loop_count - 1 - i].*stride;
  return form;
}

Form make_form(const Move& move, const Cutter& cutter) {
  Form form{};
  form.src = form_side(move.src, move, &Loop::src_stride);
  form.dst = form_side(move.dst, move, &Loop::dst_stride);
  form.fragment_bytes = move.fragment_bytes;
  form.units_per_pair = static_cast<uint32_t>(cutter.units_per_pair(move));
  form.loop_count = static_cast<uint32_t>(move.loop_count);
  form.parts = make_divisor(cutter.parts(move));
  for (int i = 0; i < move.loop_count; ++i) form.extents[i] = make_divisor(move.loops[move.loop_count - 1 - i].extent);
  return form;
}

static_assert(std::has_unique_object_representations_v<Form>, "forms are compared byte by byte");

// The forms of a group of moves. Moves that share a form mostly follow each other or alternate: looking a few back
// keeps this linear.
struct MoveTables {
  std::vector<Form> forms;
  std::vector<MoveEntry> moves;

  size_t bytes() const { return forms.size() * sizeof(Form) + moves.size() * sizeof(MoveEntry); }

  void add(const Move& move, const Form& form) {
    constexpr size_t kLookBack = 8;
    size_t at = forms.size();
    for (size_t back = 1; back <= std::min(kLookBack, forms.size()); ++back) {
      if (std::memcmp(&forms[forms.size() - back], &form, sizeof form) == 0) at = forms.size() - back;
    }
    if (at == forms.size()) forms.push_back(form);
    moves.push_back({move.src.base, move.dst.base, 0, static_cast<uint32_t>(at)});
  }
};

struct Ids {
  std::vector<Pair> pairs;
  uint32_t width = 0;

  explicit Ids(const Work& work) {
    pairs.reserve(static_cast<size_t>(work.pairs));
    int64_t largest = 0;
    for (const Segment& segment : work.segments) {
      for (int64_t i = 0; i < segment.count; ++i) pairs.push_back({segment.src + i, segment.dst + i});
      largest = std::max({largest, segment.src + segment.count, segment.dst + segment.count});
    }
    width = largest <= INT32_MAX ? 4 : 8;
  }

  void append(size_t begin, size_t count, std::vector<std::byte>& tables) const {
    const size_t at = tables.size();
    tables.resize(at + count * 2 * width);
    if (width == 8) {
      if (count > 0) std::memcpy(tables.data() + at, &pairs[begin], count * sizeof(Pair));
      return;
    }
    for (size_t i = 0; i < count; ++i) {
      const int32_t pair[2] = {static_cast<int32_t>(pairs[begin + i].src), static_cast<int32_t>(pairs[begin + i].dst)};
      std::memcpy(tables.data() + at + i * sizeof pair, pair, sizeof pair);
    }
  }
};

class Planner {
 public:
  Planner(const Work& work, const DeviceIds* device_ids, int sm_budget, const DeviceLimits& limits, bool capturing)
      : work_(work), device_ids_(device_ids), limits_(limits), capturing_(capturing), cutter_(work), ids_(work) {
    const bool links_host = work.direction != Direction::kDeviceToDevice;
    const int host_link_ctas = is_bulk() ? kBulkHostLinkCtas : kHostLinkCtas;
    budget_ = sm_budget > 0 ? sm_budget : links_host ? host_link_ctas : limits.sm_count;
    budget_ = std::min(budget_, limits.sm_count);
    id_width_ = device_ids ? 0 : ids_.width;
  }

  KernelPlan plan() {
    plan_.shape = work_.shape;
    plan_.variant = cutter_.variant();
    if (is_bulk())
      plan_.shared_bytes = static_cast<int64_t>(bulk_shared_bytes(static_cast<uint32_t>(cutter_.unit_bytes())));
    plan_.bytes = work_.bytes;
    if (work_.bytes == 0) return plan_;
    std::vector<Move> moves;
    for (const Move& move : work_.moves) split(move, cutter_, limits_.max_items, moves);
    for (size_t begin = 0; begin < moves.size();) {
      MoveTables tables;
      const size_t end = take_group(moves, begin, tables);
      launch_group(std::span(moves).subspan(begin, end - begin), tables, begin == 0);
      begin = end;
    }
    size_grids();
    return plan_;
  }

 private:
  bool is_bulk() const { return work_.executor == Executor::kBulk; }

  int64_t group_units(std::span<const Move> moves) const {
    int64_t units = 0;
    for (const Move& move : moves) units += cutter_.units_per_pair(move);
    return units;
  }

  size_t pair_bytes() const { return static_cast<size_t>(work_.pairs) * 2 * id_width_; }

  // Takes as many moves as one launch can have: by items and, while capturing, by what the parameters hold, of which
  // pairs keep half.
  size_t take_group(const std::vector<Move>& moves, size_t begin, MoveTables& tables) const {
    int64_t units = 0;
    size_t end = begin;
    for (; end < moves.size(); ++end) {
      const int64_t more = cutter_.units_per_pair(moves[end]);
      if (end > begin && units + more > limits_.max_items) break;
      const size_t after = tables.bytes() + sizeof(Form) + sizeof(MoveEntry);
      const size_t room = kLargeTables - std::min(pair_bytes(), kLargeTables / 2);
      if (capturing_ && after > room) break;
      tables.add(moves[end], make_form(moves[end], cutter_));
      units += more;
    }
    return end;
  }

  void launch_group(std::span<const Move> moves, MoveTables& tables, bool records) {
    int64_t pairs_per_launch = std::max<int64_t>(1, limits_.max_items / group_units(moves));
    if (capturing_ && id_width_ > 0) {
      const size_t room = (kLargeTables - tables.bytes()) / (2 * id_width_);
      pairs_per_launch = std::min(pairs_per_launch, static_cast<int64_t>(room));
    }
    for (int64_t begin = 0; begin < work_.pairs; begin += pairs_per_launch) {
      add_launch(moves, tables, begin, std::min(pairs_per_launch, work_.pairs - begin), records);
    }
  }

  void add_launch(std::span<const Move> moves, MoveTables& tables, int64_t begin, int64_t pairs, bool records) {
    KernelLaunch launch{};
    Head& head = launch.head;
    const int64_t first_tiles = cutter_.tiles(moves[0], pairs);
    bool are_alike = true;
    int64_t tiles = 0;
    for (size_t i = 0; i < moves.size(); ++i) {
      const int64_t more = cutter_.tiles(moves[i], pairs);
      tables.moves[i].first_tile = static_cast<uint32_t>(tiles);
      tiles += more;
      are_alike = are_alike && more == first_tiles;
    }
    head.moves_offset = static_cast<uint32_t>(tables.forms.size() * sizeof(Form));
    head.pairs_offset = static_cast<uint32_t>(tables.bytes());
    head.moves = static_cast<uint32_t>(moves.size());
    head.pairs = static_cast<uint32_t>(pairs);
    head.tiles = static_cast<uint32_t>(tiles);
    if (are_alike) head.tiles_per_move = make_divisor(first_tiles);
    head.id_width = id_width_;
    head.unit_bytes = static_cast<uint32_t>(cutter_.unit_bytes());
    head.cut_on_src = cutter_.cut_on_src();
    head.first_row = begin;
    if (device_ids_) {
      head.src_ids = device_ids_->src;
      head.dst_ids = device_ids_->dst;
      head.src_limit = device_ids_->src_limit;
      head.dst_limit = device_ids_->dst_limit;
      head.skip_negative = device_ids_->skip_negative;
      head.op = records ? device_ids_->op : 0;
    }
    launch.tables.resize(tables.bytes());
    std::memcpy(launch.tables.data(), tables.forms.data(), head.moves_offset);
    std::memcpy(launch.tables.data() + head.moves_offset, tables.moves.data(), moves.size() * sizeof(MoveEntry));
    if (id_width_ > 0) ids_.append(static_cast<size_t>(begin), static_cast<size_t>(pairs), launch.tables);

    ++plan_.launches;
    plan_.tiles += tiles;
    plan_.descriptors += static_cast<int64_t>(moves.size()) + pairs;
    plan_.table_bytes += static_cast<int64_t>(launch.tables.size());
    plan_.uploads = plan_.uploads || launch.tables.size() > kLargeTables;
    plan_.parts.push_back(std::move(launch));
  }

  // Never more CTAs than tiles need; few tiles are spread, in CTAs of a few warps.
  void size_grids() {
    int64_t most = 0;
    for (const KernelLaunch& launch : plan_.parts) most = std::max<int64_t>(most, launch.head.tiles);
    const int64_t spread = std::min<int64_t>(budget_, (most + kMinWarpsPerCta - 1) / kMinWarpsPerCta);
    const int64_t most_warps = is_bulk() ? kBulkWarps : kWarpsPerCta;
    const int64_t warps = std::clamp((most + spread - 1) / spread, kMinWarpsPerCta, most_warps);
    plan_.threads = static_cast<int>(warps * kWarpLanes);
    for (KernelLaunch& launch : plan_.parts) {
      launch.ctas = static_cast<int>(std::min<int64_t>(budget_, (launch.head.tiles + warps - 1) / warps));
      plan_.ctas = std::max(plan_.ctas, launch.ctas);
    }
  }

  const Work& work_;
  const DeviceIds* device_ids_;
  const DeviceLimits& limits_;
  const bool capturing_;
  const Cutter cutter_;
  const Ids ids_;
  int budget_;
  uint32_t id_width_;
  KernelPlan plan_;
};

}  // namespace

KernelPlan plan_kernel(const Work& work, const DeviceIds* ids, int sm_budget, const DeviceLimits& limits,
                       bool capturing) {
  return Planner(work, ids, sm_budget, limits, capturing).plan();
}

Issued run_kernel(const KernelPlan& plan, const Upload& upload, cudaStream_t stream) {
  Issued issued;
  if (plan.launches == 0) return issued;
  std::optional<FaultWord> word;
  if (plan.parts[0].head.id_width == 0) word.emplace(current_device());
  Fault* const fault = word ? word->get() : nullptr;
  const std::byte* uploaded = nullptr;
  if (plan.uploads) {
    std::vector<std::byte> together;
    for (const KernelLaunch& launch : plan.parts) {
      together.resize((together.size() + 15) / 16 * 16);
      together.insert(together.end(), launch.tables.begin(), launch.tables.end());
    }
    uploaded = static_cast<const std::byte*>(upload(together.data(), together.size()));
  }
  size_t at = 0;
  const auto launch_part = [&](const KernelLaunch& launch) {
    Head head = launch.head;
    head.fault = head.op != 0 ? fault : nullptr;
    if (plan.uploads) {
      at = (at + 15) / 16 * 16;
      head.tables = uploaded + at;
      at += launch.tables.size();
    }
    const std::byte* tables = plan.uploads ? nullptr : launch.tables.data();
    if (plan.variant == KernelVariant::kBulk) {
      launch_bulk(head, tables, launch.tables.size(), launch.ctas, stream);
    } else {
      check_copy(launch_copy(plan.variant, head, tables, launch.tables.size(), launch.ctas, plan.threads, stream),
                 "cudaLaunchKernelExC");
    }
    ++issued.launches;
    issued.descriptors += head.moves + head.pairs;
  };
  try {
    for (const KernelLaunch& launch : plan.parts) launch_part(launch);
  } catch (...) {
    // Those that run write the word all the same.
    if (word && issued.launches > 0) word->note_launches(stream);
    throw;
  }
  if (word) word->note_launches(stream);
  issued.bytes = plan.bytes;
  return issued;
}

}  // namespace kvkernels
