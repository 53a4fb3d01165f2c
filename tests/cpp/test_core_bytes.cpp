// The core against naive models that list every byte of a call: judging overlap, lowering, walking and copying. Meant
// for sanitizers. Argument: a test's name, or --list.
#include <numeric>
#include <set>

#include "core/fragments.h"
#include "core/lower.h"
#include "core/overlap.h"
#include "cpu/copy.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;

// A call on pools that lie in one arena, whose bytes can be listed.
struct Call {
  std::vector<Pool> src;
  std::vector<Pool> dst;
  PageSizes pages;
  std::vector<Run> runs;
  std::vector<Segment> segments;
};

// `unit` is 1, or 16 for calls whose every address is 16-byte aligned; `pages_meet` makes pools without padding.
std::vector<Pool> random_pools(Random& random, std::byte* arena, int64_t arena_bytes, int64_t common_stride,
                               int64_t unit, bool pages_meet) {
  std::vector<Pool> pools(static_cast<size_t>(random.in(1, 3)));
  for (Pool& pool : pools) {
    pool.page_bytes = random.in(1, 40);
    if (pages_meet) pool.page_bytes = common_stride;
    pool.block_stride =
        random.once_in(3) && !pages_meet ? pool.page_bytes + random.in(0, 9) : std::max(pool.page_bytes, common_stride);
    pool.blocks = random.in(1, std::min<int64_t>(7, (arena_bytes - pool.page_bytes) / pool.block_stride));
    if (pool.blocks == 1) pool.block_stride = pool.page_bytes;
    const int64_t span = (pool.blocks - 1) * pool.block_stride + pool.page_bytes;
    const int64_t grid = random.once_in(2) ? 1 : common_stride / 4;
    pool.base = arena + random.in(0, (arena_bytes - span) / grid) * grid * unit;
    pool.page_bytes *= unit;
    pool.block_stride *= unit;
  }
  return pools;
}

void scale(Run& run, int64_t unit) {
  for (int64_t* bytes :
       {&run.src_offset, &run.dst_offset, &run.fragment_bytes, &run.src_subblock_stride, &run.dst_subblock_stride}) {
    *bytes *= unit;
  }
  for (Loop& loop : run.loops) loop = {loop.extent, loop.src_stride * unit, loop.dst_stride * unit};
}

void for_each_byte(const Run& run, bool dst, const Pool& pool, int64_t subblocks, int64_t id,
                   const std::function<void(std::byte*)>& visit) {
  const int64_t substride = dst ? run.dst_subblock_stride : run.src_subblock_stride;
  std::byte* page = pool.base + id / subblocks * pool.block_stride + (subblocks == 1 ? 0 : id % subblocks * substride) +
                    (dst ? run.dst_offset : run.src_offset);
  for (int64_t i = 0; i < run.loops[0].extent; ++i) {
    for (int64_t j = 0; j < run.loops[1].extent; ++j) {
      for (int64_t k = 0; k < run.loops[2].extent; ++k) {
        const int64_t index[3] = {i, j, k};
        std::byte* at = page;
        for (int l = 0; l < 3; ++l) at += index[l] * (dst ? run.loops[l].dst_stride : run.loops[l].src_stride);
        for (int64_t byte = 0; byte < run.fragment_bytes; ++byte) visit(at + byte);
      }
    }
  }
}

