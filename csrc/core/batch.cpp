#include "core/batch.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "core/radix.h"
#include "core/text.h"

namespace kvkernels {
namespace {

constexpr uintptr_t kLastAddress = std::numeric_limits<uintptr_t>::max();
// A thread keeps its memory for so many rows (22 MiB in all), and gives larger lists back to the system.
constexpr size_t kSpareRows = size_t{1} << 18;
// As good as wider ones for 160,000 rows, and their counts cost 1,000 rows little.
constexpr int kDigitBits = 9;

thread_local std::vector<Fragment> spare_fragments;

template <class Value>
Value value_at(const IdColumn& column, int64_t row) {
  Value value;
  std::memcpy(&value, static_cast<const std::byte*>(column.data) + row * column.stride_bytes, sizeof(value));
  return value;
}

[[noreturn]] void refuse_size(const char* op, int64_t row, int64_t bytes) {
  value_error(op, ": sizes[", row, "] must not be negative, got ", bytes);
}

[[noreturn]] void refuse_address(const char* op, const char* name, int64_t row, uintptr_t address) {
  if (address == 0) value_error(op, ": ", name, "[", row, "] must not be null, got 0");
  value_error(op, ": ", name, "[", row, "] + sizes[", row, "] must fit in the address space, got an overflow");
}

uintptr_t checked_address(const char* op, const char* name, const IdColumn& column, int64_t row, uintptr_t bytes) {
  const auto address = value_at<uintptr_t>(column, row);
  if (address == 0 || address > kLastAddress - bytes) refuse_address(op, name, row, address);
  return address;
}

// Calls use(copy, row) for each row that asks for something, after a look at the row alone.
template <class Size, class Use>
void for_each_row(const char* op, const BatchRows& rows, Use use) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t bytes = value_at<Size>(rows.bytes, row);
    if (bytes < 0) refuse_size(op, row, bytes);
    if (bytes == 0) continue;
    const uintptr_t src = checked_address(op, "src_ptrs", rows.src, row, static_cast<uintptr_t>(bytes));
    const uintptr_t dst = checked_address(op, "dst_ptrs", rows.dst, row, static_cast<uintptr_t>(bytes));
    use(Fragment{reinterpret_cast<const std::byte*>(src), reinterpret_cast<std::byte*>(dst), bytes}, row);
  }
}

template <class Use>
void for_each_row(const char* op, const BatchRows& rows, Use use) {
  rows.bytes.width == 4 ? for_each_row<int32_t>(op, rows, use) : for_each_row<int64_t>(op, rows, use);
}

// Half-open.
struct Interval {
  uintptr_t begin;
  uintptr_t end;
};

Interval interval_of(const std::byte* begin, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {address, address + static_cast<uintptr_t>(bytes)};
}

Interval read_by(const Fragment& copy) { return interval_of(copy.src, copy.bytes); }
Interval written_by(const Fragment& copy) { return interval_of(copy.dst, copy.bytes); }

// What is known of one side's intervals after a look at each.
struct Hull {
  uintptr_t least = kLastAddress;  // of the begins
  uintptr_t most = 0;              // of the begins
  uintptr_t end = 0;
  uintptr_t varying = 0;  // bits that are not the same in all begins
  bool is_sorted = true;

  void add(const Interval& interval) {
    varying |= end > 0 ? interval.begin ^ least : 0;
    is_sorted &= most <= interval.begin;
    least = std::min(least, interval.begin);
    most = std::max(most, interval.begin);
    end = std::max(end, interval.end);
  }
};

struct Copies {
  std::vector<Fragment> fragments;
  Hull src;
  Hull dst;
};

Copies read_rows(const char* op, const BatchRows& rows) {
  Copies copies;
  copies.fragments = std::exchange(spare_fragments, {});
  copies.fragments.resize(static_cast<size_t>(rows.count));
  Fragment* next = copies.fragments.data();
  Hull src;
  Hull dst;
  for_each_row(op, rows, [&](const Fragment& copy, int64_t) {
    src.add(read_by(copy));
    dst.add(written_by(copy));
    *next++ = copy;
  });
  copies.fragments.resize(static_cast<size_t>(next - copies.fragments.data()));
  copies.src = src;
  copies.dst = dst;
  return copies;
}

// Intervals to be sorted. Their memory is kept for this thread's next call: faulting fresh pages in takes longer than
// all that is done here.
class Intervals {
 public:
  std::vector<Interval>& emptied(size_t expected) {
    listed_.clear();
    listed_.reserve(expected);
    return listed_;
  }

  // By begins, counted from the least in steps of what divides all distances: few digits are left. `hull` may be that
  // of more than these.
  const std::vector<Interval>& sorted(const Hull& hull) {
    if (hull.is_sorted) return listed_;
    const int step = std::countr_zero(hull.varying);
    const uint64_t limit = ((hull.most - hull.least) >> step) + 1;
    const auto key = [step, least = hull.least](const Interval& interval) { return (interval.begin - least) >> step; };
    radix_sort<kDigitBits>(listed_, spare_, limit, key);
    return listed_;
  }

  void give_back_excess() {
    if (listed_.capacity() > kSpareRows) *this = {};
  }

 private:
  std::vector<Interval> listed_;
  std::vector<Interval> spare_;
};

thread_local Intervals written_intervals;
thread_local Intervals read_intervals;

// Roughly where something is written, in cells that divide the hull: most copies read allocations that nothing writes,
// and need no closer look.
class WrittenCells {
 public:
  explicit WrittenCells(const Hull& hull) : begin_(hull.least), end_(hull.end) {
    while ((end_ - begin_) >> shift_ >= kCells) ++shift_;
  }

