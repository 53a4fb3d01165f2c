// swap_blocks_batch: raw addresses, as vLLM calls it.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "core/radix.h"
#include "ops/copy_call.h"
#include "ops/cuda_path.h"
#include "ops/explain.h"
#include "ops/ops.h"

namespace kvkernels {
namespace {

const char* const kOp = "swap_blocks_batch";

struct Column {
  const std::byte* data;
  int64_t stride_bytes;
  int width;
  int64_t rows;

  int64_t operator[](int64_t row) const {
    if (width == 4) {
      int32_t narrow = 0;
      std::memcpy(&narrow, data + row * stride_bytes, sizeof(narrow));
      return narrow;
    }
    int64_t value = 0;
    std::memcpy(&value, data + row * stride_bytes, sizeof(value));
    return value;
  }
};

Column checked_column(const char* name, const Tensor& tensor, bool is_address, int64_t expected_rows) {
  const TensorFacts facts = checked_tensor(kOp, Name{name}, tensor);
  const bool is_wide = facts.dtype() == aoti_torch_dtype_int64();
  const bool other = facts.dtype() == (is_address ? aoti_torch_dtype_uint64() : aoti_torch_dtype_int32());
  if (!is_wide && !other) {
    value_error(kOp, ": ", name, is_address ? " must be int64 or uint64, got " : " must be int64 or int32, got ",
                facts.dtype_text());
  }
  if (facts.dim() != 1 || (expected_rows >= 0 && facts.size(0) != expected_rows)) {
    value_error(kOp, ": ", name, " must have shape ", expected_rows < 0 ? "[n]" : text('[', expected_rows, ']'),
                ", got ", facts.shape_text());
  }
  if (!facts.is_cpu()) value_error(kOp, ": ", name, " must be on the cpu, got ", facts.device_text());
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), facts.stride(0) * facts.element_bytes(),
          facts.element_bytes() == 4 ? 4 : 8, facts.size(0)};
}

uintptr_t checked_address(const char* name, const Column& column, int64_t row, int64_t bytes) {
  const auto address = static_cast<uintptr_t>(column[row]);
  if (address == 0) value_error(kOp, ": ", name, "[", row, "] must not be null, got 0");
  if (address > std::numeric_limits<uintptr_t>::max() - static_cast<uintptr_t>(bytes)) {
    value_error(kOp, ": ", name, "[", row, "] + sizes[", row, "] must fit in the address space, got an overflow");
  }
  return address;
}

uintptr_t address_of(const std::byte* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// A copy asked for, with the row that asked.
struct Listed {
  Fragment fragment;
  int64_t row;

  uintptr_t src_begin() const { return address_of(fragment.src); }
  uintptr_t src_end() const { return src_begin() + static_cast<uintptr_t>(fragment.bytes); }
  uintptr_t dst_begin() const { return address_of(fragment.dst); }
  uintptr_t dst_end() const { return dst_begin() + static_cast<uintptr_t>(fragment.bytes); }
};

// Counted from the lowest, so that addresses near each other take a few passes.
template <class Key>
void sort_by(std::vector<Listed>& copies, Key key) {
  if (copies.empty()) return;
  uintptr_t least = key(copies.front());
  uintptr_t most = least;
  bool sorted = true;
  uintptr_t before = least;
  for (const Listed& copy : copies) {
    const uintptr_t value = key(copy);
    least = std::min(least, value);
    most = std::max(most, value);
    sorted = sorted && before <= value;
    before = value;
  }
  if (!sorted) radix_sort(copies, most - least + 1, [&](const Listed& copy) { return key(copy) - least; });
}

// Of copies sorted by destination, removes those given twice; ValueError where two destinations meet otherwise.
void check_destinations(std::vector<Listed>& copies) {
  size_t kept = 0;
  for (const Listed& copy : copies) {
    if (kept > 0) {
      const Listed& last = copies[kept - 1];
      if (last.dst_begin() == copy.dst_begin() && last.src_begin() == copy.src_begin() &&
          last.fragment.bytes == copy.fragment.bytes) {
        continue;
      }
      if (copy.dst_begin() < last.dst_end()) {
        value_error(kOp, ": dst_ptrs must name each destination once, got rows ", std::min(last.row, copy.row), " and ",
                    std::max(last.row, copy.row), " sharing bytes");
      }
    }
    copies[kept++] = copy;
  }
  copies.resize(kept);
}

// Destinations are apart from each other by now; a source may be read often, but never where something is written.
void check_sources(const std::vector<Listed>& by_dst) {
  std::vector<Listed> by_src = by_dst;
  sort_by(by_src, [](const Listed& copy) { return copy.src_begin(); });
  auto writer = by_dst.begin();
  for (const Listed& reader : by_src) {
    while (writer != by_dst.end() && writer->dst_end() <= reader.src_begin()) ++writer;
    if (writer == by_dst.end()) return;
    if (writer->dst_begin() < reader.src_end()) {
      value_error(kOp, ": dst_ptrs must not write what src_ptrs read, got rows ", writer->row, " and ", reader.row,
                  " sharing bytes");
    }
  }
}

// The copies to make, in the order asked for and each once, or an error.
std::vector<Fragment> checked_fragments(std::vector<Listed> copies) {
  sort_by(copies, [](const Listed& copy) { return copy.dst_begin(); });
  check_destinations(copies);
  check_sources(copies);
  sort_by(copies, [](const Listed& copy) { return static_cast<uintptr_t>(copy.row); });
  std::vector<Fragment> fragments;
  fragments.reserve(copies.size());
  for (const Listed& copy : copies) fragments.push_back(copy.fragment);
  return fragments;
}

}  // namespace

void swap_blocks_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes,
                       bool is_src_access_order_any) {
  const Column src = checked_column("src_ptrs", src_ptrs, true, -1);
  const Column dst = checked_column("dst_ptrs", dst_ptrs, true, src.rows);
  const Column bytes = checked_column("sizes", sizes, false, src.rows);
  std::vector<Listed> copies;
  copies.reserve(static_cast<size_t>(src.rows));
  for (int64_t row = 0; row < src.rows; ++row) {
    const int64_t size = bytes[row];
    if (size < 0) value_error(kOp, ": sizes[", row, "] must not be negative, got ", size);
    if (size == 0) continue;
    copies.push_back({{reinterpret_cast<const std::byte*>(checked_address("src_ptrs", src, row, size)),
                       reinterpret_cast<std::byte*>(checked_address("dst_ptrs", dst, row, size)), size},
                      row});
  }
  std::vector<Fragment> fragments = checked_fragments(std::move(copies));
  if (addresses_may_be_cuda() && carry_out_fragments_on_cuda(kOp, fragments, is_src_access_order_any)) return;
  const Work work =
      lower_fragments(std::move(fragments), Direction::kHostToHost, {Executor::kCpu, torch_threads(), false});
  run_on_cpu(kOp, work, "no address is a cuda device's");
}

}  // namespace kvkernels
