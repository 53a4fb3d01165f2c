#include "cuda/dma.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace kvkernels {
namespace {

using Memory = Range::Memory;

PFN_cuMemcpyBatchAsync_v12080 batch_function() {
  static const auto function =
      reinterpret_cast<PFN_cuMemcpyBatchAsync_v12080>(driver_function("cuMemcpyBatchAsync", 12080));
  return function;
}

class Copier {
 public:
  Copier(int64_t expected, bool any_source_order, bool issues, bool batches, cudaStream_t stream)
      : any_source_order_(any_source_order), issues_(issues), stream_(stream) {
    if (batches) batch_ = batch_function();
    const size_t room = static_cast<size_t>(std::clamp<int64_t>(expected, 1, kBatchDescriptors));
    sources_.reserve(room);
    destinations_.reserve(room);
    sizes_.reserve(room);
  }

  // Cuts the fragment where what is known of either side's memory ends.
  void add(Fragment fragment) {
    while (fragment.bytes > 0) {
      const Range src = pointers_.find(fragment.src);
      const Range dst = pointers_.find(fragment.dst);
      const int64_t bytes = std::min(room(src, fragment.src, fragment.bytes), room(dst, fragment.dst, fragment.bytes));
      add_piece({fragment.src, fragment.dst, bytes}, src, dst);
      fragment.src += bytes;
      fragment.dst += bytes;
      fragment.bytes -= bytes;
    }
  }

  void assume(const Range& range) { pointers_.assume(range); }

  Issued finish() {
    flush();
    return issued_;
  }

 private:
  // How many of `bytes` from `at` on are in one piece of memory. Where no end is known, the last byte may lie in memory
  // whose begin is one.
  int64_t room(const Range& range, const void* at, int64_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    if (range.memory != Memory::kPageable) {
      bytes = static_cast<int64_t>(std::min<uintptr_t>(range.end - address, static_cast<uintptr_t>(bytes)));
    }
    if (range.is_known || bytes == 1) return bytes;
    const Range last = pointers_.find(static_cast<const std::byte*>(at) + bytes - 1);
    return !last.is_known || last.begin <= address ? bytes : static_cast<int64_t>(last.begin - address);
  }

  // A batch takes addresses of the device alone; a plain copy takes the host's as well.
  static bool is_batchable(const Range& range) {
    return range.mapped && (range.memory == Memory::kPinned || range.memory == Memory::kDevice);
  }

  static CUdeviceptr device_address(const Range& range, const void* at) {
    return reinterpret_cast<CUdeviceptr>(at) + static_cast<CUdeviceptr>(range.device_offset);
  }

  void add_piece(const Fragment& piece, const Range& src, const Range& dst) {
    ++issued_.descriptors;
    issued_.bytes += piece.bytes;
    if (batch_ == nullptr || !is_batchable(src) || !is_batchable(dst)) {
      return copy_alone(piece.src, piece.dst, static_cast<size_t>(piece.bytes));
    }
    loads_only_ = loads_only_ && src.memory == Memory::kPinned && dst.memory == Memory::kDevice;
    sources_.push_back(device_address(src, piece.src));
    destinations_.push_back(device_address(dst, piece.dst));
    sizes_.push_back(static_cast<size_t>(piece.bytes));
    if (static_cast<int64_t>(sizes_.size()) == kBatchDescriptors) flush();
  }

  void copy_alone(const void* src, void* dst, size_t bytes) {
    ++issued_.launches;
    if (!issues_) return;
    check_copy(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
  }

  void flush() {
    if (sizes_.size() == 1 || !copy_batch()) {
      for (size_t i = 0; i < sizes_.size(); ++i) {
        copy_alone(reinterpret_cast<const void*>(sources_[i]), reinterpret_cast<void*>(destinations_[i]), sizes_[i]);
      }
    }
    sources_.clear();
    destinations_.clear();
    sizes_.clear();
    loads_only_ = true;
  }

  // False where the driver does not support the batch, and then for the rest of the call.
  bool copy_batch() {
    if (sizes_.empty()) return true;
    if (batch_ == nullptr) return false;
    if (issues_) {
      CUmemcpyAttributes attributes{};
      attributes.srcAccessOrder =
          any_source_order_ && loads_only_ ? CU_MEMCPY_SRC_ACCESS_ORDER_ANY : CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
      size_t first = 0;
      size_t failed = SIZE_MAX;
      const CUresult result = batch_(destinations_.data(), sources_.data(), sizes_.data(), sizes_.size(), &attributes,
                                     &first, 1, &failed, stream_);
      if (result == CUDA_ERROR_NOT_SUPPORTED) {
        batch_ = nullptr;
        return false;
      }
      const std::string detail = failed == SIZE_MAX ? "" : " (copy " + std::to_string(failed) + " of its batch)";
      check_copy(static_cast<cudaError_t>(result), "cuMemcpyBatchAsync", detail.c_str());
    }
    ++issued_.launches;
    return true;
  }

  const bool any_source_order_;
  const bool issues_;
  const cudaStream_t stream_;
  PFN_cuMemcpyBatchAsync_v12080 batch_ = nullptr;
  PointerMap pointers_;
  std::vector<CUdeviceptr> sources_;
  std::vector<CUdeviceptr> destinations_;
  std::vector<size_t> sizes_;
  bool loads_only_ = true;  // every copy waiting is from pinned host memory to a device
  Issued issued_;
};

bool allows_batches(cudaStream_t stream) { return !is_capturing(stream) && !is_legacy(stream); }

Issued walk(const Work& work, bool any_source_order, bool issues, cudaStream_t stream) {
  Copier copier(work.descriptors, any_source_order, issues, allows_batches(stream), stream);
  FragmentCursor cursor(work, 0, work.bytes);
  Fragment fragments[64];
  for (int64_t count; (count = cursor.next(fragments, std::ssize(fragments))) > 0;) {
    for (int64_t i = 0; i < count; ++i) copier.add(fragments[i]);
  }
  return copier.finish();
}

Issued walk(const Fragment* fragments, int64_t count, bool any_source_order, bool issues, cudaStream_t stream) {
  Copier copier(count, any_source_order, issues, allows_batches(stream), stream);
  for (int64_t i = 0; i < count; ++i) copier.add(fragments[i]);
  return copier.finish();
}

}  // namespace

Issued dma_copy(const Work& work, bool any_source_order, cudaStream_t stream) {
  return walk(work, any_source_order, true, stream);
}

Issued dma_copy(const Fragment* fragments, int64_t count, bool any_source_order, cudaStream_t stream) {
  return walk(fragments, count, any_source_order, true, stream);
}

Issued plan_dma(const Work& work, cudaStream_t stream) { return walk(work, false, false, stream); }

Issued plan_dma(const Fragment* fragments, int64_t count, cudaStream_t stream) {
  return walk(fragments, count, false, false, stream);
}

Issued plan_ring_copies(const Fragment* fragments, int64_t count, const Range& ring) {
  Copier copier(count, false, false, true, nullptr);
  copier.assume(ring);
  for (int64_t i = 0; i < count; ++i) copier.add(fragments[i]);
  return copier.finish();
}

}  // namespace kvkernels
