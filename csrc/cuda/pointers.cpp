#include "cuda/pointers.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/device.h"
#include "cuda/error.h"

namespace kvkernels {
namespace {

// The driver rather than cudaPointerGetAttributes: the latter creates a context on the current device and does not know
// where an allocation ends.
Range ask(uintptr_t address) {
  static const auto get =
      reinterpret_cast<PFN_cuPointerGetAttributes_v7000>(driver_function("cuPointerGetAttributes", 12000));
  if (get == nullptr) throw CudaError("cuPointerGetAttributes failed: the driver lacks it");
  uint64_t type = 0;
  uint64_t managed = 0;
  int device = -1;
  CUdeviceptr begin = 0;
  size_t size = 0;
  CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                      CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                      CU_POINTER_ATTRIBUTE_RANGE_SIZE};
  void* values[] = {&type, &managed, &device, &begin, &size};
  const CUresult result = get(5, attributes, values, address);
  Range range{address, address + 1, Range::Memory::kPageable, -1, false, 0};
  if (result == CUDA_ERROR_INVALID_VALUE) return range;
  check(static_cast<cudaError_t>(result), "cuPointerGetAttributes");
  const uint32_t kind = static_cast<uint32_t>(type);
  if (kind != CU_MEMORYTYPE_HOST && kind != CU_MEMORYTYPE_DEVICE && static_cast<uint8_t>(managed) == 0) return range;

  range.device = device;
  range.begin = begin;
  range.end = begin + size;
  if (!(begin <= address && address < range.end)) {
    range.begin = address;
    range.end = UINTPTR_MAX;
  }
  if (static_cast<uint8_t>(managed) != 0) {
    range.memory = Range::Memory::kManaged;
    range.mapped = true;
  } else if (kind == CU_MEMORYTYPE_DEVICE) {
    range.memory = Range::Memory::kDevice;
    range.mapped = true;
  } else {
    range.memory = Range::Memory::kPinned;
    cudaPointerAttributes seen{};
    check(cudaPointerGetAttributes(&seen, reinterpret_cast<const void*>(address)), "cudaPointerGetAttributes");
    range.mapped = seen.devicePointer != nullptr;
    if (range.mapped) {
      const uintptr_t seen_at = reinterpret_cast<uintptr_t>(seen.devicePointer);
      range.device_offset = static_cast<ptrdiff_t>(seen_at - address);
    }
  }
  return range;
}

bool holds(const Range& range, uintptr_t address) { return range.begin <= address && address < range.end; }

}  // namespace

void PointerMap::assume(const Range& range) {
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), range.begin,
                                      [](uintptr_t wanted, const Range& known) { return wanted < known.begin; });
  ranges_.insert(after, range);
}

Range PointerMap::find(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (holds(last_, address)) return last_;
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                      [](uintptr_t wanted, const Range& range) { return wanted < range.begin; });
  if (after != ranges_.begin() && holds(*std::prev(after), address)) return last_ = *std::prev(after);
  const Range range = ask(address);
  if (range.memory != Range::Memory::kPageable && range.end != UINTPTR_MAX) ranges_.insert(after, range);
  return last_ = range;
}

}  // namespace kvkernels
