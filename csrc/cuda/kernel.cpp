#include "cuda/kernel.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>

#include "core/cut.h"
#include "cuda/bulk_body.h"
#include "cuda/bulk_kernel.h"
#include "cuda/error.h"
#include "cuda/fault.h"
#include "cuda/grid.h"

namespace kvkernels {
namespace {

constexpr int64_t kMinCtaWarps = 4;  // small copies are spread over the grid's SMs rather than packed into one

// What the kernels of work.executor take.
CutRule rule_of(const Work& work) {
  if (work.executor != Executor::kBulk) return {.tile_bytes = kTileBytes};
  return {.has_chunks = false, .tile_bytes = kBulkTileBytes, .shrinks_tiles = true};
}

KernelVariant variant_of(const Work& work, const Cut& cut) {
  if (work.executor == Executor::kBulk) return KernelVariant::kBulk;
  switch (cut.shape()) {
    case Shape::kPage:
      return KernelVariant::kPage;
    case Shape::kRow:
      return KernelVariant::kRow;
    default:
      return KernelVariant::kBytes;
  }
}

FormSide form_side(const Side& side, const Move& move, int64_t Loop::* stride) {
  FormSide form{};
  form.block_stride = side.block_stride;
  form.subblock_stride = side.subblocks > 1 ? side.subblock_stride : 0;
  form.subblocks = make_wide_divisor(side.subblocks);
  for (int i = 0; i < move.loop_count; ++i) form.loop_strides[i] = move.loops[move.loop_count - 1 - i].*stride;
  return form;
}

Form make_form(const Move& move, int64_t units_per_pair, const Cut& cut) {
  Form form{};
  form.src = form_side(move.src, move, &Loop::src_stride);
  form.dst = form_side(move.dst, move, &Loop::dst_stride);
  form.fragment_bytes = move.fragment_bytes;
  form.units_per_pair = static_cast<uint32_t>(units_per_pair);
  form.loop_count = static_cast<uint32_t>(move.loop_count);
  form.parts = make_divisor(cut.pieces_per_fragment(move));
  for (int i = 0; i < move.loop_count; ++i) form.extents[i] = make_divisor(move.loops[move.loop_count - 1 - i].extent);
  return form;
}

// A move, or a part of one, and how many pieces it has.
struct CutMove {
  const Move* move;
  int64_t pieces_per_pair;

  // Where both begin is no part of a form.
  bool has_form_of(const CutMove& other) const {
    const auto are_alike = [](const Side& a, const Side& b) {
      return a.block_stride == b.block_stride && a.subblock_stride == b.subblock_stride && a.subblocks == b.subblocks;
    };
    return pieces_per_pair == other.pieces_per_pair && move->fragment_bytes == other.move->fragment_bytes &&
           move->loop_count == other.move->loop_count && are_alike(move->src, other.move->src) &&
           are_alike(move->dst, other.move->dst) &&
           std::memcmp(move->loops, other.move->loops, static_cast<size_t>(move->loop_count) * sizeof(Loop)) == 0;
  }
};

// The forms of a group of moves. Moves that share a form mostly follow each other or alternate: looking a few back
// keeps this linear.
struct MoveTables {
  std::vector<CutMove> firsts;  // by form
  std::vector<Form> forms;
  std::vector<MoveEntry> moves;

  size_t bytes() const { return forms.size() * sizeof(Form) + moves.size() * sizeof(MoveEntry); }

