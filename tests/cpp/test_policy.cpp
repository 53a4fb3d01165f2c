// The policies' decisions around each of their numbers, and their overrides. The CPU's is read once, so each of its
// overrides is tried in a process of its own.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/gpu_policy.h"
#include "core/lower.h"
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

void check_caches() {
  constexpr int64_t kMiB = 1 << 20;
  const auto l2_of = [](int64_t bytes) { return policy_of_caches(bytes, 32 * kMiB).l2_bytes; };
  const auto l3_of = [](int64_t bytes) { return policy_of_caches(kMiB, bytes).l3_bytes; };
  expect(l2_of(1) == 1 && l2_of(16 * kMiB) == 16 * kMiB, "an L2 of up to 16 MiB is believed");
  expect(l3_of(1) == 1 && l3_of(128 * kMiB) == 128 * kMiB, "an L3 of up to 128 MiB is believed");
  for (const int64_t bytes : {int64_t{-1}, int64_t{0}, 128 * kMiB + 1}) {
    expect(l2_of(bytes) == kMiB / 2 && l3_of(bytes) == 32 * kMiB, "a cache that nothing is known of");
  }
  expect(l2_of(16 * kMiB + 1) == kMiB / 2, "an L2 of more than 16 MiB");
  expect(policy_of_caches(2 * kMiB, 64 * kMiB).stream_soon_read_bytes == 16 * kMiB, "a quarter of L3");
  expect(policy_of_caches(2 * kMiB, 12 * kMiB).stream_soon_read_bytes == 4 * kMiB, "but twice L2 at least");
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

Executor chosen(Direction direction, int64_t bytes, int64_t count, bool batches, const char* refusal = "") {
  return choose_on_gpu(direction, bytes * count, count, {batches, refusal, false, 0}).executor;
}

void check_gpu_table() {
  constexpr int64_t kKiB = 1024;
  for (const Direction link : {Direction::kHostToDevice, Direction::kDeviceToHost}) {
    expect(chosen(link, 28 * kKiB - 1, 16, true) == Executor::kKernel, "short fragments take the kernel");
    expect(chosen(link, 28 * kKiB, 16, true) == Executor::kDma, "long ones the copy engine");
    expect(chosen(link, 28 * kKiB - 1, 15, true) == Executor::kDma, "few are not worth a launch");
    expect(chosen(link, 1024 * kKiB - 1, 4, false) == Executor::kKernel, "single copies cost more than batched ones");
    expect(chosen(link, 1024 * kKiB, 4, false) == Executor::kDma, "but not above 1 MiB");
    expect(chosen(link, 1024, 3, false) == Executor::kDma, "nor for three");
    expect(chosen(link, 16, 1000, true, "pageable") == Executor::kDma, "a kernel that cannot reach is not taken");
    expect(chosen(link, 0, 0, true) == Executor::kDma, "nothing to copy divides by nothing");
  }
  expect(chosen(Direction::kDeviceToDevice, int64_t{1} << 30, 1, true) == Executor::kKernel, "on a device, the kernel");
  const auto small = [](Direction direction, GpuFacts facts) {
    return choose_on_gpu(direction, 64 * 4 * kKiB, 64, facts).executor;
  };
  const Direction to_host = Direction::kDeviceToHost;
  const Direction to_device = Direction::kHostToDevice;
  expect(small(to_device, {true, "", true, 0}) == Executor::kBulk, "aligned fragments take bulk copies");
  expect(small(to_device, {true, "", true, 1 << 20}) == Executor::kBulk, "loads need no ring");
  expect(small(to_device, {true, "pageable", true, 28 * kKiB}) == Executor::kStaged, "but where a kernel cannot load");
  expect(small(to_host, {true, "", true, 28 * kKiB}) == Executor::kStaged, "long host runs take the ring");
  expect(small(to_host, {true, "", true, 28 * kKiB - 1}) == Executor::kBulk, "short ones do not");
  expect(small(to_host, {true, "pageable", false, 28 * kKiB - 1}) == Executor::kDma, "nor the kernel");
  expect(small(Direction::kDeviceToDevice, {true, "", true, 1 << 20}) == Executor::kKernel, "no link, no ring");
  expect(small(Direction::kDeviceToDevice, {true, "no code", true, 1 << 20}) == Executor::kDma, "it needs no code");
  expect(chosen(to_device, 28 * kKiB, 16, true) == Executor::kDma, "from the limit on");
  expect(bulk_refusal({}, {89, 89, 99, 99}) == "it needs compute capability 9.0 or later, and the device has 8.9",
         "older devices are named");
  expect(bulk_refusal({}, {90, 80, 99, 99}) ==
             "it needs code for compute capability 9.0 or later, and the library's for this device is for 8.0",
         "older code is named");
  expect(bulk_refusal({}, {120, 100, 98, 99}) == "it needs 99 bytes of shared memory a CTA, and the device has 98",
         "smaller shared memory is named");
  std::vector<Move> moves(2);
  moves[0].fragment_bytes = 4096;
  moves[1].fragment_bytes = 512;
  expect(bulk_refusal(moves, {90, 90, 99, 99}).empty(), "fragments of 512 bytes are long enough");
  moves[1].fragment_bytes = 511;
  expect(bulk_refusal(moves, {90, 90, 99, 99}) == "its fragments must have at least 512 bytes, and one has 511",
         "the shortest is named");
  const Choice refused = choose_on_gpu(Direction::kHostToDevice, 16, 1, {true, "its memory is pageable", false, 0});
  expect(refused.reason == "the kernel cannot: its memory is pageable", "the reason is told");
}

void check_bulk_pays() {
  const auto pays = [](int64_t fragment_bytes, int64_t block_stride, int capability, int code) {
    Move move{};
    move.src.block_stride = move.dst.block_stride = block_stride;
    move.fragment_bytes = fragment_bytes;
    return bulk_pays({move}, {capability, code, 99, 99});
  };
  for (const int capability : {90, 100, 103}) expect(pays(4096, 4096, capability, 90), "in the data centre");
  for (const int capability : {80, 89, 110, 120}) expect(!pays(4096, 4096, capability, 90), "but not elsewhere");
  expect(!pays(4080, 4096, 90, 90), "for long fragments");
  expect(!pays(4096, 4104, 90, 90), "that are aligned");
  expect(!pays(4096, 4096, 90, 80), "with the code for it");
}

void check_gpu_override() {
  const char* variable = "KVKERNELS_KERNEL_BELOW_BYTES";
  if (setenv(variable, "100", 1) != 0) throw std::runtime_error("setenv failed");
  expect(chosen(Direction::kHostToDevice, 99, 16, true) == Executor::kKernel, "below the override");
  expect(chosen(Direction::kHostToDevice, 100, 16, true) == Executor::kDma, "from the override on");
  for (const char* value : {"", "-1", "1k", "99999999999999999999"}) {
    if (setenv(variable, value, 1) != 0) throw std::runtime_error("setenv failed");
    std::string message;
    try {
      chosen(Direction::kDeviceToHost, 1, 16, true);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    expect(message == std::string(variable) + " must be a number of bytes, got '" + value + "'", value);
  }
  if (unsetenv(variable) != 0) throw std::runtime_error("unsetenv failed");
}

// Listed fragments as a move a size: every byte where the list has it, in the widest steps that all addresses allow.
void check_addresses_as_ids() {
  alignas(16) std::byte src[4096] = {};
  alignas(16) std::byte dst[4096] = {};
  const auto as_ids = [](const std::vector<Fragment>& fragments) {
    return addresses_as_ids(fragments, Direction::kHostToDevice);
  };
  const std::vector<Fragment> mixed = {{src + 2, dst + 40, 8}, {src + 30, dst + 4, 24}, {src + 60, dst + 80, 8}};
  const std::vector<Work> works = as_ids(mixed);
  expect(works.size() == 2 && works[0].pairs == 2 && works[0].bytes == 16 && works[1].pairs == 1 &&
             works[1].bytes == 24 && works[1].descriptors == 1,
         "a move a size");
  size_t matched = 0;
  for (const Work& work : works) {
    const Move& move = work.moves.front();
    expect(work.direction == Direction::kHostToDevice && work.fragments.empty() && move.src.block_stride == 2,
           "ids count in steps that divide every address");
    for (const Segment& segment : work.segments) {
      for (const Fragment& fragment : mixed) {
        matched += segment.count == 1 && move.src.at(segment.src) == fragment.src &&
                   move.dst.at(segment.dst) == fragment.dst && move.fragment_bytes == fragment.bytes;
      }
    }
  }
  expect(matched == mixed.size(), "an id is its address");
  const std::vector<Work> aligned = as_ids({{src + 16, dst + 1024, 4096 - 1024}, {src, dst, 512}});
  expect(aligned.size() == 2 && is_vector_aligned(aligned[0].moves) && is_vector_aligned(aligned[1].moves),
         "addresses of 16 bytes are aligned");
  expect(aligned[0].shape == Shape::kPage && aligned[1].shape == Shape::kRow, "pages and rows");
  expect(!is_vector_aligned(as_ids({{src + 8, dst, 512}})[0].moves), "one that is not");
  expect(as_ids({}).empty(), "an empty list");

  std::vector<Fragment> sizes;
  for (int64_t bytes = 1; bytes <= kMostSizes; ++bytes) {
    sizes.insert(sizes.end(), 3, {src, dst, bytes});
    expect(count_sizes(sizes) == bytes, "sizes are counted once");
  }
  sizes.insert(sizes.end(), {{src, dst, 100}, {src, dst, 101}});
  expect(count_sizes(sizes) == kMostSizes + 1 && count_sizes({}) == 0, "and no further than needed");
}

void check_lowering() {
  std::byte memory[1] = {};
  const std::vector<Pool> pools = {{memory, 4, 1 << 20, 1 << 20}};
  const Run nest = {0, 0, 0, 0, 8, 0, 0, {{2, 240, 480}, {3, 80, 160}, {5, 16, 32}}};
  const std::vector<Move> moves = bind_runs({nest}, pools, pools, 1, 1, Direction::kHostToHost);
  expect(moves[0].loop_count == 1 && moves[0].loops[0].extent == 30 && moves[0].loops[0].src_stride == 16,
         "three loops that continue each other are one");
  const Run rows = {0, 0, 0, 0, 8, 0, 0, {{2, 240, 8}, {3, 80, 16}, {5, 16, 48}}};
  expect(bind_runs({rows}, pools, pools, 1, 1, Direction::kHostToHost)[0].fragment_bytes == 8,
         "loops that continue on one side only stay");
  for (const Direction direction : {Direction::kHostToDevice, Direction::kDeviceToHost, Direction::kDeviceToDevice}) {
    const Work work = lower_device_ids(moves, 7, direction);
    expect(work.direction == direction && work.pairs == 7 && work.segments.empty(), "ids on the device");
    expect(work.bytes == 7 * 240 && work.descriptors == 7 * 30, "what ids on the device may move");
  }
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
  check_caches();
  check_gpu_table();
  check_bulk_pays();
  check_gpu_override();
  check_addresses_as_ids();
  check_lowering();
  std::printf("policy: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
