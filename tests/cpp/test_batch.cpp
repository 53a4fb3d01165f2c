// swap_blocks_batch's rows against a model that compares each with each. Addresses are numbers here, nothing is behind
// them.
#include "core/batch.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;

constexpr const char* kOp = "op";
constexpr size_t kRoom = 64;  // more rows than a small call has

struct Row {
  uint64_t src;
  uint64_t dst;
  int64_t bytes;

  bool operator==(const Row&) const = default;
};

using Rows = std::vector<Row>;

// Columns as a caller may have them: rows apart from each other, sizes of 32 bits.
struct Columns {
  std::vector<uint64_t> memory;
  std::vector<int32_t> narrow;
  BatchRows rows;

  Columns(const Rows& listed, bool is_narrow) : memory(3 * listed.size() + 1), narrow(2 * listed.size() + 1) {
    for (size_t i = 0; i < listed.size(); ++i) {
      memory[3 * i] = listed[i].src;
      memory[3 * i + 1] = listed[i].dst;
      memory[3 * i + 2] = static_cast<uint64_t>(listed[i].bytes);
      narrow[2 * i] = static_cast<int32_t>(listed[i].bytes);
    }
    rows = {{memory.data(), 24, 8}, {memory.data() + 1, 24, 8}, {memory.data() + 2, 24, 8}, std::ssize(listed)};
    if (is_narrow) rows.bytes = {narrow.data(), 8, 4};
  }
};

using Check = std::vector<Fragment> (*)(const char*, const BatchRows&);

struct Answer {
  Rows copies;
  std::string error;
  const Fragment* memory = nullptr;
};

Answer answer_of(Check check, const Columns& columns) {
  Answer answer;
  answer.error = error_of([&] {
    std::vector<Fragment> copies = check(kOp, columns.rows);
    answer.memory = copies.data();
    for (const Fragment& copy : copies) {
      answer.copies.push_back(
          {reinterpret_cast<uintptr_t>(copy.src), reinterpret_cast<uintptr_t>(copy.dst), copy.bytes});
    }
  });
  return answer;
}

bool meet(uint64_t a, int64_t a_bytes, uint64_t b, int64_t b_bytes) {
  return a < b ? b - a < static_cast<uint64_t>(a_bytes) : a - b < static_cast<uint64_t>(b_bytes);
}

struct Expected {
  Rows copies;        // in order and once
  std::string error;  // or what the error says
  bool repeats = false;
};

Expected expected_of(const Rows& rows) {
  Expected expected;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    if (row.bytes < 0) return {{}, text("sizes[", i, "] must not be negative")};
    if (row.bytes == 0) continue;
    for (const uint64_t address : {row.src, row.dst}) {
      if (address == 0) return {{}, "must not be null"};
      if (address + static_cast<uint64_t>(row.bytes) < address) return {{}, "must fit in the address space"};
    }
    if (std::find(expected.copies.begin(), expected.copies.end(), row) == expected.copies.end()) {
      expected.copies.push_back(row);
    } else {
      expected.repeats = true;
    }
  }
  const Rows& copies = expected.copies;
  bool reads_written = false;
  for (size_t i = 0; i < copies.size(); ++i) {
    for (size_t j = 0; j < copies.size(); ++j) {
      if (j < i && meet(copies[i].dst, copies[i].bytes, copies[j].dst, copies[j].bytes)) {
        return {{}, "must name each destination once"};
      }
      reads_written = reads_written || meet(copies[i].src, copies[i].bytes, copies[j].dst, copies[j].bytes);
    }
  }
  if (reads_written) return {{}, "must not write what src_ptrs read"};
  return expected;
}

// A step below, at and above multiples of the size, so that neighbours touch, meet by a byte or stay apart by one.
uint64_t random_place(Random& random, uint64_t base, int64_t bytes, int64_t places) {
  const int64_t shift = random.once_in(6) ? random.in(-1, 1) : 0;
  return base + static_cast<uint64_t>(random.in(0, places) * std::max<int64_t>(bytes, 1) + shift);
}

uint64_t random_base(Random& random, int64_t reach_bytes) {
  const uint64_t last = ~uint64_t{0};
  const uint64_t bases[] = {4096, uint64_t{1} << 47, (uint64_t{1} << 63) - 50,
                            last - static_cast<uint64_t>(reach_bytes)};
  return bases[random.in(0, 3)] + static_cast<uint64_t>(random.in(0, 3) * 7);
}

