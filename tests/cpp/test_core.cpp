// The core against naive models: reading mappings, verifying plans. Meant for sanitizers. Argument: a test's name, or
// --list.
#include <set>
#include <thread>

#include "core/radix.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;

struct Expected {
  std::string error;
  std::set<std::pair<int64_t, int64_t>> pairs;
};

Expected naive_pairs(const Pairs& rows, int64_t src_ids, int64_t dst_ids, bool skip_negative) {
  Expected expected;
  std::map<int64_t, int64_t> source_of;
  int64_t clash = -1;
  for (size_t row = 0; row < rows.size(); ++row) {
    const auto [src, dst] = rows[row];
    if (skip_negative && (src < 0 || dst < 0)) continue;
    const bool src_is_bad = src < 0 || src >= src_ids;
    if (src_is_bad || dst < 0 || dst >= dst_ids) {
      expected.error = text("IndexError: op: map[", row, src_is_bad ? ", 0] = " : ", 1] = ", src_is_bad ? src : dst,
                            " is out of range for ", src_is_bad ? "src" : "dst", " with ",
                            src_is_bad ? src_ids : dst_ids, " blocks");
      return expected;
    }
    const auto [at, is_new] = source_of.try_emplace(dst, src);
    if (!is_new && at->second != src && (clash < 0 || dst < clash)) clash = dst;
    expected.pairs.emplace(src, dst);
  }
  if (clash >= 0) {
    expected.error =
        text("ValueError: op: map must name each destination once, got two sources for destination ", clash);
  }
  return expected;
}

Pairs random_rows(Random& random, int64_t src_ids, int64_t dst_ids, bool wide) {
  Pairs rows(static_cast<size_t>(random.in(0, 40)));
  const bool runs_on = random.once_in(2);
  const int64_t step = random.of({1, -1});
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = {random.in(0, src_ids - 1), random.in(0, dst_ids - 1)};
    if (runs_on && i > 0 && !random.once_in(6)) {
      rows[i] = {std::clamp<int64_t>(rows[i - 1].first + step, 0, src_ids - 1),
                 std::clamp<int64_t>(rows[i - 1].second + step, 0, dst_ids - 1)};
    }
    if (i > 0 && random.once_in(20)) rows[i] = rows[static_cast<size_t>(random.in(0, static_cast<int64_t>(i) - 1))];
  }
  if (!rows.empty() && random.once_in(4)) {
    auto& row = rows[static_cast<size_t>(random.in(0, static_cast<int64_t>(rows.size()) - 1))];
    int64_t& id = random.once_in(2) ? row.first : row.second;
    id = wide ? random.of({-1, kMin, kMax, src_ids, dst_ids, -src_ids}) : random.of({-1, INT32_MIN, INT32_MAX});
  }
  return rows;
}

void reads_what_a_loop_reads() {
  Random random(1);
  int refused = 0;
  for (int i = 0; i < 15000; ++i) {
    const bool wide = random.once_in(2);
    // The last ones are above what a bitmap is kept for.
    const int64_t src_ids = random.of({1, 7, 60, 1000, wide ? int64_t{1} << 40 : INT32_MAX});
    const int64_t dst_ids = random.of({1, 7, 60, 1000, 1 << 25, (1 << 25) + 1, wide ? kMax : INT32_MAX});
    const bool skip_negative = random.once_in(3);
    const Mapping mapping = laid_out(random_rows(random, src_ids, dst_ids, wide), random, wide);
    const Expected expected = naive_pairs(mapping.rows, src_ids, dst_ids, skip_negative);
    PairList list;
    const std::string error = error_of([&] {
      list = read_pairs({"op",
                         "map",
                         mapping.column(0),
                         mapping.column(1),
                         static_cast<int64_t>(mapping.rows.size()),
                         {Name{"src"}, src_ids},
                         {Name{"dst"}, dst_ids},
                         skip_negative});
    });
    expect(error == expected.error, text("got '", error, "', expected '", expected.error, "'"));
    refused += !error.empty();
    if (!error.empty()) continue;
    const Pairs pairs = expanded(list.segments);
    expect(std::set(pairs.begin(), pairs.end()) == expected.pairs, "other pairs than a loop finds");
    expect(pairs.size() == expected.pairs.size() && list.pairs == static_cast<int64_t>(pairs.size()),
           "a pair counted twice");
    for (size_t s = 1; s < list.segments.size(); ++s) {
      expect(!continues(list.segments[s - 1], list.segments[s]), "neighbours were not coalesced");
    }
    recycle(std::move(list.segments));
  }
  expect(refused > 1500 && refused < 13000, text("the cases are one-sided: ", refused, " refused"));
}

