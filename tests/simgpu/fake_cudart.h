// What the files of the stand-in's libcudart.so.13 share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

// Makes `code` the thread's last error, unless it is 0, and returns it.
cudaError_t done(int code);

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace fake
