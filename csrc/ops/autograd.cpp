#include "ops/autograd.h"

namespace kvkernels {
namespace {

// The stable ABI has none of this. Three functions of torch's C++ do, found by name: in all of 2.10 to 2.14, and a
// torch without them is asked through Python, which takes microseconds instead of nanoseconds. An AtenTensorHandle
// points to an at::Tensor, whose one member points to its TensorImpl.
struct TorchFunctions {
  bool (*requires_grad)(const void* impl);
  bool (*is_inference)(const void* tensor);
  void (*bump_version)(const void* tensor);

  bool are_there() const { return requires_grad != nullptr && is_inference != nullptr && bump_version != nullptr; }
};

const TorchFunctions& torch_functions() {
  static const TorchFunctions functions{
      torch_function<bool(const void*)>("libc10.so", "_ZNK3c1010TensorImpl13requires_gradEv"),
      torch_function<bool(const void*)>("libtorch_cpu.so", "_ZN2at6native12is_inferenceERKNS_6TensorE"),
      torch_function<void(const void*)>("libtorch_cpu.so", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE")};
  return functions;
}

const void* impl_of(const Tensor& tensor) { return *reinterpret_cast<const void* const*>(tensor.get()); }

int64_t first_requiring_grad(std::span<const Tensor> tensors) {
  const TorchFunctions& torch = torch_functions();
  if (!torch.are_there()) return call_first_requiring_grad({tensors.begin(), tensors.end()});
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (torch.requires_grad(impl_of(tensors[i]))) return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace

void check_may_write(const char* op, const char* list, bool is_list, std::span<const Tensor> written) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  const int64_t found = first_requiring_grad(written);
  if (found < 0) return;
  value_error(op, ": ", Name{list, is_list ? found : -1},
              " must not require a gradient where gradients are recorded, got a tensor that does; torch.no_grad() "
              "allows it");
}

void note_writes(std::span<const Tensor> written) {
  const TorchFunctions& torch = torch_functions();
  if (!torch.are_there()) return call_note_writes({written.begin(), written.end()});
  for (const Tensor& tensor : written) {
    if (!torch.is_inference(tensor.get())) torch.bump_version(tensor.get());
  }
}

}  // namespace kvkernels
