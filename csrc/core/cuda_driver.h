// What the driver says without CUDA's runtime, which may be too new for it, and without its headers: a build without
// CUDA code has to know some of it, too.
#pragma once

#include <string>

namespace kvkernels {

// True only where this process has initialised CUDA already; never initialises it, so a call that concerns the CPU
// alone creates no context.
bool cuda_in_use();

// The CUDA version that the driver is for, 12040 for 12.4; 0 where none is loaded.
int cuda_driver_version();

// Whether the byte there is on a device, or may go there by itself.
bool is_on_device(const void* address);

// Why a kernel that gets the host's address of pinned memory could not use it; empty where it can, or where the driver
// of CUDA is not loaded. `writes`: whether the kernel would.
std::string host_address_refusal(const void* address, bool writes);

}  // namespace kvkernels
