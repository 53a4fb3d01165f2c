#include "ops/mover_device.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include "core/chunks.h"
#include "cuda/mover_streams.h"
#include "ops/cuda_site.h"
#include "ops/executors/room.h"
#include "ops/held.h"
#include "ops/named_errors.h"
#include "ops/path.h"

namespace kvkernels {
namespace {

using transfer::Access;
using transfer::Handed;
using transfer::Item;
using transfer::Kind;
using transfer::Mark;
using transfer::Marks;
using transfer::Priority;
using transfer::Times;

// By device, made at the first use.
class Streams {
 public:
  MoverStreams& of(int device) {
    const std::lock_guard lock(mutex_);
    auto& found = devices_[device];
    if (found == nullptr) found = std::make_unique<MoverStreams>(device);
    return *found;
  }

  void close() {
    const std::lock_guard lock(mutex_);
    devices_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<int, std::unique_ptr<MoverStreams>> devices_;
};

// Behind a chunk, with the event in front of it.
class ChunkMark : public Mark {
 public:
  ChunkMark(const char* op, int64_t stream, MoverStreams& streams, int device)
      : op_(op), stream_(stream), streams_(streams), begin_(device, true), end_(device, true) {}

  void begin(cudaStream_t stream) { begin_.record(stream); }
  void end(cudaStream_t stream) { end_.record(stream); }

  int64_t stream() const override { return stream_; }

  bool has_passed() override {
    try {
      return end_.has_passed();
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(text(op_, ": ", error.what(), "; the destination is undefined"));
    }
  }

  void hold(void* stream) override { end_.hold(static_cast<cudaStream_t>(stream)); }

  void tell(Times& times) noexcept override {
    try {
      times = {streams_.ns_of(begin_), streams_.ns_of(end_)};
    } catch (const std::runtime_error&) {
      // Then they are the host's, and a little wider.
    }
  }

 private:
  const char* const op_;
  const int64_t stream_;
  MoverStreams& streams_;
  DeviceEvent begin_;
  DeviceEvent end_;
};

// One op's copy.
struct Part {
  Job job;
  WorkChunks chunks;
  int64_t first_chunk;

  Part(Job whole, int64_t chunk_bytes, int64_t first)
      : job(std::move(whole)), chunks(job.work, chunk_bytes), first_chunk(first) {
    if (job.work.direction == Direction::kHostToDevice) job.host_tensors = job.held.src->tensors();
    if (job.work.direction == Direction::kDeviceToHost) job.host_tensors = job.held.dst->tensors();
  }
  ~Part() { recycle(std::move(job.work.segments)); }

  Job chunk(int64_t index) const {
    Job chunk;
    chunk.op = job.op;
    chunk.src_list = job.src_list;
    chunk.dst_list = job.dst_list;
    chunk.asked = job.asked;
    chunk.sm_budget = job.sm_budget;
    chunk.device = job.device;
    chunk.peer = job.peer;
    chunk.host_tensors = job.host_tensors;
    chunk.any_ids = job.any_ids;
    chunk.is_for_mover = true;
    if (chunks.keeps_moves()) chunk.device_moves = job.device_moves;
    chunk.work = chunks.chunk(job.work, index - first_chunk);
    return chunk;
  }
};

class DeviceParts : public transfer::DevicePayload {
 public:
  explicit DeviceParts(Streams& streams) : streams_(streams) {}

  std::vector<std::unique_ptr<Part>> parts;
  std::vector<std::shared_ptr<DeviceEvent>> ready;  // what the transfer comes after

  void check() override {
    for (const auto& part : parts) {
      part->job.held.dst->check();
      part->job.held.src->check();
    }
  }

