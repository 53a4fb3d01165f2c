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

// swap_blocks_batch's addresses on a device; false where all of them are the host's.
bool carry_out_fragments_on_cuda(const char* op, const std::vector<Fragment>& fragments, bool any_source_order);

// {} or {"count": …, "first_row": …, "op": …}; synchronises, clears.
std::string take_fault_json(int device);

}  // namespace kvkernels
