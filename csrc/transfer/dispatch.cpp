// The queue's thread for a device: it hands chunks to streams, most urgent first, and looks at what has ended.
//
//   ready, by direction ─▶ [ 2 chunks of a direction at most ] ─▶ streams ─▶ marks behind chunks ─▶ ended
//
// Whoever waits for a transfer is released once that one was handed over whole, and is ordered behind its marks.
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "core/text.h"
#include "transfer/queue.h"

namespace kvkernels::transfer {
namespace {

// Between looks at what is on its way: it doubles while nothing happens, so that a long wait for the engine's own work
// costs little, and a short copy is seen soon.
constexpr std::chrono::microseconds kLeastPause{20};
constexpr std::chrono::microseconds kMostPause{500};

// One error of a mark may be that of the call which asked; two in a row are the device's, and nothing is on its way.
constexpr int kErrorsOfDevice = 2;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

size_t index_of(Priority urgency) { return static_cast<size_t>(urgency) + 1; }

// In the place of an earlier mark of the same stream, which it stands for.
void add_mark(Marks& marks, const std::shared_ptr<Mark>& mark) {
  for (std::shared_ptr<Mark>& known : marks) {
    if (known->stream() != mark->stream()) continue;
    known = mark;
    return;
  }
  marks.push_back(mark);
}

}  // namespace

void Queue::dispatch() {
  pthread_setname_np(pthread_self(), "kvk-device");
  auto pause = kLeastPause;
  std::unique_lock lock(mutex_);
  while (!stops_) {
    const bool has_ended = look_at_flights(lock);
    const bool has_begun = hand_over_next(lock);
    tell(lock);
    if (has_ended || has_begun) {
      pause = kLeastPause;
    } else if (flights_.empty()) {
      // Whoever changed something while the lock was not held has been seen by the last look at what is ready.
      if (!stops_ && (holds_ > 0 || next_to_hand_over() == nullptr)) urgent_cv_.wait(lock);
      pause = kLeastPause;
    } else if (urgent_cv_.wait_for(lock, pause) == std::cv_status::timeout) {
      pause = std::min(2 * pause, kMostPause);
    }
  }
}

// What a stream waits for is handed over whole; of all else only what keeps the direction busy.
bool Queue::has_room(const Item& item) const {
  if (item.urgency == Priority::kAwaited) return true;
  const auto& counts = in_flight_[static_cast<size_t>(item.direction)];
  int64_t in_front = 0;
  for (size_t i = 0; i <= index_of(item.urgency); ++i) in_front += counts[i];
  return in_front < kMostInFlight;
}

// The most urgent one whose direction has room: where there is none for the first of a direction, there is none for
// those after it.
Item* Queue::next_to_hand_over() const {
  Item* found = nullptr;
  for (const Ready& ready : ready_) {
    if (ready.empty() || !has_room(**ready.begin())) continue;
    if (found == nullptr || ByUrgency()(*ready.begin(), found)) found = *ready.begin();
  }
  return found;
}

bool Queue::hand_over_next(std::unique_lock<std::mutex>& lock) {
  Item* const next = holds_ > 0 ? nullptr : next_to_hand_over();
  if (next == nullptr) return false;
  hand_over(unfinished_.at(next->ticket), lock);
  return true;
}

void Queue::hand_over(const std::shared_ptr<Item>& item, std::unique_lock<std::mutex>& lock) {
  const int64_t chunk = item->next_chunk++;
  const bool is_first = item->state == State::kQueued;
  item->state = State::kRunning;
  if (item->next_chunk == item->chunks) ready_of(*item).erase(item.get());
  const Priority urgency = item->urgency;
  const Marks after = item->after;
  auto& payload = static_cast<DevicePayload&>(*item->payload);
  lock.unlock();
  Times times{now_ns(), 0};
  Handed handed;
  try {
    if (is_first) payload.check();
    handed = payload.hand_over(chunk, urgency, after);
  } catch (const std::logic_error& caught) {
    handed.kind = Kind::kValueError;
    handed.error = caught.what();
  } catch (const std::exception& caught) {
    handed.kind = Kind::kRuntimeError;
    handed.error = caught.what();
  }
  lock.lock();
  item->has_moved = item->has_moved || handed.has_moved;
  if (handed.kind != Kind::kNone) {
    item->kind = handed.kind;
    item->error = std::move(handed.error);
    // The rest never begins.
    item->chunks_left -= item->chunks - item->next_chunk;
    item->next_chunk = item->chunks;
    ready_of(*item).erase(item.get());
  }
  if (handed.mark != nullptr) add_mark(item->marks, handed.mark);
  ++in_flight_[static_cast<size_t>(item->direction)][index_of(urgency)];
  times.end_ns = now_ns();
  const bool is_nowhere = handed.mark == nullptr;
  flights_.push_back({item, std::move(handed.mark), chunk, urgency, times, is_nowhere});
  if (item->next_chunk == item->chunks && item->kind == Kind::kNone && !item->is_aborted) release_followers(*item);
}

// All of it is with the device: what comes after it is ordered there.
void Queue::release_followers(Item& item) {
  item.is_handed_over = true;
  const std::shared_ptr<Item> self = unfinished_.at(item.ticket);
  for (const Follower& follower : std::exchange(item.followers, {})) {
    Item& next = *follower.item;
    if (next.has_ended()) continue;
    next.leans_on.push_back({self, follower.fails_with_it});
    for (const std::shared_ptr<Mark>& mark : item.marks) add_mark(next.after, mark);
    if (--next.waits_for == 0) ready_of(next).insert(&next);
  }
  if (item.waiters > 0) to_be_told_.push_back(self);
}

void Queue::add_to_time(Item& item, const Times& times) {
  // The device's clock is known to a microsecond or so.
  const int64_t begin_ns = std::max(times.begin_ns, item.submitted_ns);
  item.started_ns = item.started_ns == 0 ? begin_ns : std::min(item.started_ns, begin_ns);
  item.ended_ns = std::max(item.ended_ns, times.end_ns);
}

// No chunk of it is on its way, nor will be.
void Queue::end_on_device(const std::shared_ptr<Item>& item) {
  const bool was_cut_short = item->is_aborted;
  item->is_aborted = item->has_moved && (was_cut_short || item->kind != Kind::kNone);
  if (item->kind != Kind::kNone) return end(item, State::kFailed, item->kind, item->error);
  if (was_cut_short) {
    return end(item, State::kCancelled, Kind::kCancelled,
               "it was cancelled while it was carried out: the mover was closed");
  }
  // It was released before those in front of it had ended, of which one failed after all.
  for (const Follower& before : std::exchange(item->leans_on, {})) {
    if (!before.fails_with_it || before.item->state == State::kDone) continue;
    item->is_aborted = item->has_moved;
    return end(item, State::kFailed, Kind::kDependency, cause_text(*before.item));
  }
  end(item, State::kDone);
}

// Whether one of them has ended.
bool Queue::look_at_flights(std::unique_lock<std::mutex>& lock) {
  if (flights_.empty()) return false;
  lock.unlock();
  std::vector<int64_t> busy;  // streams
  for (Flight& flight : flights_) {
    if (flight.has_passed) continue;
    const int64_t stream = flight.mark->stream();
    if (std::find(busy.begin(), busy.end(), stream) != busy.end()) continue;
    try {
      flight.has_passed = flight.mark->has_passed();
      flight.errors = 0;
    } catch (const std::exception& caught) {
      if (flight.error.empty()) flight.error = caught.what();
      flight.has_passed = ++flight.errors == kErrorsOfDevice;
    }
    if (!flight.has_passed) {
      busy.push_back(stream);
      continue;
    }
    flight.times.end_ns = now_ns();
    if (flight.error.empty()) flight.mark->tell(flight.times);
  }
  lock.lock();
  bool has_ended = false;
  for (Flight& flight : flights_) has_ended = (flight.has_passed && settle(flight)) || has_ended;
  std::list<Flight> settled;  // freed without the lock
  for (auto at = flights_.begin(); at != flights_.end();) {
    const auto here = at++;
    if (here->is_settled) settled.splice(settled.end(), flights_, here);
  }
  lock.unlock();
  settled.clear();
  lock.lock();
  return has_ended;
}

// Its chunk has ended; false while its transfer's end must wait for that of one before it.
bool Queue::settle(Flight& flight) {
  Item& item = *flight.item;
  const bool is_last = item.chunks_left == 1;
  if (is_last && std::any_of(item.leans_on.begin(), item.leans_on.end(),
                             [](const Follower& before) { return !before.item->has_ended(); })) {
    return false;
  }
  flight.is_settled = true;
  --in_flight_[static_cast<size_t>(item.direction)][index_of(flight.urgency)];
  if (flight.mark != nullptr) {
    trace_.add({item.ticket, static_cast<int64_t>(item.priority), item.bytes, item.submitted_ns, flight.chunk,
                flight.mark->stream(), flight.times.begin_ns, flight.times.end_ns});
  }
  add_to_time(item, flight.times);
  if (!flight.error.empty() && item.kind == Kind::kNone) {
    item.kind = Kind::kRuntimeError;
    item.error = flight.error;
    item.chunks_left -= item.chunks - item.next_chunk;
    item.next_chunk = item.chunks;
    ready_of(item).erase(&item);
  }
  if (--item.chunks_left == 0) end_on_device(flight.item);
  return true;
}

bool Queue::handed_over(int64_t ticket, int64_t timeout_ns, Marks& marks) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Item> item = known(ticket);
  const auto is_there = [&] { return item->has_ended() || item->is_handed_over; };
  hurry(item, Priority::kAwaited);
  wake();
  ++item->waiters;
  if (timeout_ns > 0) item->has_ended_cv.wait_for(lock, std::chrono::nanoseconds(timeout_ns), is_there);
  --item->waiters;
  marks = item->marks;
  return is_there();
}

}  // namespace kvkernels::transfer
