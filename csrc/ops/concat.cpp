// TP shards along a dimension to one tensor and back: each tensor is a pool of one block, the strided copy its plan.
#include <algorithm>
#include <utility>

#include "core/verify.h"
#include "ops/copy_call.h"
#include "ops/ops.h"

namespace kvkernels {
namespace {

constexpr size_t kMaxRuns = 4096;

// One dimension of a strided copy, in bytes.
struct Dim {
  int64_t extent;
  int64_t src_stride;
  int64_t dst_stride;
};

// The dimensions of a copy between two views of one shape, outermost first: ones gone, neighbours that continue each
// other on both sides merged.
std::vector<Dim> merged_dims(const std::vector<int64_t>& sizes, const TensorFacts& src, const TensorFacts& dst) {
  std::vector<Dim> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) continue;
    const auto dim = static_cast<int64_t>(i);
    const Dim next{sizes[i], src.stride(dim) * src.element_bytes(), dst.stride(dim) * dst.element_bytes()};
    if (!dims.empty() && dims.back().src_stride == next.extent * next.src_stride &&
        dims.back().dst_stride == next.extent * next.dst_stride) {
      dims.back() = {dims.back().extent * next.extent, next.src_stride, next.dst_stride};
    } else {
      dims.push_back(next);
    }
  }
  return dims;
}

// Appends the runs of one strided copy: three loops a run, and one run a step of the smallest extents beyond that.
// False, with nothing appended, where that would be too many.
bool append_runs(Run base, std::vector<Dim> dims, std::vector<Run>& runs) {
  if (!dims.empty() && dims.back().src_stride == base.fragment_bytes && dims.back().dst_stride == base.fragment_bytes) {
    base.fragment_bytes *= dims.back().extent;
    dims.pop_back();
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.extent < b.extent; });
  std::vector<Run> expanded{base};
  while (dims.size() > 3) {
    const Dim dim = dims.front();
    dims.erase(dims.begin());
    if (dim.extent > static_cast<int64_t>(kMaxRuns / expanded.size())) return false;
    std::vector<Run> next;
    for (const Run& run : expanded) {
      for (int64_t i = 0; i < dim.extent; ++i) {
        next.push_back(run);
        next.back().src_offset += i * dim.src_stride;
        next.back().dst_offset += i * dim.dst_stride;
      }
    }
    expanded = std::move(next);
  }
  for (Run& run : expanded) {
    for (size_t i = 0; i < dims.size(); ++i) run.loops[i] = {dims[i].extent, dims[i].src_stride, dims[i].dst_stride};
    runs.push_back(run);
  }
  return true;
}

Pool whole_tensor(const Tensor& tensor, const TensorFacts& facts, bool written) {
  void* base = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  const int64_t bytes = facts.span_bytes();
  return {static_cast<std::byte*>(base), 1, bytes, bytes};
}

int64_t checked_dim(const char* op, int64_t dim, int64_t dims) {
  if (dim < -dims || dim >= dims) value_error(op, ": dim must be in [", -dims, ", ", dims, "), got ", dim);
  return dim < 0 ? dim + dims : dim;
}

void check_like(const char* op, const Name& name, const TensorFacts& facts, const TensorFacts& first, int64_t dim) {
  if (facts.dim() != first.dim()) {
    value_error(op, ": ", name, " must have ", first.dim(), " dimensions, got ", facts.dim());
  }
  for (int64_t i = 0; i < facts.dim(); ++i) {
    if (i != dim && facts.size(i) != first.size(i)) {
      value_error(op, ": ", name, " must have size ", first.size(i), " in dimension ", i, ", got ", facts.size(i));
    }
  }
  if (facts.dtype() != first.dtype()) {
    value_error(op, ": ", name, " must be ", first.dtype_text(), ", got ", facts.dtype_text());
  }
}

// Shards along `dim`, in rank order.
struct Shards {
  const char* list;
  std::vector<Tensor> tensors;
  std::vector<TensorFacts> facts;
  Place place;
  int64_t dim = 0;
  std::vector<int64_t> whole_shape;
};

