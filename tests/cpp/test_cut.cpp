// How moves are cut, against every fragment's own addresses, which are numbers here: nothing is behind them.
#include <set>
#include <tuple>

#include "core/chunks.h"
#include "core/cut.h"
#include "core/fragments.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;

constexpr int64_t kLineBytes = 128;
constexpr CutRule kRules[] = {
    {.tile_bytes = 4096},
    {.has_chunks = false, .tile_bytes = 8192, .shrinks_tiles = true},
    {.tile_elements = 256, .joins_lines = false},
};

uint64_t address_of(const std::byte* at) { return reinterpret_cast<uintptr_t>(at); }

// Strides and bases that are multiples of a few powers of two, so that alignments meet and miss each other.
Side random_side(Random& random, uint64_t begin, int64_t grain) {
  const auto base = reinterpret_cast<std::byte*>(begin + static_cast<uint64_t>(grain * random.in(0, 20)));
  const int64_t subblocks = random.of({1, 1, 2, 3});
  return {base, grain * random.in(1, 3000), subblocks > 1 ? grain * random.in(1, 400) : 0, subblocks};
}

Work random_work(Random& random, int64_t ids) {
  Work work;
  work.direction = random.once_in(2) ? Direction::kHostToDevice : Direction::kDeviceToHost;
  const int64_t grain = random.of({1, 2, 4, 8, 16, 32, 128});
  for (int64_t moves = random.in(1, 3); moves > 0; --moves) {
    Move move{random_side(random, 1 << 20, grain), random_side(random, 1 << 30, grain), 0, 0, {}, false};
    // Both sides begin as far inside an element.
    const int64_t shift = random.of({0, 0, 5, 8});
    move.src.base += shift;
    move.dst.base += shift;
    move.fragment_bytes = grain * random.of({1, 3, 16, 63, 64, 65, 300, 1000});
    move.loop_count = static_cast<int>(random.in(0, 3));
    for (int i = 0; i < move.loop_count; ++i) {
      move.loops[i] = {random.in(2, 4), grain * random.in(-9, 90), grain * random.in(1, 90)};
    }
    work.moves.push_back(move);
  }
  const int64_t scale = random.of({1, 1, 2, 16});
  for (int64_t i = random.in(1, 4); i > 0; --i) {
    work.segments.push_back({scale * random.in(0, ids), scale * random.in(0, ids), random.in(1, 3)});
  }
  if (random.once_in(6)) work.segments = {{0, 0, 1}};
  for (const Segment& segment : work.segments) work.pairs += segment.count;
  for (const Move& move : work.moves) work.bytes += work.pairs * move.bytes_per_pair();
  return work;
}

std::vector<Fragment> fragments_of(const Work& work) {
  std::vector<Fragment> fragments;
  FragmentCursor cursor(work, 0, work.bytes);
  for (Fragment fragment; cursor.next(&fragment, 1) == 1;) fragments.push_back(fragment);
  return fragments;
}

// The tiles that this fragment needs, cut at cache lines.
int64_t tiles_of(const Fragment& fragment, const Cut& cut) {
  const uint64_t begin = cut.is_on_src() ? address_of(fragment.src) : address_of(fragment.dst);
  const auto phase = static_cast<int64_t>(begin % kLineBytes);
  return (fragment.bytes + phase + cut.tile_bytes() - 1) / cut.tile_bytes();
}

void expect_holds(const Cut& cut, const CutRule& rule, const Move& move, const std::vector<Fragment>& fragments) {
  const int64_t pieces = cut.pieces_per_fragment(move);
  for (const Fragment& fragment : fragments) {
    const auto src = address_of(fragment.src);
    const auto dst = address_of(fragment.dst);
    expect((src - dst) % static_cast<uint64_t>(cut.element_bytes()) == 0, "elements line up on both sides");
    const bool is_whole =
        (src | static_cast<uint64_t>(fragment.bytes)) % static_cast<uint64_t>(cut.element_bytes()) == 0;
    expect(is_whole || cut.is_ragged(), "who is not ragged has whole elements");
    if (cut.has_chunks()) {
      expect(is_whole && cut.element_bytes() == cut.chunk_bytes(), "chunks are whole");
      expect(pieces * cut.chunk_bytes() == fragment.bytes, "chunks are all of a fragment");
      expect(pieces <= kMostChunks, "few chunks a fragment");
    } else {
      const bool joins = rule.joins_lines && fragment.bytes <= cut.tile_bytes();
      expect(pieces >= (joins ? 1 : tiles_of(fragment, cut)), "tiles reach over all of a fragment");
    }
  }
}