// The arenas hold 16 times `arena_units` bytes.
Call random_call(Random& random, std::byte* src_arena, std::byte* dst_arena, int64_t arena_units) {
  while (true) {
    Call call;
    const int64_t common_stride = random.of({8, 24, 40, 64});
    const int64_t unit = random.once_in(8) ? 16 : 1;
    const bool pages_meet = random.once_in(4);
    call.src = random_pools(random, src_arena, arena_units, common_stride, unit, pages_meet);
    call.dst = random.once_in(4) && src_arena == dst_arena
                   ? call.src
                   : random_pools(random, dst_arena, arena_units, common_stride, unit, pages_meet);
    call.pages.src_subblocks = random.once_in(2) ? 1 : random.in(1, 3);
    call.pages.dst_subblocks = random.once_in(2) ? 1 : random.in(1, 3);
    for (const Pool& pool : call.src) call.pages.src.push_back(pool.page_bytes);
    for (const Pool& pool : call.dst) call.pages.dst.push_back(pool.page_bytes);
    for (int64_t n = random.in(1, 5); n > 0; --n) {
      Run run = random_run(random, call.pages, false);
      scale(run, unit);
      if (random.once_in(3)) run = {run.src_pool, run.dst_pool, 0, 0, 0, 0, 0, {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}}};
      if (run.fragment_bytes == 0)
        run.fragment_bytes = std::min(call.pages.src[run.src_pool], call.pages.dst[run.dst_pool]);
      call.runs.push_back(run);
      if (!naive_verify(call.runs, call.pages).empty()) call.runs.pop_back();
    }
    if (call.runs.empty()) continue;
    const auto fewest = [](const std::vector<Pool>& pools) {
      return std::min_element(pools.begin(), pools.end(),
                              [](const Pool& a, const Pool& b) { return a.blocks < b.blocks; })
          ->blocks;
    };
    std::vector<int64_t> ids(static_cast<size_t>(fewest(call.dst) * call.pages.dst_subblocks));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random.engine());
    ids.resize(static_cast<size_t>(random.in(1, static_cast<int64_t>(ids.size()))));
    Pairs rows;
    for (const int64_t dst : ids) rows.emplace_back(random.in(0, fewest(call.src) * call.pages.src_subblocks - 1), dst);
    const Mapping mapping = laid_out(rows, random, true);
    call.segments = read_pairs({"op",
                                "map",
                                mapping.column(0),
                                mapping.column(1),
                                static_cast<int64_t>(rows.size()),
                                {Name{"src"}, kMax},
                                {Name{"dst"}, 1 << 10},
                                false})
                        .segments;
    return call;
  }
}

// Which bytes a call writes and from where; `conflict` where one is read and written, or written by two pools.
struct Touched {
  std::map<std::byte*, std::byte*> source_of;
  std::set<std::byte*> read;
  bool conflict = false;
};

Touched touched_by(const Call& call) {
  Touched touched;
  for (const Run& run : call.runs) {
    for (const auto& [src, dst] : expanded(call.segments)) {
      std::vector<std::byte*> from;
      for_each_byte(run, false, call.src[run.src_pool], call.pages.src_subblocks, src,
                    [&](std::byte* at) { from.push_back(at); });
      touched.read.insert(from.begin(), from.end());
      auto next = from.begin();
      for_each_byte(run, true, call.dst[run.dst_pool], call.pages.dst_subblocks, dst,
                    [&](std::byte* at) { touched.conflict |= !touched.source_of.try_emplace(at, *next++).second; });
    }
  }
  for (const auto& [at, from] : touched.source_of) touched.conflict |= touched.read.count(at) != 0;
  return touched;
}

void judges_overlap_by_the_bytes_touched() {
  Random random(6);
  alignas(64) static std::byte arena[16 * 640];
  int conflicts = 0;
  constexpr int kCases = 8000;
  for (int i = 0; i < kCases; ++i) {
    const int64_t room = random.of({300, 640});
    const Call call = random_call(random, arena, arena, room);
    const bool expected = touched_by(call).conflict;
    const std::string error = error_of([&] {
      check_overlap({"op", "map", "dst", call.runs, call.src, call.dst, call.pages.src_subblocks,
                     call.pages.dst_subblocks, call.segments});
    });
    expect(error.empty() != expected,
           text("case ", i, expected ? ": an overlap was not seen" : ": nothing overlaps, but " + error));
    conflicts += expected;
  }
  expect(conflicts > kCases / 10 && conflicts < kCases * 9 / 10, text("the cases are one-sided: ", conflicts));
}

