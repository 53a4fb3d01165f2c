#include "transfer/metrics.h"

namespace kvkernels::transfer {
namespace {

size_t bucket_of(int64_t value, int64_t least) {
  size_t bucket = 0;
  for (int64_t bound = least; value > bound && bucket < kBuckets - 1; bound *= 4) ++bucket;
  return bucket;
}

}  // namespace

void Counters::add_done(int64_t of_bytes, int64_t of_copy_ns, int64_t of_queue_ns, int64_t of_chunks) {
  ++done;
  bytes += of_bytes;
  copy_ns += of_copy_ns;
  queue_ns += of_queue_ns;
  chunks += of_chunks;
  ++by_bytes[bucket_of(of_bytes, kLeastBytes)];
  ++by_copy_ns[bucket_of(of_copy_ns, kLeastNs)];
  ++by_queue_ns[bucket_of(of_queue_ns, kLeastNs)];
}

void TraceRing::add(const Trace& trace) {
  if (ring_.size() < kMost) {
    ring_.push_back(trace);
    return;
  }
  ring_[next_] = trace;
  next_ = (next_ + 1) % kMost;
}

std::vector<Trace> TraceRing::list() const {
  std::vector<Trace> listed(ring_.begin() + static_cast<std::ptrdiff_t>(next_), ring_.end());
  listed.insert(listed.end(), ring_.begin(), ring_.begin() + static_cast<std::ptrdiff_t>(next_));
  return listed;
}

}  // namespace kvkernels::transfer
