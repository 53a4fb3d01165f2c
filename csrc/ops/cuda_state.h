// What this process's CUDA says of itself; a build without CUDA code has the same functions (cuda_absent.cpp).
#pragma once

#include <string>
#include <vector>

#include "core/plan.h"

namespace kvkernels {

// Why the CUDA code of this library cannot run on the driver that is loaded; empty where it can, or where there is
// neither.
std::string driver_refusal();

// The device that copies between raw addresses are for; -1 where all are the host's. Throws where some are a device's,
// or may be, and CUDA does not serve.
int device_of_addresses(const char* op, const std::vector<Fragment>& fragments);

// {} or {"count": …, "first_row": …, "op": …}; synchronises, clears.
std::string take_fault_json(int device);

}  // namespace kvkernels
