#include "ops/stable_abi.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

namespace kvkernels {
namespace {

// Raises torch's own words where it keeps them, which it does from 2.13 on; before, it prints them.
void check_torch(AOTITorchError code, const char* call) {
  if (code == AOTI_TORCH_SUCCESS) return;
  static const auto what =
      torch_function<const char*()>("libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
  throw std::runtime_error(what != nullptr ? text(what(), " (from ", call, ')')
                                           : text(call, " failed in torch, which printed why"));
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type, int32_t device_index = 0,
             bool pinned = false) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  const auto make = pinned ? &aoti_torch_empty_strided_pinned : &aoti_torch_empty_strided;
  AtenTensorHandle handle = nullptr;
  check_torch(
      make(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type, device_index, &handle),
      pinned ? "aoti_torch_empty_strided_pinned" : "aoti_torch_empty_strided");
  return Tensor(handle);
}

template <size_t N>
void call_dispatcher(const char* op, std::array<StableIValue, N>& stack) {
  check_torch(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION), op);
}

std::string text_of(const StableIValue& value) {
  const auto bytes = torch::stable::detail::to<Tensor>(value);
  return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<size_t>(bytes.numel())};
}

}  // namespace

void* torch_symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return nullptr;
  void* symbol = dlsym(handle, name);
  dlclose(handle);
  return symbol;
}

std::string StrArgument::take() const {
  size_t length = 0;
  const char* data = nullptr;
  check_torch(torch_string_length(handle, &length), "torch_string_length");
  check_torch(torch_string_c_str(handle, &data), "torch_string_c_str");
  std::string value(data, length);
  check_torch(torch_delete_string(handle), "torch_delete_string");
  return value;
}

Tensor text_tensor(const std::string& value) {
  Tensor tensor = empty({static_cast<int64_t>(value.size())}, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu());
  if (!value.empty()) std::memcpy(tensor.mutable_data_ptr(), value.data(), value.size());
  return tensor;
}

Extents::Extents(const torch::headeronly::IntHeaderOnlyArrayRef& values) : count_(std::ssize(values)) {
  if (count_ > kInside) {
    outside_.assign(values.begin(), values.end());
  } else {
    std::copy(values.begin(), values.end(), inside_);
  }
}

std::vector<int64_t> Extents::list() const {
  return count_ > kInside ? outside_ : std::vector<int64_t>(inside_, inside_ + count_);
}

TensorFacts::TensorFacts(const Tensor& tensor) : sizes_(tensor.sizes()) {
  const AtenTensorHandle handle = tensor.get();
  check_torch(aoti_torch_get_device_type(handle, &device_type_), "aoti_torch_get_device_type");
  check_torch(aoti_torch_get_device_index(handle, &device_index_), "aoti_torch_get_device_index");
  check_torch(aoti_torch_get_dtype(handle, &dtype_), "aoti_torch_get_dtype");
  check_torch(aoti_torch_get_layout(handle, &layout_), "aoti_torch_get_layout");
  element_bytes_ = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_));
  if (!is_strided()) return;
  strides_ = Extents(tensor.strides());
  storage_offset_ = tensor.storage_offset();
  storage_bytes_ = storage_bytes(tensor);
}

int64_t storage_bytes(const Tensor& tensor) {
  int64_t bytes = 0;
  check_torch(aoti_torch_get_storage_size(tensor.get(), &bytes), "aoti_torch_get_storage_size");
  return bytes;
}

int64_t saturating_product(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

int64_t saturating_sum(int64_t a, int64_t b) {
  int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<int64_t>::max() : sum;
}

int64_t TensorFacts::numel() const {
  if (is_empty_from(0)) return 0;
  int64_t elements = 1;
  for (int64_t i = 0; i < dim(); ++i) elements *= size(i);
  return elements;
}

bool TensorFacts::is_empty_from(int64_t dim) const {
  while (dim < this->dim() && size(dim) != 0) ++dim;
  return dim < this->dim();
}

bool TensorFacts::is_contiguous_from(int64_t dim) const {
  if (is_empty_from(dim)) return true;
  int64_t expected = 1;
  for (int64_t i = this->dim() - 1; i >= dim; --i) {
    if (size(i) != 1 && stride(i) != expected) return false;
    expected *= size(i);
  }
  return true;
}

bool TensorFacts::is_dense_from(int64_t dim) const {
  if (is_empty_from(dim)) return true;
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int64_t i = dim; i < this->dim(); ++i) {
    if (size(i) != 1) by_stride.emplace_back(stride(i), size(i));
  }
  std::sort(by_stride.begin(), by_stride.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

int64_t TensorFacts::span_bytes() const {
  if (is_empty_from(0)) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < dim(); ++i) last += (size(i) - 1) * stride(i);
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
  // In the order of ScalarType, whose numbers the ABI fixes; the shim names but half of them. The last came after the
  // torch that this is built with.
  constexpr std::array names{"uint8",
                             "int8",
                             "int16",
                             "int32",
                             "int64",
                             "float16",
                             "float32",
                             "float64",
                             "complex32",
                             "complex64",
                             "complex128",
                             "bool",
                             "qint8",
                             "quint8",
                             "qint32",
                             "bfloat16",
                             "quint4x2",
                             "quint2x4",
                             "bits1x8",
                             "bits2x4",
                             "bits4x2",
                             "bits8",
                             "bits16",
                             "float8_e5m2",
                             "float8_e4m3fn",
                             "float8_e5m2fnuz",
                             "float8_e4m3fnuz",
                             "uint16",
                             "uint32",
                             "uint64",
                             "uint1",
                             "uint2",
                             "uint3",
                             "uint4",
                             "uint5",
                             "uint6",
                             "uint7",
                             "int1",
                             "int2",
                             "int3",
                             "int4",
                             "int5",
                             "int6",
                             "int7",
                             "float8_e8m0fnu",
                             "float4_e2m1fn_x2",
                             "bcomplex32"};
  static_assert(names.size() >= static_cast<size_t>(torch::headeronly::ScalarType::Undefined));
  if (dtype_ >= 0 && dtype_ < static_cast<int32_t>(names.size())) return names[static_cast<size_t>(dtype_)];
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
  call_dispatcher("kvkernels::_copy_pages_reference", stack);
}

void call_swap_reference(const Tensor& src, const Tensor& dst, int64_t block_bytes, const Tensor& mapping) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(src), from(dst), from(block_bytes), from(mapping)};
  call_dispatcher("kvkernels::_swap_blocks_reference", stack);
}

