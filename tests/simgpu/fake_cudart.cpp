// libcudart.so.13 of the stand-in: the runtime functions that csrc/cuda calls, and what nvcc's host stubs register
// with.
#include "fake_cudart.h"

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

extern "C" CUresult fake_cuPointerGetAttributes(unsigned, CUpointer_attribute*, void**, CUdeviceptr);
extern "C" CUresult fake_cuMemcpyBatchAsync(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*, size_t*,
                                            size_t, size_t*, CUstream);

namespace {

using fake::address;
using fake::Allocation;
using fake::Counters;
using fake::current_device;
using fake::done;
using fake::Lock;
using fake::Stream;

thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

std::map<const void*, std::string>& kernels() {
  static auto* const instance = new std::map<const void*, std::string>;
  return *instance;
}

// Dynamic shared memory that a launch may have: more than the first only by a kernel's attribute on each device.
constexpr size_t kSharedBytes = 48 << 10;

std::map<std::pair<const void*, int>, size_t>& shared_limits() {
  static auto* const instance = new std::map<std::pair<const void*, int>, size_t>;
  return *instance;
}

// Calls that no thread may make while a stream captures, unless the thread said that it knows.
bool breaks_capture() { return fake::forbids_unsafe_call(capture_mode); }

cudaError_t allocate(const char* call, void** out, size_t bytes, int memory) {
  if (const int code = fake::enter(call)) return done(code);
  if (breaks_capture()) return done(cudaErrorStreamCaptureUnsupported);
  const size_t rounded = (bytes + 4095) / 4096 * 4096;
  void* at = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return done(cudaErrorMemoryAllocation);
  Allocation allocation{address(at), address(at) + bytes, memory, current_device()};
  if (memory == fake::kPinned && fake::setting("device_addresses_differ") != 0) {
    allocation.device_offset = static_cast<ptrdiff_t>(fake::map_again(allocation.begin, rounded) - allocation.begin);
  }
  // Fresh device memory is not zero.
  if (memory == fake::kDevice) std::memset(at, 0xA5, rounded < (1u << 20) ? rounded : 1u << 20);
  fake::insert(allocation);
  *out = at;
  return done(0);
}

// Frees in spite of an error: what could not be given back is not the caller's any more.
cudaError_t release(const char* call, void* pointer) {
  Lock lock(fake::mutex());
  const int code = fake::enter(call);
  Allocation erased;
  if (pointer == nullptr) return done(code);
  ++fake::counters().hidden_synchronisations;
  fake::find(address(pointer), erased);
  const int after = erased.memory == fake::kPinned ? fake::finish_everything() : fake::finish_device(erased.device);
  if (!fake::erase(address(pointer), erased)) return done(cudaErrorInvalidValue);
  munmap(pointer, (erased.end - erased.begin + 4095) / 4096 * 4096);
  return done(code != 0 ? code : after);
}

bool is_pageable(uintptr_t at) {
  Allocation found;
  return !fake::find(at, found) || found.memory == fake::kPageable;
}

// A plain copy takes either address of pinned memory.
uintptr_t behind(const void* pointer) {
  const uintptr_t seen = fake::behind_device_address(address(pointer));
  return seen != 0 ? seen : address(pointer);
}

// A copy from pageable memory has read it when the call returns, and one to pageable memory is complete then.
cudaError_t copy(const char* call, void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, void* handle,
                 bool is_synchronous) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter(call)) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  fake::log(call, {{"dst", static_cast<int64_t>(address(dst))},
                   {"src", static_cast<int64_t>(address(src))},
                   {"bytes", static_cast<int64_t>(bytes)},
                   {"kind", kind},
                   {"device", current_device()},
                   {"stream", reinterpret_cast<intptr_t>(handle)},
                   {"capturing", fake::is_capturing(*stream)},
                   {"operation", fake::upcoming_operation()}});
  if (const int code = fake::refusal(*stream)) return done(code);
  const uintptr_t to = behind(dst);
  const uintptr_t from = behind(src);
  if (fake::is_bad_copy(to, from, bytes)) return done(cudaErrorInvalidValue);
  Counters& counters = fake::counters();
  ++counters.copy_calls;
  fake::count_copy(to, from, bytes);
  fake::Work work{.kind = call, .copies = {{to, from, bytes}}};
  if (is_pageable(from)) work.reads = fake::Reads::kDuringCall;
  int64_t id = 0;
  const bool is_recorded = stream->capture != nullptr;
  const int code = fake::submit(*stream, std::move(work), &id);
  if (is_recorded || code != 0) return done(code);
  if (is_synchronous || is_pageable(to)) {
    ++counters.hidden_synchronisations;
    return done(fake::finish(id));
  }
  if (is_pageable(from)) ++counters.staged_copies;
  return done(0);
}

}  // namespace

