#include "transfer/queue.h"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "core/text.h"

namespace kvkernels::transfer {
namespace {

constexpr int kStoreNice = 10;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

bool is_urgent(const Item& item) { return item.urgency != Priority::kStore; }

}  // namespace

std::string Queue::cause_text(const Item& before) {
  const char* const became = before.state == State::kCancelled ? " was cancelled" : " failed";
  const std::string why = before.kind == Kind::kDependency || before.error.empty() ? "" : text(": ", before.error);
  return text("transfer ", before.ticket, ", which this one needs,", became, why);
}

Queue::Queue(int lanes) : lanes_(lanes) {
  if (!is_on_device()) {
    for (const Priority priority : {Priority::kExpedited, Priority::kLoad, Priority::kStore}) {
      counters_[{Direction::kHostToHost, priority, Executor::kCpu}] = {};
    }
  }
  // Signals are for the program's own threads, but for those that a thread's own fault raises.
  sigset_t others;
  sigset_t before;
  sigfillset(&others);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&others, fault);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  std::string error;
  const int threads = is_on_device() ? 1 : 2 * lanes;
  try {
    for (int thread = 0; thread < threads; ++thread) {
      threads_.emplace_back([this, thread, lanes] { is_on_device() ? dispatch() : work(thread < lanes, thread); });
    }
  } catch (const std::system_error& caught) {
    error = caught.what();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error.empty()) return;
  close(false);
  throw std::runtime_error(text(threads, " threads must be startable, got ", error));
}

Queue::~Queue() { close(false); }

std::shared_ptr<Item> Queue::known(int64_t ticket) {
  const auto found = items_.find(ticket);
  if (found == items_.end()) throw std::invalid_argument(text("ticket must be a transfer's, got ", ticket));
  return found->second;
}

// The earlier ones that touch what this one does. What has ended meanwhile is no conflict any more.
std::vector<Queue::Before> Queue::conflicts_of(Item& item) {
  std::vector<std::shared_ptr<Item>> earlier;
  {
    const std::lock_guard lock(mutex_);
    earlier.reserve(unfinished_.size());
    for (const auto& [ticket, other] : unfinished_) earlier.push_back(other);
  }
  std::vector<Before> found;
  for (const std::shared_ptr<Item>& other : earlier) {
    bool meets = false;
    bool reads_its = false;
    for (Access& mine : item.accesses) {
      for (Access& its : other->accesses) {
        if ((!mine.is_written && !its.is_written) || (meets && (mine.is_written || reads_its))) continue;
        if (mine.footprint->begin >= its.footprint->end || its.footprint->begin >= mine.footprint->end) continue;
        for (const Meeting& meeting : footprints_.meetings(*mine.footprint, *its.footprint)) {
          if (!share_pages(meeting, mine.block_set(), its.block_set())) continue;
          meets = true;
          reads_its |= !mine.is_written;
          break;
        }
      }
    }
    if (meets) found.push_back({other, reads_its});
  }
  return found;
}

void Queue::follow(const std::shared_ptr<Item>& item, const std::shared_ptr<Item>& before, bool fails_with_it) {
  if (before->is_handed_over) {
    item->leans_on.push_back({before, fails_with_it});
    item->after.insert(item->after.end(), before->marks.begin(), before->marks.end());
    return;
  }
  before->followers.push_back({item, fails_with_it});
  item->before.push_back(before);
  ++item->waits_for;
  hurry(before, item->urgency);
}

// False where it cannot any more, because the other has failed it.
bool Queue::come_after(const std::shared_ptr<Item>& item, const std::shared_ptr<Item>& before, bool fails_with_it) {
  if (!before->has_ended()) {
    follow(item, before, fails_with_it);
  } else if (fails_with_it && before->state != State::kDone) {
    end(item, State::kFailed, Kind::kDependency, cause_text(*before));
  }
  return !item->has_ended();
}

