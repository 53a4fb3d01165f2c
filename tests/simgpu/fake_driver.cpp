// libcuda.so.1 of the stand-in: memory, streams, the log, failures on demand, and the driver functions in use.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <set>
#include <vector>

#include "fake.h"
#include "fake_graph.h"
#include "fake_time.h"

namespace fake {
namespace {

struct State {
  std::recursive_mutex mutex;
  bool is_initialised = false;
  int context_error = 0;
  std::map<uintptr_t, Allocation> allocations;
  std::map<int, Context> contexts;
  std::map<std::string, int64_t> settings;
  std::map<std::string, int64_t> calls;
  std::map<std::pair<std::string, int64_t>, int> failures;
  Counters counters;
  std::string log;
  std::string log_text;
  std::vector<std::string> parameters;
  Runner runner = nullptr;
  ParameterBytes parameter_bytes = nullptr;
};

State& state() {
  static State* const instance = new State;
  return *instance;
}

bool crosses(uintptr_t begin, size_t bytes) {
  Allocation found;
  if (find(begin, found)) return found.end - begin < bytes;
  const auto next = state().allocations.lower_bound(begin);
  return next != state().allocations.end() && next->first - begin < bytes;
}

bool is_on_device(uintptr_t address) {
  Allocation found;
  return find(address, found) && (found.memory == kDevice || found.memory == kManaged);
}

// Calls that work without a context, and so in spite of a broken one.
bool needs_context(const std::string& call) {
  static const std::set<std::string> kNeedNone{
      "cuCtxGetCurrent",
      "cuCtxSetCurrent",
      "cuDeviceGet",
      "cuDevicePrimaryCtxGetState",
      "cuDevicePrimaryCtxRetain",
      "cudaDeviceCanAccessPeer",
      "cudaDeviceGetAttribute",
      "cudaGetDevice",
      "cudaGetDeviceCount",
      "cudaGetDeviceProperties",
      "cudaGetDriverEntryPointByVersion",
      "cudaThreadExchangeStreamCaptureMode",
  };
  return kNeedNone.count(call) == 0;
}

thread_local int runtime_device = 0;

}  // namespace

std::recursive_mutex& mutex() { return state().mutex; }

Counters& counters() { return state().counters; }

Context* primary_context(int device) {
  Lock lock(mutex());
  return &state().contexts.try_emplace(device, Context{device}).first->second;
}

Context*& current_context() {
  thread_local Context* context = nullptr;
  return context;
}

int current_device() { return current_context() != nullptr ? current_context()->device : runtime_device; }

void set_device(int device) {
  runtime_device = device;
  current_context() = primary_context(device);
}

int enter(const char* call) {
  Lock lock(mutex());
  State& s = state();
  const bool is_runtime_call = std::strncmp(call, "cuda", 4) == 0;
  s.is_initialised = s.is_initialised || is_runtime_call;
  if (is_runtime_call && current_context() == nullptr && needs_context(call) &&
      std::strcmp(call, "cudaSetDevice") != 0) {
    current_context() = primary_context(runtime_device);
  }
  const int64_t k = ++s.calls[call];
  pass_time();
  if (s.context_error != 0 && needs_context(call)) return s.context_error;
  const auto failure = s.failures.find({call, k});
  if (failure == s.failures.end()) return 0;
  log(call, {{"failed", failure->second}});
  if (breaks_context(failure->second)) break_context(failure->second);
  return failure->second;
}

// Those of which the header says that they leave the process in an inconsistent state, and an uncorrectable ECC error.
bool breaks_context(int code) {
  switch (code) {
    case cudaErrorECCUncorrectable:
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

void break_context(int code) {
  Lock lock(mutex());
  if (state().context_error == 0) state().context_error = code;
  forget_operations();
}

int context_error() {
  Lock lock(mutex());
  return state().context_error;
}

void log(const char* call, std::initializer_list<std::pair<const char*, int64_t>> fields, const std::string& name,
         const std::string& list) {
  Lock lock(mutex());
  std::string& text = state().log;
  text += text.empty() ? "{" : ",\n{";
  text += "\"call\": \"" + std::string(call) + "\"";
  for (const auto& [key, value] : fields) text += ", \"" + std::string(key) + "\": " + std::to_string(value);
  if (!name.empty()) text += ", \"name\": \"" + name + "\"";
  if (!list.empty()) text += ", \"copies\": " + list;
  text += "}";
}

int64_t setting(const char* name) {
  Lock lock(mutex());
  const auto found = state().settings.find(name);
  return found == state().settings.end() ? 0 : found->second;
}

bool find(uintptr_t address, Allocation& found) {
  Lock lock(mutex());
  auto after = state().allocations.upper_bound(address);
  if (after == state().allocations.begin()) return false;
  found = std::prev(after)->second;
  return address < found.end;
}

void insert(const Allocation& allocation) {
  Lock lock(mutex());
  state().allocations[allocation.begin] = allocation;
}

bool erase(uintptr_t begin, Allocation& erased) {
  Lock lock(mutex());
  const auto found = state().allocations.find(begin);
  if (found == state().allocations.end()) return false;
  erased = found->second;
  state().allocations.erase(found);
  return true;
}

uintptr_t behind_device_address(uintptr_t address) {
  Lock lock(mutex());
  Allocation found;
  if (find(address, found) && found.memory != kPageable && found.device_offset == 0) return address;
  for (const auto& [at, allocation] : state().allocations) {
    const uintptr_t shift = static_cast<uintptr_t>(allocation.device_offset);
    if (shift != 0 && address >= at + shift && address < allocation.end + shift) return address - shift;
  }
  return 0;
}

bool is_bad_copy(uintptr_t dst, uintptr_t src, size_t bytes) {
  Lock lock(mutex());
  return bytes == 0 || crosses(dst, bytes) || crosses(src, bytes);
}

void count_copy(uintptr_t dst, uintptr_t src, size_t bytes) {
  Lock lock(mutex());
  ++state().counters.descriptors;
  state().counters.bytes[is_on_device(src)][is_on_device(dst)] += static_cast<int64_t>(bytes);
}

uintptr_t map_again(uintptr_t begin, size_t bytes) {
  void* second = mremap(reinterpret_cast<void*>(begin), 0, bytes, MREMAP_MAYMOVE);
  return second == MAP_FAILED ? 0 : reinterpret_cast<uintptr_t>(second);
}

int launch(const char* kernel, void** arguments, unsigned ctas, unsigned threads, size_t shared_bytes, void* stream) {
  Lock lock(mutex());
  State& s = state();
  Stream* const found = find_stream(stream);
  if (found == nullptr || found->device != current_device()) return cudaErrorInvalidResourceHandle;
  if (const int code = refusal(*found)) return code;
  std::vector<std::string> values;
  if (s.parameter_bytes != nullptr) {
    for (size_t bytes; (bytes = s.parameter_bytes(kernel, values.size())) > 0;) {
      values.emplace_back(static_cast<const char*>(arguments[values.size()]), bytes);
    }
  }
  s.parameters.push_back(values.empty() ? "" : values[0]);
  ++s.counters.launches;
  const auto run = [name = std::string(kernel), values, ctas, threads, shared_bytes, runner = s.runner]() mutable {
    std::vector<void*> pointers;
    for (std::string& value : values) pointers.push_back(value.data());
    return runner == nullptr ? 0 : runner(name.c_str(), pointers.data(), ctas, threads, shared_bytes);
  };
  log("launch",
      {{"ctas", ctas},
       {"threads", threads},
       {"shared_bytes", static_cast<int64_t>(shared_bytes)},
       {"device", current_device()},
       {"stream", reinterpret_cast<intptr_t>(stream)},
       {"capturing", is_capturing(*found)},
       {"parameter_bytes", static_cast<int64_t>(s.parameters.back().size())},
       {"index", static_cast<int64_t>(s.parameters.size()) - 1},
       {"operation", upcoming_operation()}},
      kernel);
  return submit(*found, {.kind = "launch", .action = run});
}

}  // namespace fake

using namespace fake;

EXPORT void fake_reset() {
  Lock lock(mutex());
  forget_operations();
  set_seed(0);
  state().context_error = 0;
  state().settings.clear();
  state().calls.clear();
  state().failures.clear();
  state().counters = {};
  state().log.clear();
  state().parameters.clear();
  for (Stream* stream : streams()) {
    stream->is_declared_capturing = false;
    stream->capture = nullptr;
  }
}

EXPORT void fake_set(const char* name, int64_t value) {
  Lock lock(mutex());
  state().settings[name] = value;
}

// The k-th call of that name from now on (1 is the next) returns `code`.
EXPORT void fake_fail(const char* call, int64_t k, int code) {
  Lock lock(mutex());
  state().failures[{call, state().calls[call] + k}] = code;
}

EXPORT void fake_fail_no_more() {
  Lock lock(mutex());
  state().failures.clear();
}

EXPORT int64_t fake_calls(const char* call) {
  Lock lock(mutex());
  return state().calls[call];
}

EXPORT const char* fake_log() {
  Lock lock(mutex());
  state().log_text = "[" + state().log + "]";
  return state().log_text.c_str();
}

EXPORT void fake_clear_log() {
  Lock lock(mutex());
  state().log.clear();
  state().parameters.clear();
}

EXPORT int64_t fake_parameters(int64_t index, void* out, int64_t capacity) {
  Lock lock(mutex());
  if (index < 0 || index >= static_cast<int64_t>(state().parameters.size())) return -1;
  const std::string& bytes = state().parameters[static_cast<size_t>(index)];
  std::memcpy(out, bytes.data(), std::min<size_t>(bytes.size(), static_cast<size_t>(capacity)));
  return static_cast<int64_t>(bytes.size());
}

EXPORT void fake_set_runner(Runner runner, ParameterBytes parameter_bytes) {
  Lock lock(mutex());
  state().runner = runner;
  state().parameter_bytes = parameter_bytes;
}

EXPORT void fake_set_capturing(void* stream, int is_capturing) {
  Lock lock(mutex());
  static_cast<Stream*>(stream)->is_declared_capturing = is_capturing != 0;
}

// Declares any memory of the test's to be of a kind; fake_forget undoes it.
EXPORT void fake_adopt(uintptr_t begin, int64_t bytes, int memory, int device, int64_t device_offset) {
  insert({begin, begin + static_cast<uintptr_t>(bytes), memory, device, device_offset, false});
}

EXPORT int fake_forget(uintptr_t begin) {
  Allocation erased;
  return erase(begin, erased) ? 1 : 0;
}

EXPORT int64_t fake_allocations() {
  Lock lock(mutex());
  return static_cast<int64_t>(state().allocations.size());
}

// Rows of begin, end, kind, device and the distance of the device's mapping; returns how many there are.
EXPORT int64_t fake_list_allocations(int64_t* rows, int64_t capacity) {
  Lock lock(mutex());
  int64_t count = 0;
  for (const auto& [at, allocation] : state().allocations) {
    if (count < capacity) {
      const int64_t row[] = {static_cast<int64_t>(at), static_cast<int64_t>(allocation.end), allocation.memory,
                             allocation.device, static_cast<int64_t>(allocation.device_offset)};
      std::memcpy(rows + 5 * count, row, sizeof row);
    }
    ++count;
  }
  return count;
}

EXPORT int64_t fake_streams() {
  Lock lock(mutex());
  return static_cast<int64_t>(streams().size());
}

// The fields of Counters, in their order.
EXPORT void fake_counters(int64_t* out) {
  Lock lock(mutex());
  std::memcpy(out, &counters(), sizeof(Counters));
}

// The end of the memory round `address` that a kernel may touch; 0 where it may not.
EXPORT uintptr_t fake_kernel_reach(uintptr_t address, uintptr_t* begin) {
  Lock lock(mutex());
  Allocation found;
  if (find(address, found)) {
    if (found.memory == kPinned && found.device_offset != 0) return 0;
    *begin = found.begin;
    return found.end;
  }
  for (const auto& [at, allocation] : state().allocations) {
    const uintptr_t shift = static_cast<uintptr_t>(allocation.device_offset);
    if (allocation.memory != kPinned || shift == 0) continue;
    if (address >= at + shift && address < allocation.end + shift) {
      *begin = at + shift;
      return allocation.end + shift;
    }
  }
  if (setting("pageable_access") == 0) return 0;
  const auto next = state().allocations.lower_bound(address);
  *begin = address;
  return next == state().allocations.end() ? UINTPTR_MAX : next->first;
}

EXPORT int64_t fake_contexts() {
  Lock lock(mutex());
  return static_cast<int64_t>(state().contexts.size());
}

EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  Lock lock(mutex());
  if (const int code = enter("cuCtxGetCurrent")) return static_cast<CUresult>(code);
  *context = reinterpret_cast<CUcontext>(current_context());
  return state().is_initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  Lock lock(mutex());
  if (const int code = enter("cuCtxSetCurrent")) return static_cast<CUresult>(code);
  current_context() = reinterpret_cast<Context*>(context);
  return CUDA_SUCCESS;
}

// Another thing than what the runtime's function says here: torch's runtime is as old as its driver, and ours is not.
EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = setting("driver_version") != 0 ? static_cast<int>(setting("driver_version")) : CUDA_VERSION;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (const int code = enter("cuDeviceGet")) return static_cast<CUresult>(code);
  *device = ordinal;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (const int code = enter("cuDevicePrimaryCtxRetain")) return static_cast<CUresult>(code);
  *context = reinterpret_cast<CUcontext>(primary_context(device));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* is_active) {
  Lock lock(mutex());
  if (const int code = enter("cuDevicePrimaryCtxGetState")) return static_cast<CUresult>(code);
  *flags = 0;
  *is_active = state().contexts.count(device) != 0;
  return CUDA_SUCCESS;
}

