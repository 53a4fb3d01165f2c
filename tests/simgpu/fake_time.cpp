#include "fake_time.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <string>

#include "fake_graph.h"

namespace fake {
namespace {

// Part of a copy: a copy engine is not atomic, and reads before it writes.
struct Piece {
  Copy copy;
  size_t copy_index = 0;
  size_t offset = 0;
  bool is_read = false;
  std::vector<char> data;
};

constexpr size_t kQueueLength = 256;

struct Operation {
  const char* kind = "";
  Reads reads = Reads::kInTurn;
  std::function<int()> action;
  std::vector<Piece> pieces;  // those not written yet
  std::vector<int64_t> after;
  int device = 0;
  bool is_blocking = true;
  bool is_point = false;
};

struct Step {
  int64_t operation;
  const char* kind;
  const char* did;
  size_t copy_index;  // of the operation's copies; where in it, and how much
  size_t offset;
  size_t bytes;
};

struct Time {
  uint64_t seed = 0;
  std::mt19937_64 random;
  // How often, in percent, a call lets nothing happen, and how often everything: what is left are a few steps.
  uint64_t idle_percent = 0;
  uint64_t busy_percent = 0;
  int64_t last_id = 0;
  int64_t seeded_at_id = 0;
  // A host function, say, which must not call CUDA: to wait there would be to wait for itself.
  bool is_running = false;
  std::map<int64_t, Operation> pending;
  std::vector<Step> schedule;
  std::string schedule_text;
  std::set<Stream*> streams;
  std::map<int, Stream> legacy;
};

Time& time() {
  static Time* const instance = new Time;
  return *instance;
}

uint64_t draw(uint64_t below) { return time().random() % below; }

bool is_ready(const Operation& operation) {
  return std::none_of(operation.after.begin(), operation.after.end(),
                      [](int64_t id) { return time().pending.count(id) != 0; });
}

void note(int64_t id, const Operation& operation, const char* did, const Piece& piece = {}) {
  time().schedule.push_back(
      {id - time().seeded_at_id, operation.kind, did, piece.copy_index, piece.offset, piece.copy.bytes});
}

void read(int64_t id, const Operation& operation, Piece& piece) {
  const char* const from = reinterpret_cast<const char*>(piece.copy.src);
  piece.data.assign(from, from + piece.copy.bytes);
  piece.is_read = true;
  note(id, operation, "read", piece);
}

// What may be read at any time may be read now.
void read_early(int64_t id, Operation& operation) {
  if (operation.reads != Reads::kAnyTime) return;
  for (Piece& piece : operation.pieces) {
    if (!piece.is_read && draw(4) == 0) read(id, operation, piece);
  }
}

std::vector<Piece> cut(const std::vector<Copy>& copies) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < copies.size(); ++i) {
    for (size_t at = 0; at < copies[i].bytes;) {
      const size_t rest = copies[i].bytes - at;
      const size_t bytes = draw(2) == 0 ? rest : 1 + draw(rest);
      pieces.push_back({{copies[i].dst + at, copies[i].src + at, bytes}, i, at, false, {}});
      at += bytes;
    }
  }
  return pieces;
}

// One step of a ready operation: a piece is read or written, or the action runs.
void step(int64_t id) {
  Operation& operation = time().pending.at(id);
  if (!operation.pieces.empty()) {
    std::swap(operation.pieces[draw(operation.pieces.size())], operation.pieces.back());
    Piece& piece = operation.pieces.back();
    if (!piece.is_read) {
      read(id, operation, piece);
      if (draw(2) == 0) return;
    }
    std::memcpy(reinterpret_cast<void*>(piece.copy.dst), piece.data.data(), piece.data.size());
    note(id, operation, "wrote", piece);
    operation.pieces.pop_back();
    if (!operation.pieces.empty()) return;
  }
  const std::function<int()> action = std::move(operation.action);
  if (action) note(id, operation, "ran");
  if (operation.is_point) note(id, operation, "passed");
  // What it does may break the context, and then no operation is left.
  time().is_running = true;
  const int code = action ? action() : 0;
  time().is_running = false;
  time().pending.erase(id);
  if (code != 0) break_context(code);
}