  void mark(const Interval& interval) {
    for (uintptr_t cell = cell_of(interval.begin); cell <= cell_of(interval.end - 1); ++cell) {
      bits_[cell / 64] |= uint64_t{1} << (cell % 64);
    }
  }

  bool may_meet(const Interval& interval) const {
    const uintptr_t begin = std::max(interval.begin, begin_);
    const uintptr_t end = std::min(interval.end, end_);
    if (begin >= end) return false;
    for (uintptr_t cell = cell_of(begin); cell <= cell_of(end - 1); ++cell) {
      if ((bits_[cell / 64] >> (cell % 64) & 1) != 0) return true;
    }
    return false;
  }

 private:
  static constexpr uintptr_t kCells = uintptr_t{1} << 15;

  uintptr_t cell_of(uintptr_t address) const { return (address - begin_) >> shift_; }

  uintptr_t begin_;
  uintptr_t end_;
  int shift_ = 0;
  std::array<uint64_t, kCells / 64> bits_{};
};

// Whether no copy writes a byte that another one writes or that any reads. One that is there twice is not apart.
bool all_apart(const Copies& copies) {
  std::vector<Interval>& unsorted = written_intervals.emptied(copies.fragments.size());
  for (const Fragment& copy : copies.fragments) unsorted.push_back(written_by(copy));
  const std::vector<Interval>& writers = written_intervals.sorted(copies.dst);
  for (size_t i = 1; i < writers.size(); ++i) {
    if (writers[i].begin < writers[i - 1].end) return false;
  }
  if (copies.src.end <= copies.dst.least || copies.dst.end <= copies.src.least) return true;
  WrittenCells cells(copies.dst);
  for (const Interval& writer : writers) cells.mark(writer);
  std::vector<Interval>& near = read_intervals.emptied(copies.fragments.size());
  for (const Fragment& copy : copies.fragments) {
    if (cells.may_meet(read_by(copy))) near.push_back(read_by(copy));
  }
  auto writer = writers.begin();
  for (const Interval& reader : read_intervals.sorted(copies.src)) {
    while (writer != writers.end() && writer->end <= reader.begin) ++writer;
    if (writer == writers.end()) return true;
    if (writer->begin < reader.end) return false;
  }
  return true;
}

// A copy asked for, with the row that asked.
struct Listed {
  Fragment copy;
  int64_t row;

  Interval read() const { return read_by(copy); }
  Interval written() const { return written_by(copy); }
};

template <class Key>
void sort_by(std::vector<Listed>& copies, Key key) {
  if (copies.empty()) return;
  const auto less = [&](const Listed& a, const Listed& b) { return key(a) < key(b); };
  const auto [least, most] = std::minmax_element(copies.begin(), copies.end(), less);
  const uint64_t begin = key(*least);
  radix_sort(copies, key(*most) - begin + 1, [&](const Listed& copy) { return key(copy) - begin; });
}

// Of copies sorted by destination, removes those given twice; ValueError where two destinations meet otherwise.
void check_destinations(const char* op, std::vector<Listed>& copies) {
  size_t kept = 0;
  for (const Listed& listed : copies) {
    if (kept > 0) {
      const Listed& last = copies[kept - 1];
      if (last.copy.dst == listed.copy.dst && last.copy.src == listed.copy.src &&
          last.copy.bytes == listed.copy.bytes) {
        continue;
      }
      if (listed.written().begin < last.written().end) {
        value_error(op, ": dst_ptrs must name each destination once, got rows ", std::min(last.row, listed.row),
                    " and ", std::max(last.row, listed.row), " sharing bytes");
      }
    }
    copies[kept++] = listed;
  }
  copies.resize(kept);
}

// Destinations are apart from each other by now; a source may be read often, but never where something is written.
void check_sources(const char* op, const std::vector<Listed>& by_dst) {
  std::vector<Listed> by_src = by_dst;
  sort_by(by_src, [](const Listed& listed) { return listed.read().begin; });
  auto writer = by_dst.begin();
  for (const Listed& reader : by_src) {
    while (writer != by_dst.end() && writer->written().end <= reader.read().begin) ++writer;
    if (writer == by_dst.end()) return;
    if (writer->written().begin < reader.read().end) {
      value_error(op, ": dst_ptrs must not write what src_ptrs read, got rows ", writer->row, " and ", reader.row,
                  " sharing bytes");
    }
  }
}

}  // namespace

std::vector<Fragment> checked_rows(const char* op, const BatchRows& rows) {
  Copies copies = read_rows(op, rows);
  const bool are_apart = all_apart(copies);
  written_intervals.give_back_excess();
  read_intervals.give_back_excess();
  return are_apart ? std::move(copies.fragments) : checked_rows_by_sorting(op, rows);
}

std::vector<Fragment> checked_rows_by_sorting(const char* op, const BatchRows& rows) {
  std::vector<Listed> copies;
  copies.reserve(static_cast<size_t>(rows.count));
  for_each_row(op, rows, [&](const Fragment& copy, int64_t row) { copies.push_back({copy, row}); });
  sort_by(copies, [](const Listed& listed) { return listed.written().begin; });
  check_destinations(op, copies);
  check_sources(op, copies);
  sort_by(copies, [](const Listed& listed) { return static_cast<uint64_t>(listed.row); });
  std::vector<Fragment> fragments;
  fragments.reserve(copies.size());
  for (const Listed& listed : copies) fragments.push_back(listed.copy);
  return fragments;
}

void recycle(std::vector<Fragment>&& fragments) {
  if (fragments.capacity() > spare_fragments.capacity() && fragments.capacity() <= kSpareRows) {
    spare_fragments = std::move(fragments);
  }
}

}  // namespace kvkernels