Shards checked_shards(const char* op, const char* list, const std::vector<Tensor>& tensors, int64_t dim) {
  if (tensors.empty()) value_error(op, ": ", list, " must not be empty");
  Shards shards{list, tensors, {}, {}, 0, {}};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name{list, static_cast<int64_t>(i)};
    shards.facts.push_back(checked_tensor(op, name, tensors[i]));
    const TensorFacts& facts = shards.facts.back();
    const TensorFacts& first = shards.facts.front();
    if (i == 0) {
      if (facts.dim() == 0) value_error(op, ": ", name, " must have at least one dimension, got shape []");
      shards.dim = checked_dim(op, dim, facts.dim());
      shards.whole_shape = facts.sizes();
      merge_place(op, list, facts, true, shards.place);
      continue;
    }
    check_like(op, name, facts, first, shards.dim);
    if (facts.device_text() != first.device_text()) {
      value_error(op, ": ", name, " must be on ", first.device_text(), ", got ", facts.device_text());
    }
    int64_t& whole_size = shards.whole_shape[static_cast<size_t>(shards.dim)];
    whole_size = saturating_sum(whole_size, facts.size(shards.dim));
  }
  return shards;
}

// Who shall carry it out.
struct Asked {
  Executor executor;
  int64_t sm_budget;
};

Asked checked_asked(const char* op, const StrArgument& executor, int64_t sm_budget) {
  const Asked asked{checked_executor(op, executor.take()), sm_budget};
  check_sm_budget(op, sm_budget);
  return asked;
}

// One side is the shards, the other the whole.
struct Reshard {
  const char* op;
  Asked asked;
  Shards shards;
  Tensor whole;
  TensorFacts whole_facts;
  const char* whole_name;
  bool concatenates;
};

void check_no_self_overlap(const char* op, const Reshard& reshard, const CopyCall& call) {
  PageSizes pages;
  for (const Pool& pool : call.src.pools) pages.src.push_back(pool.page_bytes);
  for (const Pool& pool : call.dst.pools) pages.dst.push_back(pool.page_bytes);
  try {
    verify_runs(op, call.runs.data(), static_cast<int64_t>(call.runs.size()), pages);
  } catch (const NotComparable&) {
    throw;
  } catch (const std::invalid_argument&) {
    if (reshard.concatenates) {
      value_error(op, ": ", reshard.whole_name, " must not overlap itself, got shape ",
                  reshard.whole_facts.shape_text(), " and strides ", reshard.whole_facts.strides_text());
    }
    value_error(op, ": ", reshard.shards.list, " must not overlap themselves, got a tensor that writes a byte twice");
  }
}

void carry_out_reshard(Reshard reshard) {
  Shards& shards = reshard.shards;
  CopyCall call;
  call.op = reshard.op;
  call.executor = reshard.asked.executor;
  call.sm_budget = reshard.asked.sm_budget;
  call.ids_name = reshard.concatenates ? reshard.whole_name : shards.list;
  call.src_list = reshard.concatenates ? shards.list : reshard.whole_name;
  call.dst_list = reshard.concatenates ? reshard.whole_name : shards.list;
  call.dst_is_list = !reshard.concatenates;
  call.soon_read = true;
  call.recurs = false;  // shards and what is made of them mostly are new tensors
  Pools& one = reshard.concatenates ? call.dst : call.src;
  Pools& many = reshard.concatenates ? call.src : call.dst;
  one.pools = {whole_tensor(reshard.whole, reshard.whole_facts, reshard.concatenates)};
  merge_place(reshard.op, reshard.whole_name, reshard.whole_facts, true, one.place);
  many.place = shards.place;
  one.tensors = {&reshard.whole, 1};
  many.tensors = shards.tensors;
  int64_t offset = 0;
  for (size_t i = 0; i < shards.tensors.size(); ++i) {
    const TensorFacts& facts = shards.facts[i];
    many.pools.push_back(whole_tensor(shards.tensors[i], facts, !reshard.concatenates));
    if (facts.numel() == 0) continue;
    const int64_t begin = offset;
    offset += facts.size(shards.dim) * reshard.whole_facts.stride(shards.dim) * facts.element_bytes();
    Run run{0, 0, 0, 0, facts.element_bytes(), 0, 0, {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}}};
    (reshard.concatenates ? run.src_pool : run.dst_pool) = static_cast<int64_t>(i);
    (reshard.concatenates ? run.dst_offset : run.src_offset) = begin;
    const TensorFacts& src = reshard.concatenates ? facts : reshard.whole_facts;
    const TensorFacts& dst = reshard.concatenates ? reshard.whole_facts : facts;
    if (append_runs(run, merged_dims(facts.sizes(), src, dst), call.runs)) continue;
    value_error(reshard.op, ": ", Name{shards.list, static_cast<int64_t>(i)}, " must be copied in at most ", kMaxRuns,
                " runs, got shape ", facts.shape_text(), " with strides ", src.strides_text(), " to strides ",
                dst.strides_text());
  }
  if (!reshard.concatenates) reread_addresses(one, {reshard.whole});
  check_no_self_overlap(reshard.op, reshard, call);
  // One pair: block 0 of each pool.
  call.rows = 1;
  call.src_limit = {Name{call.src_list}, 1};
  call.dst_limit = {Name{call.dst_list}, 1};
  if (call.runs.empty()) call.rows = 0;
  if (call.executor == Executor::kReference) {
    call.reference = [&](const Job&) {
      if (reshard.concatenates) {
        call_concat_reference(shards.tensors, shards.dim, reshard.whole);
      } else {
        call_split_reference(reshard.whole, shards.dim, shards.tensors);
      }
    };
  }
  carry_out(std::move(call));
}

