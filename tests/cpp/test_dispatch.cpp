// The queue on a device that is a model of one: streams whose work happens in order, at any time, when somebody looks.
#include <atomic>
#include <deque>
#include <mutex>
#include <set>
#include <thread>

#include "harness.h"
#include "transfer/queue.h"

namespace {

using namespace kvkernels;
using namespace kvkernels::testing;
using namespace kvkernels::transfer;

constexpr int64_t kNumbers = 64;

// What a stream is asked for: to write a name into numbers, after points of other streams.
struct Task {
  std::vector<int64_t> after;
  std::function<void()> act;
};

class Device {
 public:
  explicit Device(uint64_t seed) : random_(seed) {}

  int64_t ask(int64_t stream, Task task) {
    const std::lock_guard lock(mutex_);
    streams_[stream].emplace_back(++last_, std::move(task));
    ++in_flight_;
    return last_;
  }

  // Lets something happen, or not.
  bool has_passed(int64_t task) {
    const std::lock_guard lock(mutex_);
    for (int64_t steps = random_.in(0, 3); steps > 0; --steps) step();
    if (breaks_ && random_.once_in(8)) throw std::runtime_error("the device said an error");
    return passed_.count(task) > 0;
  }

  void break_now_and_then() { breaks_ = true; }
  int64_t in_flight() {
    const std::lock_guard lock(mutex_);
    return in_flight_;
  }

 private:
  void step() {
    std::vector<std::deque<std::pair<int64_t, Task>>*> ready;
    for (auto& [stream, tasks] : streams_) {
      if (tasks.empty()) continue;
      const auto& after = tasks.front().second.after;
      if (std::all_of(after.begin(), after.end(), [&](int64_t id) { return passed_.count(id) > 0; })) {
        ready.push_back(&tasks);
      }
    }
    if (ready.empty()) return;
    auto& tasks = *ready[static_cast<size_t>(random_.in(0, std::ssize(ready) - 1))];
    tasks.front().second.act();
    passed_.insert(tasks.front().first);
    tasks.pop_front();
    --in_flight_;
  }

  std::mutex mutex_;
  Random random_;
  std::map<int64_t, std::deque<std::pair<int64_t, Task>>> streams_;
  std::set<int64_t> passed_;
  int64_t last_ = 0;
  int64_t in_flight_ = 0;
  bool breaks_ = false;
};

class Point : public Mark {
 public:
  Point(Device& device, int64_t stream, int64_t task) : task(task), device_(device), stream_(stream) {}
  int64_t stream() const override { return stream_; }
  bool has_passed() override { return device_.has_passed(task); }
  void hold(void*) override {}
  void tell(Times&) noexcept override {}

  const int64_t task;

 private:
  Device& device_;
  const int64_t stream_;
};

struct World {
  std::vector<int64_t> numbers = std::vector<int64_t>(kNumbers);
  std::shared_ptr<const BoundCopy> copy;
  Device device;

  explicit World(uint64_t seed) : device(seed) {
    BoundCopy made;
    auto* base = reinterpret_cast<std::byte*>(numbers.data());
    made.src = made.dst = {{base, kNumbers, 8, 8}};
    made.runs = {Run{}};
    copy = std::make_shared<BoundCopy>(std::move(made));
  }
};

constexpr int64_t kChunks = 3;

// Writes the sum of what it reads and its name, number by number, so that any other order shows.
class Naming : public DevicePayload {
 public:
  Naming(World& world, Random& random, int64_t name, Direction direction)
      : world_(world), name_(name), direction_(direction) {
    segments = {{random.in(0, kNumbers / 2 - 9), random.in(kNumbers / 2, kNumbers - 9), random.in(1, 9)}};
    if (random.once_in(2)) std::swap(segments[0].src, segments[0].dst);
    fails_check_ = random.once_in(30);
    fails_at_ = random.once_in(30) ? random.in(0, kChunks - 1) : -1;
  }

  void check() override {
    if (fails_check_) throw std::invalid_argument("it was to fail");
  }

  Handed hand_over(int64_t chunk, Priority urgency, const Marks& after) noexcept override {
    Handed handed;
    if (chunk == fails_at_) {
      handed.kind = Kind::kRuntimeError;
      handed.error = "a call failed";
      return handed;
    }
    Task task;
    for (const auto& mark : after) task.after.push_back(static_cast<Point&>(*mark).task);
    task.act = [this, chunk] {
      for (int64_t i = chunk; i < segments[0].count; i += kChunks) {
        auto& numbers = world_.numbers;
        numbers[static_cast<size_t>(segments[0].dst + i)] = numbers[static_cast<size_t>(segments[0].src + i)] + name_;
      }
    };
    const int64_t stream = static_cast<int64_t>(direction_) * 4 + static_cast<int64_t>(urgency);
    handed.mark = std::make_shared<Point>(world_.device, stream, world_.device.ask(stream, std::move(task)));
    handed.has_moved = true;
    return handed;
  }

  std::vector<Segment> segments;

