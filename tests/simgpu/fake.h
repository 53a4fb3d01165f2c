// What the two halves of the stand-in for CUDA share: libcuda.so.1 holds all state, libcudart.so.13 forwards to it.
// "Device" memory is host memory, and every call is recorded. fake_time.h says when the work that was asked for
// happens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <string>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

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
  bool is_read_only = false;    // for the device
};

// What was asked for since the last reset. Bytes are indexed by whether the source and the destination are on a device.
struct Counters {
  int64_t launches = 0;
  int64_t copy_calls = 0;
  int64_t descriptors = 0;  // copies that those calls were told of
  int64_t bytes[2][2] = {};
  int64_t staged_copies = 0;  // from pageable memory: read before the call returns, which need not wait for the stream
  int64_t stream_synchronisations = 0;
  int64_t device_synchronisations = 0;
  int64_t event_synchronisations = 0;
  int64_t hidden_synchronisations = 0;  // cudaMemcpy, copies to pageable memory, and giving memory back
};

std::recursive_mutex& mutex();
using Lock = std::lock_guard<std::recursive_mutex>;

Counters& counters();

// A device's primary context: hundreds of megabytes on a real one, from the first call that needs it to the end.
struct Context {
  int device;
};
Context* primary_context(int device);

// The calling thread's; null where it has none.
Context*& current_context();

// That context's device. Without one: the device that the runtime would make one on.
int current_device();

// The runtime's way to change it, which makes a context there.
void set_device(int device);

// Counts the call and lets time pass. The code it was told to fail with, or that the context is broken with; else 0.
// Calls that start with "cuda" initialise the driver, and most make a context for a thread that has none.
int enter(const char* call);

// After these codes nothing works any more.
bool breaks_context(int code);
void break_context(int code);
int context_error();

// Appends {"call": call, fields...} to the log; `name` and `list` (JSON) where they are not empty.
void log(const char* call, std::initializer_list<std::pair<const char*, int64_t>> fields, const std::string& name = "",
         const std::string& list = "");

// A function or kernel that the stand-in lacks: says so once, and gives "not supported".
int refuse_call(const char* call);

// What the calling thread was refused last.
const std::string& last_refusal();

int64_t setting(const char* name);

// False where no allocation or registration holds the address.
bool find(uintptr_t address, Allocation& found);
void insert(const Allocation& allocation);
bool erase(uintptr_t begin, Allocation& erased);

// Where the memory is that the device sees at the address; 0 where it sees none there. The host's address of pinned
// memory that has another for the device is none of the device's.
uintptr_t behind_device_address(uintptr_t address);

// Whether either side of the copy is empty or crosses the end of an allocation or registration.
bool is_bad_copy(uintptr_t dst, uintptr_t src, size_t bytes);

// Adds the copy to the counters.
void count_copy(uintptr_t dst, uintptr_t src, size_t bytes);

// A second mapping of shared memory, so that the device's address of it differs from the host's.
uintptr_t map_again(uintptr_t begin, size_t bytes);

// Runs a kernel with so many bytes of dynamic shared memory; and says how many bytes its parameter number `index` has,
// 0 past the last.
using Runner = int (*)(const char* kernel, void** arguments, unsigned ctas, unsigned threads, size_t shared_bytes);
using ParameterBytes = size_t (*)(const char* kernel, size_t index);
int launch(const char* kernel, void** arguments, unsigned ctas, unsigned threads, size_t shared_bytes, void* stream);

}  // namespace fake
#pragma GCC visibility pop
