// libcudart.so.13 of the stand-in: what torch asks of CUDA beside what csrc/cuda does.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "fake.h"
#include "fake_cudart.h"
#include "fake_graph.h"
#include "fake_time.h"

using fake::done;

namespace {

constexpr int kCudaVersion = 13000;
constexpr size_t kDeviceBytes = size_t{80} << 30;

// An H100's, as far as torch or csrc/cuda looks at them.
void describe(cudaDeviceProp& p) {
  std::memset(&p, 0, sizeof p);
  std::strcpy(p.name, "stand-in");
  p.major = 9;
  p.minor = 0;
  p.multiProcessorCount = 132;
  p.warpSize = 32;
  p.totalGlobalMem = kDeviceBytes;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = fake::shared_bytes();
  p.sharedMemPerMultiprocessor = 228 << 10;
  p.regsPerBlock = 65536;
  p.regsPerMultiprocessor = 65536;
  p.l2CacheSize = 50 << 20;
  p.unifiedAddressing = 1;
  p.canMapHostMemory = 1;
  p.asyncEngineCount = 3;
}

bool is_device(int device) { return device >= 0 && device < fake::device_count(); }

}  // namespace

int fake::refuse_runtime_call(const char* call) { return done(refuse_call(call)); }

int fake::device_count() {
  // Many, so that what happens once a device can be tested often; torch wants few.
  static const int count = [] {
    const char* wanted = std::getenv("KVKERNELS_FAKE_DEVICES");
    return wanted == nullptr ? 4096 : std::atoi(wanted);
  }();
  return count;
}

bool fake::is_fill_of_integers(std::string_view kernel) {
  return kernel.find("vectorized_elementwise_kernel") != kernel.npos && kernel.find("FillFunctorIlE") != kernel.npos;
}

// Its parameters are how many there are, the value and where they are.
int fake::fill_integers(void** arguments, cudaStream_t handle) {
  Lock lock(mutex());
  Stream* const stream = find_stream(handle);
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (const int code = refusal(*stream)) return code;
  const int count = *static_cast<int*>(arguments[0]);
  const int64_t value = *static_cast<int64_t*>(arguments[1]);
  int64_t* const out = *static_cast<int64_t**>(arguments[2]);
  const auto fill = [=] {
    std::fill_n(out, count, value);
    return 0;
  };
  return submit(*stream, {.kind = "fill", .action = fill});
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (const int code = fake::enter("cudaGetDeviceProperties")) return done(code);
  if (!is_device(device)) return done(cudaErrorInvalidDevice);
  describe(*properties);
  properties->pciBusID = device;
  std::memcpy(properties->uuid.bytes, &device, sizeof device);
  return done(0);
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const int code = fake::enter("cudaDeviceGetAttribute")) return done(code);
  if (!is_device(device)) return done(cudaErrorInvalidDevice);
  cudaDeviceProp properties;
  describe(properties);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      return done(0);
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      return done(0);
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      return done(0);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(fake::shared_bytes());
      return done(0);
    case cudaDevAttrPageableMemoryAccess:
      *value = static_cast<int>(fake::setting("pageable_access"));
      return done(0);
    case cudaDevAttrPageableMemoryAccessUsesHostPageTables:
      *value = static_cast<int>(fake::setting("host_page_tables"));
      return done(0);
    default:
      return static_cast<cudaError_t>(
          fake::refuse_runtime_call(("device attribute " + std::to_string(attribute)).c_str()));
  }
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  if (const int code = fake::enter("cudaMemGetInfo")) return done(code);
  *free = *total = kDeviceBytes;
  return done(0);
}

EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  if (const int code = fake::enter("cudaDeviceCanAccessPeer")) return done(code);
  if (!is_device(device) || !is_device(peer)) return done(cudaErrorInvalidDevice);
  *can = device != peer && fake::setting("no_peer_access") == 0;
  return done(0);
}

EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  if (const int code = fake::enter("cudaDeviceEnablePeerAccess")) return done(code);
  return done(is_device(peer) ? cudaSuccess : cudaErrorInvalidDevice);
}