cudaError_t fake::done(int code) {
  // "Not actually an error".
  if (code != 0 && code != cudaErrorNotReady) last_error = static_cast<cudaError_t>(code);
  return static_cast<cudaError_t>(code);
}

int fake::thread_capture_mode() { return capture_mode; }

EXPORT cudaError_t cudaMalloc(void** out, size_t bytes) { return allocate("cudaMalloc", out, bytes, fake::kDevice); }
EXPORT cudaError_t cudaFree(void* pointer) { return release("cudaFree", pointer); }
EXPORT cudaError_t cudaFreeHost(void* pointer) { return release("cudaFreeHost", pointer); }

EXPORT cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  return allocate("cudaHostAlloc", out, bytes, fake::kPinned);
}

EXPORT cudaError_t cudaMallocManaged(void** out, size_t bytes, unsigned) {
  return allocate("cudaMallocManaged", out, bytes, fake::kManaged);
}

EXPORT cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned flags) {
  if (const int code = fake::enter("cudaHostRegister")) return done(code);
  Allocation found;
  if (fake::find(address(pointer), found)) return done(cudaErrorHostMemoryAlreadyRegistered);
  found = {address(pointer), address(pointer) + bytes, fake::kPinned, current_device()};
  found.is_read_only = (flags & cudaHostRegisterReadOnly) != 0;
  if (fake::setting("device_addresses_differ") != 0) {
    const uintptr_t second = fake::map_again(found.begin, bytes);
    if (second == 0) return done(cudaErrorInvalidValue);
    found.device_offset = static_cast<ptrdiff_t>(second - found.begin);
  }
  fake::insert(found);
  return done(0);
}

EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaHostUnregister")) return done(code);
  ++fake::counters().hidden_synchronisations;
  const int code = fake::finish_everything();
  Allocation erased;
  return done(fake::erase(address(pointer), erased) ? code : cudaErrorHostMemoryNotRegistered);
}

EXPORT cudaError_t cudaHostGetDevicePointer(void** out, void* pointer, unsigned) {
  if (const int code = fake::enter("cudaHostGetDevicePointer")) return done(code);
  Allocation found;
  if (!fake::find(address(pointer), found) || found.memory != fake::kPinned) return done(cudaErrorInvalidValue);
  *out = static_cast<char*>(pointer) + found.device_offset;
  return done(0);
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  if (const int code = fake::enter("cudaPointerGetAttributes")) return done(code);
  Allocation found;
  *out = cudaPointerAttributes{};
  out->device = -1;
  if (!fake::find(address(pointer), found)) return done(0);
  out->type = found.memory == fake::kPinned   ? cudaMemoryTypeHost
              : found.memory == fake::kDevice ? cudaMemoryTypeDevice
                                              : cudaMemoryTypeManaged;
  out->device = found.device;
  char* seen = static_cast<char*>(const_cast<void*>(pointer));
  out->hostPointer = found.memory == fake::kDevice ? nullptr : seen;
  out->devicePointer = fake::setting("unmapped") != 0 ? nullptr : seen + found.device_offset;
  return done(0);
}