void call_concat_reference(const std::vector<Tensor>& shards, int64_t dim, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(shards), from(dim), from(out)};
  call_dispatcher("kvkernels::_concat_tp_shards_reference", stack);
}

void call_split_reference(const Tensor& input, int64_t dim, const std::vector<Tensor>& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(input), from(dim), from(out)};
  call_dispatcher("kvkernels::_split_tp_shards_reference", stack);
}

void call_batch_reference(const Tensor& copies) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(copies)};
  call_dispatcher("kvkernels::_swap_blocks_batch_reference", stack);
}

int64_t call_first_requiring_grad(const std::vector<Tensor>& tensors) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensors)};
  call_dispatcher("kvkernels::_first_requiring_grad", stack);
  return torch::stable::detail::to<int64_t>(stack[0]);
}

void call_note_writes(const std::vector<Tensor>& tensors) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensors)};
  call_dispatcher("kvkernels::_note_writes", stack);
}

std::string call_peer_refusal(int64_t device, int64_t peer, bool enables) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(device), from(peer), from(enables)};
  call_dispatcher("kvkernels::_peer_refusal", stack);
  return text_of(stack[0]);
}

std::string call_triton_refusal(int64_t device) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(device)};
  call_dispatcher("kvkernels::_triton_refusal", stack);
  return text_of(stack[0]);
}

void call_triton_copy(const Tensor& table, const std::vector<int64_t>& head) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(table), from(head)};
  call_dispatcher("kvkernels::_triton_copy", stack);
}

bool is_pinned(const Tensor& tensor) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(tensor), from(std::nullopt)};
  call_dispatcher("aten::is_pinned", stack);
  return torch::stable::detail::to<bool>(stack[0]);
}

Tensor int64_tensor(const std::vector<int64_t>& sizes, const int64_t* values) {
  Tensor tensor = empty(sizes, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu());
  const auto bytes = static_cast<size_t>(tensor.numel()) * sizeof(int64_t);
  if (bytes > 0) std::memcpy(tensor.mutable_data_ptr(), values, bytes);
  return tensor;
}

void* current_stream(int device) {
  // Not linked: a torch without CUDA has no such library, and the same file serves both.
  static const auto ask =
      torch_function<AOTITorchError(int32_t, void**)>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  if (ask == nullptr) throw std::runtime_error("torch's CUDA library, which knows the current stream, is not loaded");
  void* stream = nullptr;
  check_torch(ask(device, &stream), "aoti_torch_get_current_cuda_stream");
  return stream;
}

// Not linked, like the above.
TorchStreamGuard::TorchStreamGuard(void* stream, int device) {
  static const auto make =
      torch_function<AOTITorchError(void*, int32_t, void**)>("libtorch_cuda.so", "aoti_torch_create_cuda_stream_guard");
  if (make == nullptr) throw std::runtime_error("torch's CUDA library, which sets the current stream, is not loaded");
  check_torch(make(stream, device, &guard_), "aoti_torch_create_cuda_stream_guard");
}

TorchStreamGuard::~TorchStreamGuard() {
  static const auto end =
      torch_function<AOTITorchError(void*)>("libtorch_cuda.so", "aoti_torch_delete_cuda_stream_guard");
  if (end != nullptr) static_cast<void>(end(guard_));
}

Tensor device_bytes(size_t bytes, int device) {
  return empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device);
}

Tensor upload_bytes(const void* host, size_t bytes, int device) {
  const Tensor pinned =
      empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, true);
  std::memcpy(pinned.mutable_data_ptr(), host, bytes);
  Tensor uploaded = device_bytes(bytes, device);
  torch::stable::copy_(uploaded, pinned, true);
  return uploaded;
}

}  // namespace kvkernels
