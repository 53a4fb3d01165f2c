#include "ops/policy_ops.h"

#include <optional>
#include <type_traits>
#include <utility>

#include "core/gpu_policy.h"
#include "ops/json.h"

namespace kvkernels {
namespace {

constexpr int64_t kColumns = 10;

// Python has checked the values; what is no row at all would be read as one.
template <class Value>
std::optional<Value> member(int64_t number, int64_t values) {
  if (number < -1 || number >= values) {
    value_error("_set_policy: rows must have numbers from -1 to ", values - 1, ", got ", number);
  }
  if (number < 0) return std::nullopt;
  return static_cast<Value>(number);
}

std::optional<int64_t> limit(int64_t number) { return member<int64_t>(number, INT64_MAX); }

PolicyRow row_of(const int64_t* numbers) {
  const std::optional<Executor> executor = member<Executor>(numbers[0], 1 + std::ssize(kExecutors));
  PolicyRow row{executor.value_or(Executor::kAuto)};
  row.direction = member<Direction>(numbers[1], 4);
  row.link = member<Link>(numbers[2], 2);
  row.capability_at_least = member<int>(numbers[3], 10'000);
  row.capability_below = member<int>(numbers[4], 10'000);
  row.copies = member<Copies>(numbers[5], 2);
  row.count_at_least = limit(numbers[6]);
  row.count_below = limit(numbers[7]);
  row.fragment_bytes_below = limit(numbers[8]);
  row.ring_copy_bytes_at_least = limit(numbers[9]);
  if (row.executor == Executor::kAuto) value_error("_set_policy: rows must each have an executor, got one without");
  return row;
}

std::string json(const PolicyRow& row) {
  const auto version = [](int capability) { return quoted(text(capability / 10, '.', capability % 10)); };
  std::string members = text("\"executor\": ", quoted(name_of(row.executor)));
  const auto add = [&](const char* key, const auto& value) { members += text(", ", quoted(key), ": ", value); };
  if (row.direction) add("direction", quoted(name_of(*row.direction)));
  if (row.link) add("link", quoted(name_of(*row.link)));
  if (row.capability_at_least) add("capability_at_least", version(*row.capability_at_least));
  if (row.capability_below) add("capability_below", version(*row.capability_below));
  if (row.copies) add("copies", quoted(name_of(*row.copies)));
  if (row.count_at_least) add("count_at_least", *row.count_at_least);
  if (row.count_below) add("count_below", *row.count_below);
  if (row.fragment_bytes_below) add("fragment_bytes_below", *row.fragment_bytes_below);
  if (row.ring_copy_bytes_at_least) add("ring_copy_bytes_at_least", *row.ring_copy_bytes_at_least);
  return '{' + members + '}';
}

}  // namespace

void set_policy(const Tensor& rows) {
  const TensorFacts facts(rows);
  if (facts.dtype() != aoti_torch_dtype_int64() || !facts.is_cpu() || facts.dim() != 2 || facts.size(1) != kColumns ||
      !facts.is_contiguous_from(0)) {
    value_error("_set_policy: rows must be contiguous int64 of shape [n, ", kColumns, "] on the cpu, got ",
                facts.dtype_text(), " of shape ", facts.shape_text(), " on ", facts.device_text());
  }
  const auto* numbers = static_cast<const int64_t*>(rows.const_data_ptr());
  GpuPolicy policy{{}, "the policy of KVKERNELS_POLICY"};
  for (int64_t i = 0; i < facts.size(0); ++i) policy.rows.push_back(row_of(numbers + i * kColumns));
  set_gpu_policy(std::move(policy));
}

std::string policy_json(bool is_default) {
  const auto policy = gpu_policy();
  std::string rows;
  for (const PolicyRow& row : (is_default ? default_gpu_policy() : *policy).rows) {
    rows += (rows.empty() ? "" : ", ") + json(row);
  }
  return '[' + rows + ']';
}

}  // namespace kvkernels