EXPORT cudaError_t cudaMemcpy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind) {
  if (breaks_capture()) return done(cudaErrorStreamCaptureImplicit);
  return copy("cudaMemcpy", dst, src, bytes, kind, nullptr, true);
}

EXPORT cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy("cudaMemcpyAsync", dst, src, bytes, kind, stream, false);
}

EXPORT cudaError_t cudaMemsetAsync(void* dst, int value, size_t bytes, cudaStream_t handle) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaMemsetAsync")) return done(code);
  Stream* const stream = fake::find_stream(handle);
  if (stream == nullptr) return done(cudaErrorInvalidResourceHandle);
  if (const int code = fake::refusal(*stream)) return done(code);
  fake::log("cudaMemsetAsync", {{"bytes", static_cast<int64_t>(bytes)},
                                {"capturing", fake::is_capturing(*stream)},
                                {"operation", fake::upcoming_operation()}});
  const auto set = [=] {
    std::memset(dst, value, bytes);
    return 0;
  };
  return done(fake::submit(*stream, {.kind = "cudaMemsetAsync", .action = set}));
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (const int code = fake::enter("cudaThreadExchangeStreamCaptureMode")) return done(code);
  std::swap(*mode, capture_mode);
  return done(0);
}

EXPORT int fake_capture_mode() { return capture_mode; }
EXPORT void fake_set_capture_mode(int mode) { capture_mode = static_cast<cudaStreamCaptureMode>(mode); }

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  if (const int code = fake::enter("cudaGetDeviceCount")) return done(code);
  *count = fake::device_count();
  return done(0);
}

EXPORT cudaError_t cudaGetDevice(int* device) {
  if (const int code = fake::enter("cudaGetDevice")) return done(code);
  *device = current_device();
  return done(0);
}

EXPORT cudaError_t cudaSetDevice(int device) {
  if (const int code = fake::enter("cudaSetDevice")) return done(code);
  if (device < 0 || device >= fake::device_count()) return done(cudaErrorInvalidDevice);
  fake::set_device(device);
  return done(0);
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                                    unsigned long long, cudaDriverEntryPointQueryResult* status) {
  if (const int code = fake::enter("cudaGetDriverEntryPointByVersion")) return done(code);
  fake::log("cudaGetDriverEntryPointByVersion", {{"version", version}}, symbol);
  static const std::map<std::string, void*> kFunctions{
      {"cuCtxGetCurrent", reinterpret_cast<void*>(cuCtxGetCurrent)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(cuCtxSetCurrent)},
      {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(cuDevicePrimaryCtxRetain)},
      {"cuMemcpyBatchAsync", reinterpret_cast<void*>(fake_cuMemcpyBatchAsync)},
      {"cuPointerGetAttribute", reinterpret_cast<void*>(cuPointerGetAttribute)},
      {"cuPointerGetAttributes", reinterpret_cast<void*>(fake_cuPointerGetAttributes)},
  };
  const auto found = kFunctions.find(symbol);
  bool is_there = found != kFunctions.end();
  if (std::strcmp(symbol, "cuMemcpyBatchAsync") == 0)
    is_there = version == 12080 && fake::setting("batch_missing") == 0;
  *function = is_there ? found->second : nullptr;
  *status = is_there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return done(0);
}

EXPORT cudaError_t cudaPeekAtLastError() {
  const int broken = fake::context_error();
  return broken != 0 ? static_cast<cudaError_t>(broken) : last_error;
}

EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t code = cudaPeekAtLastError();
  last_error = cudaSuccess;
  return code;
}

EXPORT const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
#define ERROR_NAME(error) \
  case error:             \
    return #error;
#include "error_names.inc"
#undef ERROR_NAME
  }
  return "unrecognized error code";
}