void pieces_hold_every_fragment() {
  Random random(1);
  int chunked = 0;
  int ragged = 0;
  for (int round = 0; round < 4000; ++round) {
    Work work = random_work(random, 50);
    const CutRule& rule = kRules[round % 3];
    const Cut host(work, rule);
    chunked += host.has_chunks();
    ragged += host.is_ragged();
    for (const Move& move : work.moves) {
      Work one = work;
      one.moves = {move};
      one.bytes = one.pairs * move.bytes_per_pair();
      expect_holds(host, rule, move, fragments_of(one));
    }
    // Of ids on a device only the limits are known.
    work.device_ids = DeviceIds{.rows = work.pairs, .src_limit = 1000, .dst_limit = 1000};
    const Cut device(work, rule);
    expect(device.element_bytes() <= host.element_bytes(), "whoever knows the ids knows more");
    expect(device.is_on_src() == (work.direction == Direction::kHostToDevice), "cut on the side of the host's loads");
  }
  expect(chunked > 300 && ragged > 30, "both kinds of pieces are tried");
}

// One pool with one block, or one block that is ever named: its stride is no distance between fragments.
void a_lone_block_has_no_stride() {
  Work work;
  const auto at = [](uint64_t address) { return reinterpret_cast<std::byte*>(address); };
  work.moves = {Move{{at(4096), 33, 0, 1}, {at(8192), 35, 0, 1}, 512, 0, {}, false}};
  work.pairs = 1;
  const auto chunk_bytes = [&] { return Cut(work, kRules[0]).chunk_bytes(); };
  work.segments = {{0, 0, 1}};
  expect(chunk_bytes() == 16, "block 0 alone");
  work.segments = {{16, 32, 1}};
  expect(chunk_bytes() == 16, "ids that are multiples of 16");
  work.segments = {{16, 8, 1}};
  expect(chunk_bytes() == 8, "ids that are multiples of 8");
  work.segments = {{0, 0, 2}};
  expect(Cut(work, kRules[0]).element_bytes() == 1 && !Cut(work, kRules[0]).has_chunks(), "two blocks");
  work.segments = {};
  work.device_ids = DeviceIds{.rows = 1, .src_limit = 1, .dst_limit = 1};
  expect(chunk_bytes() == 16, "pools of one block");
  work.device_ids->dst_limit = 2;
  expect(chunk_bytes() == 0, "a pool of two");
}

void shapes_are_the_kernels_names() {
  Work work;
  const auto at = [](uint64_t address) { return reinterpret_cast<std::byte*>(address); };
  const Side side{at(4096), 16384, 0, 1};
  const auto json_of = [&](int64_t bytes, int loops, const CutRule& rule) {
    work.moves = {Move{side, side, bytes, loops, {{2, 8192, 8192}}, false}};
    return Cut(work, rule).json();
  };
  work.segments = {{0, 1, 1}};
  expect(json_of(1024, 0, kRules[0]) == R"({"kernel": "row", "chunk_bytes": 16})", "64 chunks");
  expect(json_of(1040, 0, kRules[0]) == R"({"kernel": "page", "tile_bytes": 4096})", "65");
  expect(json_of(1040, 1, kRules[0]) == R"({"kernel": "bytes", "tile_bytes": 4096})", "with loops");
  expect(json_of(24, 0, kRules[0]) == R"({"kernel": "bytes", "chunk_bytes": 8})", "narrower chunks");
  expect(json_of(1000, 0, kRules[1]) == R"({"kernel": "page", "tile_bytes": 1024})", "tiles of whole lines");
  expect(json_of(9000, 0, kRules[1]) == R"({"kernel": "page", "tile_bytes": 8192})", "and no longer than they may be");
  expect(json_of(9000, 0, kRules[2]) == R"({"kernel": "page", "tile_bytes": 4096})", "256 elements of 16 bytes");
}