void tells_a_large_plan_apart_quickly() {
  // Two halves of one page, 4096 runs with gaps between them, copied to another block of the same pool.
  std::vector<Run> runs;
  for (int64_t i = 0; i < 4096; ++i) runs.push_back({0, 0, i * 24, i * 24, 8, 0, 0, {{2, 8, 8}, {1, 0, 0}, {1, 0, 0}}});
  const std::vector<Pool> pools{{reinterpret_cast<std::byte*>(int64_t{1} << 40), 10, 4096 * 24, 4096 * 24}};
  const std::vector<Segment> apart{{1, 2, 1}, {5, 7, 1}};
  check_overlap({"op", "map", "dst", runs, pools, pools, 1, 1, apart});
  const std::vector<Segment> meeting{{1, 2, 1}, {2, 7, 1}};
  expect(error_of([&] { check_overlap({"op", "map", "dst", runs, pools, pools, 1, 1, meeting}); }) ==
             "ValueError: op: map must not write what it reads, got destination 2 overlapping source 2",
         "a block both read and written");
}

void parallel_in_turn(int lanes, void* context, void (*body)(void*, int)) {
  for (int lane = lanes - 1; lane >= 0; --lane) body(context, lane);
}

// Collects what a cursor yields, with cuts at random places, as byte → source; true if each came once.
std::map<std::byte*, std::byte*> walked(const Work& work, Random& random, int lanes) {
  std::map<std::byte*, std::byte*> source_of;
  std::vector<int64_t> cuts{0, work.bytes};
  for (int i = 1; i < lanes; ++i) cuts.push_back(random.in(0, work.bytes));
  std::sort(cuts.begin(), cuts.end());
  for (size_t lane = 0; lane + 1 < cuts.size(); ++lane) {
    FragmentCursor cursor(work, cuts[lane], cuts[lane + 1]);
    const int64_t capacity = random.in(1, 9);
    std::vector<Fragment> fragments(static_cast<size_t>(capacity));
    std::vector<Strip> strips(static_cast<size_t>(capacity));
    int64_t bytes = 0;
    while (cursor.left() > 0) {
      const bool as_strips = !cursor.listed() && random.once_in(2);
      int64_t count = 0;
      if (as_strips) {
        count = cursor.next_of_move(strips.data(), capacity);
        fragments.clear();
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t k = 0; k < strips[i].count; ++k) {
            fragments.push_back(
                {strips[i].src + k * strips[i].src_stride, strips[i].dst + k * strips[i].dst_stride, strips[i].bytes});
          }
        }
        count = static_cast<int64_t>(fragments.size());
      } else {
        fragments.resize(static_cast<size_t>(capacity));
        count = random.once_in(2) ? cursor.next(fragments.data(), capacity)
                                  : cursor.next_of_move(fragments.data(), capacity);
      }
      expect(count > 0, "a cursor with bytes left yields nothing");
      for (int64_t i = 0; i < count; ++i) {
        bytes += fragments[i].bytes;
        for (int64_t byte = 0; byte < fragments[i].bytes; ++byte) {
          const bool is_new =
              source_of.try_emplace(fragments[i].dst + byte, const_cast<std::byte*>(fragments[i].src) + byte).second;
          expect(is_new, "a byte came twice");
        }
      }
    }
    expect(bytes == cuts[lane + 1] - cuts[lane], "a lane yields other than its bytes");
  }
  return source_of;
}

int64_t descriptors_of(const Work& work) {
  FragmentCursor cursor(work, 0, work.bytes);
  Fragment fragments[16];
  int64_t descriptors = 0;
  while (const int64_t count = cursor.next(fragments, 16)) descriptors += count;
  return descriptors;
}

