// What transfers touch, against every byte of it, and the queue from several threads at once.
#include <atomic>
#include <set>
#include <thread>

#include "harness.h"
#include "transfer/queue.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;
using namespace kvkernels::transfer;

std::vector<Segment> random_segments(Random& random, int64_t ids, bool is_dst) {
  std::vector<Segment> segments;
  const int64_t count = random.in(1, 4);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = random.in(0, ids - 1);
    const int64_t length = random.in(1, std::min<int64_t>(ids - at, random.of({1, 2, 90, 300})));
    segments.push_back(is_dst ? Segment{0, at, length} : Segment{at, 0, length});
  }
  return segments;
}

std::set<int64_t> blocks_of(const std::vector<Segment>& segments, bool is_dst, int64_t subblocks) {
  std::set<int64_t> blocks;
  for (const Segment& segment : segments) {
    for (int64_t i = 0; i < segment.count; ++i) blocks.insert(((is_dst ? segment.dst : segment.src) + i) / subblocks);
  }
  return blocks;
}

void block_sets_hold_what_segments_name() {
  Random random(1);
  for (int round = 0; round < 500; ++round) {
    const int64_t subblocks = random.of({1, 1, 3, 64});
    const bool is_dst = random.once_in(2);
    const auto segments = random_segments(random, 700, is_dst);
    const BlockSet set(segments, is_dst, subblocks);
    const std::set<int64_t> blocks = blocks_of(segments, is_dst, subblocks);
    for (int64_t block = -70; block < 800; ++block) {
      expect(set.has_any(block, block) == (blocks.count(block) > 0), "a block is named or not");
      expect((set.bits_at(block) & 1) == (blocks.count(block) > 0), "its bit is set or not");
    }
    const int64_t first = random.in(-100, 700);
    const int64_t last = first + random.in(-1, 200);
    const auto found = blocks.lower_bound(first);
    expect(set.has_any(first, last) == (found != blocks.end() && *found <= last), "any of a range");
  }
}

BoundCopy random_copy(Random& random, std::byte* base, int64_t bytes) {
  BoundCopy copy;
  for (int64_t i = random.in(1, 3); i > 0; --i) {
    const int64_t page = random.in(1, 40);
    const int64_t stride = std::max(page, random.of({page, 32, 32, 64, 70}));
    const int64_t offset = random.in(0, bytes - page);
    const int64_t blocks = random.in(1, 1 + (bytes - offset - page) / stride);
    copy.src.push_back({base + offset, blocks, stride, page});
    Run run{};
    run.src_pool = static_cast<int64_t>(copy.src.size()) - 1;
    if (random.once_in(4) && i > 1) continue;  // a pool that nobody uses
    copy.runs.push_back(run);
  }
  copy.dst.push_back({base, 1, 1, 1});
  return copy;
}

std::set<int64_t> bytes_of(const BoundCopy& copy, const std::set<int64_t>& blocks, const std::byte* base) {
  std::set<int64_t> bytes;
  for (const Run& run : copy.runs) {
    const Pool& pool = copy.src[static_cast<size_t>(run.src_pool)];
    for (const int64_t block : blocks) {
      const int64_t begin = pool.base - base + block * pool.block_stride;
      for (int64_t i = 0; i < pool.page_bytes; ++i) bytes.insert(begin + i);
    }
  }
  return bytes;
}

void meetings_are_where_pages_share_bytes() {
  Random random(2);
  std::vector<std::byte> memory(3000);
  Footprints footprints;
  int meets = 0;
  for (int round = 0; round < 1500; ++round) {
    std::shared_ptr<const BoundCopy> copies[2];
    std::set<int64_t> bytes[2];
    std::vector<Segment> segments[2];
    for (int i = 0; i < 2; ++i) {
      copies[i] = std::make_shared<BoundCopy>(random_copy(random, memory.data(), 3000));
      int64_t blocks = 1000;
      for (const Pool& pool : copies[i]->src) blocks = std::min(blocks, pool.blocks);
      segments[i] = random_segments(random, blocks, false);
      bytes[i] = bytes_of(*copies[i], blocks_of(segments[i], false, 1), memory.data());
    }
    const auto a = footprints.find(copies[0], false);
    const auto b = footprints.find(copies[1], false);
    const BlockSet blocks_a(segments[0], false, 1);
    const BlockSet blocks_b(segments[1], false, 1);
    bool found = false;
    for (const Meeting& meeting : footprints.meetings(*a, *b)) found |= share_pages(meeting, blocks_a, blocks_b);
    const bool expected =
        std::any_of(bytes[0].begin(), bytes[0].end(), [&](int64_t at) { return bytes[1].count(at) > 0; });
    expect(found == expected, "pages meet where they share a byte");
    meets += expected;
  }
  expect(meets > 300 && meets < 1200, "both kinds were drawn");
}

