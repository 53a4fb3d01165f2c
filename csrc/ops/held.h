// Tensors that somebody keeps for later: they are not freed, and what becomes of their memory is seen.
#pragma once

#include <vector>

#include "ops/stable_abi.h"

namespace kvkernels {

class Held {
 public:
  // `op` and `list` are what errors call them; `since` is when they were taken, and what to do about it.
  Held(const char* op, const char* list, bool is_list, bool written, std::vector<Tensor> tensors, const char* since);

  const std::vector<Tensor>& tensors() const { return tensors_; }

  // ValueError where one is no longer in the memory that it was in.
  void check() const;

 private:
  // Where a tensor's memory was.
  struct Memory {
    const void* data;
    int64_t storage_bytes;

    bool operator==(const Memory&) const = default;
  };
  Memory memory_of(const Tensor& tensor) const;

  const char* op_;
  const char* list_;
  bool is_list_;
  bool written_;
  const char* since_;
  std::vector<Tensor> tensors_;
  std::vector<Memory> memory_;
};

}  // namespace kvkernels