// A transfer, and all that it waits for, becomes as urgent as one that waits for it.
void Queue::hurry(const std::shared_ptr<Item>& item, Priority urgency) {
  std::vector<std::shared_ptr<Item>> left{item};
  while (!left.empty()) {
    const std::shared_ptr<Item> here = std::move(left.back());
    left.pop_back();
    if (here->has_ended() || here->urgency <= urgency) continue;
    Ready& ready = ready_of(*here);
    const bool was_ready = ready.erase(here.get()) > 0;
    here->urgency = urgency;
    if (was_ready) ready.insert(here.get());
    for (const std::weak_ptr<Item>& before : here->before) {
      if (auto one = before.lock()) left.push_back(std::move(one));
    }
  }
}

int64_t Queue::submit(std::shared_ptr<Item> item, const std::vector<int64_t>& after) {
  const std::lock_guard submitting(submit_mutex_);
  for (Access& access : item->accesses) access.footprint = footprints_.find(access.copy, access.is_written);
  const std::vector<Before> conflicts = conflicts_of(*item);
  std::unique_lock lock(mutex_);
  if (is_closed_) throw std::runtime_error("the mover must be open, got a closed one");
  std::vector<std::shared_ptr<Item>> named;
  for (const int64_t ticket : after) named.push_back(known(ticket));
  item->ticket = ++last_ticket_;
  item->urgency = item->priority;
  item->submitted_ns = now_ns();
  items_.emplace(item->ticket, item);
  unfinished_.emplace(item->ticket, item);
  bool goes_on = true;
  for (const Before& conflict : conflicts) {
    goes_on = goes_on && come_after(item, conflict.item, conflict.fails_with_it);
  }
  for (const std::shared_ptr<Item>& before : named) goes_on = goes_on && come_after(item, before, true);
  if (goes_on && item->waits_for == 0) ready_of(*item).insert(item.get());
  std::condition_variable* const free_thread = next_thread();
  lock.unlock();
  if (free_thread != nullptr) free_thread->notify_one();
  return item->ticket;
}

// With those that fail because it did.
void Queue::end(const std::shared_ptr<Item>& item, State state, Kind kind, std::string error) {
  struct Ending {
    std::shared_ptr<Item> item;
    State state;
    Kind kind;
    std::string error;
  };
  std::vector<Ending> left;
  left.push_back({item, state, kind, std::move(error)});
  while (!left.empty()) {
    const Ending ending = std::move(left.back());
    left.pop_back();
    Item& here = *ending.item;
    if (here.has_ended()) continue;
    here.state = ending.state;
    here.kind = ending.kind;
    here.error = ending.error;
    if (here.ended_ns == 0) here.ended_ns = now_ns();
    here.end_order = ++ended_;
    ready_of(here).erase(&here);
    unfinished_.erase(here.ticket);
    untold_.emplace(here.end_order, here.ticket);
    ended_payloads_.push_back(std::move(here.payload));
    here.marks.clear();
    here.after.clear();
    here.leans_on.clear();
    Counters& counters = counters_[{here.direction, here.priority, here.executor}];
    if (here.state == State::kDone) {
      counters.add_done(here.bytes, here.ended_ns - here.started_ns, here.started_ns - here.submitted_ns, here.chunks);
    } else {
      ++(here.state == State::kFailed ? counters.failed : counters.cancelled);
    }
    for (const Follower& follower : std::exchange(here.followers, {})) {
      Item& next = *follower.item;
      if (next.has_ended()) continue;
      if (follower.fails_with_it && here.state != State::kDone) {
        left.push_back({follower.item, State::kFailed, Kind::kDependency, cause_text(here)});
      } else if (--next.waits_for == 0) {
        ready_of(next).insert(&next);
      }
    }
    if (here.waiters > 0) to_be_told_.push_back(ending.item);
  }
  if (unfinished_.empty()) all_ended_cv_.notify_all();
  wake();
}

// Without the lock, which whoever wakes up takes first.
void Queue::tell(std::unique_lock<std::mutex>& lock) {
  if (to_be_told_.empty()) return;
  const std::vector<std::shared_ptr<Item>> items = std::exchange(to_be_told_, {});
  lock.unlock();
  for (const std::shared_ptr<Item>& item : items) item->has_ended_cv.notify_all();
  lock.lock();
}

bool Queue::cancel(int64_t ticket) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Item> item = known(ticket);
  if (item->state != State::kQueued) return false;
  end(item, State::kCancelled, Kind::kCancelled, "it was cancelled before it began");
  tell(lock);
  return true;
}

