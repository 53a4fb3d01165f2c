// The plan of a copy by way of a ring on the device, carried out with memcpy: every byte, no byte outside the ring, and
// the number of copies over the link.
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/lower.h"
#include "core/staged.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;

using Bytes = std::vector<std::byte>;

constexpr int64_t kPlace = 512;   // where a move's first fragment is at least, so that others may lie below it
constexpr int64_t kBytes = 5120;  // of host and of device memory

template <class Visit>
void each_fragment(const Work& work, Visit visit) {
  for (const Segment& segment : work.segments) {
    for (int64_t i = 0; i < segment.count; ++i) {
      for (const Move& move : work.moves) {
        const std::byte* src = move.src.at(segment.src + i);
        std::byte* dst = move.dst.at(segment.dst + i);
        for (int64_t f = 0; f < move.fragments_per_pair(); ++f) {
          int64_t rest = f;
          int64_t src_step = 0;
          int64_t dst_step = 0;
          for (int l = move.loop_count - 1; l >= 0; --l) {
            src_step += rest % move.loops[l].extent * move.loops[l].src_stride;
            dst_step += rest % move.loops[l].extent * move.loops[l].dst_stride;
            rest /= move.loops[l].extent;
          }
          visit(Fragment{src + src_step, dst + dst_step, move.fragment_bytes});
        }
      }
    }
  }
}

void copy(const Fragment& fragment) { std::memcpy(fragment.dst, fragment.src, static_cast<size_t>(fragment.bytes)); }

// Whether every fragment lies in these buffers and none writes what another has written.
bool is_valid(const Work& work, const Bytes& src, const Bytes& dst) {
  std::vector<bool> written(dst.size());
  bool valid = true;
  each_fragment(work, [&](const Fragment& fragment) {
    const int64_t from = fragment.src - src.data();
    const int64_t to = fragment.dst - dst.data();
    valid = valid && from >= 0 && from + fragment.bytes <= static_cast<int64_t>(src.size()) && to >= 0 &&
            to + fragment.bytes <= static_cast<int64_t>(dst.size());
    for (int64_t at = to; valid && at < to + fragment.bytes; ++at) {
      valid = !written[static_cast<size_t>(at)];
      written[static_cast<size_t>(at)] = true;
    }
  });
  return valid;
}

Work random_work(Random& random, Direction direction, Bytes& host, Bytes& device) {
  Work work;
  work.direction = direction;
  const int64_t subblocks = random.of({1, 1, 2, 3});
  const int64_t pairs = random.in(1, 12);
  const int64_t block_stride = random.of({96, 128, 200});
  for (int64_t moves = random.in(1, 3); moves > 0; --moves) {
    Side there{device.data() + kPlace + random.in(0, 255), random.of({256, 300}), 0, 1};
    Side here{host.data() + kPlace + random.in(0, 5) * 16, block_stride, random.of({16, 32, 64}), subblocks};
    if (random.once_in(4)) here.block_stride = random.of({96, 128, 200});
    Move move{};
    move.fragment_bytes = random.of({8, 16, 16, 32, 96, 128});
    move.loop_count = static_cast<int>(random.in(0, 2));
    for (int l = 0; l < move.loop_count; ++l) {
      const int64_t there_stride = random.of({64, 32, -64});
      const int64_t here_stride = random.of({8, 16, 32, 64, -16, -64, 0});
      const bool to_device = direction == Direction::kHostToDevice;
      move.loops[l] = {random.in(2, 3), to_device ? here_stride : there_stride, to_device ? there_stride : here_stride};
    }
    move.src = direction == Direction::kHostToDevice ? here : there;
    move.dst = direction == Direction::kHostToDevice ? there : here;
    work.moves.push_back(move);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    // Ids that follow each other, in either order, and ids that do not.
    const int64_t host_id = random.once_in(3) ? random.in(0, 15) : i;
    const Segment segment{direction == Direction::kHostToDevice ? host_id : i,
                          direction == Direction::kHostToDevice ? i : host_id, 1};
    work.segments.insert(random.once_in(2) ? work.segments.begin() : work.segments.end(), segment);
  }
  return work;
}

// The copies over the link, were the ring endless: the bytes of one window that lie together, per pair, and of pairs
// that follow each other on both sides.
void check_counts(const Work& work, const Staging& staging) {
  if (staging.chunks() != 1) return;
  Bytes ring(static_cast<size_t>(staging.chunk_bytes));
  const StagingChunk chunk = staging_chunk(work, staging, 0, ring.data());
  int64_t bytes = 0;
  for (const Fragment& fragment : chunk.over_link) bytes += fragment.bytes;
  expect(bytes == staging.host_bytes, text("host_bytes: ", staging.host_bytes, " planned, ", bytes, " copied"));
  const auto copies = static_cast<int64_t>(chunk.over_link.size());
  expect(copies <= staging.copies, text("copies: ", staging.copies, " planned, ", copies, " made"));
}

void carry_out(const Work& work, const Staging& staging) {
  int64_t pairs = 0;
  int64_t bytes = 0;
  for (int64_t c = 0; c < staging.chunks(); ++c) {
    Bytes ring(static_cast<size_t>(staging.chunk_bytes), std::byte{0xEE});
    const StagingChunk chunk = staging_chunk(work, staging, c, ring.data());
    if (work.direction == Direction::kHostToDevice) {
      for (const Fragment& fragment : chunk.over_link) copy(fragment);
    }
    each_fragment(chunk.in_device, copy);
    if (work.direction == Direction::kDeviceToHost) {
      for (const Fragment& fragment : chunk.over_link) copy(fragment);
    }
    pairs += chunk.in_device.pairs;
    bytes += chunk.in_device.bytes;
  }
  int64_t moved = 0;
  each_fragment(work, [&](const Fragment& fragment) { moved += fragment.bytes; });
  expect(pairs == static_cast<int64_t>(work.segments.size()) && bytes == moved, "pairs and bytes of the chunks");
}