EXPORT const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaErrorNotSupported && !fake::last_refusal().empty()) return fake::last_refusal().c_str();
  return code == cudaErrorInvalidValue ? "invalid argument" : "an error of the stand-in";
}

// nvcc's host code passes the address of a kernel's stub; registration says which name that is.
EXPORT void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 0; }

EXPORT void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
  kernels()[stub] = name;
}

EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

namespace {

// Whoever needs a kernel on a device first loads it.
void load(const char* call, const void* stub) {
  static auto* const loaded = new std::set<std::pair<const void*, int>>;
  if (!loaded->insert({stub, current_device()}).second) return;
  fake::log("load", {{"device", current_device()}, {"by_question", std::strcmp(call, "cudaFuncGetAttributes") == 0}},
            kernels()[stub]);
}

}  // namespace

size_t fake::shared_bytes() {
  const int64_t set = fake::setting("shared_bytes");
  return set != 0 ? static_cast<size_t>(set) : 227 << 10;
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaFuncGetAttributes")) return done(code);
  if (kernels().count(stub) == 0) return done(cudaErrorInvalidDeviceFunction);
  if (fake::setting("no_image") != 0) return done(cudaErrorNoKernelImageForDevice);
  load("cudaFuncGetAttributes", stub);
  std::memset(attributes, 0, sizeof *attributes);
  const int64_t set = fake::setting("code_capability");
  attributes->ptxVersion = set != 0 ? static_cast<int>(set) : 90;
  attributes->binaryVersion = 90;
  return done(0);
}

EXPORT cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Lock lock(fake::mutex());
  if (const int code = fake::enter("cudaFuncSetAttribute")) return done(code);
  if (kernels().count(stub) == 0) return done(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return static_cast<cudaError_t>(fake::refuse_runtime_call("another attribute of a kernel"));
  }
  if (value < 0 || static_cast<size_t>(value) > fake::shared_bytes()) return done(cudaErrorInvalidValue);
  load("cudaFuncSetAttribute", stub);
  shared_limits()[{stub, current_device()}] = static_cast<size_t>(value);
  return done(0);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  if (const int code = fake::enter("cudaLaunchKernelExC")) return done(code);
  const auto found = kernels().find(stub);
  if (found == kernels().end()) return done(cudaErrorInvalidDeviceFunction);
  if (fake::is_fill_of_integers(found->second)) return done(fake::fill_integers(arguments, config->stream));
  // Torch's other kernels are registered too, but there is nothing to run them.
  if (!found->second.starts_with("kvkernels_")) {
    return static_cast<cudaError_t>(fake::refuse_runtime_call(("kernel " + found->second).c_str()));
  }
  const bool is_flat = config->gridDim.y == 1 && config->gridDim.z == 1 && config->blockDim.y == 1 &&
                       config->blockDim.z == 1 && config->numAttrs == 0;
  const auto allowed = shared_limits().find({stub, current_device()});
  if (config->dynamicSmemBytes > (allowed == shared_limits().end() ? kSharedBytes : allowed->second)) {
    return done(cudaErrorInvalidValue);
  }
  if (!is_flat || config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) {
    return done(cudaErrorInvalidConfiguration);
  }
  load("cudaLaunchKernelExC", stub);
  return done(fake::launch(found->second.c_str(), arguments, config->gridDim.x, config->blockDim.x,
                           config->dynamicSmemBytes, config->stream));
}

EXPORT cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                    cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelExC(&config, stub, arguments);
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                      cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

namespace {
thread_local std::vector<cudaLaunchConfig_t> configurations;
}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  configurations.push_back(config);
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  if (configurations.empty()) return done(cudaErrorInvalidConfiguration);
  *grid = configurations.back().gridDim;
  *block = configurations.back().blockDim;
  *shared_bytes = configurations.back().dynamicSmemBytes;
  *static_cast<cudaStream_t*>(stream) = configurations.back().stream;
  configurations.pop_back();
  return done(0);
}