  void add(const CutMove& cut_move, const Cut& cut) {
    constexpr size_t kLookBack = 8;
    size_t at = forms.size();
    const size_t oldest = at - std::min(kLookBack, at);
    while (at > oldest && !cut_move.has_form_of(firsts[at - 1])) --at;
    if (at == oldest) {
      at = forms.size();
      firsts.push_back(cut_move);
      forms.push_back(make_form(*cut_move.move, cut_move.pieces_per_pair, cut));
    } else {
      --at;
    }
    moves.push_back({cut_move.move->src.base, cut_move.move->dst.base, 0, static_cast<uint32_t>(at)});
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
  Planner(const Work& work, int sm_budget, const DeviceLimits& limits, bool capturing)
      : work_(work),
        limits_(limits),
        capturing_(capturing),
        cut_(work, rule_of(work)),
        ids_(work),
        sm_budget_(sm_budget) {
    id_width_ = work.device_ids ? 0 : ids_.width;
  }

  KernelPlan plan() {
    plan_.cut = cut_.json();
    plan_.variant = variant_of(work_, cut_);
    if (is_bulk())
      plan_.shared_bytes = static_cast<int64_t>(bulk_shared_bytes(static_cast<uint32_t>(cut_.tile_bytes())));
    plan_.bytes = work_.bytes;
    if (work_.bytes == 0) return plan_;
    std::vector<CutMove> moves = cut_moves(work_.moves);
    std::vector<Move> parts;
    if (std::any_of(moves.begin(), moves.end(),
                    [&](const CutMove& move) { return move.pieces_per_pair > limits_.max_items; })) {
      parts = cut_.split(work_.moves, limits_.max_items);
      moves = cut_moves(parts);
    }
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

  std::vector<CutMove> cut_moves(const std::vector<Move>& moves) const {
    std::vector<CutMove> out;
    out.reserve(moves.size());
    for (const Move& move : moves) out.push_back({&move, cut_.pieces_per_pair(move)});
    return out;
  }

  static int64_t group_pieces(std::span<const CutMove> moves) {
    int64_t pieces = 0;
    for (const CutMove& move : moves) pieces += move.pieces_per_pair;
    return pieces;
  }

  // A warp takes a tile, or so many chunks, at a time.
  int64_t tiles_of(const CutMove& move, int64_t pairs) const {
    const int64_t pieces = move.pieces_per_pair * pairs;
    return cut_.has_chunks() ? (pieces + kTileChunks - 1) / kTileChunks : pieces;
  }

  size_t pair_bytes() const { return static_cast<size_t>(work_.pairs) * 2 * id_width_; }

  // Takes as many moves as one launch can have: by pieces and, while capturing, by what the parameters hold, of which
  // pairs keep half.
  size_t take_group(const std::vector<CutMove>& moves, size_t begin, MoveTables& tables) const {
    int64_t pieces = 0;
    size_t end = begin;
    for (; end < moves.size(); ++end) {
      const int64_t more = moves[end].pieces_per_pair;
      if (end > begin && pieces + more > limits_.max_items) break;
      const size_t after = tables.bytes() + sizeof(Form) + sizeof(MoveEntry);
      const size_t room = kLargeTables - std::min(pair_bytes(), kLargeTables / 2);
      if (capturing_ && after > room) break;
      tables.add(moves[end], cut_);
      pieces += more;
    }
    return end;
  }

  void launch_group(std::span<const CutMove> moves, MoveTables& tables, bool records) {
    int64_t pairs_per_launch = std::max<int64_t>(1, limits_.max_items / group_pieces(moves));
    if (capturing_ && id_width_ > 0) {
      const size_t room = (kLargeTables - tables.bytes()) / (2 * id_width_);
      pairs_per_launch = std::min(pairs_per_launch, static_cast<int64_t>(room));
    }
    for (int64_t begin = 0; begin < work_.pairs; begin += pairs_per_launch) {
      add_launch(moves, tables, begin, std::min(pairs_per_launch, work_.pairs - begin), records);
    }
  }

  void add_launch(std::span<const CutMove> moves, MoveTables& tables, int64_t begin, int64_t pairs, bool records) {
    KernelLaunch launch{};
    Head& head = launch.head;
    const int64_t first_tiles = tiles_of(moves[0], pairs);
    bool are_alike = true;
    int64_t tiles = 0;
    for (size_t i = 0; i < moves.size(); ++i) {
      const int64_t more = tiles_of(moves[i], pairs);
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
    head.unit_bytes = static_cast<uint32_t>(is_bulk() ? cut_.tile_bytes() : cut_.chunk_bytes());
    head.cut_on_src = cut_.is_on_src();
    head.first_row = begin;
    if (work_.device_ids) {
      const DeviceIds& ids = *work_.device_ids;
      head.src_ids = ids.src;
      head.dst_ids = ids.dst;
      head.src_limit = ids.src_limit;
      head.dst_limit = ids.dst_limit;
      head.skip_negative = ids.skip_negative;
      head.op = records ? ids.op : 0;
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
    const Grid grid = most_of_grid(work_, cut_, sm_budget_, limits_);
    int64_t most = 0;
    for (const KernelLaunch& launch : plan_.parts) most = std::max<int64_t>(most, launch.head.tiles);
    const int64_t spread = std::min(grid.ctas, (most + kMinCtaWarps - 1) / kMinCtaWarps);
    const int64_t warps = std::clamp((most + spread - 1) / spread, kMinCtaWarps, grid.cta_warps);
    plan_.threads = static_cast<int>(warps * kWarpLanes);
    for (KernelLaunch& launch : plan_.parts) {
      launch.ctas = static_cast<int>(std::min(grid.ctas, (launch.head.tiles + warps - 1) / warps));
      plan_.ctas = std::max(plan_.ctas, launch.ctas);
    }
  }

  const Work& work_;
  const DeviceLimits& limits_;
  const bool capturing_;
  const Cut cut_;
  const Ids ids_;
  const int sm_budget_;
  uint32_t id_width_;
  KernelPlan plan_;
};

}  // namespace

KernelPlan plan_kernel(const Work& work, int sm_budget, const DeviceLimits& limits, bool capturing) {
  return Planner(work, sm_budget, limits, capturing).plan();
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