void reads_row_numbers_and_names_the_pool() {
  const std::vector<int64_t> ids{4, 5, 6, 2, 2};
  PairRequest request{"gather_blocks",  "block_ids", {ids.data(), 8, 8}, {}, 5, {Name{"pools", 1}, 7},
                      {Name{"out"}, 5}, false};
  const PairList list = read_pairs(request);
  expect(list.segments.size() == 3 && list.segments[0].count == 3, "rows of a buffer coalesce with their ids");
  request.src_limit = {Name{"pools", 1}, 3, 2};
  expect(error_of([&] { read_pairs(request); }) ==
             "IndexError: gather_blocks: block_ids[2] = 6 is out of range for pools[1] with 3 blocks of 2 sub-blocks",
         "an id out of range of sub-blocks");
}

// A refused call must not leave bits behind that the next call on this thread takes for its own.
void forgets_what_a_refused_call_saw() {
  // Few rows of many ids, which are cleared one by one, and many of few, which are cleared as one.
  for (const int64_t ids : {10000, 8}) {
    std::vector<int64_t> map;
    for (int64_t i = 0; i < 8; ++i) map.insert(map.end(), {i, (7 - i) * (ids - 1) / 7});
    map.insert(map.end(), {0, ids});
    PairRequest request{
        "op", "map", {map.data(), 16, 8}, {map.data() + 1, 16, 8}, 9, {Name{"src"}, 8}, {Name{"dst"}, ids}, false};
    for (int round = 0; round < 2; ++round) {
      expect(!error_of([&] { read_pairs(request); }).empty(), "an id out of range was accepted");
      request.rows = 8;
      const PairList list = read_pairs(request);
      expect(list.pairs == 8 && expanded(list.segments).front() == std::pair<int64_t, int64_t>(0, ids - 1),
             "another order than asked for");
      request.rows = 9;
      map[15] = map[1];  // now a destination twice, too
      expect(!error_of([&] { read_pairs(request); }).empty(), "an id out of range was accepted");
      map[15] = 0;
    }
  }
}

void coalesces_downwards() {
  const std::vector<int64_t> map{9, 19, 8, 18, 7, 17, 10, 20, 3, 3};
  PairList list = read_pairs(
      {"op", "map", {map.data(), 16, 8}, {map.data() + 1, 16, 8}, 5, {Name{"src"}, 30}, {Name{"dst"}, 30}, false});
  expect(list.segments.size() == 2 && list.segments[0].src == 7 && list.segments[0].count == 4, "descending ids");
}

void sorts_by_source() {
  Random random(2);
  for (int i = 0; i < 3000; ++i) {
    const int64_t src_ids = random.of({1, 3, 50, 5000, int64_t{1} << 40, kMax});
    PairList list;
    for (int64_t n = random.in(0, 60); n > 0; --n) {
      const int64_t src = random.in(0, src_ids - 1);
      list.segments.push_back({src, random.in(0, 60), random.in(1, std::min<int64_t>(4, src_ids - src))});
    }
    Pairs before = expanded(list.segments);
    sort_by_source(list, src_ids);
    Pairs after = expanded(list.segments);
    for (size_t s = 1; s < list.segments.size(); ++s) {
      expect(list.segments[s - 1].src <= list.segments[s].src, "sources are not in order");
      expect(!continues(list.segments[s - 1], list.segments[s]), "sorted neighbours were not coalesced");
    }
    std::sort(before.begin(), before.end());
    std::sort(after.begin(), after.end());
    expect(before == after, "sorting changed the pairs");
  }
}