std::vector<int64_t> ready_operations() {
  std::vector<int64_t> found;
  for (const auto& [id, operation] : time().pending) {
    if (is_ready(operation)) found.push_back(id);
  }
  return found;
}

bool step_any() {
  const std::vector<int64_t> ready = ready_operations();
  if (ready.empty()) return false;
  step(ready[draw(ready.size())]);
  return true;
}

// Those of the operations that are pending, and all that they wait for.
std::set<int64_t> needed(const std::vector<int64_t>& operations) {
  std::set<int64_t> found;
  std::vector<int64_t> left = operations;
  while (!left.empty()) {
    const int64_t id = left.back();
    left.pop_back();
    const auto at = time().pending.find(id);
    if (at == time().pending.end() || !found.insert(id).second) continue;
    left.insert(left.end(), at->second.after.begin(), at->second.after.end());
  }
  return found;
}

bool step_towards(const std::vector<int64_t>& operations) {
  if (time().is_running) return false;
  std::vector<int64_t> ready;
  for (const int64_t id : needed(operations)) {
    if (is_ready(time().pending.at(id))) ready.push_back(id);
  }
  if (ready.empty()) return false;
  step(ready[draw(ready.size())]);
  return true;
}

int finish(const std::vector<int64_t>& operations) {
  if (time().is_running) return cudaErrorNotPermitted;
  while (step_towards(operations)) {
    if (draw(100) >= time().idle_percent) step_any();
  }
  return context_error();
}

// All that new work in the stream comes after; what the legacy stream's last work came after is known.
std::vector<int64_t> before(const Stream& stream) {
  std::vector<int64_t> found{stream.last};
  if (stream.is_legacy) {
    const auto& pending = time().pending;
    for (auto at = pending.upper_bound(stream.last); at != pending.end(); ++at) {
      if (at->second.device == stream.device && at->second.is_blocking) found.push_back(at->first);
    }
  } else if (stream.is_blocking) {
    found.push_back(time().legacy[stream.device].last);
  }
  return found;
}

// All that must be finished before the stream is. The legacy stream has as its own what it waits for; another does not.
std::vector<int64_t> all_of(const Stream& stream) {
  return stream.is_legacy ? before(stream) : std::vector<int64_t>{stream.last};
}

int run_now(const Work& work) {
  for (const Copy& copy : work.copies) {
    std::memmove(reinterpret_cast<void*>(copy.dst), reinterpret_cast<const void*>(copy.src), copy.bytes);
  }
  const int code = work.action ? work.action() : 0;
  if (breaks_context(code)) break_context(code);
  return code;
}

}  // namespace

Stream* find_stream(void* handle) {
  Lock lock(mutex());
  if (is_legacy(handle)) {
    Stream& legacy = time().legacy[current_device()];
    legacy.device = current_device();
    legacy.is_legacy = true;
    return &legacy;
  }
  if (handle == cudaStreamPerThread) {
    static thread_local std::map<int, Stream> own;
    own[current_device()].device = current_device();
    return &own[current_device()];
  }
  const auto found = time().streams.find(static_cast<Stream*>(handle));
  return found == time().streams.end() ? nullptr : *found;
}

bool is_legacy(const void* handle) { return handle == nullptr || handle == cudaStreamLegacy; }

void* make_stream(bool is_blocking, int priority) {
  Lock lock(mutex());
  Stream* const stream = new Stream;
  stream->device = current_device();
  stream->is_blocking = is_blocking;
  stream->priority = priority;
  time().streams.insert(stream);
  return stream;
}

bool destroy_stream(void* handle) {
  Lock lock(mutex());
  if (time().streams.erase(static_cast<Stream*>(handle)) == 0) return false;
  delete static_cast<Stream*>(handle);
  return true;
}

const std::set<Stream*>& streams() { return time().streams; }

