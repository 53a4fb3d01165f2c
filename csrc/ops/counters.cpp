#include "ops/counters.h"

#include <array>
#include <atomic>

#include "core/text.h"
#include "ops/json.h"

namespace kvkernels {
namespace {

struct Counter {
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> launches{0};
  std::atomic<int64_t> descriptors{0};
  std::atomic<int64_t> bytes{0};
};

std::array<Counter, kExecutors.size() + 1> counters;  // auto's is never used

Counter& counter_of(Executor executor) { return counters[static_cast<size_t>(executor)]; }

}  // namespace

void count_issued(Executor executor, const Issued& issued) {
  Counter& counter = counter_of(executor);
  ++counter.calls;
  counter.launches += issued.launches;
  counter.descriptors += issued.descriptors;
  counter.bytes += issued.bytes;
}

std::string counters_json() {
  std::string json = "{";
  for (const Executor executor : kExecutors) {
    const Counter& counter = counter_of(executor);
    if (json.size() > 1) json += ", ";
    json += text(quoted(name_of(executor)), ": {\"calls\": ", counter.calls.load(),
                 ", \"launches\": ", counter.launches.load(), ", \"descriptors\": ", counter.descriptors.load(),
                 ", \"bytes\": ", counter.bytes.load(), '}');
  }
  return json + '}';
}

void reset_counters() {
  for (Counter& counter : counters) {
    counter.calls = 0;
    counter.launches = 0;
    counter.descriptors = 0;
    counter.bytes = 0;
  }
}

}  // namespace kvkernels
