// cpu::copy against a loop over single bytes, on random Works: every instruction set, alignment, size, nest, number of
// lanes and kind of store. Meant for -fsanitize=address,undefined. Arguments: [seed] [seconds].
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core/fragments.h"
#include "cpu/copy.h"
#include "cpu/loops.h"

namespace {

using namespace kvkernels;

constexpr int64_t kGuardBytes = 256;
constexpr int64_t kSmallCaseBytes = 24 << 10;
constexpr int64_t kLargeCaseBytes = 1 << 20;  // long enough for lanes to cut fragments

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t in(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine_); }
  bool once_in(int64_t n) { return in(1, n) == 1; }
  template <class T>
  const T& of(const std::vector<T>& values) {
    return values[static_cast<size_t>(in(0, static_cast<int64_t>(values.size()) - 1))];
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// Memory that starts `misalignment` bytes after a cache line and ends where the heap's red zone starts.
class Memory {
 public:
  Memory(int64_t bytes, int64_t misalignment) : bytes_(bytes) {
    raw_.reset(
        static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>((bytes + misalignment + 63) / 64 * 64))));
    if (raw_ == nullptr) throw std::bad_alloc();
    data_ = raw_.get() + misalignment;
  }
  std::byte* data() const { return data_; }
  int64_t size() const { return bytes_; }
  void fill(Random& random) {
    for (int64_t i = 0; i < bytes_; ++i) data_[i] = static_cast<std::byte>(i * 131 + (i >> 8) * 17 + (i >> 16) * 29);
    data_[random.in(0, bytes_ - 1)] = std::byte{0xff};
  }
  std::vector<std::byte> copy() const { return {data_, data_ + bytes_}; }
  // The first byte that differs, or -1.
  int64_t difference(const std::vector<std::byte>& expected) const {
    if (std::memcmp(data_, expected.data(), expected.size()) == 0) return -1;
    return std::mismatch(expected.begin(), expected.end(), data_).first - expected.begin();
  }

 private:
  struct Free {
    void operator()(std::byte* pointer) const { std::free(pointer); }
  };
  int64_t bytes_;
  std::unique_ptr<std::byte, Free> raw_;
  std::byte* data_;
};

// One dimension of a nest while its strides on one side are chosen.
struct Dim {
  int64_t extent;
  int64_t stride;
};

// Gives the dims strides, nested in a random order with random padding, over elements of `bytes`; returns the span.
int64_t lay_out(Random& random, std::vector<Dim>& dims, int64_t bytes, bool padded) {
  std::vector<size_t> order(dims.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random.engine());
  int64_t span = bytes;
  for (const size_t i : order) {
    dims[i].stride = span + (padded && random.once_in(3) ? random.in(1, 70) : 0);
    span = dims[i].stride * (dims[i].extent - 1) + span;
  }
  return span;
}

int64_t random_size(Random& random) {
  switch (random.in(0, 6)) {
    case 0:
      return random.in(1, 8);
    case 1:
      return random.in(1, 70);
    case 2:
      return int64_t{1} << random.in(0, 13);
    case 3:
      return random.in(64, 1100);
    case 4:
      return random.in(1900, 2200);
    case 5:
      return random.in(3500, 13000);
    default:
      return random.once_in(4) ? random.in(60 << 10, 300 << 10) : 64 * random.in(1, 70);
  }
}

// A Work with the memory that it copies between.
struct Case {
  Work work;
  std::unique_ptr<Memory> src;
  std::unique_ptr<Memory> dst;
};

// Pairs whose destinations are all different, out of ids below src_ids and dst_ids.
std::vector<Segment> random_segments(Random& random, int64_t src_ids, int64_t dst_ids) {
  std::vector<Segment> segments;
  for (int64_t dst = 0; dst < dst_ids;) {
    const int64_t count = std::min({dst_ids - dst, src_ids, random.once_in(2) ? 1 : random.in(1, 9)});
    if (!random.once_in(4)) segments.push_back({random.in(0, src_ids - count), dst, count});
    dst += count;
  }
  if (segments.empty()) segments.push_back({0, 0, 1});
  std::shuffle(segments.begin(), segments.end(), random.engine());
  return segments;
}

