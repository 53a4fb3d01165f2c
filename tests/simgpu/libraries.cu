// Kernels that synchronise through CUDA's own C++ libraries, whose PTX nobody here wrote; and assembly by hand.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include <cuda/atomic>
#include <cuda/barrier>
#include <cuda/pipeline>

namespace cg = cooperative_groups;

// Sums of 16 lanes, plus the value three lanes on, from five threads on.
extern "C" __global__ void groups(int* out, const int* in) {
  __shared__ int sums[256];
  const auto block = cg::this_thread_block();
  const auto tile = cg::tiled_partition<16>(block);
  const unsigned long long rank = cg::this_grid().thread_rank();
  const int value = in[rank];
  sums[block.thread_rank()] = cg::reduce(tile, value, cg::plus<int>()) + tile.shfl_down(value, 3);
  block.sync();
  out[rank] = sums[(block.thread_rank() + 5) % block.size()];
}

// Each thread copies 16 bytes, and reads what another has copied.
extern "C" __global__ void barrier_copies(int4* out, const int4* in) {
  __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
  __shared__ int4 tile[64];
  if (threadIdx.x == 0) init(&barrier, blockDim.x);
  __syncthreads();
  cuda::memcpy_async(&tile[threadIdx.x], in + threadIdx.x, cuda::aligned_size_t<16>(16), barrier);
  barrier.arrive_and_wait();
  out[threadIdx.x] = tile[threadIdx.x ^ 21];
}

extern "C" __global__ void pipelined_copies(int4* out, const int4* in, int rounds) {
  __shared__ int4 tiles[2][64];
  auto pipeline = cuda::make_pipeline();
  const auto load = [&](int round) {
    pipeline.producer_acquire();
    cuda::memcpy_async(&tiles[round % 2][threadIdx.x], in + round * 64 + threadIdx.x, sizeof(int4), pipeline);
    pipeline.producer_commit();
  };
  load(0);
  for (int round = 0; round < rounds; ++round) {
    if (round + 1 < rounds) load(round + 1);
    if (round + 1 < rounds) {
      cuda::pipeline_consumer_wait_prior<1>(pipeline);
    } else {
      cuda::pipeline_consumer_wait_prior<0>(pipeline);
    }
    __syncthreads();
    out[round * 64 + threadIdx.x] = tiles[round % 2][(threadIdx.x + 1) % 64];
    __syncthreads();
    pipeline.consumer_release();
  }
}

// One block hands a value to another, which has looked before; `kOrder` is what the second one's loads promise.
template <cuda::memory_order kOrder>
__device__ void hand_over(int* flags, int* data, int* out) {
  cuda::atomic_ref<int, cuda::thread_scope_device> ready(flags[0]), looked(flags[1]);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    while (looked.load(cuda::memory_order_relaxed) == 0) {
    }
    data[0] = 42;
    ready.store(1, kOrder == cuda::memory_order_acquire ? cuda::memory_order_release : cuda::memory_order_relaxed);
  }
  if (blockIdx.x == 1 && threadIdx.x == 0) {
    while (ready.load(kOrder) == 0) looked.store(1, cuda::memory_order_relaxed);
    out[0] = data[0];
  }
}
extern "C" __global__ void ordered(int* flags, int* data, int* out) {
  hand_over<cuda::memory_order_acquire>(flags, data, out);
}
extern "C" __global__ void unordered(int* flags, int* data, int* out) {
  hand_over<cuda::memory_order_relaxed>(flags, data, out);
}

// Assembly as people write it by hand: cache policies and hints, and constants in decimal.
extern "C" __global__ void by_hand(int4* out, const int4* in, double* constants) {
  const int4* const from = in + threadIdx.x;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(from));
  int4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.s32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from), "l"(policy));
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.s32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(out + threadIdx.x),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
               : "memory");
  if (threadIdx.x > 0) return;
  asm("mov.f64 %0, 1.0;" : "=d"(constants[0]));
  asm("mov.f64 %0, -12.5e-1;" : "=d"(constants[1]));
  asm("mov.f64 %0, 3e2;" : "=d"(constants[2]));
  asm("mov.f64 %0, -0d3FF8000000000000;" : "=d"(constants[3]));
}
