#include "ops/arguments.h"

namespace kvkernels {
namespace {

std::string place_text(const Place& place) { return place.on_device ? text("cuda:", place.device) : "cpu"; }

}  // namespace

TensorFacts checked_tensor(const char* op, const Name& name, const Tensor& tensor) {
  TensorFacts facts(tensor);
  if (!facts.is_cpu() && !facts.is_cuda()) {
    value_error(op, ": ", name, " must be on the cpu or a cuda device, got ", facts.device_text());
  }
  if (!facts.is_strided()) value_error(op, ": ", name, " must be a strided tensor, got layout ", facts.layout_text());
  if (!facts.memory_is_there()) {
    value_error(op, ": ", name, " must lie inside its storage, got shape ", facts.shape_text(), " and strides ",
                facts.strides_text(), " on a smaller storage");
  }
  return facts;
}

Pool checked_pool(const char* op, const Name& name, const Tensor& tensor, const TensorFacts& facts, bool written) {
  if (facts.dim() == 0) value_error(op, ": ", name, " must have at least one dimension, got shape []");
  if (!facts.is_contiguous_from(1)) {
    value_error(op, ": ", name, " must have contiguous rows, got shape ", facts.shape_text(), " and strides ",
                facts.strides_text());
  }
  int64_t page_bytes = facts.element_bytes();
  for (int64_t i = 1; i < facts.dim(); ++i) page_bytes = saturating_product(page_bytes, facts.size(i));
  if (page_bytes == 0)
    value_error(op, ": ", name, " must have pages of at least one byte, got shape ", facts.shape_text());
  const int64_t block_stride = facts.size(0) > 1 ? facts.stride(0) * facts.element_bytes() : page_bytes;
  if (block_stride < page_bytes) {
    value_error(op, ": ", name, " must have a row stride of at least its page of ", page_bytes, " bytes, got ",
                block_stride, " bytes");
  }
  // mutable_data_ptr unshares a copy-on-write tensor; a const pointer to a destination would write to its siblings.
  void* base = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  return {static_cast<std::byte*>(base), facts.size(0), block_stride, page_bytes};
}

void merge_place(const char* op, const char* list, const TensorFacts& facts, bool first, Place& place) {
  const Place here{facts.is_cuda(), facts.is_cuda() ? facts.device_index() : -1};
  if (first) {
    place = here;
    return;
  }
  if (here.on_device && place.on_device) return check_one_device(op, place, here);
  if (here.on_device != place.on_device) {
    value_error(op, ": ", list, " must be on one device, got ", place_text(place), " and ", place_text(here));
  }
}

Pools checked_pools(const char* op, const char* list, const std::vector<Tensor>& tensors, bool written) {
  if (tensors.empty()) value_error(op, ": ", list, " must not be empty");
  Pools result;
  result.tensors = tensors;
  result.pools.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name{list, static_cast<int64_t>(i)};
    const TensorFacts facts = checked_tensor(op, name, tensors[i]);
    result.pools.push_back(checked_pool(op, name, tensors[i], facts, written));
    merge_place(op, list, facts, i == 0, result.place);
  }
  return result;
}

void reread_addresses(Pools& pools, const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    pools.pools[i].base = static_cast<std::byte*>(const_cast<void*>(tensors[i].const_data_ptr()));
  }
}

void check_one_device(const char* op, const Place& a, const Place& b) {
  if (a.on_device && b.on_device && a.device != b.device) {
    value_error(op, ": tensors must be on one cuda device, got ", place_text(a), " and ", place_text(b));
  }
}

Ids checked_ids(const char* op, const char* argument, const Tensor& tensor, int columns) {
  const TensorFacts facts = checked_tensor(op, Name{argument}, tensor);
  const bool is_wide = facts.dtype() == aoti_torch_dtype_int64();
  if (!is_wide && facts.dtype() != aoti_torch_dtype_int32()) {
    value_error(op, ": ", argument, " must be int64 or int32, got ", facts.dtype_text());
  }
  const bool has_shape = columns == 1 ? facts.dim() == 1 : facts.dim() == 2 && facts.size(1) == columns;
  if (!has_shape) {
    value_error(op, ": ", argument, " must have shape ", columns == 1 ? "[n]" : "[n, 2]", ", got ", facts.shape_text());
  }
  Ids ids;
  ids.rows = facts.size(0);
  ids.on_device = facts.is_cuda();
  ids.device = facts.is_cuda() ? facts.device_index() : -1;
  const auto* data = static_cast<const std::byte*>(tensor.const_data_ptr());
  for (int column = 0; column < columns; ++column) {
    const int64_t step = columns == 1 ? 0 : column * facts.stride(1) * facts.element_bytes();
    ids.columns[column] = {data + step, facts.stride(0) * facts.element_bytes(), is_wide ? 8 : 4};
  }
  return ids;
}

void check_ids_device(const char* op, const char* argument, const Ids& ids, const Place& src, const Place& dst) {
  if (!ids.on_device || ids.device == (src.on_device ? src : dst).device) return;
  const bool has_peer = src.on_device && dst.on_device && src.device != dst.device;
  value_error(op, ": ", argument, " must be on the cpu or on the ", has_peer ? "source's" : "pools'",
              " cuda device, got cuda:", ids.device);
}

Executor checked_executor(const char* op, std::string_view executor) {
  if (executor == name_of(Executor::kAuto)) return Executor::kAuto;
  std::string names = "'auto'";
  for (const Executor known : kExecutors) {
    if (executor == name_of(known)) return known;
    names += text(", '", name_of(known), '\'');
  }
  value_error(op, ": executor must be one of ", names, ", got '", executor, "'");
}

void check_sm_budget(const char* op, int64_t sm_budget) {
  if (sm_budget < 0) value_error(op, ": sm_budget must not be negative, got ", sm_budget);
}

}  // namespace kvkernels
