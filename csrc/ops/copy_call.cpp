#include "ops/copy_call.h"

#include <utility>

#include "core/overlap.h"
#include "cpu/copy.h"
#include "ops/autograd.h"
#include "ops/fault_ops.h"
#include "ops/fork.h"
#include "ops/held.h"
#include "ops/path.h"
#include "ops/submission.h"

namespace kvkernels {
namespace {

PairList read_call(const CopyCall& call) {
  return read_pairs({call.op, call.ids_name, call.src_ids, call.dst_ids, call.rows, call.src_limit, call.dst_limit,
                     call.skip_negative});
}

}  // namespace

int torch_threads() { return lost_threads_to_fork() ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

Direction direction_of(const Place& src, const Place& dst) {
  if (src.on_device) return dst.on_device ? Direction::kDeviceToDevice : Direction::kDeviceToHost;
  return dst.on_device ? Direction::kHostToDevice : Direction::kHostToHost;
}

DeviceIds device_ids_of(const CopyCall& call) {
  return {call.src_ids,         call.dst_ids,       call.rows,          call.src_limit.ids(),
          call.dst_limit.ids(), call.skip_negative, fault_code(call.op)};
}

IdLimit limit_of(const char* list, const std::vector<Pool>& pools, int64_t subblocks, bool is_list) {
  size_t tightest = 0;
  for (size_t i = 1; i < pools.size(); ++i) {
    if (pools[i].blocks < pools[tightest].blocks) tightest = i;
  }
  return {Name{list, is_list ? static_cast<int64_t>(tightest) : -1}, pools[tightest].blocks, subblocks};
}

namespace {

// Copies of fewer runs are bound sooner than found, and those of more would be much to keep.
constexpr size_t kLeastKeptRuns = 4;
constexpr size_t kMostKeptRuns = 1024;

BoundCopies& bound_copies() {
  // Never destroyed: other threads may still be in an op when the process's statics go.
  static BoundCopies& copies = *new BoundCopies;
  return copies;
}

bool is_kept(const CopyCall& call) {
  return call.recurs && call.runs.size() >= kLeastKeptRuns && call.runs.size() <= kMostKeptRuns;
}

// Takes the pools and the runs out of the call.
BoundCopy content_of(CopyCall& call) {
  BoundCopy content;
  content.src = std::move(call.src.pools);
  content.dst = std::move(call.dst.pools);
  content.runs = std::move(call.runs);
  content.src_subblocks = call.src_subblocks;
  content.dst_subblocks = call.dst_subblocks;
  content.direction = direction_of(call.src.place, call.dst.place);
  return content;
}

// The work of a checked call: on the host as the CPU takes it, on a device as a copy engine does.
Work lower_call(const CopyCall& call, PairList list) {
  const BoundCopy& bound = *call.bound;
  if (call.ids_on_device) return lower_device_ids(bound.moves, device_ids_of(call), bound.direction);
  const bool on_host = bound.direction == Direction::kHostToHost;
  const Executor executor = on_host ? Executor::kCpu : Executor::kDma;
  return lower(bound.moves, bound.sums, std::move(list), call.src_limit.ids(), bound.direction,
               {executor, torch_threads(), call.soon_read, on_host && cpu::writes_rows()});
}

HeldSides held_for_mover(const CopyCall& call) {
  constexpr const char* since = "the transfer was submitted, got a storage that was resized, freed or moved since";
  const auto hold = [&](const char* list, bool written, std::span<const Tensor> tensors) {
    return std::make_shared<Held>(call.op, list, tensors.size() > 1, written,
                                  std::vector<Tensor>(tensors.begin(), tensors.end()), since);
  };
  return {hold(call.dst_list, true, call.dst.tensors), hold(call.src_list, false, call.src.tensors)};
}

// False where the call was only explained.
bool check_and_copy(CopyCall call) {
  bind_now(call);
  const BoundCopy& bound = *call.bound;
  PairList list;
  if (!call.ids_on_device) {
    list = read_call(call);
    if (!bound.is_apart) {
      check_overlap({call.op, call.ids_name, call.dst_list, bound.runs, bound.src, bound.dst, bound.src_subblocks,
                     bound.dst_subblocks, list.segments});
    }
  }
  check_may_write(call.op, call.dst_list, call.dst_is_list, call.dst.tensors);
  Job job;
  job.op = call.op;
  job.src_list = call.src_list;
  job.dst_list = call.dst_list;
  job.asked = call.executor;
  job.sm_budget = call.sm_budget;
  job.device = call.src.place.on_device ? call.src.place.device : call.dst.place.device;
  const bool is_inside = bound.direction == Direction::kDeviceToDevice;
  if (is_inside && call.dst.place.device != job.device) job.peer = call.dst.place.device;
  job.device_moves = call.device_moves;
  job.any_ids.src_limit = call.src_limit.ids();
  job.any_ids.dst_limit = call.dst_limit.ids();
  job.any_ids.src.width = job.any_ids.dst.width = 8;
  job.work = lower_call(call, std::move(list));
  if (bound.direction == Direction::kHostToDevice) job.host_tensors = call.src.tensors;
  if (bound.direction == Direction::kDeviceToHost) job.host_tensors = call.dst.tensors;
  job.reference = std::move(call.reference);
  if (submitting()) {
    job.bound = call.bound;
    job.held = call.held.dst ? call.held : held_for_mover(call);
  }
  return carry_out(std::move(job));
}

}  // namespace

std::shared_ptr<const BoundCopy> bound_before(CopyCall& call) {
  if (!is_kept(call)) return nullptr;
  BoundCopy content = content_of(call);
  std::shared_ptr<const BoundCopy> found = bound_copies().find(content);
  call.src.pools = std::move(content.src);
  call.dst.pools = std::move(content.dst);
  call.runs = std::move(content.runs);
  return found;
}

void bind_now(CopyCall& call) {
  if (!call.bound) call.bound = bound_before(call);
  if (call.bound) return;
  const bool keeps = is_kept(call);
  auto copy = std::make_shared<BoundCopy>(content_of(call));
  bind(*copy);
  if (keeps) bound_copies().add(copy);
  call.bound = std::move(copy);
}

void CopyCall::take_mapping(const char* argument, const Tensor& mapping) {
  const Ids ids = checked_ids(op, argument, mapping, 2);
  check_ids_device(op, argument, ids, src.place, dst.place);
  take_ids(ids);
}

void CopyCall::take_ids(const Ids& ids) {
  src_ids = ids.columns[0];
  dst_ids = ids.columns[1];
  rows = ids.rows;
  ids_on_device = ids.on_device;
}

void carry_out(CopyCall call) {
  const std::span<const Tensor> written = call.dst.tensors;
  bool is_done = false;
  try {
    is_done = check_and_copy(std::move(call));
  } catch (const std::logic_error&) {  // the caller's, before anything moved
    throw;
  } catch (...) {
    note_writes(written);
    throw;
  }
  if (is_done) note_writes(written);
}

}  // namespace kvkernels
