// What the core's tests share: expectations, random numbers, and models that look at every byte.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/pairs.h"
#include "core/verify.h"

namespace kvkernels::testing {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw Failure(what);
}

// What `call` raises as "IndexError: …" or "ValueError: …"; "" where it returns.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::out_of_range& error) {
    return std::string("IndexError: ") + error.what();
  } catch (const std::invalid_argument& error) {
    return std::string("ValueError: ") + error.what();
  }
  return "";
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t in(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine_); }
  bool once_in(int64_t n) { return in(1, n) == 1; }
  int64_t of(std::initializer_list<int64_t> values) {
    return values.begin()[in(0, static_cast<int64_t>(values.size()) - 1)];
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

using Pairs = std::vector<std::pair<int64_t, int64_t>>;

inline Pairs expanded(const std::vector<Segment>& segments) {
  Pairs pairs;
  for (const Segment& segment : segments) {
    expect(segment.count > 0, "a segment holds no pair");
    for (int64_t i = 0; i < segment.count; ++i) pairs.emplace_back(segment.src + i, segment.dst + i);
  }
  return pairs;
}

inline bool continues(const Segment& a, const Segment& b) {
  return b.src == a.src + a.count && b.dst == a.dst + a.count;
}

struct Mapping {
  Pairs rows;
  std::vector<std::byte> memory;
  int width = 8;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  IdColumn column(int which) const { return {memory.data() + which * column_stride, row_stride, width}; }
};

inline Mapping laid_out(Pairs rows, Random& random, bool wide) {
  Mapping mapping;
  mapping.rows = std::move(rows);
  mapping.width = wide ? 8 : 4;
  const auto n = static_cast<int64_t>(mapping.rows.size());
  const bool column_major = random.once_in(3);
  mapping.row_stride = mapping.width * (column_major ? 1 : random.in(2, 4));
  mapping.column_stride = mapping.width * (column_major ? n : 1);
  mapping.memory.resize(static_cast<size_t>(mapping.width * 4 * (n + 1)));
  for (int64_t row = 0; row < n; ++row) {
    for (int which : {0, 1}) {
      const int64_t id = which == 0 ? mapping.rows[row].first : mapping.rows[row].second;
      std::byte* at = mapping.memory.data() + row * mapping.row_stride + which * mapping.column_stride;
      const auto narrow = static_cast<int32_t>(id);
      wide ? std::memcpy(at, &id, sizeof(id)) : std::memcpy(at, &narrow, sizeof(narrow));
    }
  }
  return mapping;
}

using Wide = __int128;

struct Side4 {
  Wide extents[4];
  Wide strides[4];
};

inline Side4 side_of(const Run& run, bool dst, int64_t subblocks) {
  Side4 side{{subblocks, run.loops[0].extent, run.loops[1].extent, run.loops[2].extent}, {}};
  side.strides[0] = dst ? run.dst_subblock_stride : run.src_subblock_stride;
  for (int i = 0; i < 3; ++i) side.strides[i + 1] = dst ? run.loops[i].dst_stride : run.loops[i].src_stride;
  return side;
}

// "" or what is wrong with one side of a run: "overflow", "outside".
inline std::string naive_reach(const Side4& side, Wide offset, Wide bytes, Wide page) {
  Wide begin = offset;
  Wide end = offset + bytes;
  bool fits = true;
  for (int i = 0; i < 4; ++i) {
    const Wide span = (side.extents[i] - 1) * side.strides[i];
    fits = fits && span >= kMin && span <= kMax;
    (span < 0 ? begin : end) += span;
  }
  if (!fits || begin < kMin || end > kMax) return "must fit in int64, got an offset that overflows";
  if (begin < 0 || end > page) return "must stay inside";
  return "";
}

// Marks what a run writes; false where a byte is written that `written` has already, whose run is then `other`.
inline bool naive_write(const Run& run, int64_t index, int64_t subblocks, std::map<int64_t, int64_t>& written,
                        int64_t& other) {
  const Side4 side = side_of(run, true, subblocks);
  Wide fragments = 1;
  for (const Wide extent : side.extents) {
    fragments *= extent;
    if (fragments > 100000) {  // more than a page here holds
      other = index;
      return false;
    }
  }
  for (int64_t f = 0; f < static_cast<int64_t>(fragments); ++f) {
    int64_t rest = f;
    int64_t at = run.dst_offset;
    for (int i = 3; i >= 0; --i) {
      at += rest % static_cast<int64_t>(side.extents[i]) *
            static_cast<int64_t>(side.extents[i] == 1 ? 0 : side.strides[i]);
      rest /= static_cast<int64_t>(side.extents[i]);
    }
    for (int64_t byte = at; byte < at + run.fragment_bytes; ++byte) {
      const auto [position, is_new] = written.try_emplace(byte, index);
      other = position->second;
      if (!is_new) return false;
    }
  }
  return true;
}

inline std::string naive_verify(const std::vector<Run>& runs, const PageSizes& pages) {
  std::vector<std::map<int64_t, int64_t>> written(pages.dst.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    const std::string prefix = text("runs[", i, "] ");
    if (run.src_pool < 0 || run.src_pool >= static_cast<int64_t>(pages.src.size()))
      return prefix + "src_pool must be below";
    if (run.dst_pool < 0 || run.dst_pool >= static_cast<int64_t>(pages.dst.size()))
      return prefix + "dst_pool must be below";
    if (run.fragment_bytes <= 0) return prefix + "fragment_bytes must be positive";
    for (int loop = 0; loop < 3; ++loop) {
      if (run.loops[loop].extent <= 0) return prefix + text("extent ", loop, " must be positive");
    }
    for (const bool dst : {false, true}) {
      const std::string wrong = naive_reach(side_of(run, dst, dst ? pages.dst_subblocks : pages.src_subblocks),
                                            dst ? run.dst_offset : run.src_offset, run.fragment_bytes,
                                            dst ? pages.dst[run.dst_pool] : pages.src[run.src_pool]);
      if (!wrong.empty()) return prefix + wrong + (wrong == "must stay inside" ? (dst ? " dst[" : " src[") : "");
    }
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    int64_t other = 0;
    if (!naive_write(runs[i], static_cast<int64_t>(i), pages.dst_subblocks, written[runs[i].dst_pool], other)) {
      return "runs must write each byte once, got runs[";
    }
  }
  return "";
}

inline Run random_run(Random& random, const PageSizes& pages, bool extremes) {
  const auto src_pools = static_cast<int64_t>(pages.src.size());
  const auto dst_pools = static_cast<int64_t>(pages.dst.size());
  Run run{random.in(0, src_pools - 1), random.in(0, dst_pools - 1), 0, 0, random.in(1, 5), 0, 0, {}};
  run.src_offset = random.in(0, 12);
  run.dst_offset = random.in(0, 40);
  run.src_subblock_stride = random.in(-4, 8);
  run.dst_subblock_stride = random.in(-6, 12);
  for (Loop& loop : run.loops) {
    loop = {random.once_in(2) ? 1 : random.in(1, 4), random.in(-3, 6),
            random.of({1, 2, 3, 4, 5, 6, 8, 12, 16, -2, -5, 0})};
    if (random.once_in(3)) loop.dst_stride = run.fragment_bytes * random.in(1, 4);
    if (random.once_in(4)) loop.dst_stride = random.of({24, -24});
    // A loop that walks downwards stays in the page where it starts at the top.
    if (random.once_in(2)) run.src_offset += std::max<int64_t>(0, -(loop.extent - 1) * loop.src_stride);
    if (random.once_in(2)) run.dst_offset += std::max<int64_t>(0, -(loop.extent - 1) * loop.dst_stride);
  }
  if (extremes && random.once_in(2)) {
    auto* columns = reinterpret_cast<int64_t*>(&run);
    for (int64_t n = random.in(1, 3); n > 0; --n) {
      columns[random.in(0, kRunColumns - 1)] =
          random.of({kMin, kMin + 1, kMax, kMax - 1, kMax / 2, -1, 0, 1, 2, int64_t{1} << 32, int64_t{1} << 62});
    }
  }
  return run;
}

inline PageSizes random_pages(Random& random) {
  PageSizes pages;
  pages.src.resize(static_cast<size_t>(random.in(1, 3)));
  pages.dst.resize(static_cast<size_t>(random.in(1, 3)));
  for (int64_t& page : pages.src) page = random.in(16, 90);
  for (int64_t& page : pages.dst) page = random.in(16, 120);
  pages.src_subblocks = random.once_in(2) ? 1 : random.in(1, 4);
  pages.dst_subblocks = random.once_in(2) ? 1 : random.in(1, 4);
  return pages;
}

using Tests = std::map<std::string, void (*)()>;

// Runs the test of that name, or prints the names for --list.
inline int run_tests(const Tests& tests, const std::string& wanted) {
  if (wanted == "--list") {
    for (const auto& [name, test] : tests) std::printf("%s\n", name.c_str());
    return 0;
  }
  const auto found = tests.find(wanted);
  if (found == tests.end()) return 2;
  try {
    found->second();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", wanted.c_str(), error.what());
    return 1;
  }
  return 0;
}

}  // namespace kvkernels::testing
