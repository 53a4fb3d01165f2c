// The cases, by what they have in common. Each goes through the functions that csrc/ops calls.
#include <cuda_runtime_api.h>

#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "core/pairs.h"
#include "core/staged.h"
#include "core/text.h"
#include "cuda/bulk_body.h"
#include "cuda/dma.h"
#include "cuda/error.h"
#include "cuda/staged.h"
#include "geometry.h"
#include "launches.h"
#include "session.h"

namespace kvkernels::sanitizer {
namespace {

constexpr Direction kDirections[] = {Direction::kHostToDevice, Direction::kDeviceToHost, Direction::kDeviceToDevice};
constexpr uint32_t kOp = 7;  // that a fault is recorded under

// How many runs there are decides how a launch's tables arrive: a run is an entry of 24 bytes, and as a rule a form of
// some 200 bytes. The kernels that were launched are counted, so a number that no longer serves is noticed.
struct Delivery {
  const char* name;
  int runs;
};
constexpr Delivery kDeliveries[] = {{"small", 8}, {"large", 60}, {"table", 160}};

// Where the ids are: on the host, or on the device as two columns of a width, or as the sources alone, whose
// destinations are their rows.
enum class IdKind { kHost, kDevice64, kDevice32, kDeviceRows };

const char* name_of(IdKind kind) {
  switch (kind) {
    case IdKind::kHost:
      return "host ids";
    case IdKind::kDevice64:
      return "int64 ids on the device";
    case IdKind::kDevice32:
      return "int32 ids on the device";
    case IdKind::kDeviceRows:
      return "source ids on the device";
  }
  return "";
}

Memory src_memory(Direction direction) {
  return direction == Direction::kHostToDevice ? Memory::kPinned : Memory::kDevice;
}

Memory dst_memory(Direction direction) {
  return direction == Direction::kDeviceToHost ? Memory::kPinned : Memory::kDevice;
}

// A mapping as a caller gives it, bad rows included, and what it comes to.
struct Mapping {
  std::vector<Pair> rows;
  bool skip_negative = false;
  std::vector<Pair> good;
  std::optional<FaultRecord> fault;
};

// The first and the last id of either side, two that follow each other, and one that is not named.
std::vector<Pair> pairs_of(const Geometry& geometry) {
  const int64_t src = geometry.src.ids();
  const int64_t dst = geometry.dst.ids();
  return {{src - 1, 0}, {0, dst - 1}, {1, dst - 3}, {2, dst - 2}};
}

Mapping mapping_of(const Geometry& geometry, IdKind kind) {
  Mapping mapping;
  const int64_t src = geometry.src.ids();
  const int64_t dst = geometry.dst.ids();
  const std::vector<Pair> pairs = pairs_of(geometry);
  if (kind == IdKind::kHost) {
    mapping.rows = mapping.good = pairs;
    return mapping;
  }
  if (kind == IdKind::kDeviceRows) {
    // Row 2 is bad, and so destination 2 is left alone.
    for (const int64_t id : {src - 1, int64_t{0}, src, int64_t{1}, int64_t{2}}) {
      mapping.rows.push_back({id, static_cast<int64_t>(mapping.rows.size())});
    }
  } else {
    // One past the end of either side, negative, and, where there is room, one that 32 bits would take for 0.
    mapping.rows = {pairs[0], {src, 1}, pairs[1], {0, dst}, {-1, 1}, pairs[2], pairs[3]};
    if (kind == IdKind::kDevice64) mapping.rows.push_back({int64_t{1} << 40, 1});
    mapping.skip_negative = kind == IdKind::kDevice32;
  }
  const auto is_in = [](int64_t id, int64_t limit) { return id >= 0 && id < limit; };
  FaultRecord fault{0, 0, kOp};
  for (size_t row = 0; row < mapping.rows.size(); ++row) {
    const Pair& pair = mapping.rows[row];
    if (mapping.skip_negative && (pair.src < 0 || pair.dst < 0)) continue;
    if (is_in(pair.src, src) && is_in(pair.dst, dst)) {
      mapping.good.push_back(pair);
    } else if (fault.count++ == 0) {
      fault.first_row = row;
    }
  }
  mapping.fault = fault;
  return mapping;
}

// Two columns of ids in device memory, side by side.
Buffer ids_on_device(const std::vector<Pair>& rows, int width, cudaStream_t stream) {
  Bytes bytes(rows.size() * 2 * static_cast<size_t>(width));
  std::byte* at = bytes.data();
  for (const Pair& pair : rows) {
    for (const int64_t id : {pair.src, pair.dst}) {
      std::memcpy(at, &id, static_cast<size_t>(width));  // a little-endian host, as CUDA's are
      at += width;
    }
  }
  Buffer buffer(Memory::kDevice, bytes.size());
  buffer.write(bytes, stream);
  return buffer;
}

Work lower_host_ids(const Trial& trial, Direction direction, Executor executor, const std::vector<Pair>& rows) {
  const Geometry& geometry = trial.geometry();
  const IdLimit src_limit{{"src"}, kBlocks, geometry.src.subblocks};
  const IdLimit dst_limit{{"dst"}, kBlocks, geometry.dst.subblocks};
  PairList pairs = read_pairs({"sanitizer",
                               "mapping",
                               {&rows[0].src, sizeof(Pair), 8},
                               {&rows[0].dst, sizeof(Pair), 8},
                               static_cast<int64_t>(rows.size()),
                               src_limit,
                               dst_limit});
  std::vector<Move> moves = bind_runs(geometry.runs, trial.src_pools(), trial.dst_pools(), geometry.src.subblocks,
                                      geometry.dst.subblocks, direction);
  Work work = lower(std::move(moves), std::move(pairs), src_limit.ids(), direction, {Executor::kDma, 1, false});
  work.executor = executor;
  return work;
}

KernelPlan launch_on_device_ids(Session& session, const Trial& trial, Direction direction, Executor executor,
                                IdKind kind, const Mapping& mapping, const Buffer& ids, int sm_budget) {
  const Geometry& geometry = trial.geometry();
  const int width = kind == IdKind::kDevice32 ? 4 : 8;
  DeviceIds device_ids{{ids.data(), 2 * width, width},
                       {ids.data() + width, 2 * width, width},
                       static_cast<int64_t>(mapping.rows.size()),
                       geometry.src.ids(),
                       geometry.dst.ids(),
                       mapping.skip_negative,
                       kOp};
  if (kind == IdKind::kDeviceRows) device_ids.dst = {};
  Work work = lower_device_ids(bind_runs(geometry.runs, trial.src_pools(), trial.dst_pools(), geometry.src.subblocks,
                                         geometry.dst.subblocks, direction),
                               device_ids, direction);
  work.executor = executor;
  return session.launch(std::move(work), sm_budget);
}

// The path through the kernels that a geometry is there for.
struct Path {
  KernelVariant variant;
  uint32_t unit_bytes;  // as Head has it
  Executor executor = Executor::kKernel;
};
constexpr Path kTiles{KernelVariant::kPage, 0};
constexpr Path kTilesWithLoops{KernelVariant::kBytes, 0};
const Path kShortBulk{KernelVariant::kBulk, 1024, Executor::kBulk};
constexpr Path kLongBulk{KernelVariant::kBulk, kBulkTileBytes, Executor::kBulk};

// Bytes are right whichever way they went: nothing else would notice that a case no longer is what it is there for.
void expect(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

void expect_path(const std::string& name, const KernelPlan& plan, const Path& path) {
  const uint32_t unit_bytes = plan.parts.at(0).head.unit_bytes;
  expect(plan.variant == path.variant && unit_bytes == path.unit_bytes,
         text(name, ": the plan must be variant ", static_cast<int>(path.variant), " with units of ", path.unit_bytes,
              " bytes, got variant ", static_cast<int>(plan.variant), " with ", unit_bytes));
}

void expect_full_rings(const std::string& name, const KernelPlan& plan) {
  const KernelLaunch& launch = plan.parts.at(0);
  const int64_t stages = int64_t{launch.ctas} * kBulkWarps * stages_of(launch.head.unit_bytes);
  expect(launch.head.tiles >= 2 * stages, text(name, ": the tiles must be at least twice the ", stages,
                                               " stages of all rings, got ", launch.head.tiles));
}

KernelPlan run_kernel_case(Session& session, const std::string& name, const Geometry& geometry, Direction direction,
                           const Path& path, IdKind kind) {
  Trial trial(geometry, src_memory(direction), dst_memory(direction), session.next_seed(), session.stream());
  const Mapping mapping = mapping_of(geometry, kind);
  // One CTA, so that each warp's ring of stages is used more than once.
  const int sm_budget = path.executor == Executor::kBulk ? 1 : 0;
  const Buffer ids = ids_on_device(mapping.rows, kind == IdKind::kDevice32 ? 4 : 8, session.stream());
  KernelPlan plan = kind == IdKind::kHost
                        ? session.launch(lower_host_ids(trial, direction, path.executor, mapping.rows), sm_budget)
                        : launch_on_device_ids(session, trial, direction, path.executor, kind, mapping, ids, sm_budget);
  session.finish();
  const std::string full_name = text(name, ", ", name_of(direction), ", ", name_of(kind));
  expect_path(full_name, plan, path);
  session.judge(full_name, trial, mapping.good, mapping.fault);
  return plan;
}

// Every way for the tables to arrive, in every direction, with ids on the host and on the device.
void run_kernel_cases(Session& session, const Fragments& fragments, const Path& path) {
  constexpr IdKind kOnDevice[] = {IdKind::kDevice64, IdKind::kDevice32, IdKind::kDeviceRows};
  for (size_t i = 0; i < std::size(kDeliveries); ++i) {
    const Geometry geometry = lay_out(fragments, kDeliveries[i].runs);
    for (const Direction direction : kDirections) {
      run_kernel_case(session, kDeliveries[i].name, geometry, direction, path, kOnDevice[i]);
      const KernelPlan plan = run_kernel_case(session, kDeliveries[i].name, geometry, direction, path, IdKind::kHost);
      if (path.executor == Executor::kBulk && plan.uploads) expect_full_rings(kDeliveries[i].name, plan);
    }
  }
}

// Fragments of one tile and of two, whose sides lie alike, or differ so that elements of 8, 4, 2 or 1 bytes are left.
const Fragments kPageFragments{{65, 100, 200, 127, 4097, 333, 150, 175, 129, 511},
                               {{0, 0}, {5, 5}, {0, 8}, {3, 7}, {1, 3}, {2, 3}, {15, 15}}};

// Multiples of a width, none of them of a larger one throughout.
Fragments chunks_of(int64_t width) {
  Fragments fragments{{}, {{width % 16, 0}, {0, width % 16}, {width % 16, width % 16}}, true};
  for (const int64_t chunks : {1, 3, 17, 2, 33, 64, 5, 31, 9, 12}) fragments.bytes.push_back(chunks * width);
  return fragments;
}

Fragments with_loops(Fragments fragments) {
  fragments.has_loops = true;
  return fragments;
}

// The shortest that bulk copies take, ragged at both ends, and some that lie differently on their two sides.
const Fragments kShortBulkFragments{{512, 528, 700, 640, 513, 999, 1024, 1000, 600, 777},
                                    {{0, 0}, {5, 5}, {8, 8}, {15, 15}, {0, 4}, {0, 0}, {1, 1}}};

// Tiles of 8 KiB, of which a warp's ring holds six.
const Fragments kLongBulkFragments{{8192, 17000, 6000, 20000, 8208}, {{0, 0}, {5, 5}, {8, 8}, {15, 15}}};

void run_long_bulk(Session& session) {
  const Geometry geometry = lay_out(kLongBulkFragments, 7);
  for (const Direction direction : kDirections) {
    const char* const name = "tiles of 8 KiB";
    expect_full_rings(name, run_kernel_case(session, name, geometry, direction, kLongBulk, IdKind::kHost));
  }
}

// Ids that are a block and a sub-block of it, other ones on either side.
void run_subblocks(Session& session) {
  Fragments fragments = with_loops(kPageFragments);
  fragments.src_subblocks = 3;
  fragments.dst_subblocks = 4;
  const Geometry geometry = lay_out(fragments, 12);
  for (const Direction direction : kDirections) {
    run_kernel_case(session, "sub-blocks", geometry, direction, kTilesWithLoops, IdKind::kHost);
    run_kernel_case(session, "sub-blocks", geometry, direction, kTilesWithLoops, IdKind::kDevice64);
  }
}

std::vector<Fragment> fragments_of(const Trial& trial, const std::vector<Pair>& pairs) {
  const std::vector<Pool> src = trial.src_pools();
  const std::vector<Pool> dst = trial.dst_pools();
  std::vector<Fragment> fragments;
  for (const Piece& piece : pieces_of(trial.geometry(), pairs)) {
    fragments.push_back({src[static_cast<size_t>(piece.src_pool)].base + piece.src_offset,
                         dst[static_cast<size_t>(piece.dst_pool)].base + piece.dst_offset, piece.bytes});
  }
  return fragments;
}

// Raw addresses, which a kernel takes as ids of 64 bits.
void run_addresses(Session& session) {
  const Geometry geometry = lay_out({{333}, kPageFragments.phases}, 20);
  for (const Direction direction : kDirections) {
    Trial trial(geometry, src_memory(direction), dst_memory(direction), session.next_seed(), session.stream());
    const std::vector<Pair> pairs = pairs_of(geometry);
    std::vector<Work> works = addresses_as_ids(fragments_of(trial, pairs), direction);
    expect(works.size() == 1, "fragments of one size must do as one move");
    works.front().executor = Executor::kKernel;
    const KernelPlan plan = session.launch_mapped(works.front(), 0);
    expect(plan.parts.at(0).head.id_width == 8, "addresses must be ids of 64 bits");
    session.finish();
    session.judge(text("addresses, ", name_of(direction)), trial, pairs, std::nullopt);
  }
}

// Captures what `issue` asks of the session's stream, and replays it on two sets of bytes.
void run_in_graph(Session& session, const std::string& name, Trial& trial, const std::vector<Pair>& pairs,
                  const std::function<void()>& issue) {
  check(cudaStreamBeginCapture(session.stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  issue();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamEndCapture(session.stream(), &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  for (const char* replay : {"first replay", "second replay"}) {
    trial.fill();
    check(cudaGraphLaunch(executable, session.stream()), "cudaGraphLaunch");
    session.finish();
    session.judge(text(name, ", ", replay), trial, pairs, std::nullopt);
  }
  check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
}

// A capture uploads nothing: what would be one launch becomes several.
void run_graphs(Session& session, const Fragments& fragments, Executor executor) {
  const Geometry geometry = lay_out(fragments, kDeliveries[2].runs);
  for (const Direction direction : kDirections) {
    Trial trial(geometry, src_memory(direction), dst_memory(direction), session.next_seed(), session.stream());
    const std::vector<Pair> pairs = pairs_of(geometry);
    run_in_graph(session, text("graph, ", name_of(direction)), trial, pairs, [&] {
      const KernelPlan plan = session.launch(lower_host_ids(trial, direction, executor, pairs), 0);
      expect(plan.launches > 1 && !plan.uploads, "tables of a captured call must be split, not uploaded");
    });
  }
}

void run_dma(Session& session) {
  const Geometry geometry = lay_out(kPageFragments, 20);
  for (const Direction direction : kDirections) {
    const std::vector<Pair> pairs = pairs_of(geometry);
    Trial trial(geometry, src_memory(direction), dst_memory(direction), session.next_seed(), session.stream());
    const Work work = lower_host_ids(trial, direction, Executor::kDma, pairs);
    dma_copy(work, false, session.stream());
    session.finish();
    session.judge(text("own stream, ", name_of(direction)), trial, pairs, std::nullopt);

    trial.fill();
    dma_copy(work, false, nullptr);
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    session.judge(text("legacy stream, ", name_of(direction)), trial, pairs, std::nullopt);

    run_in_graph(session, text("dma in a graph, ", name_of(direction)), trial, pairs,
                 [&] { dma_copy(work, false, session.stream()); });
  }
}

// The ring holds one pair's bytes, or a few: chunk after chunk goes through it.
void run_staged_case(Session& session, const Geometry& geometry, Direction direction, Memory host) {
  const bool loads = direction == Direction::kHostToDevice;
  Trial trial(geometry, loads ? host : Memory::kDevice, loads ? Memory::kDevice : host, session.next_seed(),
              session.stream());
  const std::vector<Pair> pairs = pairs_of(geometry);
  const Work work = lower_host_ids(trial, direction, Executor::kStaged, pairs);
  const Staging staging = plan_staging(work, 48 << 10);
  expect(staging.chunks() > 1, "staged: there must be more than one chunk, got '" + staging.refusal + "'");
  const RingLease lease(current_device(), session.stream());
  count_launches_as(Direction::kDeviceToDevice);
  run_staged(work, staging, lease.ring(), 0, session.limits(), session.upload(), session.stream());
  session.finish();
  session.judge(text("staged, ", name_of(direction), host == Memory::kPinned ? ", pinned" : ", pageable"), trial, pairs,
                std::nullopt);
}

void run_staged_cases(Session& session) {
  const Geometry geometry = lay_out(with_loops(kPageFragments), 40);
  for (const Memory host : {Memory::kPinned, Memory::kPageable}) {
    run_staged_case(session, geometry, Direction::kHostToDevice, host);
    run_staged_case(session, geometry, Direction::kDeviceToHost, host);
  }
}

Group kernel_group(const char* name, Fragments fragments, Path path) {
  return {name, path.executor == Executor::kBulk,
          [fragments = std::move(fragments), path](Session& session) { run_kernel_cases(session, fragments, path); }};
}

Group graph_group(const char* name, Fragments fragments, Executor executor) {
  return {name, executor == Executor::kBulk,
          [fragments = std::move(fragments), executor](Session& session) { run_graphs(session, fragments, executor); }};
}

}  // namespace

const std::vector<Group>& groups() {
  static const std::vector<Group> all{
      kernel_group("page", kPageFragments, kTiles),
      kernel_group("row", chunks_of(16), {KernelVariant::kRow, 16}),
      kernel_group("bytes-8", chunks_of(8), {KernelVariant::kBytes, 8}),
      kernel_group("bytes-4", chunks_of(4), {KernelVariant::kBytes, 4}),
      kernel_group("bytes-2", chunks_of(2), {KernelVariant::kBytes, 2}),
      kernel_group("bytes-1", chunks_of(1), {KernelVariant::kBytes, 1}),
      kernel_group("bytes-tiles", with_loops(kPageFragments), kTilesWithLoops),
      kernel_group("bulk-short", with_loops(kShortBulkFragments), kShortBulk),
      {"bulk-long", true, run_long_bulk},
      {"sub-blocks", false, run_subblocks},
      {"addresses", false, run_addresses},
      graph_group("graphs", kPageFragments, Executor::kKernel),
      graph_group("bulk-graphs", kShortBulkFragments, Executor::kBulk),
      {"dma", false, run_dma},
      {"staged", false, run_staged_cases},
  };
  return all;
}

void read_out_of_bounds(Session& session) {
  const Geometry geometry = lay_out(kPageFragments, 2);
  Trial trial(geometry, Memory::kDevice, Memory::kDevice, session.next_seed(), session.stream());
  const Buffer ids = ids_on_device({{kBlocks, 0}}, 8, session.stream());
  const DeviceIds lenient{{ids.data(), 16, 8}, {ids.data() + 8, 16, 8}, 1, kBlocks + 1, kBlocks, false, kOp};
  Work work =
      lower_device_ids(bind_runs(geometry.runs, trial.src_pools(), trial.dst_pools(), 1, 1, Direction::kDeviceToDevice),
                       lenient, Direction::kDeviceToDevice);
  session.launch(std::move(work), 0);
  session.finish();
}

}  // namespace kvkernels::sanitizer