void radix_sort_is_a_stable_sort() {
  Random random(3);
  for (const uint64_t limit :
       {uint64_t{1}, uint64_t{2}, uint64_t{2048}, uint64_t{2049}, uint64_t{1} << 57, ~uint64_t{0}}) {
    std::vector<std::pair<uint64_t, int>> records(500);
    for (int i = 0; i < 500; ++i) records[i] = {random.engine()() % limit, i};
    for (int i = 0; i < 100; ++i) records[i].first = limit - 1;
    auto expected = records;
    std::stable_sort(expected.begin(), expected.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    radix_sort(records, limit, [](const auto& record) { return record.first; });
    expect(records == expected, text("radix_sort with keys below ", limit));
  }
}

void verifies_what_a_byte_map_verifies() {
  Random random(4);
  std::map<std::string, int> outcomes;
  for (int i = 0; i < 30000; ++i) {
    const PageSizes pages = random_pages(random);
    std::vector<Run> runs(static_cast<size_t>(random.in(0, random.of({1, 3, 6}))));
    for (Run& run : runs) run = random_run(random, pages, random.once_in(3));
    const std::string expected = naive_verify(runs, pages);
    const std::string error =
        error_of([&] { verify_runs("op", runs.data(), static_cast<int64_t>(runs.size()), pages); });
    const bool agrees = expected.empty() ? error.empty() : error.find("ValueError: op: " + expected) == 0;
    expect(agrees, text("case ", i, ": got '", error, "', expected '", expected, "'"));
    ++outcomes[expected.substr(0, 4) == "runs" ? expected.substr(expected.find(' ') + 1, 12) : expected];
  }
  for (const char* kind : {"", "must fit in ", "must stay in", "must write e"}) {
    expect(outcomes[kind] > 300, text("too few cases of '", kind, "': ", outcomes[kind]));
  }
}

// Runs that share their loops' strides, as shards in a row do, and stand anywhere in a step of them.
void verifies_combs_as_a_byte_map_does() {
  Random random(9);
  int accepted = 0;
  constexpr int kCases = 20000;
  for (int i = 0; i < kCases; ++i) {
    const int64_t inner = random.in(3, 9);
    const int64_t outer = inner * random.in(1, 4) + random.in(0, 3);
    const PageSizes pages{{16}, {outer * 4 + 20}, 1, random.once_in(4) ? 2 : 1};
    std::vector<Run> runs;
    for (int64_t n = random.in(2, 4); n > 0; --n) {
      Run run{0, 0, 0, random.in(0, 2 * inner), random.in(1, 3), 0, outer, {}};
      const int64_t sign = random.once_in(5) ? -1 : 1;
      run.loops[0] = {random.in(1, 3), 0, sign * outer};
      run.loops[1] = {random.in(1, 3), 0, inner};
      run.loops[2] = {1, 0, kMax};
      if (sign < 0) run.dst_offset += (run.loops[0].extent - 1) * outer;
      if (random.once_in(2)) std::swap(run.loops[0], run.loops[1]);
      runs.push_back(run);
    }
    const std::string expected = naive_verify(runs, pages);
    const std::string error =
        error_of([&] { verify_runs("op", runs.data(), static_cast<int64_t>(runs.size()), pages); });
    const bool agrees = expected.empty() ? error.empty() : error.find("ValueError: op: " + expected) == 0;
    expect(agrees, text("case ", i, ": got '", error, "', expected '", expected, "'"));
    accepted += error.empty();
  }
  expect(accepted > kCases / 20, text("too few plans are right: ", accepted));
}

// A pair of runs that is named must really share a byte.
void names_runs_that_share_a_byte() {
  Random random(5);
  int found = 0;
  for (int i = 0; i < 30000; ++i) {
    const PageSizes pages = random_pages(random);
    std::vector<Run> runs(static_cast<size_t>(random.in(2, 4)));
    for (Run& run : runs) run = random_run(random, pages, false);
    const std::string error =
        error_of([&] { verify_runs("op", runs.data(), static_cast<int64_t>(runs.size()), pages); });
    long long first = 0;
    long long second = 0;
    long long pool = 0;
    if (std::sscanf(
            error.c_str(),
            "ValueError: op: runs must write each byte once, got runs[%lld] and runs[%lld] sharing bytes of dst[%lld]",
            &first, &second, &pool) != 3) {
      continue;
    }
    ++found;
    expect(first <= second && runs[first].dst_pool == pool && runs[second].dst_pool == pool,
           "runs of another pool: " + error);
    std::map<int64_t, int64_t> written;
    int64_t other = 0;
    bool apart = naive_write(runs[first], first, pages.dst_subblocks, written, other);
    if (first != second) apart = apart && naive_write(runs[second], second, pages.dst_subblocks, written, other);
    expect(!apart, "the named runs share nothing: " + error);
  }
  expect(found > 1000, text("too few cases: ", found));
}

void remembers_only_what_passed() {
  const PageSizes pages{{64}, {64}, 1, 1};
  const Run good{0, 0, 0, 0, 8, 0, 0, {{4, 16, 16}, {1, 0, 0}, {1, 0, 0}}};
  for (int round = 0; round < 3; ++round) {
    verify_runs("op", &good, 1, pages);
    for (int column = 0; column < kRunColumns; ++column) {
      Run bad = good;
      reinterpret_cast<int64_t*>(&bad)[column] = column == 5 || column == 6   ? 16
                                                 : column == 8 || column == 9 ? 100
                                                 : column < 7                 ? 1000
                                                                              : 0;
      const bool unused = column == 5 || column == 6 || column == 11 || column == 12 || column == 14 || column == 15;
      expect(error_of([&] { verify_runs("op", &bad, 1, pages); }).empty() == unused, text("column ", column));
    }
    expect(!error_of([&] { verify_runs("op", &good, 1, {{55}, {64}, 1, 1}); }).empty(),
           "the source's page is part of what passed");
    expect(!error_of([&] { verify_runs("op", &good, 1, {{64}, {55}, 1, 1}); }).empty(),
           "the destination's page is part of what passed");
    expect(!error_of([&] { verify_runs("op", &good, 1, {{64}, {64}, 1, 2}); }).empty(),
           "the sub-blocks are part of what passed");
    // More plans than are remembered.
    for (int64_t i = 0; i < 300; ++i) verify_runs("op", &good, 1, {{64 + i}, {64}, 1, 1});
  }
}

void verifies_a_long_plan_quickly() {
  std::vector<Run> runs;
  for (int64_t i = 0; i < 20000; ++i) runs.push_back({0, 0, 0, i * 16, 8, 0, 0, {{2, 0, 8}, {1, 0, 0}, {1, 0, 0}}});
  verify_runs("op", runs.data(), 20000, {{64}, {20000 * 16}, 1, 1});
  runs.back().dst_offset -= 8;
  expect(error_of([&] { verify_runs("op", runs.data(), 20000, {{64}, {20000 * 16}, 1, 1}); }) ==
             "ValueError: op: runs must write each byte once, got runs[19998] and runs[19999] sharing bytes of dst[0]",
         "two of many runs");
}

// Eight shards beside each other in each of many rows and planes: more fragments than could be compared one by one.
void verifies_shards_that_interleave() {
  constexpr int64_t kRow = 8 * 16;
  constexpr int64_t kPlane = 5000 * kRow + 64;
  constexpr int64_t kPage = 1000 * kPlane;
  std::vector<Run> runs;
  for (int64_t shard = 0; shard < 8; ++shard) {
    const Loop planes = shard % 2 == 0 ? Loop{1000, 0, kPlane} : Loop{1000, 0, -kPlane};
    runs.push_back({0, 0, 0, shard * 16 + (shard % 2) * 999 * kPlane, 16, 0, 0, {{5000, 0, kRow}, planes, {1, 0, 0}}});
  }
  const PageSizes pages{{64}, {kPage}, 1, 1};
  verify_runs("op", runs.data(), 8, pages);
  // Over one byte of the next shard, and over the end of the row into the first shard of the next one.
  runs[3].fragment_bytes = 17;
  expect(error_of([&] { verify_runs("op", runs.data(), 8, pages); }).find("runs must") != std::string::npos,
         "a byte of the next shard");
  runs[3].fragment_bytes = 16;
  runs[7].dst_offset += 1;
  expect(error_of([&] { verify_runs("op", runs.data(), 8, pages); }).find("runs must") != std::string::npos,
         "a byte of the next row");
}

void threads_share_the_cache_of_plans() {
  std::vector<std::thread> threads;
  std::vector<std::string> failures(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &failures] {
      Random random(static_cast<uint64_t>(t / 2));  // two threads verify the same plans
      try {
        for (int i = 0; i < 1500; ++i) {
          PageSizes pages = random_pages(random);
          std::vector<Run> runs(static_cast<size_t>(random.in(1, 3)));
          for (Run& run : runs) run = random_run(random, pages, false);
          const bool refused =
              !error_of([&] { verify_runs("op", runs.data(), static_cast<int64_t>(runs.size()), pages); }).empty();
          expect(refused != naive_verify(runs, pages).empty(), "a plan was judged otherwise beside other threads");
          const Mapping mapping = laid_out(random_rows(random, 60, 60, true), random, true);
          const Expected expected = naive_pairs(mapping.rows, 60, 60, false);
          PairList list;
          const std::string error = error_of([&] {
            list = read_pairs({"op",
                               "map",
                               mapping.column(0),
                               mapping.column(1),
                               static_cast<int64_t>(mapping.rows.size()),
                               {Name{"src"}, 60},
                               {Name{"dst"}, 60},
                               false});
          });
          expect(
              error == expected.error && (!error.empty() || list.pairs == static_cast<int64_t>(expected.pairs.size())),
              "pairs beside other threads");
          recycle(std::move(list.segments));
        }
      } catch (const std::exception& error) {
        failures[static_cast<size_t>(t)] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) expect(failure.empty(), failure);
}

const Tests kTests{
    {"reads_what_a_loop_reads", reads_what_a_loop_reads},
    {"reads_row_numbers_and_names_the_pool", reads_row_numbers_and_names_the_pool},
    {"forgets_what_a_refused_call_saw", forgets_what_a_refused_call_saw},
    {"coalesces_downwards", coalesces_downwards},
    {"sorts_by_source", sorts_by_source},
    {"radix_sort_is_a_stable_sort", radix_sort_is_a_stable_sort},
    {"verifies_what_a_byte_map_verifies", verifies_what_a_byte_map_verifies},
    {"verifies_combs_as_a_byte_map_does", verifies_combs_as_a_byte_map_does},
    {"names_runs_that_share_a_byte", names_runs_that_share_a_byte},
    {"remembers_only_what_passed", remembers_only_what_passed},
    {"verifies_shards_that_interleave", verifies_shards_that_interleave},
    {"verifies_a_long_plan_quickly", verifies_a_long_plan_quickly},
    {"threads_share_the_cache_of_plans", threads_share_the_cache_of_plans},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