bool Queue::wait(int64_t ticket, int64_t timeout_ns) {
  {
    std::unique_lock lock(mutex_);
    const std::shared_ptr<Item> item = known(ticket);
    ++item->waiters;
    if (timeout_ns > 0) {
      item->has_ended_cv.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [&] { return item->has_ended(); });
    }
    --item->waiters;
    if (!item->has_ended()) return false;
    untold_.erase(item->end_order);
  }
  free_ended();
  return true;
}

Report Queue::report(int64_t ticket) {
  const std::lock_guard lock(mutex_);
  const Item& item = *known(ticket);
  return {static_cast<int64_t>(item.state),
          static_cast<int64_t>(item.kind),
          item.bytes,
          item.chunks,
          item.submitted_ns,
          item.started_ns,
          item.ended_ns,
          item.is_aborted ? 1 : 0,
          static_cast<int64_t>(item.executor)};
}

std::string Queue::error(int64_t ticket) {
  const std::lock_guard lock(mutex_);
  return known(ticket)->error;
}

std::vector<int64_t> Queue::poll(size_t most) {
  std::vector<int64_t> tickets;
  {
    const std::lock_guard lock(mutex_);
    while (!untold_.empty() && tickets.size() < most) {
      tickets.push_back(untold_.begin()->second);
      untold_.erase(untold_.begin());
    }
  }
  free_ended();
  return tickets;
}

// Under the lock of those who compare, so that nobody still looks at a payload's ids.
void Queue::free_ended() {
  std::vector<std::unique_ptr<Payload>> payloads;
  const std::lock_guard submitting(submit_mutex_);
  const std::lock_guard lock(mutex_);
  payloads.swap(ended_payloads_);
}

std::vector<int64_t> Queue::touching(const std::vector<Range>& ranges) {
  std::vector<int64_t> tickets;
  const std::lock_guard lock(mutex_);
  for (const auto& [ticket, item] : unfinished_) {
    const bool touches = std::any_of(item->accesses.begin(), item->accesses.end(), [&](const Access& access) {
      return std::any_of(ranges.begin(), ranges.end(),
                         [&](const Range& range) { return access.footprint->meets(range.begin, range.end); });
    });
    if (touches) tickets.push_back(ticket);
  }
  return tickets;
}

void Queue::hold(bool holds) {
  const std::lock_guard lock(mutex_);
  holds_ += holds ? 1 : -1;
  wake();
}