// Bytes that tell neighbours and calls apart.
void number(std::vector<std::byte>& bytes, int call) {
  for (size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<std::byte>(i * 7 + i / 256 + static_cast<size_t>(call));
}

void lowers_to_each_byte_once() {
  Random random(7);
  std::vector<std::byte> src_arena(16 * 640);
  std::vector<std::byte> dst_arena(16 * 640);
  std::map<Shape, int> shapes;
  int merged = 0;
  for (int i = 0; i < 3000; ++i) {
    Call call = random_call(random, src_arena.data(), dst_arena.data(), 640);
    Touched touched = touched_by(call);
    if (touched.conflict) continue;
    const auto direction = static_cast<Direction>(random.in(0, 3));
    PairList pairs{call.segments, static_cast<int64_t>(expanded(call.segments).size())};
    const Executor executor = random.once_in(2) ? Executor::kCpu : Executor::kDma;
    Work work =
        lower(bind_runs(call.runs, call.src, call.dst, call.pages.src_subblocks, call.pages.dst_subblocks, direction),
              std::move(pairs), 1000, direction, {executor, 2, false});
    expect(work.bytes == static_cast<int64_t>(touched.source_of.size()), "lower counts other bytes");
    expect(work.descriptors == descriptors_of(work), "lower counts other descriptors than a cursor yields");
    expect(walked(work, random, static_cast<int>(random.in(1, 4))) == touched.source_of,
           text("case ", i, ": other bytes are copied"));
    ++shapes[work.shape];
    for (const Move& move : work.moves) merged += move.merges;
    number(src_arena, i);
    std::vector<std::byte> expected = dst_arena;
    for (const auto& [at, from] : touched.source_of) expected[static_cast<size_t>(at - dst_arena.data())] = *from;
    work.lanes = static_cast<int>(random.in(1, 5));
    work.streaming = random.once_in(2);
    const Issued issued = cpu::copy(work, parallel_in_turn);
    expect(dst_arena == expected, text("case ", i, ": the cpu executor copies other bytes"));
    expect(issued.bytes == work.bytes && issued.descriptors == work.descriptors, "the cpu executor counts otherwise");
  }
  expect(shapes.size() == 3 && shapes[Shape::kPage] > 100 && shapes[Shape::kBytes] > 100 && merged > 100,
         text("shapes are missing: ", shapes[Shape::kPage], " page, ", shapes[Shape::kRow], " row, ",
              shapes[Shape::kBytes], " bytes, ", merged, " merged"));
}

void lowers_listed_fragments() {
  Random random(8);
  std::vector<std::byte> src(4000);
  std::vector<std::byte> dst(4000);
  for (int i = 0; i < 800; ++i) {
    number(src, i);
    std::vector<std::byte> expected = dst;
    std::vector<Fragment> fragments;
    std::map<std::byte*, std::byte*> source_of;
    int64_t at = random.in(0, 9);
    int64_t from = 0;
    for (int64_t n = random.in(0, 30); n > 0; --n) {
      const int64_t bytes = random.once_in(5) ? 0 : random.in(1, 100);
      if (!random.once_in(3) || from + bytes > 4000) from = random.in(0, 3900);
      fragments.push_back({src.data() + from, dst.data() + at, bytes});
      for (int64_t byte = 0; byte < bytes; ++byte) {
        source_of[dst.data() + at + byte] = src.data() + from + byte;
        expected[static_cast<size_t>(at + byte)] = src[static_cast<size_t>(from + byte)];
      }
      from += bytes;
      at += bytes + (random.once_in(3) ? random.in(1, 20) : 0);
    }
    Work work = lower_fragments(fragments, Direction::kHostToHost, {Executor::kCpu, 2, false});
    expect(work.bytes == static_cast<int64_t>(source_of.size()) && work.descriptors == descriptors_of(work),
           "counts of listed fragments");
    for (size_t f = 1; f < work.fragments.size(); ++f) {
      const Fragment& last = work.fragments[f - 1];
      expect(last.src + last.bytes != work.fragments[f].src || last.dst + last.bytes != work.fragments[f].dst,
             "neighbours not joined");
    }
    expect(walked(work, random, static_cast<int>(random.in(1, 4))) == source_of, "other bytes of listed fragments");
    work.lanes = static_cast<int>(random.in(1, 5));
    cpu::copy(work, parallel_in_turn);
    expect(dst == expected, text("case ", i, ": the cpu executor copies other bytes of listed fragments"));
  }
}

const Tests kTests{
    {"judges_overlap_by_the_bytes_touched", judges_overlap_by_the_bytes_touched},
    {"tells_a_large_plan_apart_quickly", tells_a_large_plan_apart_quickly},
    {"lowers_to_each_byte_once", lowers_to_each_byte_once},
    {"lowers_listed_fragments", lowers_listed_fragments},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
