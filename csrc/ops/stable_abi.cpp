#include "ops/stable_abi.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace kvkernels {
namespace {

std::vector<int64_t> copy_of(const torch::headeronly::IntHeaderOnlyArrayRef& values) {
  return {values.begin(), values.end()};
}

}  // namespace

TensorFacts::TensorFacts(const Tensor& tensor) : sizes_(copy_of(tensor.sizes())) {
  const AtenTensorHandle handle = tensor.get();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout_));
  element_bytes_ = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_));
  if (!is_strided()) return;
  strides_ = copy_of(tensor.strides());
  storage_offset_ = tensor.storage_offset();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &storage_bytes_));
}

int64_t TensorFacts::numel() const {
  int64_t elements = 1;
  for (const int64_t size : sizes_) elements *= size;
  return elements;
}

bool TensorFacts::is_contiguous_from(int64_t dim) const {
  int64_t expected = 1;
  for (int64_t i = this->dim() - 1; i >= dim; --i) {
    if (size(i) == 0) return true;
    if (size(i) != 1 && stride(i) != expected) return false;
    expected *= size(i);
  }
  return true;
}

int64_t TensorFacts::span_bytes() const {
  int64_t last = 0;
  for (int64_t i = 0; i < dim(); ++i) {
    if (size(i) == 0) return 0;
    last += (size(i) - 1) * stride(i);
  }
  return (last + 1) * element_bytes_;
}

bool TensorFacts::memory_is_there() const {
  const int64_t span = span_bytes();
  return span == 0 || storage_offset_ * element_bytes_ + span <= storage_bytes_;
}

std::string TensorFacts::device_text() const {
  const std::array<std::pair<int32_t, const char*>, 6> names{{{aoti_torch_device_type_cpu(), "cpu"},
                                                              {aoti_torch_device_type_cuda(), "cuda"},
                                                              {aoti_torch_device_type_meta(), "meta"},
                                                              {aoti_torch_device_type_xpu(), "xpu"},
                                                              {aoti_torch_device_type_mps(), "mps"},
                                                              {aoti_torch_device_type_privateuse1(), "privateuseone"}}};
  for (const auto& [code, name] : names) {
    if (code == device_type_) return device_index_ >= 0 && !is_cpu() ? text(name, ':', device_index_) : name;
  }
  return text("device type ", device_type_);
}

std::string TensorFacts::dtype_text() const {
  const std::array<std::pair<int32_t, const char*>, 22> names{{{aoti_torch_dtype_float32(), "float32"},
                                                               {aoti_torch_dtype_bfloat16(), "bfloat16"},
                                                               {aoti_torch_dtype_float16(), "float16"},
                                                               {aoti_torch_dtype_float64(), "float64"},
                                                               {aoti_torch_dtype_uint8(), "uint8"},
                                                               {aoti_torch_dtype_int8(), "int8"},
                                                               {aoti_torch_dtype_int16(), "int16"},
                                                               {aoti_torch_dtype_int32(), "int32"},
                                                               {aoti_torch_dtype_int64(), "int64"},
                                                               {aoti_torch_dtype_uint16(), "uint16"},
                                                               {aoti_torch_dtype_uint32(), "uint32"},
                                                               {aoti_torch_dtype_uint64(), "uint64"},
                                                               {aoti_torch_dtype_bool(), "bool"},
                                                               {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
                                                               {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
                                                               {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
                                                               {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
                                                               {torch_dtype_float8_e8m0fnu(), "float8_e8m0fnu"},
                                                               {torch_dtype_float4_e2m1fn_x2(), "float4_e2m1fn_x2"},
                                                               {aoti_torch_dtype_complex32(), "complex32"},
                                                               {aoti_torch_dtype_complex64(), "complex64"},
                                                               {aoti_torch_dtype_complex128(), "complex128"}}};
  for (const auto& [code, name] : names) {
    if (code == dtype_) return name;
  }
  return text("dtype ", dtype_);
}

std::string TensorFacts::layout_text() const {
  const std::array<std::pair<int32_t, const char*>, 8> names{{{aoti_torch_layout_strided(), "torch.strided"},
                                                              {aoti_torch_layout_sparse_coo(), "torch.sparse_coo"},
                                                              {aoti_torch_layout_sparse_csr(), "torch.sparse_csr"},
                                                              {aoti_torch_layout_sparse_csc(), "torch.sparse_csc"},
                                                              {aoti_torch_layout_sparse_bsr(), "torch.sparse_bsr"},
                                                              {aoti_torch_layout_sparse_bsc(), "torch.sparse_bsc"},
                                                              {aoti_torch_layout__mkldnn(), "torch._mkldnn"},
                                                              {aoti_torch_layout_jagged(), "torch.jagged"}}};
  for (const auto& [code, name] : names) {
    if (code == layout_) return name;
  }
  return text("layout ", layout_);
}

void parallel_lanes(int lanes, void* context, void (*body)(void* context, int lane)) {
  if (lanes == 1) return body(context, 0);
  torch::stable::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) body(context, static_cast<int>(lane));
  });
}

void call_reference(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& mapping,
                    const Tensor& runs, int64_t src_subblocks, int64_t dst_subblocks, bool skip_negative) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(src),           from(dst),           from(mapping),      from(runs),
                                    from(src_subblocks), from(dst_subblocks), from(skip_negative)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("kvkernels::_copy_pages_reference", "", stack.data(), TORCH_ABI_VERSION));
}

Tensor int64_tensor(const std::vector<int64_t>& sizes, const int64_t* values) {
  Tensor tensor = torch::stable::empty(sizes, torch::headeronly::ScalarType::Long, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const auto bytes = static_cast<size_t>(tensor.numel()) * sizeof(int64_t);
  if (bytes > 0) std::memcpy(tensor.mutable_data_ptr(), values, bytes);
  return tensor;
}

void* current_stream(int device) { return torch::stable::accelerator::getCurrentStream(device).nativeHandle(); }

Tensor upload_bytes(const void* host, size_t bytes, int device) {
  using torch::headeronly::DeviceType;
  using torch::headeronly::ScalarType;
  const std::vector<int64_t> size{static_cast<int64_t>(bytes)};
  const Tensor pinned = torch::stable::empty(size, ScalarType::Byte, std::nullopt, torch::stable::Device(DeviceType::CPU), true);
  std::memcpy(pinned.mutable_data_ptr(), host, bytes);
  Tensor uploaded =
      torch::stable::empty(size, ScalarType::Byte, std::nullopt, torch::stable::Device(DeviceType::CUDA, device));
  torch::stable::copy_(uploaded, pinned, true);
  return uploaded;
}

}  // namespace kvkernels