void concat_into(const char* op, Asked asked, Shards shards, const Tensor& out) {
  const TensorFacts facts = checked_tensor(op, Name{"out"}, out);
  if (facts.sizes() != shards.whole_shape) {
    value_error(op, ": out must have shape ", list_text(shards.whole_shape), ", got ", facts.shape_text());
  }
  if (facts.dtype() != shards.facts.front().dtype()) {
    value_error(op, ": out must be ", shards.facts.front().dtype_text(), ", got ", facts.dtype_text());
  }
  carry_out_reshard({op, asked, std::move(shards), out, facts, "out", true});
}

}  // namespace

Tensor concat_tp_shards(const std::vector<Tensor>& tensors, int64_t dim, StrArgument executor, int64_t sm_budget) {
  const char* op = "concat_tp_shards";
  const Asked asked = checked_asked(op, executor, sm_budget);
  Shards shards = checked_shards(op, "shards", tensors, dim);
  if (shards.facts.front().is_quantized()) {
    value_error(op, ": shards must not be quantized, since a new tensor would lack their scale, got ",
                shards.facts.front().dtype_text(), "; concat_tp_shards_out takes a tensor that has one");
  }
  Tensor out = torch::stable::new_empty(tensors.front(), shards.whole_shape);
  concat_into(op, asked, std::move(shards), out);
  return out;
}

void concat_tp_shards_out(const std::vector<Tensor>& tensors, int64_t dim, const Tensor& out, StrArgument executor,
                          int64_t sm_budget) {
  const char* op = "concat_tp_shards_out";
  const Asked asked = checked_asked(op, executor, sm_budget);
  concat_into(op, asked, checked_shards(op, "shards", tensors, dim), out);
}

void split_tp_shards(const Tensor& input, int64_t dim, const std::vector<Tensor>& out, StrArgument executor,
                     int64_t sm_budget) {
  const char* op = "split_tp_shards";
  const Asked asked = checked_asked(op, executor, sm_budget);
  Shards shards = checked_shards(op, "out", out, dim);
  const TensorFacts facts = checked_tensor(op, Name{"input"}, input);
  check_like(op, Name{"input"}, facts, shards.facts.front(), shards.dim);
  const int64_t total = shards.whole_shape[static_cast<size_t>(shards.dim)];
  if (total != facts.size(shards.dim)) {
    value_error(op, ": out must add up to size ", facts.size(shards.dim), " in dimension ", shards.dim, ", got ",
                total);
  }
  carry_out_reshard({op, asked, std::move(shards), input, facts, "input", false});
}

}  // namespace kvkernels
