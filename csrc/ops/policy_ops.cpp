#include "ops/policy_ops.h"

#include <array>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/gpu_policy.h"
#include "core/policy.h"
#include "cpu/isa.h"
#include "cpu/tuning.h"
#include "ops/json.h"

namespace kvkernels {
namespace {

constexpr int64_t kColumns = 11;

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
  row.sm_budget = limit(numbers[10]);
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
  if (row.sm_budget) add("sm_budget", *row.sm_budget);
  return '{' + members + '}';
}

// What a file may say of the CPU, with the range of each.
struct CpuNumber {
  const char* name;
  int64_t least;
  int64_t most;
  int64_t (*get)(const CpuPolicy&, const cpu::Tuning&);
  void (*set)(CpuPolicy&, cpu::Tuning&, int64_t);
};

template <auto CpuPolicy::* member>
constexpr CpuNumber of_policy(const char* name, int64_t least, int64_t most) {
  return {name, least, most, [](const CpuPolicy& policy, const cpu::Tuning&) -> int64_t { return policy.*member; },
          [](CpuPolicy& policy, cpu::Tuning&, int64_t value) { policy.*member = value; }};
}

template <auto cpu::Tuning::* member>
constexpr CpuNumber of_tuning(const char* name, int64_t least, int64_t most) {
  using Value = std::remove_cvref_t<decltype(cpu::Tuning{}.*member)>;
  return {name, least, most,
          [](const CpuPolicy&, const cpu::Tuning& tuning) { return static_cast<int64_t>(tuning.*member); },
          [](CpuPolicy&, cpu::Tuning& tuning, int64_t value) { tuning.*member = static_cast<Value>(value); }};
}

constexpr int64_t kNever = INT64_MAX;
constexpr std::array kCpuNumbers{
    of_policy<&CpuPolicy::most_lanes>("lanes", 1, INT32_MAX),
    of_policy<&CpuPolicy::serial_bytes>("serial_bytes", 0, kNever),
    of_policy<&CpuPolicy::stream_pool_bytes>("stream_pool_bytes", 0, kNever),
    of_policy<&CpuPolicy::stream_soon_read_bytes>("stream_soon_read_bytes", 0, kNever),
    of_tuning<&cpu::Tuning::interleave>("interleave", 2, 4),
    of_tuning<&cpu::Tuning::piece_bytes>("piece_bytes", 4096, 1 << 30),
    of_tuning<&cpu::Tuning::prefetches_within>("prefetches_within", 0, 1),
    of_tuning<&cpu::Tuning::prefetches_strips>("prefetches_strips", 0, 1),
    of_tuning<&cpu::Tuning::writes_rows>("writes_rows", 0, 1),
    of_tuning<&cpu::Tuning::rows_interleave_from_bytes>("rows_interleave_from_bytes", 256, kNever),
};

const int64_t* checked_numbers(const Tensor& numbers) {
  const TensorFacts facts(numbers);
  const auto count = static_cast<int64_t>(kCpuNumbers.size());
  if (facts.dtype() != aoti_torch_dtype_int64() || !facts.is_cpu() || facts.dim() != 1 || facts.size(0) != count ||
      !facts.is_contiguous_from(0)) {
    value_error("_set_cpu_numbers: numbers must be contiguous int64 of shape [", count, "] on the cpu, got ",
                facts.dtype_text(), " of shape ", facts.shape_text(), " on ", facts.device_text());
  }
  const auto* values = static_cast<const int64_t*>(numbers.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const CpuNumber& number = kCpuNumbers[static_cast<size_t>(i)];
    if (values[i] == -1 || (values[i] >= number.least && values[i] <= number.most)) continue;
    value_error("_set_cpu_numbers: ", number.name, " must be from ", number.least, " to ", number.most, ", got ",
                values[i]);
  }
  return values;
}

}  // namespace

void set_policy(const Tensor& rows, StrArgument source) {
  const TensorFacts facts(rows);
  if (facts.dtype() != aoti_torch_dtype_int64() || !facts.is_cpu() || facts.dim() != 2 || facts.size(1) != kColumns ||
      !facts.is_contiguous_from(0)) {
    value_error("_set_policy: rows must be contiguous int64 of shape [n, ", kColumns, "] on the cpu, got ",
                facts.dtype_text(), " of shape ", facts.shape_text(), " on ", facts.device_text());
  }
  const auto* numbers = static_cast<const int64_t*>(rows.const_data_ptr());
  GpuPolicy policy{{}, source.take()};
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

void set_cpu_numbers(const Tensor& numbers, StrArgument source) {
  const int64_t* value = checked_numbers(numbers);
  CpuPolicy policy = cpu_policy_of_machine();
  cpu::Tuning tuning = cpu::tuning_for(cpu::selected_isa());
  for (const CpuNumber& number : kCpuNumbers) {
    if (*value >= 0) number.set(policy, tuning, *value);
    ++value;
  }
  policy.source = source.take();
  cpu::set_tuning(tuning);
  set_cpu_policy(std::move(policy));
}

std::string cpu_numbers_json() {
  const CpuPolicy& policy = cpu_policy();
  const cpu::Tuning& tuning = cpu::tuning();
  std::string members =
      text("\"table\": ", quoted(table_of(Executor::kCpu)), ", \"l2_bytes\": ", policy.l2_bytes,
           ", \"l3_bytes\": ", policy.l3_bytes, ", \"lane_bytes\": ", policy.lane_bytes,
           ", \"sort_min_page_bytes\": ", policy.sort_min_page_bytes,
           ", \"sort_max_page_bytes\": ", policy.sort_max_page_bytes, ", \"sort_bytes\": ", policy.sort_bytes);
  for (const CpuNumber& number : kCpuNumbers) {
    members += text(", ", quoted(number.name), ": ", number.get(policy, tuning));
  }
  return '{' + members + '}';
}

std::string table_of(Executor executor) {
  if (executor == Executor::kReference) return "";
  if (executor != Executor::kCpu) return gpu_policy()->source;
  const std::string& source = cpu_policy().source;
  return source.empty() ? text("compiled in: ", cpu::tuning().processors) : source;
}

}  // namespace kvkernels
