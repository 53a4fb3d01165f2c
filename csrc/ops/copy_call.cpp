#include "ops/copy_call.h"

#include <utility>

#include "core/overlap.h"
#include "cpu/copy.h"
#include "ops/autograd.h"
#include "ops/explain.h"
#include "ops/fault_ops.h"
#include "ops/fork.h"
#include "ops/path.h"

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

// The work of a checked call: on the host as the CPU takes it, on a device as a copy engine does.
Work lower_call(const CopyCall& call, std::vector<Move> moves, PairList list, Direction direction) {
  if (call.ids_on_device) return lower_device_ids(std::move(moves), device_ids_of(call), direction);
  const bool on_host = direction == Direction::kHostToHost;
  const Executor executor = on_host ? Executor::kCpu : Executor::kDma;
  return lower(std::move(moves), std::move(list), call.src_limit.ids(), direction,
               {executor, torch_threads(), call.soon_read, on_host && cpu::writes_rows()});
}

void check_and_copy(CopyCall call) {
  const Direction direction = direction_of(call.src.place, call.dst.place);
  PairList list;
  if (!call.ids_on_device) {
    list = read_call(call);
    check_overlap({call.op, call.ids_name, call.dst_list, call.runs, call.src.pools, call.dst.pools, call.src_subblocks,
                   call.dst_subblocks, list.segments});
  }
  check_may_write(call.op, call.dst_list, call.dst_is_list, call.dst.tensors);
  std::vector<Move> moves =
      bind_runs(call.runs, call.src.pools, call.dst.pools, call.src_subblocks, call.dst_subblocks, direction);
  Job job;
  job.op = call.op;
  job.src_list = call.src_list;
  job.dst_list = call.dst_list;
  job.asked = call.executor;
  job.sm_budget = call.sm_budget;
  job.device = call.src.place.on_device ? call.src.place.device : call.dst.place.device;
  if (direction == Direction::kDeviceToDevice && call.dst.place.device != job.device) job.peer = call.dst.place.device;
  job.work = lower_call(call, std::move(moves), std::move(list), direction);
  if (direction == Direction::kHostToDevice) job.host_tensors = call.src.tensors;
  if (direction == Direction::kDeviceToHost) job.host_tensors = call.dst.tensors;
  job.reference = std::move(call.reference);
  carry_out(std::move(job));
}

}  // namespace

void carry_out(CopyCall call) {
  const std::span<const Tensor> written = call.dst.tensors;
  try {
    check_and_copy(std::move(call));
  } catch (const std::logic_error&) {  // the caller's, before anything moved
    throw;
  } catch (...) {
    note_writes(written);
    throw;
  }
  if (!explaining()) note_writes(written);
}

}  // namespace kvkernels