  Handed hand_over(int64_t chunk, Priority urgency, const Marks& after) noexcept override {
    if (parts.empty()) return {};
    const Part* const part = part_of(chunk);
    const Job& job = (part != nullptr ? *part : *parts.front()).job;
    Handed handed;
    std::optional<DeviceGuard> guard;
    std::optional<RelaxedCapture> relaxed;
    std::shared_ptr<ChunkMark> mark;
    cudaStream_t stream = nullptr;
    bool may_move = false;
    try {
      std::optional<TorchStreamGuard> peer_stream;
      std::optional<TorchStreamGuard> own_stream;
      named_errors(job.op, [&] {
        guard.emplace(job.device);
        relaxed.emplace();
        stream = stream_of(job.device, job, urgency);
        if (job.peer >= 0) {
          const DeviceGuard there(job.peer);
          peer_stream.emplace(stream_of(job.peer, job, urgency), job.peer);
        }
        own_stream.emplace(stream, job.device);
        put_behind(stream, after);
        streams_.of(job.device).begin_clock();
        mark = std::make_shared<ChunkMark>(job.op, number_of(job, urgency), streams_.of(job.device), job.device);
        mark->begin(stream);
      });
      if (part != nullptr) {
        may_move = true;
        carry_out(part->chunk(chunk));
        handed.has_moved = true;
      }
    } catch (const std::logic_error& error) {
      note(handed, Kind::kValueError, error);
    } catch (const std::exception& error) {
      note(handed, Kind::kRuntimeError, error);
      handed.has_moved = may_move && may_have_issued();
    }
    if (mark == nullptr) return handed;
    // Also where it failed: what is on its way keeps its memory until it has ended.
    try {
      named_errors(job.op, [&] { mark->end(stream); });
      handed.mark = mark;
    } catch (const std::exception& error) {
      if (cudaStreamSynchronize(stream) != cudaSuccess) static_cast<void>(cudaGetLastError());
      if (handed.kind == Kind::kNone) note(handed, Kind::kRuntimeError, error);
      if (handed.has_moved) handed.error += "; the destination is undefined";
    }
    return handed;
  }

 private:
  static void note(Handed& handed, Kind kind, const std::exception& error) {
    handed.kind = kind;
    handed.error = error.what();
  }

  const Part* part_of(int64_t chunk) const {
    const auto found = std::find_if(parts.begin(), parts.end(), [chunk](const auto& part) {
      return chunk >= part->first_chunk && chunk - part->first_chunk < part->chunks.count();
    });
    return found == parts.end() ? nullptr : found->get();
  }

  // In MoverStreams' order.
  static int direction_of(const Job& job) { return static_cast<int>(job.work.direction) - 1; }
  static int priority_of(Priority urgency) { return static_cast<int>(std::max(urgency, Priority::kExpedited)); }

  static int64_t number_of(const Job& job, Priority urgency) {
    return (job.device * MoverStreams::kDirections + direction_of(job)) * MoverStreams::kPriorities +
           priority_of(urgency);
  }

  cudaStream_t stream_of(int device, const Job& job, Priority urgency) {
    return streams_.of(device).get(direction_of(job), priority_of(urgency));
  }

  // Once for each stream that has a part of the transfer.
  void put_behind(cudaStream_t stream, const Marks& after) {
    if (ordered_.count(stream) != 0) return;
    for (const auto& event : ready) event->hold(stream);
    for (const auto& mark : after) mark->hold(stream);
    ordered_.insert(stream);
  }

  Streams& streams_;
  std::set<cudaStream_t> ordered_;
};

class CudaMoverDevices : public MoverDevices {
 public:
  CudaMoverDevices(int device, int64_t chunk_bytes) : device_(device), chunk_bytes_(chunk_bytes) {}

  void take(Job& job) override {
    if (job.device < 0) value_error(job.op, ": tensors must be on ", place(), " for this mover, got the cpu alone");
    if (device_ >= 0 && job.device != device_ && job.peer != device_) {
      value_error(job.op, ": tensors must be on ", place(), " for this mover, got cuda:", job.device);
    }
    if (job.work.device_ids) {
      value_error(job.op, ": ids must be on the cpu for a mover, which keeps transfers in order by what they touch, ",
                  "got cuda:", job.device);
    }
    if (job.asked == Executor::kReference) refuse(job, job.asked, "a mover's threads never run Python");
    job.is_for_mover = true;
    named_errors(job.op, [&] { choose(job); });
  }

