// What the two halves of the stand-in for CUDA share: libcuda.so.1 holds all state, libcudart.so.13 forwards to it.
// "Device" memory is host memory; copies and kernels happen at once, and every call is recorded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <string>
#include <utility>

// Hidden by default, but these cross from one library to the other.
#pragma GCC visibility push(default)
namespace fake {

enum Memory { kPageable = 0, kPinned = 1, kDevice = 2, kManaged = 3 };

struct Allocation {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  int memory = kPageable;
  int device = -1;
  ptrdiff_t device_offset = 0;  // where a second mapping of pinned memory is, for the device
};

struct Stream {
  bool is_capturing = false;
};

std::recursive_mutex& mutex();

// Counts the call; the code it was told to fail with, or 0. Calls that start with "cuda" initialise the driver.
int enter(const char* call);

// Appends {"call": call, fields...} to the log; `name` and `list` (JSON) where they are not empty.
void log(const char* call, std::initializer_list<std::pair<const char*, int64_t>> fields, const std::string& name = "",
         const std::string& list = "");

// A function or kernel that the stand-in lacks: says so once, and gives "not supported".
int refuse_call(const char* call);

int64_t setting(const char* name);

// False where no allocation or registration holds the address.
bool find(uintptr_t address, Allocation& found);
void insert(const Allocation& allocation);
bool erase(uintptr_t begin, Allocation& erased);

// cudaErrorInvalidValue where a side of the copy crosses the end of an allocation or registration, else copies.
int copy(uintptr_t dst, uintptr_t src, size_t bytes);

bool is_legacy(const void* stream);
bool is_capturing(const void* stream);
bool any_capture();
void* make_stream();
bool destroy_stream(void* stream);

// A second mapping of shared memory, so that the device's address of it differs from the host's.
uintptr_t map_again(uintptr_t begin, size_t bytes);

using Runner = int (*)(const char* kernel, void** arguments, unsigned ctas, unsigned threads);
using ParameterBytes = size_t (*)(const char* kernel);
int launch(const char* kernel, void** arguments, unsigned ctas, unsigned threads, void* stream);

}  // namespace fake
#pragma GCC visibility pop