void layers_at_one_distance_meet_in_one_way() {
  constexpr int64_t kLayers = 160;
  constexpr int64_t kPage = 64;
  constexpr int64_t kBlocks = 8;
  std::vector<std::byte> memory(kLayers * kBlocks * kPage + kPage);
  const auto layers = [&](int64_t shift) {
    BoundCopy copy;
    for (int64_t i = 0; i < kLayers; ++i) {
      copy.src.push_back({memory.data() + shift + i * kBlocks * kPage, kBlocks, kPage, kPage});
      Run run{};
      run.src_pool = i;
      copy.runs.push_back(run);
    }
    return footprint_of(copy, false);
  };
  const Footprint here = layers(0);
  expect(here.pools.size() == kLayers, "every pool is used");
  expect(meetings_of(here, here).size() == 1, "each layer meets itself, all of them alike");
  // Half a page further each layer meets its neighbour's first block as well.
  expect(meetings_of(here, layers(kPage / 2)).size() == 2, "and the neighbours");
}

void a_footprint_is_not_taken_for_that_of_a_copy_that_is_gone() {
  Random random(3);
  std::vector<std::byte> memory(3000);
  Footprints footprints;
  for (int round = 0; round < 2000; ++round) {
    const auto copy = std::make_shared<BoundCopy>(random_copy(random, memory.data(), 3000));
    const auto found = footprints.find(copy, false);
    expect(found->pools == footprint_of(*copy, false).pools, "the pools are this copy's");
    expect(footprints.find(copy, false) == found, "and are found again");
  }
}

// Numbers instead of pages: a transfer reads some and writes its own name into others, without any lock.
struct Cells {
  std::vector<int64_t> values = std::vector<int64_t>(64);
  std::shared_ptr<const BoundCopy> copy;

  Cells() {
    BoundCopy made;
    auto* base = reinterpret_cast<std::byte*>(values.data());
    made.src = made.dst = {{base, 64, 8, 8}};
    made.runs = {Run{}};
    copy = std::make_shared<BoundCopy>(std::move(made));
  }
};

class Naming : public HostPayload {
 public:
  Naming(Cells& cells, Random& random, int64_t name) : cells_(cells), name_(name) {
    segments = {{random.in(0, 55), random.in(0, 55), random.in(1, 8)}};
    fails_ = random.once_in(20);
  }
  void check() override {
    if (fails_) throw std::invalid_argument("it was to fail");
  }
  void copy(int64_t chunk) noexcept override {
    for (int64_t i = chunk; i < segments[0].count; i += 2) {
      sum_ += cells_.values[static_cast<size_t>(segments[0].src + i)];
      // Its own bytes are no conflict for the queue, and no two chunks may write one cell.
      cells_.values[static_cast<size_t>(segments[0].dst + i)] = name_;
    }
  }
  void finish() noexcept override {}

  std::vector<Segment> segments;

 private:
  Cells& cells_;
  const int64_t name_;
  bool fails_ = false;
  std::atomic<int64_t> sum_{0};
};

bool shares_cells(const Segment& one) { return one.src < one.dst + one.count && one.dst < one.src + one.count; }

