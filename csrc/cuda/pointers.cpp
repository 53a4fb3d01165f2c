#include "cuda/pointers.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>

#include "cuda/device.h"
#include "cuda/error.h"

namespace kvkernels {
namespace {

// The driver rather than cudaPointerGetAttributes: the latter makes a context on the current device and does not know
// where an allocation ends.
Range ask(uintptr_t address, bool has_context) {
  static const auto get = driver_function<PFN_cuPointerGetAttributes_v7000>("cuPointerGetAttributes");
  uint64_t type = 0;
  uint64_t managed = 0;
  int device = -1;
  CUdeviceptr seen_at = 0;
  CUdeviceptr begin = 0;
  size_t size = 0;
  CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,    CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                      CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                      CU_POINTER_ATTRIBUTE_RANGE_SIZE,     CU_POINTER_ATTRIBUTE_DEVICE_POINTER};
  void* values[] = {&type, &managed, &device, &begin, &size, &seen_at};
  const auto asked = static_cast<unsigned>(std::size(attributes)) - (has_context ? 0 : 1);
  const CUresult result = get(asked, attributes, values, address);
  Range range{address, address + 1};
  if (result == CUDA_ERROR_INVALID_VALUE) return range;
  check(static_cast<cudaError_t>(result), "cuPointerGetAttributes");
  const uint32_t kind = static_cast<uint32_t>(type);
  if (kind != CU_MEMORYTYPE_HOST && kind != CU_MEMORYTYPE_DEVICE && static_cast<uint8_t>(managed) == 0) return range;

  range.device = device;
  range.memory = static_cast<uint8_t>(managed) != 0 ? Range::Memory::kManaged
                 : kind == CU_MEMORYTYPE_DEVICE     ? Range::Memory::kDevice
                                                    : Range::Memory::kPinned;
  range.mapped = range.memory != Range::Memory::kPinned || seen_at != 0;
  if (range.memory == Range::Memory::kPinned && range.mapped) {
    range.device_offset = static_cast<ptrdiff_t>(seen_at - address);
  }
  range.end = UINTPTR_MAX;
  // The range may be that of the device's addresses.
  const uintptr_t seen_from = begin;
  for (const uintptr_t from : {seen_from, seen_from - static_cast<uintptr_t>(range.device_offset)}) {
    if (address - from >= size) continue;
    range.begin = from;
    range.end = from + size;
    range.is_known = true;
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
  Range range = ask(address, has_context_);
  if (range.is_known) {
    ranges_.insert(after, range);
    last_ = range;
  } else if (range.memory != Range::Memory::kPageable && after != ranges_.end()) {
    range.end = after->begin;
  }
  return range;
}

bool PointerMap::is_read_only(const void* pointer) {
  static const auto get = driver_function<PFN_cuPointerGetAttribute_v4000>("cuPointerGetAttribute");
  uint32_t access = CU_POINTER_ATTRIBUTE_ACCESS_FLAG_NONE;
  const CUresult result = get(&access, CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, reinterpret_cast<CUdeviceptr>(pointer));
  if (result == CUDA_ERROR_INVALID_VALUE || result == CUDA_ERROR_NOT_SUPPORTED) return false;
  check(static_cast<cudaError_t>(result), "cuPointerGetAttribute");
  return access == CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READ;
}

}  // namespace kvkernels