// Pools of blocks; each move copies its own part of a destination page, whose nest any part of the source page feeds.
Case random_nests(Random& random, int64_t most_bytes) {
  Case result;
  Work& work = result.work;
  const int64_t src_subblocks = random.once_in(2) ? 1 : random.in(2, 5);
  const int64_t dst_subblocks = random.once_in(2) ? 1 : random.in(2, 5);
  const bool plain = random.once_in(3);
  const int64_t moves = plain ? 1 : random.in(1, 4);
  std::vector<int64_t> src_starts;
  std::vector<int64_t> dst_starts;
  int64_t src_page = 0;
  int64_t dst_page = 0;
  for (int64_t m = 0; m < moves; ++m) {
    Move move{};
    move.fragment_bytes = random_size(random);
    move.loop_count = plain ? 0 : static_cast<int>(random.in(0, 3));
    std::vector<Dim> src_dims;
    int64_t bytes = move.fragment_bytes;
    for (int i = 0; i < move.loop_count; ++i) {
      src_dims.push_back({random.in(2, bytes > 4096 ? 3 : 12), 0});
      bytes *= src_dims.back().extent;
    }
    std::vector<Dim> dst_dims = src_dims;
    if (src_subblocks > 1) src_dims.push_back({src_subblocks, 0});
    if (dst_subblocks > 1) dst_dims.push_back({dst_subblocks, 0});
    const bool padded = !plain;
    src_starts.push_back(random.once_in(2) ? 0 : src_page);
    const int64_t src_span = lay_out(random, src_dims, move.fragment_bytes, padded);
    src_page = std::max(src_page, src_starts.back() + src_span);
    dst_starts.push_back(dst_page);
    dst_page +=
        lay_out(random, dst_dims, move.fragment_bytes, padded) + (padded && random.once_in(2) ? random.in(0, 65) : 0);
    for (int i = 0; i < move.loop_count; ++i) {
      const auto at = static_cast<size_t>(i);
      move.loops[i] = {src_dims[at].extent, src_dims[at].stride, dst_dims[at].stride};
      if (random.once_in(8)) {
        src_starts.back() += (move.loops[i].extent - 1) * move.loops[i].src_stride;
        move.loops[i].src_stride = -move.loops[i].src_stride;
      }
    }
    move.src = {nullptr, 0, src_subblocks > 1 ? src_dims.back().stride : 0, src_subblocks};
    move.dst = {nullptr, 0, dst_subblocks > 1 ? dst_dims.back().stride : 0, dst_subblocks};
    work.moves.push_back(move);
  }
  const int64_t src_stride = src_page + (plain || random.once_in(2) ? 0 : random.in(1, 130));
  const int64_t dst_stride = dst_page + (plain || random.once_in(2) ? 0 : random.in(1, 130));
  const int64_t blocks = std::clamp<int64_t>(most_bytes / std::max(src_stride, dst_stride), 1, random.in(1, 300));
  result.src = std::make_unique<Memory>((blocks - 1) * src_stride + src_page, random.in(0, 63));
  result.dst = std::make_unique<Memory>((blocks - 1) * dst_stride + dst_page + 2 * kGuardBytes, random.in(0, 63));
  for (size_t m = 0; m < work.moves.size(); ++m) {
    Move& move = work.moves[m];
    move.src.base = result.src->data() + src_starts[m];
    move.dst.base = result.dst->data() + kGuardBytes + dst_starts[m];
    move.src.block_stride = src_stride;
    move.dst.block_stride = dst_stride;
    move.merges = move.loop_count == 0 && src_subblocks == 1 && dst_subblocks == 1 &&
                  src_stride == move.fragment_bytes && dst_stride == move.fragment_bytes;
  }
  work.segments = random_segments(random, blocks * src_subblocks, blocks * dst_subblocks);
  for (const Segment& segment : work.segments) work.pairs += segment.count;
  for (const Move& move : work.moves) {
    work.bytes += work.pairs * move.bytes_per_pair();
    work.descriptors +=
        move.merges ? static_cast<int64_t>(work.segments.size()) : work.pairs * move.fragments_per_pair();
  }
  return result;
}