  std::shared_ptr<Item> item_of(std::vector<Job> jobs, const std::vector<void*>& events) override {
    auto item = std::make_shared<Item>();
    auto payload = std::make_unique<DeviceParts>(streams_);
    std::set<int> devices;
    int64_t chunks = 0;
    for (Job& job : jobs) {
      Part& part = *payload->parts.emplace_back(std::make_unique<Part>(std::move(job), chunk_bytes_, chunks));
      const Work& work = part.job.work;
      devices.insert(part.job.device);
      if (part.job.peer >= 0) devices.insert(part.job.peer);
      if (item->bytes == 0) item->direction = work.direction;
      if (item->bytes == 0) item->executor = part.job.asked == Executor::kAuto ? Executor::kStaged : part.job.asked;
      chunks += part.chunks.count();
      item->bytes += work.bytes;
      if (work.bytes == 0) continue;
      for (const bool is_written : {false, true}) {
        item->accesses.push_back(Access{part.job.bound, &work.segments, is_written});
      }
    }
    item->chunks = item->chunks_left = std::max<int64_t>(1, chunks);
    for (const int device : devices) {
      const DeviceGuard guard(device);
      payload->ready.push_back(std::make_shared<DeviceEvent>(device, false));
      payload->ready.back()->record(static_cast<cudaStream_t>(current_stream(device)));
    }
    if (!devices.empty()) {
      const DeviceGuard guard(*devices.begin());
      for (void* const event : events) {
        payload->ready.push_back(snapshot_of(static_cast<cudaEvent_t>(event), *devices.begin()));
      }
    }
    item->payload = std::move(payload);
    return item;
  }

  void block(int device, void* stream, const Marks& marks) override {
    const DeviceGuard guard(device);
    if (is_capturing(static_cast<cudaStream_t>(stream))) {
      throw std::runtime_error("stream must not be captured, got one that is: a graph would repeat the wait alone");
    }
    for (const auto& mark : marks) mark->hold(stream);
  }

  void close() override { streams_.close(); }

 private:
  std::string place() const { return device_ < 0 ? "a cuda device" : text("cuda:", device_); }

  [[noreturn]] static void refuse(const Job& job, Executor executor, const std::string& reason) {
    value_error(job.op, ": executor '", name_of(executor), "' cannot serve this call: ", reason);
  }

  // Once, for all chunks: what `auto` takes for the whole, or the executor that was named.
  static void choose(Job& job) {
    const std::unique_ptr<Site> site = device_site(job, false);
    if (!site->has_cuda()) {
      value_error(job.op, ": a mover needs the library's own CUDA code, got none that serves: ", site->why_no_cuda());
    }
    if (cuda_of(*site).is_capturing()) {
      throw std::runtime_error(
          "the current stream must not be captured, got one that is: transfers are no part of a graph");
    }
    const std::string pageable = site->unreachable(job);
    if (!pageable.empty()) {
      value_error(job.op, ": host memory must be pinned for a mover, whose thread must not wait for copies, got ",
                  pageable);
    }
    const Executor executor = job.asked == Executor::kAuto ? site->choose(job).executor : job.asked;
    const std::string refusal = room_of(executor).refusal(job, *site);
    if (!refusal.empty()) refuse(job, executor, refusal);
    // `auto` finds another where there is no memory for a ring.
    if (job.asked != Executor::kAuto || executor != Executor::kStaged) job.asked = executor;
  }

  const int device_;  // -1 for any
  const int64_t chunk_bytes_;
  Streams streams_;
};

}  // namespace

std::shared_ptr<MoverDevices> mover_devices(int device, int64_t chunk_bytes) {
  return std::make_shared<CudaMoverDevices>(device, chunk_bytes);
}

}  // namespace kvkernels
