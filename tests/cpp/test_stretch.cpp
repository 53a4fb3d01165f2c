// Which moves the CPU copies as strips and which it zips: one example either side of each condition. A wrong answer
// costs time and no byte, so no test of bytes would notice.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/stretch.h"
#include "harness.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;
using cpu::goes_in_strips;
using cpu::Stretch;
using cpu::stretch_from;

constexpr int64_t kRows = 5;
constexpr int64_t kRowBytes = 1 << 20;
constexpr int64_t kPairs = 3;

// Nothing is copied: only addresses are compared.
std::byte* address(int64_t at) { return reinterpret_cast<std::byte*>(at); }

constexpr int64_t kWhole = 1 << 20;
constexpr int64_t kShards = int64_t{1} << 40;

Move page(int64_t bytes) {
  return {{address(kWhole), bytes, 0, 1}, {address(kShards), bytes, 0, 1}, bytes, 0, {}, false};
}

// Shards of `bytes` a row: on the one side their rows lie beside each other, on the other each shard is contiguous.
Work shards(int count, int64_t bytes, bool rows_are_dst) {
  Work work;
  work.streaming = true;
  work.pairs = kPairs;
  for (int i = 0; i < count; ++i) {
    const Side whole{address(kWhole + i * bytes), kRows * kRowBytes, 0, 1};
    const Side shard{address(kShards * (i + 1)), kRows * bytes, 0, 1};
    Move move{shard, whole, bytes, 1, {{kRows, bytes, kRowBytes}}, false};
    if (!rows_are_dst) move = {whole, shard, bytes, 1, {{kRows, kRowBytes, bytes}}, false};
    work.moves.push_back(move);
  }
  return work;
}

bool zips(const Work& work, bool writes_rows) { return stretch_from(work, 0, writes_rows).row_bytes > 0; }

void short_fragments_go_in_strips() {
  Move looped = page(256);
  looped.loop_count = 1;
  looped.loops[0] = {2, 512, 512};
  expect(goes_in_strips(looped), "256 bytes with a loop");
  ++looped.fragment_bytes;
  expect(!goes_in_strips(looped), "257 bytes with a loop");
  expect(goes_in_strips(page(63)) && !goes_in_strips(page(64)), "pages below a line");
  Move merging = page(8);
  merging.merges = true;
  expect(!goes_in_strips(merging), "pages that lie end to end");
}

void shards_of_these_sizes_are_zipped() {
  for (const int64_t bytes : {255, 256, 257, 4096, 4097}) {
    expect(zips(shards(2, bytes, false), false) == (bytes >= 256 && bytes <= 4096), text("reads of ", bytes));
    expect(zips(shards(2, bytes, false), true) == (bytes >= 256 && bytes <= 4096), text("reads besides, of ", bytes));
    expect(zips(shards(2, bytes, true), true) == (bytes >= 257 && bytes <= 4096), text("writes of ", bytes));
    expect(!zips(shards(2, bytes, true), false), text("no writes of ", bytes, " where these do not gain"));
  }
}

void a_stretch_says_what_it_holds() {
  const Work work = shards(3, 512, false);
  const Stretch all = stretch_from(work, 0, false);
  expect(all.first == 0 && all.last == 3 && all.row_bytes == 3 * 512, "three shards");
  expect(all.bytes == 3 * kPairs * kRows * 512, "their bytes");
  const Stretch rest = stretch_from(work, 1, false);
  expect(rest.first == 1 && rest.last == 3 && rest.row_bytes == 2 * 512, "from the second on");
  const Stretch last = stretch_from(work, 2, false);
  expect(last.last == 3 && last.row_bytes == 0 && last.bytes == kPairs * kRows * 512, "one is not zipped");
  const Stretch many = stretch_from(shards(17, 512, false), 0, false);
  expect(many.last == 16 && many.row_bytes == 16 * 512, "sixteen at a time");
}

void a_stretch_ends_where_zipping_begins() {
  Work work = shards(2, 512, false);
  work.moves.insert(work.moves.begin(), {page(4096), page(4096)});
  const Stretch before = stretch_from(work, 0, false);
  expect(before.last == 2 && before.row_bytes == 0 && before.bytes == kPairs * 2 * 4096, "pages before shards");
  const Stretch zipped = stretch_from(work, 2, false);
  expect(zipped.last == 4 && zipped.row_bytes == 2 * 512, "shards after pages");
  work.streaming = false;
  const Stretch plain = stretch_from(work, 0, false);
  expect(plain.last == 4 && plain.row_bytes == 0 && plain.bytes == kPairs * (2 * 4096 + 2 * kRows * 512),
         "stores through the caches are in order");
}

void only_parts_of_the_same_rows_are_zipped() {
  const std::vector<std::function<void(Move&)>> changes = {
      [](Move& move) { ++move.src.base; },
      [](Move& move) { ++move.src.block_stride; },
      [](Move& move) { ++move.src.subblocks; },
      [](Move& move) { ++move.src.subblock_stride; },
      [](Move& move) { ++move.loops[0].extent; },
      [](Move& move) { ++move.loops[0].src_stride; },
      [](Move& move) { move.loops[move.loop_count++] = {2, 0, 0}; },
      [](Move& move) { move.loop_count = 0; },
      [](Move& move) { move.fragment_bytes = 4097; },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    Work work = shards(2, 512, false);
    changes[i](work.moves[1]);
    expect(!zips(work, false), text("change ", i));
  }
  Work work = shards(2, 512, false);
  for (Move& move : work.moves) move.loop_count = 0;
  expect(!zips(work, false), "pages without loops");
  work = shards(2, 512, false);
  ++work.moves[1].dst.block_stride;
  ++work.moves[1].loops[0].dst_stride;
  work.moves[1].fragment_bytes = 1024;
  expect(zips(work, false), "shards of different sizes");
}

const Tests kTests{
    {"short_fragments_go_in_strips", short_fragments_go_in_strips},
    {"shards_of_these_sizes_are_zipped", shards_of_these_sizes_are_zipped},
    {"a_stretch_says_what_it_holds", a_stretch_says_what_it_holds},
    {"a_stretch_ends_where_zipping_begins", a_stretch_ends_where_zipping_begins},
    {"only_parts_of_the_same_rows_are_zipped", only_parts_of_the_same_rows_are_zipped},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
