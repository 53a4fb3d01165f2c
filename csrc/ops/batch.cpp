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
    value_error(kOp, ": ", name, is_address ? " must be int64 or uint64, got " : " must be int64 or int32, got ", facts.dtype_text());
  }
  if (facts.dim() != 1 || (expected_rows >= 0 && facts.size(0) != expected_rows)) {
    value_error(kOp, ": ", name, " must have shape ", expected_rows < 0 ? "[n]" : text('[', expected_rows, ']'), ", got ",
                facts.shape_text());
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

// Row numbers by address; an address has 48 to 57 bits, so a few passes do.
template <class Address>
std::vector<int64_t> sorted_rows(const std::vector<Fragment>& fragments, Address address) {
  std::vector<int64_t> rows(fragments.size());
  uintptr_t top = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = static_cast<int64_t>(i);
    top = std::max(top, address(fragments[i]));
  }
  radix_sort(rows, top == std::numeric_limits<uintptr_t>::max() ? top : top + 1,
             [&](int64_t row) { return address(fragments[static_cast<size_t>(row)]); });
  return rows;
}

// Removes a copy given twice; ValueError where two destinations meet otherwise.
void check_destinations(std::vector<Fragment>& fragments) {
  const std::vector<int64_t> rows = sorted_rows(fragments, [](const Fragment& f) { return address_of(f.dst); });
  std::vector<bool> repeated(fragments.size());
  bool any_repeated = false;
  int64_t before = -1;
  for (const int64_t row : rows) {
    const Fragment& fragment = fragments[static_cast<size_t>(row)];
    if (before >= 0) {
      const Fragment& last = fragments[static_cast<size_t>(before)];
      if (last.dst == fragment.dst && last.src == fragment.src && last.bytes == fragment.bytes) {
        repeated[static_cast<size_t>(row)] = any_repeated = true;
        continue;
      }
      if (address_of(fragment.dst) < address_of(last.dst) + static_cast<uintptr_t>(last.bytes)) {
        value_error(kOp, ": dst_ptrs must name each destination once, got rows ", std::min(before, row), " and ",
                    std::max(before, row), " sharing bytes");
      }
    }
    before = row;
  }
  if (!any_repeated) return;
  size_t kept = 0;
  for (size_t i = 0; i < fragments.size(); ++i) {
    if (!repeated[i]) fragments[kept++] = fragments[i];
  }
  fragments.resize(kept);
}

// Destinations are apart from each other by now; a source may be read often, but never where something is written.
void check_sources(const std::vector<Fragment>& fragments) {
  const std::vector<int64_t> by_dst = sorted_rows(fragments, [](const Fragment& f) { return address_of(f.dst); });
  const std::vector<int64_t> by_src = sorted_rows(fragments, [](const Fragment& f) { return address_of(f.src); });
  size_t next = 0;
  for (const int64_t row : by_src) {
    const Fragment& source = fragments[static_cast<size_t>(row)];
    const auto end_of = [&](size_t i) {
      const Fragment& f = fragments[static_cast<size_t>(by_dst[i])];
      return address_of(f.dst) + static_cast<uintptr_t>(f.bytes);
    };
    while (next < by_dst.size() && end_of(next) <= address_of(source.src)) ++next;
    if (next == by_dst.size()) return;
    const int64_t writer = by_dst[next];
    if (address_of(fragments[static_cast<size_t>(writer)].dst) < address_of(source.src) + static_cast<uintptr_t>(source.bytes)) {
      value_error(kOp, ": dst_ptrs must not write what src_ptrs read, got rows ", writer, " and ", row, " sharing bytes");
    }
  }
}

}  // namespace

void swap_blocks_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes, bool is_src_access_order_any) {
  const Column src = checked_column("src_ptrs", src_ptrs, true, -1);
  const Column dst = checked_column("dst_ptrs", dst_ptrs, true, src.rows);
  const Column bytes = checked_column("sizes", sizes, false, src.rows);
  std::vector<Fragment> fragments;
  fragments.reserve(static_cast<size_t>(src.rows));
  for (int64_t row = 0; row < src.rows; ++row) {
    const int64_t size = bytes[row];
    if (size < 0) value_error(kOp, ": sizes[", row, "] must not be negative, got ", size);
    if (size == 0) continue;
    fragments.push_back({reinterpret_cast<const std::byte*>(checked_address("src_ptrs", src, row, size)),
                         reinterpret_cast<std::byte*>(checked_address("dst_ptrs", dst, row, size)), size});
  }
  check_destinations(fragments);
  check_sources(fragments);
  if (addresses_may_be_cuda() && carry_out_fragments_on_cuda(kOp, fragments, is_src_access_order_any)) return;
  const Work work = lower_fragments(std::move(fragments), Direction::kHostToHost, {Executor::kCpu, torch_threads(), false});
  run_on_cpu(kOp, work, "no address is a cuda device's");
}

}  // namespace kvkernels
