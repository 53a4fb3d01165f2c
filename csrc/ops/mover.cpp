// Movers: what Python calls, through ctypes, to have ops' jobs carried out later by threads that never need the GIL.
//
// Not ops: no call has a tensor, and one that waits must not hold the GIL while those that are quick may keep it.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/policy.h"
#include "cpu/copy.h"
#include "ops/counters.h"
#include "ops/executors/room.h"
#include "ops/explain.h"
#include "ops/held.h"
#include "ops/mover_device.h"
#include "ops/submission.h"
#include "transfer/queue.h"

namespace kvkernels {
namespace {

using transfer::Access;
using transfer::Item;
using transfer::Queue;

// Where a mover's tensors are: here, from 0 on the CUDA device of that number, and below it any CUDA device.
constexpr int64_t kHost = -1;

struct Mover {
  std::shared_ptr<MoverDevices> devices;  // null for the host
  Queue queue;
  int lanes;
  int64_t chunk_bytes;

  Mover(int lanes, int64_t chunk_bytes, int64_t place)
      : devices(place == kHost ? nullptr : mover_devices(static_cast<int>(place), chunk_bytes)),
        queue(devices ? 0 : lanes),
        lanes(lanes),
        chunk_bytes(chunk_bytes) {}
};

// By handle. Whoever uses one keeps it, whatever is closed meanwhile. A fork waits for the lock, which a child would
// find taken for ever.
std::mutex movers_mutex;
[[maybe_unused]] const int registered =
    pthread_atfork([] { movers_mutex.lock(); }, [] { movers_mutex.unlock(); }, [] { movers_mutex.unlock(); });
std::unordered_map<int64_t, std::shared_ptr<Mover>>& movers() {
  // Never destroyed: other threads may still be in a call when the process's statics go.
  static auto& all = *new std::unordered_map<int64_t, std::shared_ptr<Mover>>;
  return all;
}

std::shared_ptr<Mover> mover_of(int64_t handle) {
  const std::lock_guard lock(movers_mutex);
  const auto found = movers().find(handle);
  if (found == movers().end()) throw std::runtime_error("the mover must be open, got a closed one");
  return found->second;
}

// One op's copy.
struct Part {
  Work work;
  std::shared_ptr<const BoundCopy> bound;
  HeldSides held;
  const cpu::Tuning& tuning = cpu::tuning();
  int64_t first_chunk = 0;
  std::atomic<int64_t> descriptors{0};
  std::atomic<int64_t> bytes{0};

  explicit Part(Job job) : work(std::move(job.work)), bound(std::move(job.bound)), held(std::move(job.held)) {}
  ~Part() { recycle(std::move(work.segments)); }
};

class Parts : public transfer::HostPayload {
 public:
  std::vector<std::unique_ptr<Part>> parts;

  void check() override {
    for (const auto& part : parts) {
      part->held.dst->check();
      part->held.src->check();
    }
  }

  void copy(int64_t chunk) noexcept override {
    for (const auto& part : parts) {
      const int64_t own = chunk - part->first_chunk;
      if (own < 0 || own >= part->work.lanes || part->work.bytes == 0) continue;
      const Issued issued = cpu::copy_lane_of(part->work, static_cast<int>(own), part->tuning);
      part->descriptors.fetch_add(issued.descriptors, std::memory_order_relaxed);
      part->bytes.fetch_add(issued.bytes, std::memory_order_relaxed);
    }
  }