std::multiset<std::pair<uint64_t, uint64_t>> bytes_of(Work work, const std::vector<Move>& moves) {
  work.moves = moves;
  work.bytes = 0;
  for (const Move& move : moves) work.bytes += work.pairs * move.bytes_per_pair();
  std::multiset<std::pair<uint64_t, uint64_t>> bytes;
  for (const Fragment& fragment : fragments_of(work)) {
    for (int64_t i = 0; i < fragment.bytes; ++i) {
      bytes.emplace(address_of(fragment.src + i), address_of(fragment.dst + i));
    }
  }
  return bytes;
}

void split_moves_are_the_same_bytes() {
  Random random(2);
  for (int round = 0; round < 300; ++round) {
    const Work work = random_work(random, 5);
    const Cut cut(work, kRules[round % 3]);
    const int64_t limit = random.of({1, 2, 7, 40});
    const std::vector<Move> parts = cut.split(work.moves, limit);
    if (work.bytes < 30'000) expect(bytes_of(work, parts) == bytes_of(work, work.moves), "the bytes are the same");
    for (const Move& part : parts) {
      // A part of a tile whose fragment begins inside a line is no shorter than two.
      expect(cut.pieces_per_pair(part) <= std::max<int64_t>(limit, 2), "each part is within the limit");
    }
  }
}

using Listed = std::multiset<std::tuple<uint64_t, uint64_t, int64_t>>;

Listed listed(const Work& work) {
  Listed found;
  for (const Fragment& one : fragments_of(work)) found.emplace(address_of(one.src), address_of(one.dst), one.bytes);
  return found;
}

void chunks_are_the_whole_once_and_none_is_too_large() {
  Random random(3);
  bool seen[2] = {};
  for (int round = 0; round < 400; ++round) {
    Work work = random_work(random, 9);
    const MoveSums sums = sums_of(work.moves);
    const int64_t chunk_bytes = random.of({1, 500, 5000, work.bytes, work.bytes / 3 + 1, 1 << 30});
    const WorkChunks chunks(work, chunk_bytes);
    seen[chunks.keeps_moves() ? 1 : 0] = true;
    Listed found;
    int64_t bytes = 0;
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const Work chunk = chunks.chunk(work, i);
      int64_t pairs = 0;
      for (const Segment& segment : chunk.segments) pairs += segment.count;
      const Listed own = listed(chunk);
      expect(chunk.pairs == pairs && pairs > 0, "its pairs are those of its segments");
      expect(chunk.descriptors == static_cast<int64_t>(own.size()), "its fragments are counted");
      expect(chunk.bytes <= chunk_bytes || (pairs == 1 && chunk.moves.size() == 1), "a larger page is alone");
      expect(chunk.direction == work.direction && chunk.shape == sums_of(chunk.moves).shape,
             "it is of its work's kind");
      expect(!chunks.keeps_moves() || chunk.moves.size() == work.moves.size(), "all moves are there");
      found.insert(own.begin(), own.end());
      bytes += chunk.bytes;
    }
    expect(bytes == work.bytes && found == listed(work), "together they are the whole");
    if (chunk_bytes >= work.bytes) expect(chunks.count() == 1, "one is enough");
    if (sums.bytes_per_pair * work.pairs == 0) expect(chunks.count() == 0, "nothing is no chunk");
  }
  expect(seen[0] && seen[1], "some were taken apart by moves");
  Work nothing;
  expect(WorkChunks(nothing, 1).count() == 0, "nothing is no chunk");
}

const Tests kTests{
    {"pieces_hold_every_fragment", pieces_hold_every_fragment},
    {"a_lone_block_has_no_stride", a_lone_block_has_no_stride},
    {"shapes_are_the_kernels_names", shapes_are_the_kernels_names},
    {"split_moves_are_the_same_bytes", split_moves_are_the_same_bytes},
    {"chunks_are_the_whole_once_and_none_is_too_large", chunks_are_the_whole_once_and_none_is_too_large},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
