// gather_blocks and scatter_blocks: many pools' pages to and from the rows of one buffer.
//
//   row i of the buffer:  | pool 0's page | pool 1's page | ... |   of block block_ids[i]
#include <cstring>
#include <utility>

#include "ops/copy_call.h"
#include "ops/ops.h"

namespace kvkernels {
namespace {

struct Buffer {
  Pools pools;
  int64_t row_bytes;
};

// uint8 [n, row_bytes]; its rows may be padded.
Buffer checked_buffer(const char* op, const char* name, const Tensor& tensor, const Pools& pools, int64_t rows,
                      bool written) {
  const TensorFacts facts = checked_tensor(op, Name{name}, tensor);
  int64_t row_bytes = 0;
  for (const Pool& pool : pools.pools) row_bytes = saturating_sum(row_bytes, pool.page_bytes);
  const std::vector<int64_t> expected{rows, row_bytes};
  if (facts.dtype() != aoti_torch_dtype_uint8() || facts.sizes() != expected) {
    value_error(op, ": ", name, " must be uint8 of shape ", list_text(expected), ", got ", facts.dtype_text(),
                " of shape ", facts.shape_text());
  }
  Buffer buffer{{{checked_pool(op, Name{name}, tensor, facts, written)}, {}, {&tensor, 1}}, row_bytes};
  merge_place(op, name, facts, true, buffer.pools.place);
  return buffer;
}

// The whole pages of all pools beside each other in a row of the buffer.
std::vector<Run> page_runs(const std::vector<Pool>& pools, bool gathers) {
  std::vector<Run> runs;
  runs.reserve(pools.size());
  int64_t offset = 0;
  for (size_t i = 0; i < pools.size(); ++i) {
    Run run{0, 0, 0, 0, pools[i].page_bytes, 0, 0, {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}}};
    (gathers ? run.src_pool : run.dst_pool) = static_cast<int64_t>(i);
    (gathers ? run.dst_offset : run.src_offset) = offset;
    offset += pools[i].page_bytes;
    runs.push_back(run);
  }
  return runs;
}

// The reference takes a mapping of two columns: block ids on one side, row numbers on the other.
Tensor paired_with_rows(const Ids& ids, bool gathers) {
  std::vector<int64_t> pairs(static_cast<size_t>(2 * ids.rows));
  const auto* data = static_cast<const std::byte*>(ids.columns[0].data);
  for (int64_t row = 0; row < ids.rows; ++row) {
    const std::byte* at = data + row * ids.columns[0].stride_bytes;
    int64_t id = 0;
    if (ids.columns[0].width == 8) {
      std::memcpy(&id, at, sizeof(id));
    } else {
      int32_t narrow = 0;
      std::memcpy(&narrow, at, sizeof(narrow));
      id = narrow;
    }
    pairs[static_cast<size_t>(2 * row)] = gathers ? id : row;
    pairs[static_cast<size_t>(2 * row + 1)] = gathers ? row : id;
  }
  return int64_tensor({ids.rows, 2}, pairs.data());
}

void move_blocks(const char* op, const std::vector<Tensor>& pool_tensors, const Tensor& block_ids,
                 const Tensor& buffer_tensor, const std::string& executor, int64_t sm_budget, bool gathers) {
  CopyCall call;
  call.op = op;
  call.ids_name = "block_ids";
  call.executor = checked_executor(op, executor);
  call.sm_budget = sm_budget;
  check_sm_budget(op, sm_budget);
  Pools pools = checked_pools(op, "pools", pool_tensors, !gathers);
  const Ids ids = checked_ids(op, "block_ids", block_ids, 1);
  const char* buffer_name = gathers ? "out" : "buffer";
  Buffer buffer = checked_buffer(op, buffer_name, buffer_tensor, pools, ids.rows, gathers);
  if (gathers) reread_addresses(pools, pool_tensors);
  check_ids_device(op, "block_ids", ids, (gathers ? pools : buffer.pools).place,
                   (gathers ? buffer.pools : pools).place);
  call.runs = page_runs(pools.pools, gathers);
  const IdLimit block_limit = limit_of("pools", pools.pools, 1);
  const IdLimit row_limit{Name{buffer_name}, ids.rows};
  call.rows = ids.rows;
  call.ids_on_device = ids.on_device;
  if (gathers) {
    call.src_list = "pools";
    call.dst_list = "out";
    call.dst_is_list = false;
    call.src = std::move(pools);
    call.dst = std::move(buffer.pools);
    call.src_ids = ids.columns[0];
    call.src_limit = block_limit;
    call.dst_limit = row_limit;
    call.soon_read = true;
  } else {
    call.src_list = "buffer";
    call.dst_list = "pools";
    call.src = std::move(buffer.pools);
    call.dst = std::move(pools);
    call.dst_ids = ids.columns[0];
    call.src_limit = row_limit;
    call.dst_limit = block_limit;
  }
  if (call.executor == Executor::kReference) {
    if (ids.on_device) {
      value_error(op, ": executor 'reference' cannot serve this call: its ids must be on the cpu");
    }
    call.reference = [&, runs = call.runs](const Job&) {
      const std::vector<Tensor> one{buffer_tensor};
      const Tensor columns = int64_tensor({static_cast<int64_t>(runs.size()), kRunColumns}, &runs.front().src_pool);
      call_reference(gathers ? pool_tensors : one, gathers ? one : pool_tensors, paired_with_rows(ids, gathers),
                     columns, 1, 1, false);
    };
  }
  carry_out(std::move(call));
}

}  // namespace

void gather_blocks(const std::vector<Tensor>& pools, const Tensor& block_ids, const Tensor& out, StrArgument executor,
                   int64_t sm_budget) {
  move_blocks("gather_blocks", pools, block_ids, out, executor.take(), sm_budget, true);
}

void scatter_blocks(const Tensor& buffer, const Tensor& block_ids, const std::vector<Tensor>& pools,
                    StrArgument executor, int64_t sm_budget) {
  move_blocks("scatter_blocks", pools, block_ids, buffer, executor.take(), sm_budget, false);
}

}  // namespace kvkernels