  void finish() noexcept override {
    for (const auto& part : parts) {
      if (part->work.bytes > 0) count_issued(Executor::kCpu, {0, part->descriptors.load(), part->bytes.load()});
    }
  }
};

// What this thread's ops left since the scope began.
thread_local std::shared_ptr<Mover> scope_mover;
thread_local std::vector<Job> scope_jobs;

// A part is cut into chunks that a more urgent transfer may come between, and so that every lane has some of it.
int chunks_of(const Mover& mover, int64_t bytes) {
  const int64_t by_size = (bytes + mover.chunk_bytes - 1) / mover.chunk_bytes;
  return static_cast<int>(std::max<int64_t>(by_size, cpu_policy().lanes_for(bytes, mover.lanes)));
}

std::shared_ptr<Item> item_of(const Mover& mover, std::vector<Job> jobs) {
  auto item = std::make_shared<Item>();
  auto payload = std::make_unique<Parts>();
  int64_t chunks = 0;
  for (Job& job : jobs) {
    Part& part = *payload->parts.emplace_back(std::make_unique<Part>(std::move(job)));
    part.first_chunk = chunks;
    part.work.lanes = std::max(1, chunks_of(mover, part.work.bytes));
    chunks += part.work.bytes > 0 ? part.work.lanes : 0;
    item->bytes += part.work.bytes;
    if (part.work.bytes == 0) continue;
    for (const bool is_written : {false, true}) {
      item->accesses.push_back(Access{part.bound, &part.work.segments, is_written});
    }
  }
  item->chunks = item->chunks_left = std::max<int64_t>(1, chunks);
  item->payload = std::move(payload);
  return item;
}

thread_local std::string last_error;
thread_local bool last_is_value_error = false;

// What `body` returns, or -1 where it throws.
template <class Body>
int64_t guarded(Body&& body) noexcept {
  try {
    return body();
  } catch (const std::logic_error& error) {
    last_is_value_error = true;
    last_error = error.what();
  } catch (const std::exception& error) {
    last_is_value_error = false;
    last_error = error.what();
  }
  return -1;
}

void check_for_host(const Job& job) {
  if (job.device >= 0) value_error(job.op, ": tensors must be on the cpu for this mover, got cuda:", job.device);
  if (job.asked != Executor::kAuto && job.asked != Executor::kCpu) {
    Site host;
    const std::string refusal = room_of(job.asked).refusal(job, host);
    value_error(job.op, ": executor '", name_of(job.asked),
                "' cannot serve this call: ", refusal.empty() ? "a mover's threads never run Python" : refusal);
  }
}

int64_t copy_out(const std::vector<int64_t>& values, int64_t* out) {
  std::copy(values.begin(), values.end(), out);
  return std::ssize(values);
}

}  // namespace

bool submitting() { return scope_mover != nullptr && !explaining(); }

void submit_job(Job job) {
  if (job.has_addresses) {
    value_error(job.op, ": a mover's transfers must be of tensors, which it keeps alive, got addresses");
  }
  if (scope_mover->devices) {
    scope_mover->devices->take(job);
  } else {
    check_for_host(job);
  }
  job.reference = nullptr;  // it refers to the call's own arguments
  job.host_tensors = {};
  scope_jobs.push_back(std::move(job));
}

}  // namespace kvkernels

#define KVKERNELS_ENTRY extern "C" __attribute__((visibility("default")))

using kvkernels::guarded;
using kvkernels::mover_of;

// The message of this thread's last call that returned -1, and whether it is a ValueError's.
KVKERNELS_ENTRY const char* kvkernels_mover_error() { return kvkernels::last_error.c_str(); }
KVKERNELS_ENTRY int64_t kvkernels_mover_error_is_value() { return kvkernels::last_is_value_error ? 1 : 0; }

