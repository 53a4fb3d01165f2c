// What autograd has to know of an op that writes: it compares a tensor's version with the one it saved for backward.
#pragma once

#include <span>

#include "ops/stable_abi.h"

namespace kvkernels {

// ValueError where gradients are recorded and a tensor to be written requires one: its value would come from nowhere.
void check_may_write(const char* op, const char* list, bool is_list, std::span<const Tensor> written);

// A new version of each tensor; inference tensors have none.
void note_writes(std::span<const Tensor> written);

}  // namespace kvkernels