// Shards of several widths side by side in one tensor, on either side: moves that the executor may take in turns.
Case random_shards(Random& random, int64_t most_bytes) {
  Case result;
  Work& work = result.work;
  const int64_t shards = random.in(2, 20);
  const int64_t planes = random.in(1, 3);
  int64_t row_bytes = 0;
  for (int64_t i = 0; i < shards; ++i) {
    Move move{};
    move.fragment_bytes = random.once_in(6) ? random_size(random) : random.in(200, 1200);
    if (random.once_in(2)) move.fragment_bytes = int64_t{64} << random.in(0, 4);
    row_bytes += move.fragment_bytes;
    work.moves.push_back(move);
  }
  const int64_t rows = std::clamp<int64_t>(most_bytes / row_bytes / planes, 1, random.in(2, 500));
  const int64_t stride = row_bytes + (random.once_in(2) ? 0 : random.in(1, 100));
  const bool nested = random.once_in(2);
  const bool splits = random.once_in(2);  // the shards are the destination
  const int64_t whole_bytes = planes * rows * stride;
  const int64_t parts_bytes = planes * rows * row_bytes;
  result.src = std::make_unique<Memory>(splits ? whole_bytes : parts_bytes, random.in(0, 63));
  result.dst = std::make_unique<Memory>((splits ? parts_bytes : whole_bytes) + 2 * kGuardBytes, random.in(0, 63));
  std::byte* src = result.src->data();
  std::byte* dst = result.dst->data() + kGuardBytes;
  for (Move& move : work.moves) {
    const int64_t bytes = move.fragment_bytes;
    const int64_t src_step = splits ? stride : bytes;
    const int64_t dst_step = splits ? bytes : stride;
    move.src = {src, rows * src_step, 0, 1};
    move.dst = {dst, rows * dst_step, 0, 1};
    move.loop_count = nested ? 2 : 1;
    move.loops[0] = {planes, rows * src_step, rows * dst_step};
    move.loops[nested ? 1 : 0] = {rows, src_step, dst_step};
    // Now and then one that is shorter than its neighbours, and so must not go in turns with them.
    if (random.once_in(10)) move.loops[move.loop_count - 1].extent = random.in(1, rows);
    src += splits ? bytes : planes * rows * bytes;
    dst += splits ? planes * rows * bytes : bytes;
  }
  work.segments = nested ? std::vector<Segment>{{0, 0, 1}} : random_segments(random, planes, planes);
  for (const Segment& segment : work.segments) work.pairs += segment.count;
  for (const Move& move : work.moves) {
    work.bytes += work.pairs * move.bytes_per_pair();
    work.descriptors += work.pairs * move.fragments_per_pair();
  }
  return result;
}

// Fragments that a caller listed, of any size and at any distance.
Case random_list(Random& random, int64_t most_bytes) {
  Case result;
  Work& work = result.work;
  const int64_t src_bytes = random.in(1, most_bytes);
  result.src = std::make_unique<Memory>(src_bytes, random.in(0, 63));
  std::vector<std::pair<int64_t, int64_t>> places;
  int64_t dst_bytes = kGuardBytes;
  for (int64_t count = random.in(1, 300); count > 0 && dst_bytes < most_bytes; --count) {
    const int64_t bytes = std::min(random_size(random), src_bytes);
    places.emplace_back(dst_bytes, bytes);
    dst_bytes += bytes + (random.once_in(2) ? random.in(0, 100) : 0);
  }
  result.dst = std::make_unique<Memory>(dst_bytes + kGuardBytes, random.in(0, 63));
  for (const auto& [offset, bytes] : places) {
    const int64_t from = random.in(0, src_bytes - bytes);
    work.fragments.push_back({result.src->data() + from, result.dst->data() + offset, bytes});
    work.bytes += bytes;
  }
  std::shuffle(work.fragments.begin(), work.fragments.end(), random.engine());
  work.pairs = work.descriptors = static_cast<int64_t>(work.fragments.size());
  return result;
}

// What the bytes of dst must be, written one by one as the words in lower.h say; counts each byte's writes.
struct Expected {
  const Case& of;
  std::vector<std::byte> bytes = of.dst->copy();
  std::vector<uint8_t> writes = std::vector<uint8_t>(bytes.size());

