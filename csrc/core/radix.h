// A stable radix sort on a non-negative key below a known limit: a few passes over 100,000 records where a
// comparing sort takes seventeen.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvkernels {

// `spare` is memory that the caller keeps; what is in it afterwards is of no use.
template <int kDigitBits, class Record, class Key>
void radix_sort(std::vector<Record>& records, std::vector<Record>& spare, uint64_t key_limit, Key key) {
  constexpr size_t kDigits = size_t{1} << kDigitBits;
  spare.resize(records.size());
  for (int shift = 0; shift < 64 && ((key_limit - 1) >> shift) != 0 && key_limit > 1; shift += kDigitBits) {
    std::array<size_t, kDigits> starts{};
    for (const Record& record : records) ++starts[(key(record) >> shift) & (kDigits - 1)];
    size_t start = 0;
    for (size_t& digit : starts) {
      const size_t count = digit;
      digit = start;
      start += count;
    }
    for (const Record& record : records) spare[starts[(key(record) >> shift) & (kDigits - 1)]++] = record;
    records.swap(spare);
  }
}

template <class Record, class Key>
void radix_sort(std::vector<Record>& records, uint64_t key_limit, Key key) {
  constexpr int kDigitBits = 11;
  std::vector<Record> spare;
  radix_sort<kDigitBits>(records, spare, key_limit, key);
}

}  // namespace kvkernels
