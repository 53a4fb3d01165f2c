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
#include "core/setting.h"

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
  CpuPolicy few = policy;
  few.most_lanes = 3;
  expect(few.lanes_for(64 * kMiB, 8) == 3 && few.lanes_for(64 * kMiB, 2) == 2 && few.lanes_for(64 * kMiB, 0) == 1,
         "no more lanes than are worth it");
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

void check_setting() {
  Setting<CpuPolicy> setting;
  expect(setting.get() == nullptr, "nothing was set");
  CpuPolicy one = policy_of_caches(1 << 20, 1 << 22);
  CpuPolicy other = one;
  other.source = "a file";
  setting.set(one);
  const CpuPolicy* const first = setting.get();
  setting.set(other);
  expect(*first == one && *setting.get() == other, "who has read one keeps it");
  setting.set(one);
  expect(setting.get() == first, "values that take turns are kept once");

  const CpuPolicy before = cpu_policy();
  other = before;
  other.lane_bytes = 12345;
  set_cpu_policy(other);
  expect(cpu_policy() == other && cpu_policy_of_machine() == before, "what was set serves");
  set_cpu_policy(before);
  expect(cpu_policy() == before, "and what served before may again");
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

// A call of `count` fragments of `bytes`, and executors that refuse it.
struct Asked {
  Direction direction = Direction::kHostToDevice;
  int64_t bytes = 4096;
  int64_t count = 16;
  Copies copies = Copies::kBatched;
  std::vector<std::pair<Executor, std::string>> refusals{};
  int64_t ring_copy_bytes = 0;
  Link link = Link::kPcie;
  int capability = 90;
};

std::optional<Choice> choice_of(const Asked& asked, const GpuPolicy& policy = default_gpu_policy()) {
  const GpuAnswers answers{[&](Executor executor) {
                             for (const auto& [refused, why] : asked.refusals) {
                               if (refused == executor) return why;
                             }
                             return std::string();
                           },
                           [&] { return asked.ring_copy_bytes; }};
  return choose_on_gpu(
      policy, {asked.direction, asked.link, asked.capability, asked.copies, asked.bytes * asked.count, asked.count},
      answers);
}

Executor chosen(const Asked& asked) {
  const std::optional<Choice> choice = choice_of(asked);
  return choice ? choice->executor : Executor::kAuto;
}

constexpr int64_t kKiB = 1024;
constexpr Direction kToDevice = Direction::kHostToDevice;
constexpr Direction kToHost = Direction::kDeviceToHost;
constexpr Direction kInside = Direction::kDeviceToDevice;

void check_default_policy() {
  constexpr int64_t kMany = 50'000;
  expect(chosen({kToDevice, 128 * kKiB - 1, 16}) == Executor::kKernel, "few to the device: below 128 KiB");
  expect(chosen({kToDevice, 128 * kKiB - 1, kMany - 1}) == Executor::kKernel, "up to 49,999");
  expect(chosen({kToDevice, 128 * kKiB, 16}) == Executor::kDma, "from the limit on the copy engine");
  expect(chosen({kToDevice, 28 * kKiB - 1, kMany}) == Executor::kKernel, "many to the device: below 28 KiB");
  expect(chosen({kToDevice, 28 * kKiB, kMany}) == Executor::kDma, "not above");
  expect(chosen({kToHost, 28 * kKiB - 1, 16}) == Executor::kKernel, "to the host below 28 KiB");
  expect(chosen({kToHost, 28 * kKiB, 16}) == Executor::kDma, "not above");
  for (const Direction link : {kToDevice, kToHost}) {
    expect(chosen({link, 4096, 15}) == Executor::kDma, "few are not worth a launch");
    expect(chosen({link, 1024 * kKiB - 1, 4, Copies::kOneByOne}) == Executor::kKernel, "one by one it is sooner");
    expect(chosen({link, 1024 * kKiB, 4, Copies::kOneByOne}) == Executor::kDma, "but not above 1 MiB");
    expect(chosen({link, 1024, 3, Copies::kOneByOne}) == Executor::kDma, "nor for three");
    expect(chosen({link, 0, 0}) == Executor::kDma, "nothing to copy divides by nothing");
  }
  expect(chosen({kInside, int64_t{1} << 30, 1}) == Executor::kKernel, "on a device, the kernel");
  for (const PolicyRow& row : default_gpu_policy().rows) {
    expect(row.executor != Executor::kBulk, "bulk is for who names it");
  }
}

void check_refusals() {
  const std::pair<Executor, std::string> no_kernel{Executor::kKernel, "pageable"};
  const std::pair<Executor, std::string> no_dma{Executor::kDma, "ids"};
  const std::pair<Executor, std::string> no_ring{Executor::kStaged, "no memory"};
  const std::pair<Executor, std::string> no_triton{Executor::kTriton, "not installed"};
  const auto small = [](Direction direction, int64_t ring_copy_bytes, decltype(Asked::refusals) refusals = {}) {
    return chosen({direction, 4 * kKiB, 64, Copies::kBatched, std::move(refusals), ring_copy_bytes});
  };
  expect(small(kToDevice, 1 << 20) == Executor::kKernel, "loads need no ring");
  expect(small(kToDevice, 28 * kKiB, {no_kernel}) == Executor::kStaged, "but where a kernel cannot load");
  expect(small(kToDevice, 28 * kKiB - 1, {no_kernel}) == Executor::kDma, "unless its copies are short");
  expect(small(kToHost, 28 * kKiB) == Executor::kStaged, "to the host long copies take the ring");
  expect(small(kToHost, 28 * kKiB - 1) == Executor::kKernel, "short ones do not");
  expect(small(kToHost, 1 << 20, {no_ring}) == Executor::kKernel, "nor where there is none");
  expect(small(kToHost, 0, {no_kernel}) == Executor::kDma, "a kernel that cannot reach is not taken");
  expect(small(kInside, 1 << 20, {no_kernel}) == Executor::kTriton, "inside a device another kernel may");
  expect(small(kInside, 1 << 20, {no_kernel, no_triton}) == Executor::kDma, "the copy engine needs no code");
  expect(chosen({kToDevice, 1 << 20, 1, Copies::kBatched, {no_dma}}) == Executor::kKernel,
         "no row, and no copy engine");
  expect(chosen({kToDevice, 1 << 20, 1, Copies::kBatched, {no_dma, no_kernel}}) == Executor::kTriton, "nor code");
  expect(!choice_of({kToDevice, 1 << 20, 1, Copies::kBatched, {no_dma, no_kernel, no_triton}}), "nobody serves");
  const GpuAnswers all_serve{[](Executor) { return std::string(); }, [] { return int64_t{0}; }};
  const GpuCall to_device{kToDevice, Link::kPcie, 90, Copies::kBatched, 16 * 4096, 16};
  const std::optional<Choice> silent = choose_on_gpu(default_gpu_policy(), to_device, all_serve, false);
  expect(silent && silent->executor == Executor::kKernel && silent->reason.empty(), "no reason where none is wanted");
  const auto reason = [](const Asked& asked) { return choice_of(asked)->reason; };
  expect(reason({}) ==
             "16 fragments of 4096 bytes on average to the device, where copies are batched: kernel by rows[2] of the "
             "default policy (at least 16 of them, fewer than 50000 of them, below 131072 bytes)",
         "the row is told");
  expect(reason({kInside}) ==
             "16 fragments of 4096 bytes on average inside the device: kernel by rows[0] of the default "
             "policy",
         "one without limits");
  expect(reason({kToHost, 4096, 4, Copies::kOneByOne, {no_kernel}}) ==
             "4 fragments of 4096 bytes on average to the host, where copies go one by one: dma because no row of the "
             "default policy serves them; kernel cannot: pageable",
         "and who refused");
}

void check_rows() {
  const auto fits = [](PolicyRow row, const Asked& asked) {
    row.executor = Executor::kBulk;
    return choice_of(asked, {{row}, "this"})->executor == Executor::kBulk;
  };
  PolicyRow row;
  expect(fits(row, {}) && fits(row, {kInside, 1, 1}), "a row without limits is for every call");
  row.link = Link::kCoherent;
  expect(!fits(row, {}) && fits(row, {.link = Link::kCoherent}), "links");
  row = {};
  row.copies = Copies::kOneByOne;
  expect(!fits(row, {}) && fits(row, {.copies = Copies::kOneByOne}), "copies");
  row = {};
  row.direction = kToHost;
  expect(!fits(row, {}) && fits(row, {.direction = kToHost}), "directions");
  row = {};
  row.capability_at_least = 90;
  row.capability_below = 100;
  expect(!fits(row, {.capability = 89}) && fits(row, {.capability = 90}), "capabilities from one on");
  expect(fits(row, {.capability = 99}) && !fits(row, {.capability = 100}), "to before another");
  row = {};
  row.count_at_least = 5;
  row.count_below = 7;
  expect(!fits(row, {.count = 4}) && fits(row, {.count = 5}), "counts from one on");
  expect(fits(row, {.count = 6}) && !fits(row, {.count = 7}), "to before another");
  row = {};
  row.fragment_bytes_below = 100;
  expect(fits(row, {.bytes = 99}) && !fits(row, {.bytes = 100}), "bytes");
  row = {};
  row.ring_copy_bytes_at_least = 100;
  expect(fits(row, {.ring_copy_bytes = 100}) && !fits(row, {.ring_copy_bytes = 99}), "the ring's copies");
  row = {Executor::kKernel};
  row.sm_budget = 12;
  expect(choice_of({}, {{row}, "this"})->sm_budget == 12 && choice_of({})->sm_budget == 0, "a row's SMs");
  PolicyRow every{Executor::kKernel, kToDevice, Link::kCoherent, 90, 121, Copies::kBatched, 1, 17, 4097, 3};
  expect(
      choice_of({.ring_copy_bytes = 3, .link = Link::kCoherent}, {{every}, "this"})->reason ==
          "16 fragments of 4096 bytes on average to the device, where copies are batched: kernel by rows[0] of this (a "
          "coherent link, compute capability 9.0 or later, compute capability before 12.1, at least 1 of them, "
          "fewer than 17 of them, below 4097 bytes, by way of the ring in copies of at least 3 bytes)",
      "every limit is told");
}

void check_bulk_refusal() {
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
}

void check_policy_in_force() {
  expect(gpu_policy()->rows.size() == default_gpu_policy().rows.size(), "the default serves");
  const auto before = gpu_policy();
  set_gpu_policy({{{Executor::kBulk}}, "another"});
  expect(gpu_policy()->source == "another" && gpu_policy()->rows.size() == 1, "until another is set");
  expect(before->source == "the default policy", "who has the one before keeps it");
  set_gpu_policy(default_gpu_policy());
}

void check_gpu_override() {
  const char* variable = "KVKERNELS_KERNEL_BELOW_BYTES";
  if (setenv(variable, "100", 1) != 0) throw std::runtime_error("setenv failed");
  for (const int64_t count : {16, 50'000}) {
    expect(chosen({kToDevice, 99, count}) == Executor::kKernel, "below the override");
    expect(chosen({kToDevice, 100, count}) == Executor::kDma, "from the override on");
  }
  expect(chosen({.direction = kToHost, .bytes = 99, .ring_copy_bytes = 100}) == Executor::kStaged, "the ring's, too");
  expect(chosen({.direction = kToHost, .bytes = 99, .ring_copy_bytes = 99}) == Executor::kKernel, "and below it");
  expect(chosen({kInside, 100, 16}) == Executor::kKernel, "inside a device there is no limit");
  PolicyRow inside{Executor::kBulk, kInside};
  inside.fragment_bytes_below = 1000;
  expect(choice_of({kInside, 500}, {{inside}, "this"})->executor == Executor::kBulk, "nor is one replaced there");
  expect(choice_of({kToDevice, 99})->reason.find("by rows[2] of the default policy with " + std::string(variable)) !=
             std::string::npos,
         "the reason has it");
  for (const char* value : {"", "-1", "1k", "99999999999999999999"}) {
    if (setenv(variable, value, 1) != 0) throw std::runtime_error("setenv failed");
    std::string message;
    try {
      chosen({kToHost, 1, 16});
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
  const auto step_of = [](const Work& work) { return work.moves.front().src.block_stride; };
  const std::vector<Work> aligned = as_ids({{src + 16, dst + 1024, 4096 - 1024}, {src, dst, 512}});
  expect(aligned.size() == 2 && step_of(aligned[0]) % 16 == 0 && step_of(aligned[1]) % 16 == 0,
         "addresses of 16 bytes are aligned");
  expect(aligned[0].shape == Shape::kPage && aligned[1].shape == Shape::kRow, "pages and rows");
  expect(step_of(as_ids({{src + 8, dst, 512}})[0]) == 8, "one that is not");
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
    DeviceIds ids;
    ids.rows = 7;
    const Work work = lower_device_ids(moves, ids, direction);
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
  check_setting();
  check_default_policy();
  check_refusals();
  check_rows();
  check_bulk_refusal();
  check_policy_in_force();
  check_gpu_override();
  check_addresses_as_ids();
  check_lowering();
  std::printf("policy: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