  void write(const std::byte* src, const std::byte* dst, int64_t count) {
    const int64_t begin = dst - of.dst->data();
    if (begin < kGuardBytes || begin + count > of.dst->size() - kGuardBytes)
      throw std::logic_error("a case leaves its memory");
    std::byte* const to = bytes.data() + begin;
    uint8_t* const counts = writes.data() + begin;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = src[i];
      ++counts[i];
    }
  }

  void write_all() {
    for (const Fragment& fragment : of.work.fragments) write(fragment.src, fragment.dst, fragment.bytes);
    for (const Move& move : of.work.moves) {
      for (const Segment& segment : of.work.segments) {
        for (int64_t pair = 0; pair < segment.count; ++pair) write_pair(move, segment.src + pair, segment.dst + pair);
      }
    }
  }

  void write_pair(const Move& move, int64_t src_id, int64_t dst_id) {
    int64_t at[3];
    const auto extent = [&](int i) { return i < move.loop_count ? move.loops[i].extent : 1; };
    for (at[0] = 0; at[0] < extent(0); ++at[0]) {
      for (at[1] = 0; at[1] < extent(1); ++at[1]) {
        for (at[2] = 0; at[2] < extent(2); ++at[2]) {
          const std::byte* src = move.src.at(src_id);
          const std::byte* dst = move.dst.at(dst_id);
          for (int i = 0; i < move.loop_count; ++i) {
            src += at[i] * move.loops[i].src_stride;
            dst += at[i] * move.loops[i].dst_stride;
          }
          write(src, dst, move.fragment_bytes);
        }
      }
    }
  }
};

