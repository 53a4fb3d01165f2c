// Whether CUDA is in use, asked without its headers: a build without CUDA code has to know it, too.
#pragma once

#include <string>

namespace kvkernels {

// True only where this process has initialised CUDA already; never initialises it, so a call that concerns the CPU
// alone creates no context.
bool cuda_in_use();

// Why a kernel that gets the host's address of pinned memory could not use it; empty where it can, or where the driver
// of CUDA is not loaded. `writes`: whether the kernel would.
std::string host_address_refusal(const void* address, bool writes);

}  // namespace kvkernels
