#include "ops/copy_call.h"

#include <utility>

#include "core/overlap.h"
#include "cpu/copy.h"
#include "ops/autograd.h"
#include "ops/counters.h"
#include "ops/cuda_path.h"
#include "ops/explain.h"
#include "ops/fault_ops.h"
#include "ops/fork.h"
#include "ops/triton_path.h"

namespace kvkernels {
namespace {

// The reference counts what it was asked for: it has no lowering of its own.
void run_reference(const CopyCall& call, Direction direction, int64_t pairs, const std::vector<Move>& moves) {
  Explanation explanation{call.op, Executor::kReference, "named by the caller", direction, "reference"};
  explanation.pairs = pairs;
  explanation.moves = static_cast<int64_t>(moves.size());
  for (const Move& move : moves) {
    explanation.bytes += pairs * move.bytes_per_pair();
    explanation.descriptors += pairs * move.fragments_per_pair();
  }
  if (explaining()) return record(explanation);
  if (explanation.bytes == 0) return;
  call.reference();
  count_issued(Executor::kReference, 0, explanation.descriptors, explanation.bytes);
}

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

Choice choose_on_host(const char* op, Executor asked) {
  if (asked != Executor::kAuto && asked != Executor::kCpu) {
    value_error(op, ": executor '", name_of(asked), "' cannot serve this call: it needs a tensor on a cuda device");
  }
  return {Executor::kCpu, asked == Executor::kAuto ? "both sides are in host memory" : "named by the caller"};
}

void run_on_cpu(const char* op, const Work& work, const std::string& reason) {
  if (explaining()) return record(explanation_of(op, work, reason));
  if (work.bytes == 0) return;
  const cpu::Issued issued = cpu::copy(work, parallel_lanes);
  count_issued(Executor::kCpu, 0, issued.descriptors, issued.bytes);
}

namespace {

void check_and_copy(CopyCall call) {
  check_one_device(call.op, call.src.place, call.dst.place);
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
  if (call.executor == Executor::kReference) {
    return run_reference(call, direction, call.ids_on_device ? call.rows : list.pairs, moves);
  }
  if (direction != Direction::kHostToHost) return carry_out_on_cuda(call, std::move(moves), std::move(list));
  if (call.executor == Executor::kTriton) {
    return carry_out_on_triton(call, std::move(moves), std::move(list), "both sides are in host memory");
  }
  const Choice choice = choose_on_host(call.op, call.executor);
  Work work = lower(
      std::move(moves), std::move(list), call.src_limit.ids(), direction,
      {choice.executor, torch_threads(), call.soon_read, choice.executor == Executor::kCpu && cpu::writes_rows()});
  run_on_cpu(call.op, work, choice.reason);
  recycle(std::move(work.segments));
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