void threads_submit_and_the_last_writer_is_the_last_submitted() {
  constexpr int kThreads = 4;
  constexpr int kEach = 400;
  Cells cells;
  struct Sent {
    int64_t ticket;
    int64_t name;
    Segment segment;
  };
  std::vector<Sent> sent[kThreads];
  {
    Queue queue(2);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        Random random(100 + static_cast<uint64_t>(thread));
        for (int i = 0; i < kEach; ++i) {
          const int64_t name = 1 + thread * kEach + i;
          auto payload = std::make_unique<Naming>(cells, random, name);
          if (shares_cells(payload->segments[0])) continue;
          const Segment segment = payload->segments[0];
          auto item = std::make_shared<Item>();
          item->priority = static_cast<Priority>(random.in(0, 2));
          item->chunks = item->chunks_left = 2;
          for (const bool is_written : {false, true}) {
            item->accesses.push_back(Access{cells.copy, &payload->segments, is_written});
          }
          item->payload = std::move(payload);
          std::vector<int64_t> after;
          if (!sent[thread].empty() && random.once_in(4)) after = {sent[thread].back().ticket};
          const int64_t ticket = queue.submit(std::move(item), after);
          sent[thread].push_back({ticket, name, segment});
          if (random.once_in(10)) queue.cancel(ticket);
          if (random.once_in(10)) queue.wait(ticket, 1'000'000'000);
          if (random.once_in(20)) queue.poll(10);
          if (random.once_in(30)) {
            queue.hold(true);
            queue.stats();
            queue.touching({{0, ~uintptr_t{0}}});
            queue.hold(false);
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    queue.close(true);
    std::map<int64_t, Sent> by_ticket;
    for (const auto& of_thread : sent) {
      for (const Sent& one : of_thread) by_ticket.emplace(one.ticket, one);
    }
    std::vector<int64_t> expected(cells.values.size());
    std::map<State, int> ended;
    for (const auto& [ticket, one] : by_ticket) {
      const auto state = static_cast<State>(queue.report(ticket).state);
      ++ended[state];
      if (state != State::kDone) continue;
      for (int64_t i = 0; i < one.segment.count; ++i) expected[static_cast<size_t>(one.segment.dst + i)] = one.name;
    }
    expect(expected == cells.values, "each cell has the name of its last writer");
    expect(ended.size() == 3 && ended.count(State::kRunning) == 0, "some were done, some failed, some were cancelled");
    queue.forget(by_ticket.begin()->first);
    expect(error_of([&] { queue.report(by_ticket.begin()->first); }) != "", "what was forgotten is not known");
  }
}

void a_queue_that_is_closed_while_it_is_used_ends_everything() {
  for (int round = 0; round < 60; ++round) {
    Cells cells;
    Queue queue(1 + round % 3);
    std::atomic<int64_t> last{0};
    std::thread submits([&] {
      Random random(static_cast<uint64_t>(round));
      try {
        for (int64_t name = 1;; ++name) {
          auto payload = std::make_unique<Naming>(cells, random, name);
          if (shares_cells(payload->segments[0])) continue;
          auto item = std::make_shared<Item>();
          item->chunks = item->chunks_left = 2;
          for (const bool is_written : {false, true}) {
            item->accesses.push_back(Access{cells.copy, &payload->segments, is_written});
          }
          item->payload = std::move(payload);
          last = queue.submit(std::move(item), {});
        }
      } catch (const std::runtime_error&) {
      }
    });
    while (last < 20) std::this_thread::yield();
    std::thread other([&] { queue.close(true); });
    queue.close(round % 2 == 0);
    other.join();
    submits.join();
    for (int64_t ticket = 1; ticket <= last; ++ticket) {
      expect(queue.report(ticket).state >= static_cast<int64_t>(State::kDone), "each has ended");
      expect(queue.wait(ticket, 0), "and nobody waits for it");
    }
    expect(queue.poll(1'000'000).empty(), "what was waited for is not told of again");
  }
}

const Tests kTests{
    {"block_sets_hold_what_segments_name", block_sets_hold_what_segments_name},
    {"meetings_are_where_pages_share_bytes", meetings_are_where_pages_share_bytes},
    {"layers_at_one_distance_meet_in_one_way", layers_at_one_distance_meet_in_one_way},
    {"a_footprint_is_not_taken_for_that_of_a_copy_that_is_gone",
     a_footprint_is_not_taken_for_that_of_a_copy_that_is_gone},
    {"threads_submit_and_the_last_writer_is_the_last_submitted",
     threads_submit_and_the_last_writer_is_the_last_submitted},
    {"a_queue_that_is_closed_while_it_is_used_ends_everything",
     a_queue_that_is_closed_while_it_is_used_ends_everything},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