void in_threads(int lanes, void* context, void (*body)(void*, int)) {
  std::vector<std::thread> threads;
  for (int lane = 1; lane < lanes; ++lane) threads.emplace_back(body, context, lane);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

void backwards(int lanes, void* context, void (*body)(void*, int)) {
  for (int lane = lanes - 1; lane >= 0; --lane) body(context, lane);
}

std::string describe(const Case& test, cpu::Isa isa) {
  std::string text = std::string(cpu::name_of(isa)) + ", lanes " + std::to_string(test.work.lanes) +
                     (test.work.streaming ? ", streaming" : "") + ", " + std::to_string(test.work.bytes) + " bytes";
  for (const Move& move : test.work.moves) {
    text += "; move of " + std::to_string(move.fragment_bytes) + (move.merges ? " merging" : "");
    for (int i = 0; i < move.loop_count; ++i) text += " x " + std::to_string(move.loops[i].extent);
  }
  return text + "; " + std::to_string(test.work.fragments.size()) + " listed";
}

// What no processor's row of the table says, too.
cpu::Tuning random_tuning(Random& random, cpu::Isa isa) {
  const auto any = [&] { return random.once_in(2); };
  return {"",
          isa,
          false,
          any() ? 2 : 4,
          random.of<int64_t>({4096, 16 << 10, 1 << 20}),
          any(),
          any(),
          any(),
          random.of<int64_t>({1024, 2048, 8192})};
}

void run_case(Random& random, Case test) {
  test.src->fill(random);
  std::memset(test.dst->data(), 0xa5, static_cast<size_t>(test.dst->size()));
  Expected expected{test};
  expected.write_all();
  if (*std::max_element(expected.writes.begin(), expected.writes.end()) > 1) {
    throw std::logic_error("the generator made a case that writes a byte twice");
  }
  const std::vector<std::byte> src_before = test.src->copy();
  for (const cpu::Isa isa : cpu::kAllIsas) {
    if (!cpu::supports(isa)) continue;
    test.work.lanes = static_cast<int>(random.in(1, 4));
    test.work.streaming = random.once_in(2);
    std::memset(test.dst->data(), 0xa5, static_cast<size_t>(test.dst->size()));
    const Issued issued =
        cpu::copy(test.work, random.once_in(8) ? in_threads : backwards, isa, random_tuning(random, isa));
    const std::string what = describe(test, isa);
    const int64_t difference = test.dst->difference(expected.bytes);
    expect(difference < 0, what + ": byte " + std::to_string(difference - kGuardBytes) + " of the pools differs");
    expect(test.src->difference(src_before) < 0, what + ": the source changed");
    expect(issued.bytes == test.work.bytes, what + ": " + std::to_string(issued.bytes) + " bytes issued");
    expect(issued.descriptors == test.work.descriptors, what + ": " + std::to_string(issued.descriptors) +
                                                            " descriptors issued, not " +
                                                            std::to_string(test.work.descriptors));
  }
}

// Each misalignment of either side against each size near the loops' boundaries, which chance would take long to meet.
void sweep_alignments(Random& random) {
  for (const int64_t bytes : {1, 63, 64, 65, 191, 1023, 2048, 2111, 4096, 4097, 8191, 12345}) {
    for (int64_t step = 0; step < 64; ++step) {
      Case test;
      constexpr int64_t kCount = 5;
      const int64_t stride = bytes + 77;
      test.src = std::make_unique<Memory>(kCount * stride, step);
      test.dst = std::make_unique<Memory>(kCount * stride + 2 * kGuardBytes, random.in(0, 63));
      for (int64_t i = 0; i < kCount; ++i) {
        test.work.fragments.push_back(
            {test.src->data() + i * stride, test.dst->data() + kGuardBytes + i * stride, bytes});
      }
      test.work.bytes = kCount * bytes;
      test.work.descriptors = kCount;
      run_case(random, std::move(test));
    }
  }
}

// An offset beyond 2^32 bytes, without the memory: the page table has only what is touched.
void copy_far_apart(Random& random) {
  constexpr int64_t kStride = (int64_t{3} << 30) + 192;
  std::vector<std::byte> src(128 + 3000);
  std::vector<std::byte> dst(128 + 3000, std::byte{0xa5});
  for (std::byte& value : src) value = static_cast<std::byte>(random.in(0, 255));
  for (const cpu::Isa isa : cpu::kAllIsas) {
    if (!cpu::supports(isa)) continue;
    Work work;
    // Id 2 lies 6 GiB after a base that is as far before the memory; only ids in the pairs are ever touched.
    const auto far = [](std::byte* memory) {
      return reinterpret_cast<std::byte*>(reinterpret_cast<uintptr_t>(memory) - 2 * kStride);
    };
    work.moves = {Move{{far(src.data()), kStride, 0, 1}, {far(dst.data()), kStride, 0, 1}, 3000, 0, {}, false}};
    work.segments = {{2, 2, 1}};
    work.pairs = 1;
    work.bytes = 3000;
    std::fill(dst.begin(), dst.end(), std::byte{0xa5});
    cpu::copy(work, nullptr, isa, cpu::tuning_for(isa));
    expect(std::equal(src.begin(), src.begin() + 3000, dst.begin()) && dst[3000] == std::byte{0xa5},
           std::string(cpu::name_of(isa)) + ": a page beyond 2^32 bytes differs");
  }
}

void check_ceilings(Random& random) {
  for (const cpu::Isa isa : cpu::kAllIsas) {
    if (!cpu::supports(isa)) continue;
    for (const auto loop : {cpu::Ceiling::kOneStream, cpu::Ceiling::kTwoPages, cpu::Ceiling::kTwoHalves}) {
      for (int i = 0; i < 40; ++i) {
        const int64_t bytes = random.in(1, 40000);
        Memory src(bytes, random.in(0, 63));
        Memory dst(bytes + 2 * kGuardBytes, random.in(0, 63));
        src.fill(random);
        std::memset(dst.data(), 0xa5, static_cast<size_t>(dst.size()));
        std::vector<std::byte> expected = dst.copy();
        std::copy(src.data(), src.data() + bytes, expected.begin() + kGuardBytes);
        cpu::loops_for(isa).ceiling(dst.data() + kGuardBytes, src.data(), bytes, loop);
        expect(dst.difference(expected) < 0, std::string(cpu::name_of(isa)) + ": ceiling loop " +
                                                 std::to_string(static_cast<int>(loop)) + " of " +
                                                 std::to_string(bytes));
      }
    }
  }
}

// A lane's share, told by what it has written when lanes run one after the other.
struct Shares {
  const Memory* dst;
  std::vector<int64_t> bytes;
};
Shares shares;

void count_shares(int lanes, void* context, void (*body)(void* context, int lane)) {
  int64_t before = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    body(context, lane);
    const auto now = std::count(shares.dst->data(), shares.dst->data() + shares.dst->size(), std::byte{1});
    shares.bytes.push_back(now - before);
    before = now;
  }
}

void check_shares(const Work& work, const Memory& dst, int64_t unit_bytes, const std::string& what) {
  std::memset(dst.data(), 0, static_cast<size_t>(dst.size()));
  shares = {&dst, {}};
  cpu::copy(work, count_shares, cpu::Isa::kPortable, cpu::tuning_for(cpu::Isa::kPortable));
  const int64_t even = work.bytes / work.lanes;
  for (const int64_t bytes : shares.bytes) {
    expect(std::abs(bytes - even) <= unit_bytes,
           what + ": a lane has " + std::to_string(bytes) + " bytes instead of " + std::to_string(even));
  }
  expect(std::accumulate(shares.bytes.begin(), shares.bytes.end(), int64_t{0}) == work.bytes, what + ": all lanes");
}

