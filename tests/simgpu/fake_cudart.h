// What the files of the stand-in's libcudart.so.13 share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "fake.h"

namespace fake {

// Makes `code` the thread's last error, unless it is none, and returns it.
cudaError_t done(int code);

int thread_capture_mode();

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace fake
