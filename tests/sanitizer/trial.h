// The two sides of a copy in memory of their own, and the comparison of every byte of both.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/plan.h"
#include "geometry.h"

namespace kvkernels::sanitizer {

enum class Memory { kDevice, kPinned, kPageable };

// Memory of exactly so many bytes, for which CUDA was asked alone where it is CUDA's.
class Buffer {
 public:
  Buffer(Memory memory, size_t bytes);

  std::byte* data() const { return data_.get(); }
  size_t size() const { return bytes_; }

  // For when nothing that was asked of the memory is on its way. Both are over when they return.
  void write(const Bytes& bytes, cudaStream_t stream) const;
  Bytes read(cudaStream_t stream) const;

 private:
  struct Release {
    Memory memory;
    void operator()(std::byte* data) const;
  };

  Memory memory() const { return data_.get_deleter().memory; }

  size_t bytes_;
  std::unique_ptr<std::byte[], Release> data_;
};

// A byte that is changed behind the comparison's back, to show that it looks: one that is copied, one in the gap after
// a page, or one of the source.
enum class Plant { kNone, kByte, kGap, kSource };

class Trial {
 public:
  Trial(const Geometry& geometry, Memory src, Memory dst, uint32_t seed, cudaStream_t stream);

  const Geometry& geometry() const { return geometry_; }
  std::vector<Pool> src_pools() const { return pools_of(geometry_.src, src_); }
  std::vector<Pool> dst_pools() const { return pools_of(geometry_.dst, dst_); }

  // Random bytes on both sides.
  void fill();

  // After the copies are over: how many bytes are not what the pairs make of those of fill(). `first` gets the first.
  int64_t count_wrong_bytes(const std::vector<Pair>& pairs, Plant plant, std::string& first) const;

 private:
  struct Side {
    std::vector<Buffer> buffers;
    std::vector<Bytes> filled;
  };

  static std::vector<Pool> pools_of(const SideShape& shape, const Side& side);
  Side allocate(Memory memory, const SideShape& shape) const;
  void fill(Side& side);
  void change(const Buffer& buffer, size_t at) const;

  const Geometry geometry_;
  const cudaStream_t stream_;
  std::mt19937 random_;
  Side src_;
  Side dst_;
};

}  // namespace kvkernels::sanitizer
