// The CPU policy's decisions around each of its numbers, and its one override. Each override is read in a process of
// its own, because the policy is read once.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/policy.h"

namespace {

using namespace kvkernels;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

void check_decisions() {
  const CpuPolicy& policy = cpu_policy();
  constexpr int64_t kMiB = 1 << 20;
  expect(policy.l2_bytes > 0 && policy.l3_bytes > 0, "a cache of no size");
  expect(policy.stream_pool_bytes == 2 * policy.l2_bytes, "pools are streamed into from 2 x L2 on");
  expect(policy.stream_soon_read_bytes >= policy.l3_bytes / 4, "buffers are streamed into from L3 / 4 on");
  expect(policy.stream_soon_read_bytes >= policy.stream_pool_bytes, "a buffer that is soon read streams before a pool");
  expect(!policy.streams(policy.stream_pool_bytes - 1, false) && policy.streams(policy.stream_pool_bytes, false),
         "pools");
  expect(
      !policy.streams(policy.stream_soon_read_bytes - 1, true) && policy.streams(policy.stream_soon_read_bytes, true),
      "buffers");
  expect(policy.lanes_for(4 * kMiB - 1, 8) == 1, "below 4 MiB a call is serial");
  expect(policy.lanes_for(4 * kMiB, 8) == 4, "a lane has at least 1 MiB");
  expect(policy.lanes_for(64 * kMiB, 8) == 8 && policy.lanes_for(int64_t{1} << 40, 3) == 3,
         "no more lanes than threads");
  expect(policy.lanes_for(64 * kMiB, 1) == 1 && policy.lanes_for(64 * kMiB, 0) == 1, "at least one lane");
  const int64_t large = policy.sort_bytes;
  expect(policy.sorts(4096, large) && policy.sorts(16384, large), "pages of 4 to 16 KiB are sorted");
  expect(!policy.sorts(4095, large) && !policy.sorts(16385, large) && !policy.sorts(4096, large - 1), "others are not");
}

bool rejects(const char* value) {
  try {
    cpu_policy();
  } catch (const std::invalid_argument& error) {
    return error.what() == "KVKERNELS_STREAM_BYTES must be a number of bytes from 0 to 9223372036854775807, got '" +
                               std::string(value) + "'";
  }
  return false;
}

bool follows(int64_t bytes) {
  const CpuPolicy& policy = cpu_policy();
  return policy.stream_pool_bytes == bytes && policy.stream_soon_read_bytes == bytes && policy.streams(bytes, true) &&
         policy.streams(bytes, false);
}

// Runs check() in a child where KVKERNELS_STREAM_BYTES is `value`.
template <class Check>
void expect_with(const char* value, Check check) {
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) _exit(setenv("KVKERNELS_STREAM_BYTES", value, 1) == 0 && check() ? 0 : 1);
  int status = 0;
  if (waitpid(child, &status, 0) != child) throw std::runtime_error("waitpid failed");
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, (std::string("KVKERNELS_STREAM_BYTES=") + value).c_str());
}

}  // namespace

int main() {
  if (unsetenv("KVKERNELS_STREAM_BYTES") != 0) throw std::runtime_error("unsetenv failed");
  for (const char* value : {"", "-1", "1MiB", "12 ", " 12", "0x10", "9223372036854775808", "1e6"}) {
    expect_with(value, [&] { return rejects(value) && rejects(value); });
  }
  expect_with("0", [] { return follows(0); });
  expect_with("123456", [] { return follows(123456); });
  expect_with("9223372036854775807", [] { return follows(INT64_MAX); });
  check_decisions();
  std::printf("policy: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
