#include "core/gpu_policy.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <iterator>
#include <optional>

#include "core/text.h"

namespace kvkernels {
namespace {

// Published figures, docs/design.md names their sources: batched copies move 4 to 7 GB/s up to 16 KiB a fragment and 28
// to 44 at 28 KiB; below 16 fragments a kernel's launch costs more than they do. One by one a copy costs about 3.4 us
// besides its bytes, and copy engines pass the kernel between 1 and 2 MiB.
constexpr int64_t kKiB = 1024;
constexpr GpuPolicyRow kRows[] = {
    {Direction::kHostToDevice, true, 16, 28 * kKiB},
    {Direction::kDeviceToHost, true, 16, 28 * kKiB},
    {Direction::kHostToDevice, false, 4, 1024 * kKiB},
    {Direction::kDeviceToHost, false, 4, 1024 * kKiB},
};

// Also published, none measured here: bulk copies on 4 SMs came within 10% of the ceiling of a GB300's link (SGLang
// pull request 40278), where the rate of operations limits short ones; on compute capability 12.0 they lost to plain
// loads.
constexpr int64_t kBulkPaysBytes = 4 * kKiB;
constexpr int kBulkPaysCapabilities[] = {90, 100, 103};

int64_t shortest_fragment(const std::vector<Move>& moves) {
  const auto shorter = [](const Move& a, const Move& b) { return a.fragment_bytes < b.fragment_bytes; };
  return moves.empty() ? 0 : std::min_element(moves.begin(), moves.end(), shorter)->fragment_bytes;
}

bool is_small(const GpuPolicyRow& row, int64_t bytes, int64_t descriptors) {
  return descriptors >= row.min_count && bytes / std::max<int64_t>(descriptors, 1) < row.kernel_below_bytes;
}

std::optional<int64_t> override_bytes() {
  const char* value = std::getenv("KVKERNELS_KERNEL_BELOW_BYTES");
  if (value == nullptr) return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const long long bytes = std::strtoll(value, &end, 10);
  if (end == value || *end != '\0' || bytes < 0 || errno == ERANGE) {
    value_error("KVKERNELS_KERNEL_BELOW_BYTES must be a number of bytes, got '", value, "'");
  }
  return bytes;
}

}  // namespace

GpuPolicyRow gpu_policy(Direction direction, bool batches) {
  for (GpuPolicyRow row : kRows) {
    if (row.direction != direction || row.batches != batches) continue;
    row.kernel_below_bytes = override_bytes().value_or(row.kernel_below_bytes);
    return row;
  }
  value_error("gpu_policy: direction must be h2d or d2h, got ", name_of(direction));
}

std::string bulk_refusal(const std::vector<Move>& moves, const BulkFacts& facts) {
  const auto version = [](int capability) { return text(capability / 10, '.', capability % 10); };
  if (facts.capability < kBulkCapability) {
    return text("it needs compute capability 9.0 or later, and the device has ", version(facts.capability));
  }
  if (facts.code_capability < kBulkCapability) {
    return text("it needs code for compute capability 9.0 or later, and the library's for this device is for ",
                version(facts.code_capability));
  }
  if (facts.shared_bytes < facts.needed_bytes) {
    return text("it needs ", facts.needed_bytes, " bytes of shared memory a CTA, and the device has ",
                facts.shared_bytes);
  }
  const int64_t shortest = shortest_fragment(moves);
  if (shortest >= kBulkMinBytes) return "";
  return text("its fragments must have at least ", kBulkMinBytes, " bytes, and one has ", shortest);
}

bool bulk_pays(const std::vector<Move>& moves, const BulkFacts& facts) {
  return std::find(std::begin(kBulkPaysCapabilities), std::end(kBulkPaysCapabilities), facts.capability) !=
             std::end(kBulkPaysCapabilities) &&
         shortest_fragment(moves) >= kBulkPaysBytes && is_vector_aligned(moves) && bulk_refusal(moves, facts).empty();
}

bool staging_may_pay(Direction direction, int64_t bytes, int64_t descriptors, const GpuFacts& facts) {
  // A kernel's stores to the host are the slower of its two ways; its loads are as good as the ring's.
  if (direction == Direction::kDeviceToDevice) return false;
  if (direction == Direction::kHostToDevice && facts.kernel_refusal.empty()) return false;
  return is_small(gpu_policy(direction, facts.batches), bytes, descriptors);
}

Choice choose_on_gpu(Direction direction, int64_t bytes, int64_t descriptors, const GpuFacts& facts) {
  if (direction == Direction::kDeviceToDevice && facts.kernel_refusal.empty()) {
    return {Executor::kKernel, "both sides are on the device"};
  }
  if (direction == Direction::kDeviceToDevice) return {Executor::kDma, "the kernel cannot: " + facts.kernel_refusal};
  const GpuPolicyRow row = gpu_policy(direction, facts.batches);
  const int64_t mean_bytes = descriptors > 0 ? bytes / descriptors : 0;
  if (staging_may_pay(direction, bytes, descriptors, facts) && facts.staged_bytes >= row.kernel_below_bytes) {
    return {Executor::kStaged,
            text(descriptors, " fragments of ", mean_bytes, " bytes on average, and on the host ", facts.staged_bytes,
                 " together; from ", row.kernel_below_bytes, " on they are worth a ring on the device")};
  }
  if (!facts.kernel_refusal.empty()) return {Executor::kDma, "the kernel cannot: " + facts.kernel_refusal};
  const std::string reason = text(
      descriptors, " fragments of ", mean_bytes, " bytes on average; the kernel takes at least ", row.min_count,
      " below ", row.kernel_below_bytes, facts.batches ? " where copies are batched" : " where copies go one by one");
  if (!is_small(row, bytes, descriptors)) return {Executor::kDma, reason};
  if (facts.bulk_pays) return {Executor::kBulk, reason + ", by bulk copies where all are aligned and long enough"};
  return {Executor::kKernel, reason};
}

}  // namespace kvkernels
