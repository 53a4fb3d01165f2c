#include "core/gpu_policy.h"

#include <cerrno>
#include <cstdlib>
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

GpuChoice choose_on_gpu(Direction direction, int64_t bytes, int64_t descriptors, const GpuFacts& facts) {
  if (direction == Direction::kDeviceToDevice) return {Executor::kKernel, "both sides are on the device"};
  if (!facts.kernel_refusal.empty()) return {Executor::kDma, "the kernel cannot: " + facts.kernel_refusal};
  const GpuPolicyRow row = gpu_policy(direction, facts.batches);
  const int64_t mean_bytes = descriptors > 0 ? bytes / descriptors : 0;
  const bool small = mean_bytes < row.kernel_below_bytes && descriptors >= row.min_count;
  return {small ? Executor::kKernel : Executor::kDma,
          text(descriptors, " fragments of ", mean_bytes, " bytes on average; the kernel takes at least ",
               row.min_count, " below ", row.kernel_below_bytes,
               facts.batches ? " where copies are batched" : " where copies go one by one")};
}

}  // namespace kvkernels
