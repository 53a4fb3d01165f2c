// What the ops ask of the CUDA floor; a build without CUDA has the same functions, which raise.
#pragma once

#include <string>

#include "ops/copy_call.h"

namespace kvkernels {

// A call with a tensor on a CUDA device. `list` is empty where the ids live on the device.
void carry_out_on_cuda(const CopyCall& call, std::vector<Move> moves, PairList list);

// Why the CUDA code of this library cannot run on the driver that is loaded; empty where it can, or where there is
// neither.
std::string driver_refusal();

// True where raw addresses may be the device's: this process has initialised CUDA.
bool addresses_may_be_cuda();

// swap_blocks_batch's checked copies.
struct AddressCall {
  const char* op;
  std::vector<Fragment> fragments;
  Executor executor = Executor::kAuto;
  int64_t sm_budget = 0;
  bool any_source_order = false;
};

// False, with nothing done, where all addresses are the host's.
bool carry_out_addresses_on_cuda(const AddressCall& call);

// For the executors that need tensors.
[[noreturn]] void refuse_addresses(const char* op, Executor executor);

// {} or {"count": …, "first_row": …, "op": …}; synchronises, clears.
std::string take_fault_json(int device);

}  // namespace kvkernels
