#include "ops/held.h"

#include <utility>

namespace kvkernels {

Held::Held(const char* op, const char* list, bool is_list, bool written, std::vector<Tensor> tensors, const char* since)
    : op_(op), list_(list), is_list_(is_list), written_(written), since_(since), tensors_(std::move(tensors)) {
  memory_.reserve(tensors_.size());
  for (const Tensor& tensor : tensors_) memory_.push_back(memory_of(tensor));
}

// Opening a destination gives a copy-on-write storage that was shared since memory of its own: it moves.
Held::Memory Held::memory_of(const Tensor& tensor) const {
  return {written_ ? tensor.mutable_data_ptr() : tensor.const_data_ptr(), storage_bytes(tensor)};
}

void Held::check() const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (memory_of(tensors_[i]) == memory_[i]) [[likely]]
      continue;
    value_error(op_, ": ", Name{list_, is_list_ ? static_cast<int64_t>(i) : -1},
                " must be in the memory that it had when ", since_);
  }
}

}  // namespace kvkernels