namespace {
// Where memory is for the current context's device, and what that may do with it.
bool is_of_a_context(CUpointer_attribute attribute) {
  return attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER || attribute == CU_POINTER_ATTRIBUTE_ACCESS_FLAGS;
}

bool is_of_unknown_range(const Allocation& found) { return found.memory == kPinned && setting("unknown_ranges") != 0; }
}  // namespace

EXPORT CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  Lock lock(mutex());
  if (const int code = enter("cuPointerGetAttribute")) return static_cast<CUresult>(code);
  Allocation found;
  if (!find(pointer, found) || found.memory == kPageable) return CUDA_ERROR_INVALID_VALUE;
  if (is_of_a_context(attribute) && current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *static_cast<CUdeviceptr*>(data) = pointer + static_cast<uintptr_t>(found.device_offset);
    return CUDA_SUCCESS;
  }
  if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
    *static_cast<unsigned*>(data) = found.memory == kPinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
  }
  if (attribute != CU_POINTER_ATTRIBUTE_ACCESS_FLAGS) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<unsigned*>(data) =
      found.is_read_only ? CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READ : CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE;
  return CUDA_SUCCESS;
}

EXPORT CUresult fake_cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data,
                                            CUdeviceptr pointer) {
  Lock lock(mutex());
  if (const int code = enter("cuPointerGetAttributes")) return static_cast<CUresult>(code);
  Allocation found;
  if (!find(pointer, found)) found = Allocation{};
  for (unsigned i = 0; i < count; ++i) {
    if (is_of_a_context(attributes[i]) && current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    switch (attributes[i]) {
      case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *static_cast<unsigned*>(data[i]) = found.memory == kPageable ? 0
                                           : found.memory == kPinned ? CU_MEMORYTYPE_HOST
                                                                     : CU_MEMORYTYPE_DEVICE;
        break;
      case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        *static_cast<unsigned*>(data[i]) = found.memory == kManaged;
        break;
      case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *static_cast<int*>(data[i]) = found.device;
        break;
      case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        *static_cast<CUdeviceptr*>(data[i]) = found.memory == kPageable || setting("unmapped") != 0
                                                  ? 0
                                                  : pointer + static_cast<uintptr_t>(found.device_offset);
        break;
      // What lies round the device's address of pinned memory, or nothing, are answers too.
      case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        *static_cast<CUdeviceptr*>(data[i]) =
            is_of_unknown_range(found) ? 0 : found.begin + static_cast<uintptr_t>(found.device_offset);
        break;
      case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        *static_cast<size_t*>(data[i]) = is_of_unknown_range(found) ? 0 : found.end - found.begin;
        break;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult fake_cuMemcpyBatchAsync(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count,
                                        CUmemcpyAttributes* attributes, size_t* attribute_indices,
                                        size_t attribute_count, size_t* failed, CUstream stream) {
  Lock lock(mutex());
  if (const int code = enter("cuMemcpyBatchAsync")) {
    *failed = static_cast<size_t>(setting("failed_index"));
    return static_cast<CUresult>(code);
  }
  if (setting("batch_refuses") != 0) return CUDA_ERROR_NOT_SUPPORTED;
  Stream* const found = find_stream(stream);
  if (found == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  std::string list = "[";
  for (size_t i = 0; i < count; ++i) {
    list += (i == 0 ? "[" : ", [") + std::to_string(dsts[i]) + ", " + std::to_string(srcs[i]) + ", " +
            std::to_string(sizes[i]) + "]";
  }
  const int order = attribute_count > 0 ? attributes[0].srcAccessOrder : -1;
  log("cuMemcpyBatchAsync",
      {{"count", static_cast<int64_t>(count)},
       {"device", current_device()},
       {"stream", reinterpret_cast<intptr_t>(stream)},
       {"order", order},
       {"attributes", static_cast<int64_t>(attribute_count)},
       {"first_index", attribute_count > 0 ? static_cast<int64_t>(attribute_indices[0]) : -1},
       {"operation", upcoming_operation()}},
      "", list + "]");
  if (is_capturing(*found)) return static_cast<CUresult>(refuse_to_wait(*found));
  if (found->is_legacy || count == 0 || attribute_count != 1) return CUDA_ERROR_INVALID_VALUE;
  if (order < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || order > CU_MEMCPY_SRC_ACCESS_ORDER_ANY) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Work work{.kind = "batch"};
  work.reads = order == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ? Reads::kInTurn
               : order == CU_MEMCPY_SRC_ACCESS_ORDER_ANY  ? Reads::kAnyTime
                                                          : Reads::kDuringCall;
  for (size_t i = 0; i < count; ++i) {
    const uintptr_t dst = behind_device_address(dsts[i]);
    const uintptr_t src = behind_device_address(srcs[i]);
    *failed = i;
    if (dst == 0 || src == 0 || is_bad_copy(dst, src, sizes[i])) return CUDA_ERROR_INVALID_VALUE;
    work.copies.push_back({dst, src, sizes[i]});
  }
  *failed = SIZE_MAX;
  ++counters().copy_calls;
  for (const Copy& copy : work.copies) count_copy(copy.dst, copy.src, copy.bytes);
  return static_cast<CUresult>(submit(*found, std::move(work)));
}