KVKERNELS_ENTRY int64_t kvkernels_mover_open(int64_t lanes, int64_t chunk_bytes, int64_t place) {
  return guarded([&] {
    static std::atomic<int64_t> last{0};
    auto mover = std::make_shared<kvkernels::Mover>(static_cast<int>(lanes), chunk_bytes, place);
    const std::lock_guard lock(kvkernels::movers_mutex);
    kvkernels::movers().emplace(++last, std::move(mover));
    return last.load();
  });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_close(int64_t handle, int64_t finishes) {
  return guarded([&] {
    const auto mover = mover_of(handle);
    mover->queue.close(finishes != 0);
    if (mover->devices) mover->devices->close();
    return int64_t{0};
  });
}

// Its transfers are known no more.
KVKERNELS_ENTRY int64_t kvkernels_mover_release(int64_t handle) {
  return guarded([&] {
    std::shared_ptr<kvkernels::Mover> last;  // freed without the lock
    const std::lock_guard lock(kvkernels::movers_mutex);
    const auto found = kvkernels::movers().find(handle);
    if (found == kvkernels::movers().end()) return int64_t{0};
    last = std::move(found->second);
    kvkernels::movers().erase(found);
    return int64_t{0};
  });
}

// From here on this thread's ops are kept for kvkernels_mover_submit. 0 where they are already.
KVKERNELS_ENTRY int64_t kvkernels_mover_begin(int64_t handle) {
  return guarded([&] {
    if (kvkernels::scope_mover != nullptr) return int64_t{0};
    kvkernels::scope_mover = mover_of(handle);
    return int64_t{1};
  });
}

// Drops them.
KVKERNELS_ENTRY void kvkernels_mover_abandon() {
  kvkernels::scope_mover.reset();
  kvkernels::scope_jobs.clear();
}

// The ticket of the transfer that they are, after those of `after` and, on a device, after the recorded `events`.
KVKERNELS_ENTRY int64_t kvkernels_mover_submit(int64_t handle, int64_t priority, const int64_t* after, int64_t count,
                                               void* const* events, int64_t event_count) {
  kvkernels::scope_mover.reset();
  return guarded([&] {
    auto jobs = std::exchange(kvkernels::scope_jobs, {});
    const auto mover = mover_of(handle);
    auto item = mover->devices ? mover->devices->item_of(std::move(jobs), {events, events + event_count})
                               : kvkernels::item_of(*mover, std::move(jobs));
    item->priority = static_cast<kvkernels::transfer::Priority>(priority);
    return mover->queue.submit(std::move(item), std::vector<int64_t>(after, after + count));
  });
}

// Whether it was handed to the device, which is waited for at most so long, or has ended. Where it was, what the
// stream is asked for from now on comes after it.
KVKERNELS_ENTRY int64_t kvkernels_mover_block(int64_t handle, int64_t ticket, int64_t timeout_ns, int64_t device,
                                              void* stream) {
  return guarded([&] {
    const auto mover = mover_of(handle);
    kvkernels::transfer::Marks marks;
    if (!mover->queue.handed_over(ticket, timeout_ns, marks)) return int64_t{0};
    mover->devices->block(static_cast<int>(device), stream, marks);
    return int64_t{1};
  });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_wait(int64_t handle, int64_t ticket, int64_t timeout_ns) {
  return guarded([&] { return mover_of(handle)->queue.wait(ticket, timeout_ns) ? int64_t{1} : int64_t{0}; });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_cancel(int64_t handle, int64_t ticket) {
  return guarded([&] { return mover_of(handle)->queue.cancel(ticket) ? int64_t{1} : int64_t{0}; });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_state(int64_t handle, int64_t ticket) {
  return guarded([&] { return mover_of(handle)->queue.report(ticket).state; });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_report(int64_t handle, int64_t ticket, kvkernels::transfer::Report* out) {
  return guarded([&] {
    *out = mover_of(handle)->queue.report(ticket);
    return int64_t{0};
  });
}

// The error's length, of which at most `size` bytes are written.
KVKERNELS_ENTRY int64_t kvkernels_mover_why(int64_t handle, int64_t ticket, char* out, int64_t size) {
  return guarded([&] {
    const std::string error = mover_of(handle)->queue.error(ticket);
    std::memcpy(out, error.data(), std::min(error.size(), static_cast<size_t>(size)));
    return std::ssize(error);
  });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_poll(int64_t handle, int64_t* out, int64_t most) {
  return guarded([&] { return kvkernels::copy_out(mover_of(handle)->queue.poll(static_cast<size_t>(most)), out); });
}

// How many unfinished transfers have a pool in one of the ranges (begin, end), of which at most `most` are written.
KVKERNELS_ENTRY int64_t kvkernels_mover_touching(int64_t handle, const int64_t* ranges, int64_t count, int64_t* out,
                                                 int64_t most) {
  return guarded([&] {
    std::vector<kvkernels::transfer::Range> given;
    for (int64_t i = 0; i < count; ++i) {
      given.push_back({static_cast<uintptr_t>(ranges[2 * i]), static_cast<uintptr_t>(ranges[2 * i + 1])});
    }
    auto tickets = mover_of(handle)->queue.touching(given);
    const int64_t found = std::ssize(tickets);
    tickets.resize(static_cast<size_t>(std::min(found, most)));
    kvkernels::copy_out(tickets, out);
    return found;
  });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_hold(int64_t handle, int64_t holds) {
  return guarded([&] {
    mover_of(handle)->queue.hold(holds != 0);
    return int64_t{0};
  });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_forget(int64_t handle, int64_t ticket) {
  return guarded([&] {
    mover_of(handle)->queue.forget(ticket);
    return int64_t{0};
  });
}

KVKERNELS_ENTRY int64_t kvkernels_mover_stats(int64_t handle, int64_t* out) {
  return guarded([&] { return kvkernels::copy_out(mover_of(handle)->queue.stats(), out); });
}

// How many chunks were copied of late, of which at most `most` are written.
KVKERNELS_ENTRY int64_t kvkernels_mover_trace(int64_t handle, kvkernels::transfer::Trace* out, int64_t most) {
  return guarded([&] {
    const auto traces = mover_of(handle)->queue.trace();
    std::copy(traces.begin(), traces.begin() + std::min(std::ssize(traces), most), out);
    return std::ssize(traces);
  });
}
