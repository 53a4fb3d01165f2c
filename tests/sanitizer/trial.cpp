#include "trial.h"

#include <cstring>

#include "core/text.h"
#include "cuda/error.h"

namespace kvkernels::sanitizer {
namespace {

std::byte* allocate_bytes(Memory memory, size_t bytes) {
  if (memory == Memory::kPageable) return new std::byte[bytes];
  void* data = nullptr;
  if (memory == Memory::kDevice) {
    check(cudaMalloc(&data, bytes), "cudaMalloc");
  } else {
    check(cudaHostAlloc(&data, bytes, cudaHostAllocDefault), "cudaHostAlloc");
  }
  return static_cast<std::byte*>(data);
}

int64_t compare(const Bytes& found, const Bytes& expected, const char* side, size_t pool, std::string& first) {
  int64_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    if (wrong++ == 0 && first.empty()) {
      first = text(side, '[', pool, "] has ", std::to_integer<int>(found[i]), " for ",
                   std::to_integer<int>(expected[i]), " at byte ", i, " of ", expected.size());
    }
  }
  return wrong;
}

}  // namespace

Buffer::Buffer(Memory memory, size_t bytes) : bytes_(bytes), data_(allocate_bytes(memory, bytes), Release{memory}) {}

void Buffer::Release::operator()(std::byte* data) const {
  if (memory == Memory::kPageable) {
    delete[] data;
    return;
  }
  // What fails here has failed before, where it was reported.
  if ((memory == Memory::kDevice ? cudaFree(data) : cudaFreeHost(data)) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
  }
}

// On the stream of the copies: of a cudaMemcpy from pageable memory the last part may follow its return.
void Buffer::write(const Bytes& bytes, cudaStream_t stream) const {
  if (memory() != Memory::kDevice) {
    std::memcpy(data(), bytes.data(), bytes_);
    return;
  }
  check(cudaMemcpyAsync(data(), bytes.data(), bytes_, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

Bytes Buffer::read(cudaStream_t stream) const {
  if (memory() != Memory::kDevice) return Bytes(data(), data() + bytes_);
  Bytes bytes(bytes_);
  check(cudaMemcpyAsync(bytes.data(), data(), bytes_, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return bytes;
}

Trial::Trial(const Geometry& geometry, Memory src, Memory dst, uint32_t seed, cudaStream_t stream)
    : geometry_(geometry),
      stream_(stream),
      random_(seed),
      src_(allocate(src, geometry.src)),
      dst_(allocate(dst, geometry.dst)) {
  fill();
}

Trial::Side Trial::allocate(Memory memory, const SideShape& shape) const {
  Side side;
  for (const PoolShape& pool : shape.pools) side.buffers.emplace_back(memory, pool.bytes());
  return side;
}

std::vector<Pool> Trial::pools_of(const SideShape& shape, const Side& side) {
  std::vector<Pool> pools;
  for (size_t i = 0; i < side.buffers.size(); ++i) {
    pools.push_back({side.buffers[i].data(), kBlocks, shape.pools[i].block_stride, shape.pools[i].page_bytes});
  }
  return pools;
}

void Trial::fill() {
  fill(src_);
  fill(dst_);
}

void Trial::fill(Side& side) {
  side.filled.clear();
  for (const Buffer& buffer : side.buffers) {
    Bytes bytes(buffer.size());
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random_());
    buffer.write(bytes, stream_);
    side.filled.push_back(std::move(bytes));
  }
}

void Trial::change(const Buffer& buffer, size_t at) const {
  Bytes bytes = buffer.read(stream_);
  bytes.at(at) ^= std::byte{1};
  buffer.write(bytes, stream_);
}

int64_t Trial::count_wrong_bytes(const std::vector<Pair>& pairs, Plant plant, std::string& first) const {
  std::vector<Bytes> expected = dst_.filled;
  for (const Piece& piece : pieces_of(geometry_, pairs)) {
    std::memcpy(expected.at(static_cast<size_t>(piece.dst_pool)).data() + piece.dst_offset,
                src_.filled.at(static_cast<size_t>(piece.src_pool)).data() + piece.src_offset,
                static_cast<size_t>(piece.bytes));
  }
  if (plant == Plant::kByte) change(dst_.buffers.back(), dst_.buffers.back().size() - 1);
  if (plant == Plant::kGap) change(dst_.buffers[0], static_cast<size_t>(geometry_.dst.pools[0].page_bytes));
  if (plant == Plant::kSource) change(src_.buffers[0], 0);
  int64_t wrong = 0;
  for (size_t i = 0; i < dst_.buffers.size(); ++i) {
    wrong += compare(dst_.buffers[i].read(stream_), expected[i], "dst", i, first);
  }
  for (size_t i = 0; i < src_.buffers.size(); ++i) {
    wrong += compare(src_.buffers[i].read(stream_), src_.filled[i], "src", i, first);
  }
  return wrong;
}

}  // namespace kvkernels::sanitizer
