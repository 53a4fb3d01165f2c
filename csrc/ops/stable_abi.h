// Everything that is odd about the LibTorch stable ABI stands here; nothing else under csrc/ includes torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/text.h"

namespace kvkernels {

using torch::stable::Tensor;

// A function of one of torch's loaded libraries by its name, which a torch may lack; null where it does. The dynamic
// linker shows these libraries to nobody who was not linked with them.
void* torch_symbol(const char* library, const char* name);

template <class Function>
Function* torch_function(const char* library, const char* name) {
  return reinterpret_cast<Function*>(torch_symbol(library, name));
}

// A str argument as the dispatcher hands it over. torch's own unboxing to std::string is code of its headers, and
// before 2.14 it leaves a string behind at each call.
struct StrArgument {
  StringHandle handle;

  std::string take() const;  // once: frees what the dispatcher made
};

// What an op returns instead of a string: its bytes, uint8 on the CPU. torch before 2.14 never frees a returned string.
Tensor text_tensor(const std::string& value);

// The sizes or the strides of a tensor. A call reads those of hundreds of pools, and a vector for each would take
// longer than everything else that is asked about a pool.
class Extents {
 public:
  Extents() = default;
  explicit Extents(const torch::headeronly::IntHeaderOnlyArrayRef& values);

  int64_t count() const { return count_; }
  int64_t operator[](int64_t i) const { return count_ <= kInside ? inside_[i] : outside_[static_cast<size_t>(i)]; }
  std::vector<int64_t> list() const;

 private:
  static constexpr int64_t kInside = 6;
  int64_t count_ = 0;
  int64_t inside_[kInside];
  std::vector<int64_t> outside_;
};

// A tensor's metadata, read once. Errors are ours to word: STD_TORCH_CHECK would make each a RuntimeError that shows
// the build's paths, typed data pointers throw with a header's path, and a failing shim call prints a backtrace, so
// nothing here may fail for a strided tensor.
class TensorFacts {
 public:
  explicit TensorFacts(const Tensor& tensor);

  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  bool is_quantized() const { return dtype_text().front() == 'q'; }
  bool is_strided() const { return layout_ == aoti_torch_layout_strided(); }
  int device_index() const { return device_index_; }
  int32_t dtype() const { return dtype_; }
  int64_t element_bytes() const { return element_bytes_; }
  int64_t dim() const { return sizes_.count(); }
  int64_t size(int64_t dim) const { return sizes_[dim]; }
  int64_t stride(int64_t dim) const { return strides_[dim]; }
  std::vector<int64_t> sizes() const { return sizes_.list(); }
  int64_t numel() const;
  bool is_empty_from(int64_t dim) const;       // some size, from dimension dim inwards, is 0
  bool is_contiguous_from(int64_t dim) const;  // dimensions dim and inwards, sizes of 1 aside
  bool is_dense_from(int64_t dim) const;       // the same, in any order of those dimensions
  int64_t span_bytes() const;                  // from the first element's byte to the last one's end; 0 if empty
  bool memory_is_there() const;                // the span lies inside the storage (resize_(0) frees it)

  std::string device_text() const;
  std::string dtype_text() const;
  std::string layout_text() const;
  std::string shape_text() const { return list_text(sizes_.list()); }
  std::string strides_text() const { return list_text(strides_.list()); }

 private:
  int32_t device_type_ = 0;
  int32_t device_index_ = 0;
  int32_t dtype_ = 0;
  int32_t layout_ = 0;
  int64_t element_bytes_ = 0;
  int64_t storage_offset_ = 0;
  int64_t storage_bytes_ = 0;
  Extents sizes_;
  Extents strides_;
};

int64_t storage_bytes(const Tensor& tensor);

// A tensor without elements may claim any sizes: what they come to is INT64_MAX where it does not fit.
int64_t saturating_product(int64_t a, int64_t b);
int64_t saturating_sum(int64_t a, int64_t b);

// at::parallel_for as the CPU executor wants it.
void parallel_lanes(int lanes, void* context, void (*body)(void* context, int lane));

// kvkernels::_copy_pages_reference, which Python registers. An error crossing it would lose its type: check first.
void call_reference(const std::vector<Tensor>& src, const std::vector<Tensor>& dst, const Tensor& mapping,
                    const Tensor& runs, int64_t src_subblocks, int64_t dst_subblocks, bool skip_negative);

// The same for those of other ops, kvkernels::_swap_blocks_reference and so on, with these ops' own arguments.
void call_swap_reference(const Tensor& src, const Tensor& dst, int64_t block_bytes, const Tensor& mapping);
void call_concat_reference(const std::vector<Tensor>& shards, int64_t dim, const Tensor& out);
void call_split_reference(const Tensor& input, int64_t dim, const std::vector<Tensor>& out);

// The same for kvkernels::_swap_blocks_batch_reference: a row of int64 a copy, source and destination address, bytes.
void call_batch_reference(const Tensor& copies);

// kvkernels::_first_requiring_grad and kvkernels::_note_writes of Python, for a torch that csrc/ops/autograd.cpp does
// not know.
int64_t call_first_requiring_grad(const std::vector<Tensor>& tensors);
void call_note_writes(const std::vector<Tensor>& tensors);

// kvkernels::_peer_refusal, which Python registers: why kernels on `device` cannot reach the memory of `peer`, and
// empty where they can, from then on if it `enables`.
std::string call_peer_refusal(int64_t device, int64_t peer, bool enables);

// kvkernels::_triton_refusal and kvkernels::_triton_copy, which Python registers, too.
std::string call_triton_refusal(int64_t device);
void call_triton_copy(const Tensor& table, const std::vector<int64_t>& head);

// Whether a tensor on the CPU lies in page-locked memory.
bool is_pinned(const Tensor& tensor);

// An int64 tensor on the CPU holding `values`, row-major.
Tensor int64_tensor(const std::vector<int64_t>& sizes, const int64_t* values);

// The current stream of a CUDA device as a cudaStream_t. (Stream::id() is not one.)
void* current_stream(int device);

// Until it goes out of scope, the current stream of a CUDA device on this thread, which may be none of torch's own. The
// device must be current. Throws std::runtime_error.
class TorchStreamGuard {
 public:
  TorchStreamGuard(void* stream, int device);
  ~TorchStreamGuard();
  TorchStreamGuard(const TorchStreamGuard&) = delete;
  TorchStreamGuard& operator=(const TorchStreamGuard&) = delete;

 private:
  void* guard_ = nullptr;
};

// Uninitialised bytes on `device`, of the current stream's: given back, they are handed out again behind its work.
Tensor device_bytes(size_t bytes, int device);

// Host bytes in pinned memory copied to `device` in its current stream's order. torch's host allocator frees the pinned
// side once the copy has passed; a raw copy from a temporary would race with it.
Tensor upload_bytes(const void* host, size_t bytes, int device);

}  // namespace kvkernels