int submit_beside(const Stream& stream, Work work, int64_t* id, const std::vector<int64_t>& after) {
  Lock lock(mutex());
  Time& t = time();
  const int64_t own_id = ++t.last_id;
  if (id != nullptr) *id = own_id;
  if (work.note_id) work.note_id(own_id);
  if (t.seed == 0) return run_now(work);
  const bool is_point = work.copies.empty() && !work.action;
  Operation operation{work.kind, work.reads,    std::move(work.action), cut(work.copies),
                      after,     stream.device, stream.is_blocking,     is_point};
  if (operation.reads == Reads::kDuringCall) {
    for (Piece& piece : operation.pieces) read(own_id, operation, piece);
  }
  read_early(own_id, operation);
  t.pending.emplace(own_id, std::move(operation));
  // A device's queues are not endless either: a call waits while they are full.
  while (t.pending.size() > kQueueLength && !t.is_running && step_any()) {
  }
  return 0;
}

int submit(Stream& stream, Work work, int64_t* id, const std::vector<int64_t>& after) {
  Lock lock(mutex());
  if (stream.capture != nullptr) return record(stream, std::move(work));
  std::vector<int64_t> all = before(stream);
  all.insert(all.end(), after.begin(), after.end());
  const int code = submit_beside(stream, std::move(work), &stream.last, all);
  if (id != nullptr) *id = stream.last;
  return code;
}

int64_t upcoming_operation() {
  Lock lock(mutex());
  return time().last_id + 1 - time().seeded_at_id;
}

bool is_finished(int64_t operation) { return time().pending.count(operation) == 0; }
bool is_finished(Stream& stream) { return needed(all_of(stream)).empty(); }

int finish(int64_t operation) {
  Lock lock(mutex());
  return finish(std::vector<int64_t>{operation});
}

int finish_stream(Stream& stream) {
  Lock lock(mutex());
  return finish(all_of(stream));
}

int finish_device(int device) {
  Lock lock(mutex());
  std::vector<int64_t> all;
  for (const auto& [id, operation] : time().pending) {
    if (operation.device == device) all.push_back(id);
  }
  return finish(all);
}

int finish_everything() {
  Lock lock(mutex());
  if (time().is_running) return cudaErrorNotPermitted;
  while (step_any()) {
  }
  return context_error();
}

void nudge(int64_t operation) {
  Lock lock(mutex());
  if (setting("time_stands_still") != 0) return;
  step_towards({operation});
}

void nudge(Stream& stream) {
  Lock lock(mutex());
  if (setting("time_stands_still") != 0) return;
  step_towards(all_of(stream));
}

void pass_time() {
  Lock lock(mutex());
  Time& t = time();
  if (t.pending.empty() || t.is_running || setting("time_stands_still") != 0) return;
  for (auto& [id, operation] : t.pending) read_early(id, operation);
  const uint64_t mood = draw(100);
  if (mood < t.idle_percent) return;
  const bool is_busy = mood < t.idle_percent + t.busy_percent;
  for (uint64_t left = 1 + draw(4); is_busy || left > 0; --left) {
    if (!step_any()) return;
  }
}

void set_seed(uint64_t seed) {
  Lock lock(mutex());
  finish_everything();
  Time& t = time();
  t.schedule.clear();
  t.seeded_at_id = t.last_id;
  t.seed = seed;
  t.random.seed(seed);
  // Some programs only break where nothing runs before it must, others only where things run early.
  t.idle_percent = 25 * draw(5);
  t.busy_percent = draw(2) * draw(101 - t.idle_percent);
}

void forget_operations() {
  Lock lock(mutex());
  time().pending.clear();
}

}  // namespace fake

using namespace fake;

EXPORT void fake_seed(uint64_t seed) { set_seed(seed); }

// What happened since the seed was set, in order.
EXPORT const char* fake_schedule() {
  Lock lock(mutex());
  std::string text = "[";
  for (const Step& s : time().schedule) {
    text += text.size() == 1 ? "" : ",\n";
    text += "{\"operation\": " + std::to_string(s.operation) + ", \"kind\": \"" + s.kind + "\", \"did\": \"" + s.did +
            "\", \"copy\": " + std::to_string(s.copy_index) + ", \"offset\": " + std::to_string(s.offset) +
            ", \"bytes\": " + std::to_string(s.bytes) + "}";
  }
  time().schedule_text = text + "]";
  return time().schedule_text.c_str();
}
