// What the files of the stand-in's libcudart.so.13 share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "fake.h"

namespace fake {

// Makes `code` the thread's last error, unless it is none, and returns it.
cudaError_t done(int code);

int thread_capture_mode();

// KVKERNELS_FAKE_DEVICES, or 4096.
int device_count();

// Bytes of shared memory that a CTA may ask for: the setting "shared_bytes", or an H100's.
size_t shared_bytes();

// A function or kernel that the stand-in lacks: says so once, and gives cudaErrorNotSupported.
int refuse_runtime_call(const char* call);

// The one kernel of torch's that runs: torch 2.11 fills a generator's seed, an int64, before it begins a capture.
bool is_fill_of_integers(std::string_view kernel);
int fill_integers(void** arguments, cudaStream_t handle);

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace fake