 private:
  World& world_;
  const int64_t name_;
  const Direction direction_;
  bool fails_check_ = false;
  int64_t fails_at_ = -1;
};

struct Sent {
  int64_t name;
  Segment segment;
};

std::shared_ptr<Item> item_of(World& world, Random& random, int64_t name, Sent& sent) {
  const auto direction = static_cast<Direction>(random.in(1, 3));
  auto payload = std::make_unique<Naming>(world, random, name, direction);
  sent = {name, payload->segments[0]};
  auto item = std::make_shared<Item>();
  item->priority = static_cast<Priority>(random.in(0, 2));
  item->direction = direction;
  item->executor = Executor::kDma;
  item->chunks = item->chunks_left = kChunks;
  for (const bool is_written : {false, true}) {
    item->accesses.push_back(Access{world.copy, &payload->segments, is_written});
  }
  item->payload = std::move(payload);
  return item;
}

void transfers_of_threads_end_as_in_order_of_submission() {
  constexpr int kThreads = 4;
  constexpr int kEach = 150;
  for (uint64_t round = 0; round < 3; ++round) {
    World world(round);
    std::vector<int64_t> expected(world.numbers.size());
    std::map<int64_t, Sent> by_ticket;
    std::mutex mutex;
    Queue queue(0);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        Random random(100 * round + static_cast<uint64_t>(thread));
        int64_t last = 0;
        for (int i = 0; i < kEach; ++i) {
          Sent sent;
          auto item = item_of(world, random, 1 + thread * kEach + i, sent);
          std::vector<int64_t> after;
          if (last > 0 && random.once_in(4)) after = {last};
          const int64_t ticket = last = queue.submit(std::move(item), after);
          {
            const std::lock_guard lock(mutex);
            by_ticket.emplace(ticket, sent);
          }
          if (random.once_in(15)) queue.cancel(ticket);
          if (random.once_in(10)) queue.wait(ticket, 1'000'000'000);
          if (random.once_in(20)) queue.poll(10);
          Marks marks;
          if (random.once_in(10)) expect(queue.handed_over(ticket, 20'000'000'000, marks), "it is handed over");
          if (random.once_in(30)) {
            queue.hold(true);
            queue.stats();
            queue.hold(false);
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    queue.close(true);
    expect(world.device.in_flight() == 0, "nothing is on its way");
    std::map<State, int> ended;
    std::set<int64_t> undefined;  // numbers that a transfer was to write and failed over, until the next writes them
    for (const auto& [ticket, one] : by_ticket) {
      const Report report = queue.report(ticket);
      const auto state = static_cast<State>(report.state);
      ++ended[state];
      if (report.kind == static_cast<int64_t>(Kind::kDependency)) {
        const int64_t cause = std::stoll(queue.error(ticket).substr(std::string("transfer ").size()));
        expect(queue.report(cause).state > static_cast<int64_t>(State::kDone), "it names one that was not done");
      }
      for (int64_t i = 0; i < one.segment.count; ++i) {
        const int64_t src = one.segment.src + i;
        const int64_t dst = one.segment.dst + i;
        if (state == State::kDone) {
          expected[static_cast<size_t>(dst)] = expected[static_cast<size_t>(src)] + one.name;
          undefined.erase(dst);
          if (undefined.count(src) > 0) undefined.insert(dst);
        } else if (report.undefined != 0) {
          undefined.insert(dst);
        }
      }
    }
    for (int64_t i = 0; i < kNumbers; ++i) {
      const auto at = static_cast<size_t>(i);
      expect(undefined.count(i) > 0 || world.numbers[at] == expected[at], "each number is what the model says");
    }
    expect(ended.size() == 3 && ended.count(State::kRunning) == 0, "some were done, some failed, some were cancelled");
  }
}

void a_queue_that_is_closed_ends_everything() {
  for (uint64_t round = 0; round < 40; ++round) {
    World world(round);
    if (round % 4 == 3) world.device.break_now_and_then();
    Queue queue(0);
    std::atomic<int64_t> last{0};
    std::thread submits([&] {
      Random random(round);
      try {
        for (int64_t name = 1;; ++name) {
          Sent sent;
          last = queue.submit(item_of(world, random, name, sent), {});
        }
      } catch (const std::runtime_error&) {
      }
    });
    while (last < 20) std::this_thread::yield();
    queue.close(round % 2 == 0);
    submits.join();
    for (int64_t ticket = 1; ticket <= last; ++ticket) {
      const Report report = queue.report(ticket);
      expect(report.state >= static_cast<int64_t>(State::kDone), "each has ended");
      expect(report.state != static_cast<int64_t>(State::kDone) || report.undefined == 0,
             "and is whole where it is done");
    }
  }
}

const Tests kTests{
    {"transfers_of_threads_end_as_in_order_of_submission", transfers_of_threads_end_as_in_order_of_submission},
    {"a_queue_that_is_closed_ends_everything", a_queue_that_is_closed_ends_everything},
};

}  // namespace

int main(int argc, char** argv) { return run_tests(kTests, argc > 1 ? argv[1] : "--list"); }
