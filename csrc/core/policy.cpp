#include "core/policy.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "core/setting.h"

namespace kvkernels {

namespace {

constexpr const char* kStreamBytesVariable = "KVKERNELS_STREAM_BYTES";

// sysconf answers 0 or -1 where it does not know, and on some virtual machines the sum over a whole socket.
int64_t believed(int64_t bytes, int64_t most, int64_t otherwise) {
  return bytes > 0 && bytes <= most ? bytes : otherwise;
}

int64_t parse_bytes(const char* text) {
  const char* const end = text + std::strlen(text);
  int64_t bytes = 0;
  const auto [stop, error] = std::from_chars(text, end, bytes);
  if (error != std::errc() || stop != end || bytes < 0) {
    throw std::invalid_argument(std::string(kStreamBytesVariable) +
                                " must be a number of bytes from 0 to 9223372036854775807, got '" + text + "'");
  }
  return bytes;
}

CpuPolicy with_variable(CpuPolicy policy) {
  if (const char* const text = std::getenv(kStreamBytesVariable)) {
    policy.stream_pool_bytes = policy.stream_soon_read_bytes = parse_bytes(text);
  }
  return policy;
}

Setting<CpuPolicy>& setting() {
  // Never destroyed: other threads may still be in an op when the process's statics go.
  static auto& setting = *new Setting<CpuPolicy>;
  return setting;
}

}  // namespace

CpuPolicy policy_of_caches(int64_t l2_bytes, int64_t l3_bytes) {
  CpuPolicy policy{};
  policy.l2_bytes = believed(l2_bytes, 16 << 20, 512 << 10);
  policy.l3_bytes = believed(l3_bytes, 128 << 20, 32 << 20);
  policy.stream_pool_bytes = 2 * policy.l2_bytes;
  policy.stream_soon_read_bytes = std::max(policy.l3_bytes / 4, policy.stream_pool_bytes);
  policy.serial_bytes = 4 << 20;
  policy.lane_bytes = 1 << 20;
  policy.sort_min_page_bytes = 4 << 10;
  policy.sort_max_page_bytes = 16 << 10;
  policy.sort_bytes = 64 << 20;
  policy.most_lanes = std::numeric_limits<int>::max();
  return policy;
}

const CpuPolicy& cpu_policy_of_machine() {
  static const CpuPolicy policy =
      with_variable(policy_of_caches(sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)));
  return policy;
}

const CpuPolicy& cpu_policy() {
  const CpuPolicy* const set = setting().get();
  return set != nullptr ? *set : cpu_policy_of_machine();
}

void set_cpu_policy(CpuPolicy policy) { setting().set(with_variable(std::move(policy))); }

int CpuPolicy::lanes_for(int64_t bytes, int threads) const {
  if (bytes < serial_bytes) return 1;
  return static_cast<int>(std::clamp<int64_t>(bytes / lane_bytes, 1, std::clamp<int64_t>(threads, 1, most_lanes)));
}

bool CpuPolicy::streams(int64_t bytes, bool soon_read) const {
  return bytes >= (soon_read ? stream_soon_read_bytes : stream_pool_bytes);
}

bool CpuPolicy::sorts(int64_t page_bytes, int64_t total_bytes) const {
  return page_bytes >= sort_min_page_bytes && page_bytes <= sort_max_page_bytes && total_bytes >= sort_bytes;
}

}  // namespace kvkernels