Rows random_rows(Random& random) {
  const int64_t bytes = random.of({1, 3, 7, 8, 16, 24, 64, 576, 4096, 18432, 16777213});
  const bool mixes = random.once_in(3);
  const int64_t places = random.of({12, 40, 400});
  const int64_t reach_bytes = (places + 2) * bytes;
  const uint64_t src = random_base(random, reach_bytes);
  const uint64_t dst = random.once_in(3) ? src : random_base(random, reach_bytes);
  Rows rows;
  for (int64_t n = random.in(0, 12); n > 0; --n) {
    Row row{random_place(random, src, bytes, places), random_place(random, dst, bytes, places), bytes};
    if (mixes && random.once_in(2)) row.bytes = random.in(0, bytes);
    if (random.once_in(20)) row.bytes = 0;
    if (random.once_in(2000)) row.bytes = -random.in(1, 5);
    if (random.once_in(2000)) (random.once_in(2) ? row.src : row.dst) = 0;
    if (!rows.empty() && random.once_in(25)) row = rows[static_cast<size_t>(random.in(0, std::ssize(rows) - 1))];
    rows.push_back(row);
  }
  return rows;
}

void expect_same(const Answer& fast, const Answer& slow) {
  expect(fast.error == slow.error, text("errors differ: '", fast.error, "' and '", slow.error, "'"));
  expect(fast.copies == slow.copies, "copies differ");
}

// Both answers are the model's, and where the rows are apart and none repeats, the sort of whole rows was not asked:
// its list is in other memory than the one that was given back.
void random_rows_are_judged_as_by_comparing_each_with_each() {
  Random random(1);
  int apart = 0;
  int refused = 0;
  for (int call = 0; call < 200000; ++call) {
    const Rows rows = random_rows(random);
    const Columns columns(rows, random.once_in(2));
    const Expected expected = expected_of(rows);
    std::vector<Fragment> given_back;
    given_back.reserve(kRoom);
    const Fragment* const memory = given_back.data();
    recycle(std::move(given_back));
    const Answer fast = answer_of(checked_rows, columns);
    expect_same(fast, answer_of(checked_rows_by_sorting, columns));
    expect(fast.error.empty() == expected.error.empty() && fast.error.find(expected.error) != std::string::npos,
           text("'", fast.error, "' where '", expected.error, "' is right"));
    expect(fast.copies == expected.copies, "not the copies asked for");
    const bool is_apart = expected.error.empty() && !expected.repeats;
    expect(!is_apart || fast.memory == memory, "rows that are apart were sorted whole");
    apart += is_apart;
    refused += !expected.error.empty();
  }
  expect(apart > 40000 && refused > 40000, text(apart, " calls apart and ", refused, " refused: too few of a kind"));
}

// As many as make wide digits and a full map, in pools that lie between each other; one byte too near is found.
void many_rows_are_judged_alike() {
  Random random(2);
  for (int call = 0; call < 40; ++call) {
    const int64_t bytes = random.of({16, 4096, 18432, 16384});
    const int64_t count = random.in(4000, 9000);
    const int64_t pools = random.of({1, 7, 64});
    const uint64_t pool_bytes = static_cast<uint64_t>((2 * count + 3) * bytes);
    std::vector<int64_t> order(static_cast<size_t>(2 * count));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), random.engine());
    Rows rows;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t pool = (uint64_t{1} << 40) + 2 * pool_bytes * static_cast<uint64_t>(i * pools / count);
      rows.push_back({pool + static_cast<uint64_t>(random.in(0, 2 * count) * bytes),
                      pool + pool_bytes + static_cast<uint64_t>(order[static_cast<size_t>(i)] * bytes),
                      random.once_in(9) ? bytes / 2 : bytes});
    }
    std::vector<Fragment> given_back;
    given_back.reserve(rows.size());
    const Fragment* const memory = given_back.data();
    recycle(std::move(given_back));
    const Answer fast = answer_of(checked_rows, Columns(rows, false));
    expect(fast.error.empty() && fast.copies == rows && fast.memory == memory, "rows that are apart");
    Row& moved = rows[static_cast<size_t>(random.in(0, count - 1))];
    const Row& other = rows[static_cast<size_t>(random.in(0, count - 1))];
    if (random.once_in(2)) {
      moved.src = other.dst + static_cast<uint64_t>(other.bytes - 1);
    } else if (moved.dst != other.dst) {
      moved.dst = other.dst + static_cast<uint64_t>(other.bytes - 1);
    }
    const Columns columns(rows, false);
    const Answer spoilt = answer_of(checked_rows, columns);
    expect(spoilt.error.empty() == (moved.dst == other.dst && moved.src != other.dst + other.bytes - 1),
           "a byte that is shared");
    expect_same(spoilt, answer_of(checked_rows_by_sorting, columns));
  }
}

const Tests kTests{
    {"random_rows_are_judged_as_by_comparing_each_with_each", random_rows_are_judged_as_by_comparing_each_with_each},
    {"many_rows_are_judged_alike", many_rows_are_judged_alike},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