void moves_what_the_call_moves() {
  Random random(7);
  int carried_out = 0;
  int in_chunks = 0;
  for (int n = 0; n < 12000; ++n) {
    const Direction direction = random.once_in(2) ? Direction::kHostToDevice : Direction::kDeviceToHost;
    Bytes host(kBytes);
    Bytes device(kBytes);
    for (Bytes* memory : {&host, &device}) {
      for (size_t i = 0; i < kBytes; i += sizeof(uint64_t)) {
        const uint64_t value = random.engine()();
        std::memcpy(memory->data() + i, &value, sizeof(value));
      }
    }
    const Work work = random_work(random, direction, host, device);
    Bytes& dst = direction == Direction::kHostToDevice ? device : host;
    if (!is_valid(work, direction == Direction::kHostToDevice ? host : device, dst)) continue;
    const int64_t ring_bytes = random.of({kStagingRingBytes, 900, 1400});
    const Staging staging = plan_staging(work, ring_bytes);
    if (!staging.refusal.empty()) {
      expect(ring_bytes < kStagingRingBytes, staging.refusal);
      continue;
    }
    expect(staging.chunk_bytes <= ring_bytes, "a ring larger than allowed");
    check_counts(work, staging);
    const Bytes before = dst;
    each_fragment(work, copy);
    const Bytes expected = dst;
    std::memcpy(dst.data(), before.data(), dst.size());
    carry_out(work, staging);
    expect(dst == expected, text("bytes differ in case ", n));
    ++carried_out;
    in_chunks += staging.chunks() > 1;
  }
  expect(carried_out > 2000 && in_chunks > 100, text("only ", carried_out, " carried out, ", in_chunks, " in chunks"));
}

// One window of `bytes` a pair at this stride, and the ids of the host.
Staging plan_of(int64_t bytes, int64_t block_stride, const std::vector<int64_t>& ids, Direction direction) {
  static Bytes host(8192);
  static Bytes device(8192);
  const Side here{host.data(), block_stride, 0, 1};
  const Side there{device.data(), bytes, 0, 1};
  Work work;
  work.direction = direction;
  const bool to_device = direction == Direction::kHostToDevice;
  work.moves = {Move{to_device ? here : there, to_device ? there : here, bytes, 0, {}, false}};
  int64_t row = 0;
  for (const int64_t id : ids) {
    work.segments.push_back(to_device ? Segment{id, row, 1} : Segment{row, id, 1});
    ++row;
  }
  Staging staging = plan_staging(work);
  if (staging.refusal.empty()) check_counts(work, staging);
  return staging;
}

void counts_copies_over_the_link() {
  for (const Direction direction : {Direction::kHostToDevice, Direction::kDeviceToHost}) {
    const Staging together = plan_of(24, 24, {4, 9, 3, 5}, direction);
    expect(together.copies == 2 && together.host_bytes == 96 && together.mean_copy_bytes() == 48,
           "windows of ids that follow each other are one copy");
    expect(together.windows[0].row_bytes == 24, "and have no gap in the ring");
    const Staging apart = plan_of(24, 32, {4, 9, 3, 5}, direction);
    expect(apart.copies == 4 && apart.host_bytes == 96 && apart.mean_copy_bytes() == 24, "windows with gaps are not");
    expect(apart.windows[0].row_bytes == 32, "and begin at multiples of 16 bytes in the ring");
    expect(plan_of(24, 24, {0}, direction).copies == 1, "one id is one copy");
  }
  const Staging refused = plan_of(24, 24, {0}, Direction::kDeviceToDevice);
  expect(refused.refusal == "no side is in host memory" && refused.mean_copy_bytes() == 0, "a refusal has no copies");
}

void windows_have_one_step() {
  Bytes host(4096);
  Bytes device(4096);
  const auto windows = [&](Side first, Side second) {
    const Side there{device.data(), 64, 0, 1};
    Work work;
    work.direction = Direction::kHostToDevice;
    work.moves = {Move{first, there, 16, 0, {}, false}, Move{second, there, 16, 0, {}, false}};
    work.segments = {{0, 0, 1}};
    return plan_staging(work).windows.size();
  };
  std::byte* const at = host.data();
  expect(windows({at, 64, 32, 2}, {at + 16, 64, 32, 2}) == 1, "bytes that touch, in equal steps");
  expect(windows({at, 64, 32, 2}, {at + 17, 64, 32, 2}) == 2, "bytes that do not touch");
  expect(windows({at, 64, 32, 2}, {at + 16, 64, 16, 2}) == 2, "steps of sub-blocks differ");
  expect(windows({at, 64, 32, 2}, {at + 16, 96, 32, 2}) == 2, "steps of blocks differ");
  expect(windows({at, 64, 32, 2}, {at + 16, 64, 32, 4}) == 2, "numbers of sub-blocks differ");
  expect(windows({at, 64, 32, 1}, {at + 16, 64, 16, 1}) == 1, "a step that nothing takes may differ");
}

const Tests kTests{
    {"moves_what_the_call_moves", moves_what_the_call_moves},
    {"counts_copies_over_the_link", counts_copies_over_the_link},
    {"windows_have_one_step", windows_have_one_step},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