void Queue::close(bool finishes) {
  {
    std::unique_lock lock(mutex_);
    is_closed_ = true;
    holds_ = 0;
    if (!finishes) {
      std::vector<std::shared_ptr<Item>> unfinished;
      for (const auto& [ticket, item] : unfinished_) unfinished.push_back(item);
      for (const std::shared_ptr<Item>& item : unfinished) {
        if (item->state == State::kQueued) {
          end(item, State::kCancelled, Kind::kCancelled, "it was cancelled before it began: the mover was closed");
        } else if (item->state == State::kRunning && item->next_chunk < item->chunks) {
          item->is_aborted = true;
          item->chunks_left -= item->chunks - item->next_chunk;
          item->next_chunk = item->chunks;
          ready_of(*item).erase(item.get());
          if (item->chunks_left == 0) {
            end(item, State::kCancelled, Kind::kCancelled,
                "it was cancelled while it was carried out: the mover was closed");
          }
        }
      }
    }
    wake();
    tell(lock);
    all_ended_cv_.wait(lock, [&] { return unfinished_.empty(); });
    stops_ = true;
    urgent_cv_.notify_all();
    store_cv_.notify_all();
  }
  {
    const std::lock_guard joining(join_mutex_);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  free_ended();
}

void Queue::forget(int64_t ticket) {
  const std::lock_guard lock(mutex_);
  const auto found = items_.find(ticket);
  if (found == items_.end()) return;
  untold_.erase(found->second->end_order);
  items_.erase(found);
}

std::vector<int64_t> Queue::stats() {
  const std::lock_guard lock(mutex_);
  int64_t running = 0;
  for (const auto& [ticket, item] : unfinished_) running += item->state == State::kRunning ? 1 : 0;
  std::vector<int64_t> numbers{static_cast<int64_t>(unfinished_.size()) - running, running};
  for (const auto& [row, counters] : counters_) {
    numbers.insert(numbers.end(), {static_cast<int64_t>(row.direction), static_cast<int64_t>(row.priority),
                                   static_cast<int64_t>(row.executor)});
    const auto* const first = reinterpret_cast<const int64_t*>(&counters);
    numbers.insert(numbers.end(), first, first + sizeof(Counters) / sizeof(int64_t));
  }
  return numbers;
}

std::vector<Trace> Queue::trace() {
  const std::lock_guard lock(mutex_);
  return trace_.list();
}

// Where somebody sleeps for the next chunk, if it may be copied now. Whoever takes it wakes the next.
std::condition_variable* Queue::next_thread() {
  if (is_on_device()) return holds_ == 0 && next_to_hand_over() != nullptr ? &urgent_cv_ : nullptr;
  const Ready& ready = ready_.front();
  if (running_ >= lanes_ || holds_ > 0 || ready.empty()) return nullptr;
  return is_urgent(**ready.begin()) ? &urgent_cv_ : &store_cv_;
}

void Queue::wake() {
  if (std::condition_variable* const free_thread = next_thread()) free_thread->notify_one();
}

// What a thread is to copy a chunk of, or null. A store waits while something urgent is ready.
std::shared_ptr<Item> Queue::take(bool urgent) {
  const Ready& ready = ready_.front();
  if (running_ >= lanes_ || holds_ > 0 || ready.empty()) return nullptr;
  Item& first = **ready.begin();
  if (is_urgent(first) != urgent) return nullptr;
  return unfinished_.at(first.ticket);
}

void Queue::run_chunk(const std::shared_ptr<Item>& item, int thread, std::unique_lock<std::mutex>& lock) {
  const int64_t chunk = item->next_chunk++;
  const bool is_first = item->state == State::kQueued;
  const int64_t begin_ns = now_ns();
  if (is_first) {
    item->state = State::kRunning;
    item->started_ns = begin_ns;
  }
  // Until it was checked nobody else has a part of it.
  if (is_first || item->next_chunk == item->chunks) ready_of(*item).erase(item.get());
  ++running_;
  wake();
  auto& payload = static_cast<HostPayload&>(*item->payload);
  if (is_first) {
    lock.unlock();
    Kind kind = Kind::kNone;
    std::string error;
    try {
      payload.check();
    } catch (const std::logic_error& caught) {
      kind = Kind::kValueError;
      error = caught.what();
    } catch (const std::exception& caught) {
      kind = Kind::kRuntimeError;
      error = caught.what();
    }
    lock.lock();
    if (kind != Kind::kNone) {
      --running_;
      item->is_aborted = false;  // nothing was copied
      end(item, State::kFailed, kind, std::move(error));
      return;
    }
    if (item->next_chunk < item->chunks) {
      ready_of(*item).insert(item.get());
      wake();
    }
  }
  lock.unlock();
  payload.copy(chunk);
  const int64_t end_ns = now_ns();
  lock.lock();
  --running_;
  trace_.add({item->ticket, static_cast<int64_t>(item->priority), item->bytes, item->submitted_ns, chunk, thread,
              begin_ns, end_ns});
  if (--item->chunks_left > 0) return;
  if (item->is_aborted) {
    end(item, State::kCancelled, Kind::kCancelled, "it was cancelled while it was carried out: the mover was closed");
  } else {
    payload.finish();
    end(item, State::kDone);
  }
}

void Queue::work(bool urgent, int thread) {
  pthread_setname_np(pthread_self(), urgent ? "kvk-urgent" : "kvk-store");
  if (!urgent) setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kStoreNice);
  std::unique_lock lock(mutex_);
  while (!stops_) {
    if (const std::shared_ptr<Item> item = take(urgent)) {
      run_chunk(item, thread, lock);
      tell(lock);
      continue;
    }
    wake();  // whoever may take what is there
    (urgent ? urgent_cv_ : store_cv_).wait(lock);
  }
}

}  // namespace kvkernels::transfer
