// What ended transfers came to, in integers, and the last chunks that were copied. Collected when somebody asks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvkernels::transfer {

constexpr size_t kPriorities = 3;
constexpr size_t kBuckets = 11;  // the last holds what is above the others

// Upper bounds: 4 KiB, four times as much, ... 1 GiB; and 10 us, four times as long, ... 2.6 s.
constexpr int64_t kLeastBytes = 4 << 10;
constexpr int64_t kLeastNs = 10'000;

struct Counters {
  int64_t done = 0;
  int64_t failed = 0;
  int64_t cancelled = 0;
  int64_t bytes = 0;     // of those that were done, as all below
  int64_t copy_ns = 0;   // from a transfer's first chunk to its last
  int64_t queue_ns = 0;  // from submit to its first chunk
  int64_t chunks = 0;
  std::array<int64_t, kBuckets> by_bytes{};
  std::array<int64_t, kBuckets> by_copy_ns{};
  std::array<int64_t, kBuckets> by_queue_ns{};

  void add_done(int64_t bytes, int64_t copy_ns, int64_t queue_ns, int64_t chunks);
};
static_assert(sizeof(Counters) == (7 + 3 * kBuckets) * sizeof(int64_t), "Python reads it as integers");

// A chunk that was copied.
struct Trace {
  int64_t ticket;
  int64_t priority;
  int64_t bytes;  // of the whole transfer
  int64_t submitted_ns;
  int64_t chunk;
  int64_t thread;
  int64_t begin_ns;
  int64_t end_ns;
};

// The last ones, the oldest first.
class TraceRing {
 public:
  void add(const Trace& trace);
  std::vector<Trace> list() const;

 private:
  static constexpr size_t kMost = 1 << 14;
  std::vector<Trace> ring_;
  size_t next_ = 0;
};

}  // namespace kvkernels::transfer
