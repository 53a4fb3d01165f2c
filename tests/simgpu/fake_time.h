// When work happens. Every asynchronous operation waits for others: the one before it in its stream, the recorded event
// that its stream was told to wait for, and what the legacy stream orders. With seed 0 each runs in the call that asks
// for it. With any other seed it runs when a random scheduler likes, as late, as early and as mixed as CUDA allows:
// what it may do is all that a program can rely on.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#include "fake.h"

#pragma GCC visibility push(default)
namespace fake {

struct Copy {
  uintptr_t dst = 0;
  uintptr_t src = 0;
  size_t bytes = 0;
};

// When a copy reads its source: in its turn, before the call returns, or at any time from the call to its turn.
enum class Reads { kInTurn, kDuringCall, kAnyTime };

// What an operation does: copies in any order, or an action that returns a code. Neither for a mere point in a stream.
struct Work {
  const char* kind = "";
  std::vector<Copy> copies = {};
  Reads reads = Reads::kInTurn;
  std::function<int()> action = {};
  std::function<void(int64_t)> note_id = {};  // called with the operation's id; in a graph, at each launch
};

struct Capture;

struct Stream {
  int device = 0;
  bool is_blocking = true;  // ordered with the legacy stream
  bool is_legacy = false;
  int priority = 0;
  int64_t last = 0;                    // its last operation
  bool is_declared_capturing = false;  // by a test: what is asked for is marked, and done all the same
  std::shared_ptr<Capture> capture;    // what is asked for is recorded here and not done
  std::set<size_t> captured_after;     // nodes that the next one comes after
};

struct Event {
  using Clock = std::chrono::steady_clock;

  bool has_timing = true;
  bool is_recorded = false;
  int64_t recorded = 0;  // the operation
  std::shared_ptr<Clock::time_point> completed_at;
  std::shared_ptr<Capture> capture;  // where it was last recorded, if in a stream that captured
  std::set<size_t> captured_after;
};

// The stream behind a handle, legacy and per-thread ones too; null where it is none.
Stream* find_stream(void* handle);
bool is_legacy(const void* handle);
void* make_stream(bool is_blocking, int priority);
bool destroy_stream(void* handle);
const std::set<Stream*>& streams();

// Asks for work in a stream, after what was asked for there before and after those operations. Returns the work's code
// if it ran, or why it was refused; `id`, where it is not null, becomes the operation's.
int submit(Stream& stream, Work work, int64_t* id = nullptr, const std::vector<int64_t>& after = {});

// The same for work that is not itself in the stream's order: it waits for `after` alone.
int submit_beside(const Stream& stream, Work work, int64_t* id, const std::vector<int64_t>& after);

// What the next operation will be called in the schedule and in the log, which are the same for the same seed.
int64_t upcoming_operation();

bool is_finished(int64_t operation);
bool is_finished(Stream& stream);

// Run whatever must be run before the operation, or all of the stream or device, is finished: all else waits or not.
// They return the context's error.
int finish(int64_t operation);
int finish_stream(Stream& stream);
int finish_device(int device);
int finish_everything();

// Lets one step of what the operation, or all of the stream, waits for happen.
void nudge(int64_t operation);
void nudge(Stream& stream);

// Lets as much happen as the scheduler likes; every call does, unless "time_stands_still" is set: then only what
// somebody waits for happens.
void pass_time();

// Finishes everything, forgets the schedule and starts the random scheduler anew; 0 is for no scheduler.
void set_seed(uint64_t seed);

// What never ran never will.
void forget_operations();

}  // namespace fake
#pragma GCC visibility pop