// Lanes have about the same bytes, whatever they are cut from.
void check_lanes() {
  constexpr int64_t kMoves = 3;
  constexpr int64_t kPairs = 7;
  constexpr int64_t kRows = 4;
  for (const int64_t fragment_bytes : {96, 512, 1000, 100000}) {
    const int64_t page = kRows * fragment_bytes;
    const int64_t bytes = kMoves * kPairs * page;
    const Memory src(bytes, 0);
    const Memory dst(bytes, 0);
    std::memset(src.data(), 1, static_cast<size_t>(src.size()));
    const std::string name = std::to_string(fragment_bytes);
    // Beyond the sizes that are cut inside, a fragment is the smallest share; of zipped rows one of each.
    const int64_t unit_bytes = fragment_bytes >= 1 << 16 ? cpu::kPieceBytes : kMoves * fragment_bytes;
    Work work;
    work.pairs = kPairs;
    work.bytes = bytes;
    work.segments = {{0, 0, kPairs}};
    for (int64_t i = 0; i < kMoves; ++i) {
      // The destination of each is contiguous; the rows of all lie side by side in the source.
      const Side from{src.data() + i * fragment_bytes, kMoves * page, 0, 1};
      const Side to{dst.data() + i * kPairs * page, page, 0, 1};
      work.moves.push_back({from, to, fragment_bytes, 1, {{kRows, kMoves * fragment_bytes, fragment_bytes}}, false});
    }
    for (const int lanes : {2, 3, 5}) {
      work.lanes = lanes;
      for (const bool streaming : {false, true}) {
        work.streaming = streaming;
        check_shares(work, dst, unit_bytes, "moves of " + name + (streaming ? ", streaming" : ""));
      }
    }
    work.moves.clear();
    work.segments.clear();
    for (int64_t at = 0; at < bytes; at += fragment_bytes) {
      work.fragments.push_back({src.data() + at, dst.data() + at, fragment_bytes});
    }
    check_shares(work, dst, unit_bytes, "fragments of " + name);
  }
}

// Last, because the choice is made once.
void check_selection() {
  if (setenv("KVKERNELS_CPU_ISA", "sse9", 1) != 0) throw std::runtime_error("setenv failed");
  std::string message;
  try {
    cpu::instruction_set();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  std::string names;
  for (const cpu::Isa isa : cpu::kAllIsas) {
    if (!cpu::supports(isa)) continue;
    names += (names.empty() ? "'" : ", '") + std::string(cpu::name_of(isa)) + "'";
    expect(cpu::loops_for(isa).isa == isa, "loops of other instructions than asked for");
  }
  expect(message == "KVKERNELS_CPU_ISA must be one of " + names + " on this processor, got 'sse9'", message);
  // Neither the first nor the widest, where there is a choice.
  const char* const wanted = cpu::supports(cpu::Isa::kAvx2) ? "avx2" : "portable";
  if (setenv("KVKERNELS_CPU_ISA", wanted, 1) != 0) throw std::runtime_error("setenv failed");
  expect(std::string_view(cpu::instruction_set()) == wanted,
         std::string("KVKERNELS_CPU_ISA was not followed: ") + wanted);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const double seconds = argc > 2 ? std::strtod(argv[2], nullptr) : 8;
  Random random(seed);
  sweep_alignments(random);
  copy_far_apart(random);
  check_ceilings(random);
  check_lanes();
  const auto start = std::chrono::steady_clock::now();
  int64_t cases = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds && failures == 0) {
    const int64_t most_bytes = random.once_in(30) ? kLargeCaseBytes : kSmallCaseBytes;
    switch (random.in(0, 4)) {
      case 0:
        run_case(random, random_list(random, most_bytes));
        break;
      case 1:
        run_case(random, random_shards(random, most_bytes));
        break;
      default:
        run_case(random, random_nests(random, most_bytes));
    }
    ++cases;
  }
  check_selection();
  std::printf("cpu copy: %lld random cases, seed %llu, %d failures\n", static_cast<long long>(cases),
              static_cast<unsigned long long>(seed), failures);
  return failures == 0 ? 0 : 1;
}
