// Transfers in order of urgency, carried out chunk by chunk by threads of the queue's own.
//
//   submit ─▶ [ waits for others ] ─▶ ready, by urgency and age ─┬─▶ threads for what is urgent  ─┐ at most `lanes` of
//                                                                └─▶ threads for stores, niced   ─┘ them at a time
//
// Urgent threads and those for stores are apart because a thread that has lowered its priority may not raise it again.
//
// On a device one thread hands chunks to streams and looks at what has ended (dispatch.cpp).
#pragma once

#include <array>
#include <condition_variable>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <vector>

#include "transfer/item.h"
#include "transfer/metrics.h"

namespace kvkernels::transfer {

// What is known of a transfer, as Python reads it.
struct Report {
  int64_t state;
  int64_t kind;
  int64_t bytes;
  int64_t chunks;
  int64_t submitted_ns;
  int64_t started_ns;
  int64_t ended_ns;
  int64_t undefined;  // whether a part was copied and the rest was not
  int64_t executor;
};

struct Range {
  uintptr_t begin;
  uintptr_t end;
};

class Queue {
 public:
  // With `lanes` threads of each kind; with none for a device, whose transfers have a DevicePayload.
  explicit Queue(int lanes);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  // The ticket of a transfer that comes after those named, and after earlier ones that touch what it does. Throws
  // std::runtime_error where the queue is closed, and std::invalid_argument for an unknown ticket.
  int64_t submit(std::shared_ptr<Item> item, const std::vector<int64_t>& after);

  // Whether it has not begun and now never will.
  bool cancel(int64_t ticket);

  // Whether it has ended, which is waited for at most so long.
  bool wait(int64_t ticket, int64_t timeout_ns);

  // Whether everything that was asked of the device for it was, which is waited for at most so long; it is handed over
  // before all others then, and whole. `marks` are those that are behind it, none where it has ended.
  bool handed_over(int64_t ticket, int64_t timeout_ns, Marks& marks);

  Report report(int64_t ticket);
  std::string error(int64_t ticket);

  // At most so many that ended and were neither waited for nor told of before.
  std::vector<int64_t> poll(size_t most);

  // The unfinished ones with a pool in one of the ranges.
  std::vector<int64_t> touching(const std::vector<Range>& ranges);

  // While it is held, nothing begins and no further chunk is copied.
  void hold(bool holds);

  // What was submitted is carried out or else cancelled, and the threads end. Nothing can be submitted afterwards.
  void close(bool finishes);

  // Nobody will ask about it again.
  void forget(int64_t ticket);

  // Queued, running, then for each direction, priority and executor that occurred: these, and a Counters.
  std::vector<int64_t> stats();
  std::vector<Trace> trace();

 private:
  struct ByUrgency {
    bool operator()(const Item* a, const Item* b) const {
      return a->urgency != b->urgency ? a->urgency < b->urgency : a->ticket < b->ticket;
    }
  };
  struct Before {
    std::shared_ptr<Item> item;
    bool fails_with_it;
  };
  using Ready = std::set<Item*, ByUrgency>;

  // A chunk on its way.
  struct Flight {
    std::shared_ptr<Item> item;
    std::shared_ptr<Mark> mark;  // null where nothing of it is
    int64_t chunk;
    Priority urgency;
    Times times;
    bool has_passed = false;
    bool is_settled = false;
    int errors = 0;  // in a row
    std::string error = "";
  };

  // What a follower's error says of the one before it.
  static std::string cause_text(const Item& before);

  std::vector<Before> conflicts_of(Item& item);
  std::shared_ptr<Item> known(int64_t ticket);
  void follow(const std::shared_ptr<Item>& item, const std::shared_ptr<Item>& before, bool fails_with_it);
  bool come_after(const std::shared_ptr<Item>& item, const std::shared_ptr<Item>& before, bool fails_with_it);
  void hurry(const std::shared_ptr<Item>& item, Priority urgency);
  void end(const std::shared_ptr<Item>& item, State state, Kind kind = Kind::kNone, std::string error = "");
  void free_ended();
  void tell(std::unique_lock<std::mutex>& lock);
  std::condition_variable* next_thread();
  void wake();
  std::shared_ptr<Item> take(bool urgent);
  void run_chunk(const std::shared_ptr<Item>& item, int thread, std::unique_lock<std::mutex>& lock);
  void work(bool urgent, int thread);

  // dispatch.cpp
  void dispatch();
  bool has_room(const Item& item) const;
  Item* next_to_hand_over() const;
  bool hand_over_next(std::unique_lock<std::mutex>& lock);
  void hand_over(const std::shared_ptr<Item>& item, std::unique_lock<std::mutex>& lock);
  void release_followers(Item& item);
  void add_to_time(Item& item, const Times& times);
  void end_on_device(const std::shared_ptr<Item>& item);
  bool look_at_flights(std::unique_lock<std::mutex>& lock);
  bool settle(Flight& flight);

  Ready& ready_of(const Item& item) { return ready_[static_cast<size_t>(item.direction)]; }
  bool is_on_device() const { return lanes_ == 0; }

  const int lanes_;
  std::mutex submit_mutex_;  // of those who compare a new transfer with others; taken before mutex_
  Footprints footprints_;

  std::mutex mutex_;
  std::condition_variable urgent_cv_;
  std::condition_variable store_cv_;
  std::condition_variable all_ended_cv_;
  std::unordered_map<int64_t, std::shared_ptr<Item>> items_;  // until forgotten
  std::map<int64_t, std::shared_ptr<Item>> unfinished_;       // by ticket
  std::array<Ready, 4> ready_;                                // with chunks to be handed out, by direction
  std::map<int64_t, int64_t> untold_;                         // those that ended and nobody was told, in order
  std::vector<std::unique_ptr<Payload>> ended_payloads_;  // freed by a caller's thread: their tensors may run anything
  std::vector<std::shared_ptr<Item>> to_be_told_;         // ended, and somebody waits for it
  int64_t last_ticket_ = 0;
  int64_t ended_ = 0;
  int running_ = 0;
  int holds_ = 0;
  bool is_closed_ = false;
  bool stops_ = false;
  struct Row {
    Direction direction;
    Priority priority;
    Executor executor;
    auto operator<=>(const Row&) const = default;
  };
  std::map<Row, Counters> counters_;
  TraceRing trace_;

  std::list<Flight> flights_;                                        // in order; the dispatcher's alone
  std::array<std::array<int64_t, kPriorities + 1>, 4> in_flight_{};  // by direction and urgency

  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace kvkernels::transfer
