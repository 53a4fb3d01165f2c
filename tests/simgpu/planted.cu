// Kernels for the tests of the simulator's sanitizer: each comes twice, with one bug and without it.
#include <cuda_pipeline_primitives.h>

#include <cassert>
#include <cstdint>

#define KERNEL extern "C" __global__ void

constexpr int kThreads = 128;  // of a block

// Bounds, alignment, sources and unwritten bytes.

template <bool kBug>
__device__ void read_past_the_end(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) dst[i] = src[kBug ? i + 1 : i];
}
KERNEL read_past_the_end_bug(uint32_t* dst, const uint32_t* src, int n) { read_past_the_end<true>(dst, src, n); }
KERNEL read_past_the_end_ok(uint32_t* dst, const uint32_t* src, int n) { read_past_the_end<false>(dst, src, n); }

template <bool kBug>
__device__ void read_before_the_begin(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) dst[i] = src[kBug ? i - 1 : i];
}
KERNEL read_before_the_begin_bug(uint32_t* d, const uint32_t* s, int n) { read_before_the_begin<true>(d, s, n); }
KERNEL read_before_the_begin_ok(uint32_t* d, const uint32_t* s, int n) { read_before_the_begin<false>(d, s, n); }

template <bool kBug>
__device__ void write_past_the_end(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) dst[kBug ? i + 1 : i] = src[i];
}
KERNEL write_past_the_end_bug(uint32_t* dst, const uint32_t* src, int n) { write_past_the_end<true>(dst, src, n); }
KERNEL write_past_the_end_ok(uint32_t* dst, const uint32_t* src, int n) { write_past_the_end<false>(dst, src, n); }

// The offset wraps in 32 bits and becomes negative.
template <bool kBug>
__device__ void offset_in_32_bits(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t block = 0x40000000u + static_cast<uint32_t>(i);
  const int64_t at = kBug ? static_cast<int32_t>(block * 4u) : static_cast<int64_t>(block) * 4 - 0x100000000ll;
  if (i < n) dst[i] = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(src) + at - (kBug ? 64 : 0));
}
KERNEL offset_in_32_bits_bug(uint32_t* dst, const uint32_t* src, int n) { offset_in_32_bits<true>(dst, src, n); }
KERNEL offset_in_32_bits_ok(uint32_t* dst, const uint32_t* src, int n) { offset_in_32_bits<false>(dst, src, n); }

template <bool kBug>
__device__ void misaligned_vector(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (4 * i + 8 > n) return;
  reinterpret_cast<uint4*>(dst)[i] = *reinterpret_cast<const uint4*>(src + 4 * i + (kBug ? 1 : 0));
}
KERNEL misaligned_vector_bug(uint32_t* dst, const uint32_t* src, int n) { misaligned_vector<true>(dst, src, n); }
KERNEL misaligned_vector_ok(uint32_t* dst, const uint32_t* src, int n) { misaligned_vector<false>(dst, src, n); }

template <bool kBug>
__device__ void write_to_the_source(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) dst[i] = src[i];
  if (kBug && i == 77) const_cast<uint32_t*>(src)[i] = 0;
}
KERNEL write_to_the_source_bug(uint32_t* dst, const uint32_t* src, int n) { write_to_the_source<true>(dst, src, n); }
KERNEL write_to_the_source_ok(uint32_t* dst, const uint32_t* src, int n) { write_to_the_source<false>(dst, src, n); }

template <bool kBug>
__device__ void read_of_the_unwritten(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  if (!kBug) dst[i] = src[i];
  dst[i] += 1;
}
KERNEL read_of_the_unwritten_bug(uint32_t* d, const uint32_t* s, int n) { read_of_the_unwritten<true>(d, s, n); }
KERNEL read_of_the_unwritten_ok(uint32_t* d, const uint32_t* s, int n) { read_of_the_unwritten<false>(d, s, n); }

template <bool kBug>
__device__ void unwritten_shared(uint32_t* dst, const uint32_t* src, int n) {
  __shared__ uint32_t tile[kThreads + 1];
  tile[threadIdx.x] = src[threadIdx.x];
  if (!kBug && threadIdx.x == 0) tile[kThreads] = 7;
  __syncthreads();
  if (blockIdx.x == 0) dst[threadIdx.x] = tile[threadIdx.x + 1];
}
KERNEL unwritten_shared_bug(uint32_t* dst, const uint32_t* src, int n) { unwritten_shared<true>(dst, src, n); }
KERNEL unwritten_shared_ok(uint32_t* dst, const uint32_t* src, int n) { unwritten_shared<false>(dst, src, n); }

template <bool kBug>
__device__ void shared_out_of_bounds(uint32_t* dst, const uint32_t* src, int n) {
  __shared__ uint32_t tile[kThreads];
  tile[threadIdx.x + (kBug ? n / 256 : 0)] = src[threadIdx.x];
  __syncthreads();
  if (blockIdx.x == 0) dst[threadIdx.x] = tile[threadIdx.x == 0 ? kThreads - 1 : threadIdx.x - 1 + (kBug ? 1 : 0)];
}
KERNEL shared_out_of_bounds_bug(uint32_t* d, const uint32_t* s, int n) { shared_out_of_bounds<true>(d, s, n); }
KERNEL shared_out_of_bounds_ok(uint32_t* d, const uint32_t* s, int n) { shared_out_of_bounds<false>(d, s, n); }

// Races.

template <bool kBug>
__device__ void two_writers(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) dst[kBug ? i / 2 : i] = src[i];
}
KERNEL two_writers_bug(uint32_t* dst, const uint32_t* src, int n) { two_writers<true>(dst, src, n); }
KERNEL two_writers_ok(uint32_t* dst, const uint32_t* src, int n) { two_writers<false>(dst, src, n); }

// The last byte of one thread's part is the first of the next one's.
template <bool kBug>
__device__ void overlap_of_one_byte(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n / 2) return;
  const uint8_t* from = reinterpret_cast<const uint8_t*>(src);
  uint8_t* to = reinterpret_cast<uint8_t*>(dst);
  for (int k = 0; k < (kBug ? 5 : 4); ++k) to[4 * i + k] = from[4 * i + k];
}
KERNEL overlap_of_one_byte_bug(uint32_t* dst, const uint32_t* src, int n) { overlap_of_one_byte<true>(dst, src, n); }
KERNEL overlap_of_one_byte_ok(uint32_t* dst, const uint32_t* src, int n) { overlap_of_one_byte<false>(dst, src, n); }

template <bool kBug>
__device__ void missing_barrier(uint32_t* dst, const uint32_t* src, int n) {
  __shared__ uint32_t tile[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = src[i];
  if (!kBug) __syncthreads();
  dst[i] = tile[(threadIdx.x + 37) % kThreads];
}
KERNEL missing_barrier_bug(uint32_t* dst, const uint32_t* src, int n) { missing_barrier<true>(dst, src, n); }
KERNEL missing_barrier_ok(uint32_t* dst, const uint32_t* src, int n) { missing_barrier<false>(dst, src, n); }

// The next round overwrites what others still read.
template <bool kBug>
__device__ void missing_second_barrier(uint32_t* dst, const uint32_t* src, int n) {
  __shared__ uint32_t tile[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = src[i] + round;
    __syncthreads();
    sum += tile[kThreads - 1 - threadIdx.x];
    if (!kBug) __syncthreads();
  }
  dst[i] = sum;
}
KERNEL missing_second_barrier_bug(uint32_t* d, const uint32_t* s, int n) { missing_second_barrier<true>(d, s, n); }
KERNEL missing_second_barrier_ok(uint32_t* d, const uint32_t* s, int n) { missing_second_barrier<false>(d, s, n); }

template <bool kBug>
__device__ void warp_barrier_for_a_block(uint32_t* dst, const uint32_t* src, int n) {
  __shared__ uint32_t tile[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = src[i];
  __syncwarp();
  dst[i] = tile[kBug ? (threadIdx.x + 32) % kThreads : threadIdx.x ^ 31];
}
KERNEL warp_barrier_for_a_block_bug(uint32_t* d, const uint32_t* s, int n) { warp_barrier_for_a_block<true>(d, s, n); }
KERNEL warp_barrier_for_a_block_ok(uint32_t* d, const uint32_t* s, int n) { warp_barrier_for_a_block<false>(d, s, n); }

// A barrier of a block orders nothing between blocks.
template <bool kBug>
__device__ void across_blocks(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  dst[i] = src[i];
  __syncthreads();
  const int other = kBug ? (i + kThreads) % n : i ^ 1;
  if (dst[other] == 12345) dst[i] = 0;
}
KERNEL across_blocks_bug(uint32_t* dst, const uint32_t* src, int n) { across_blocks<true>(dst, src, n); }

template <bool kBug>
__device__ void plain_counter(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 0) dst[0] = 0;
  __syncthreads();
  if (blockIdx.x > 0) return;
  if (kBug) {
    dst[0] += src[i];
  } else {
    atomicAdd(&dst[0], src[i]);
  }
}
KERNEL plain_counter_bug(uint32_t* dst, const uint32_t* src, int n) { plain_counter<true>(dst, src, n); }
KERNEL plain_counter_ok(uint32_t* dst, const uint32_t* src, int n) { plain_counter<false>(dst, src, n); }

// The last block adds what all blocks have left; without a fence it may not see it.
__device__ unsigned int blocks_done;
template <bool kBug>
__device__ void last_block(uint32_t* dst, const uint32_t* src, int n) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    dst[1 + blockIdx.x] = src[blockIdx.x];
    if (!kBug) __threadfence();
    is_last = atomicInc(&blocks_done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x > 0) return;
  uint32_t sum = 0;
  for (unsigned int b = 0; b < gridDim.x; ++b) sum += dst[1 + b];
  dst[0] = sum;
}
KERNEL last_block_bug(uint32_t* dst, const uint32_t* src, int n) { last_block<true>(dst, src, n); }
KERNEL last_block_ok(uint32_t* dst, const uint32_t* src, int n) { last_block<false>(dst, src, n); }

template <bool kBug>
__device__ void non_coherent_read(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  dst[i] = src[i];
  uint32_t v;
  if (kBug) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(dst + i)) : "memory");
  } else {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(dst + i)) : "memory");
  }
  dst[i] = v + 1;
}
KERNEL non_coherent_read_bug(uint32_t* dst, const uint32_t* src, int n) { non_coherent_read<true>(dst, src, n); }
KERNEL non_coherent_read_ok(uint32_t* dst, const uint32_t* src, int n) { non_coherent_read<false>(dst, src, n); }

// Barriers and warps.

template <bool kBug>
__device__ void conditional_barrier(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (!kBug || threadIdx.x < 64) __syncthreads();
  dst[i] = src[i];
}
KERNEL conditional_barrier_bug(uint32_t* dst, const uint32_t* src, int n) { conditional_barrier<true>(dst, src, n); }
KERNEL conditional_barrier_ok(uint32_t* dst, const uint32_t* src, int n) { conditional_barrier<false>(dst, src, n); }

template <bool kBug>
__device__ void left_before_the_barrier(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kBug && i >= n - 5) return;
  __syncthreads();
  if (i < n) dst[i] = src[i];
}
KERNEL left_before_the_barrier_bug(uint32_t* d, const uint32_t* s, int n) { left_before_the_barrier<true>(d, s, n); }
KERNEL left_before_the_barrier_ok(uint32_t* d, const uint32_t* s, int n) { left_before_the_barrier<false>(d, s, n); }

// Two instructions for the lanes of one warp.
template <bool kBug>
__device__ void divergent_barrier(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if ((kBug ? threadIdx.x : threadIdx.x / 32) % 2 == 0) {
    asm volatile("bar.sync 0;" ::: "memory");
    dst[i] = src[i];
  } else {
    asm volatile("bar.sync 0;" ::: "memory");
    dst[i] = src[i] + 1;
  }
}
KERNEL divergent_barrier_bug(uint32_t* dst, const uint32_t* src, int n) { divergent_barrier<true>(dst, src, n); }
KERNEL divergent_barrier_ok(uint32_t* dst, const uint32_t* src, int n) { divergent_barrier<false>(dst, src, n); }

template <bool kBug>
__device__ void absent_lane(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t v = src[i];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0x0000ffffu, v, kBug ? 20 : 9);
  dst[i] = v;
}
KERNEL absent_lane_bug(uint32_t* dst, const uint32_t* src, int n) { absent_lane<true>(dst, src, n); }
KERNEL absent_lane_ok(uint32_t* dst, const uint32_t* src, int n) { absent_lane<false>(dst, src, n); }

template <bool kBug>
__device__ void mask_of_those_who_left(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x % 32 > 28) return;
  dst[i] = __ballot_sync(kBug ? 0xffffffffu : 0x1fffffffu, src[i] & 1);
}
KERNEL mask_of_those_who_left_bug(uint32_t* d, const uint32_t* s, int n) { mask_of_those_who_left<true>(d, s, n); }
KERNEL mask_of_those_who_left_ok(uint32_t* d, const uint32_t* s, int n) { mask_of_those_who_left<false>(d, s, n); }

template <bool kBug>
__device__ void endless(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  dst[i] = src[i];
  volatile uint32_t* mine = dst + i;
  while (kBug && *mine == src[i]) {
  }
}
KERNEL endless_bug(uint32_t* dst, const uint32_t* src, int n) { endless<true>(dst, src, n); }
KERNEL endless_ok(uint32_t* dst, const uint32_t* src, int n) { endless<false>(dst, src, n); }

template <bool kBug>
__device__ void failed_assert(uint32_t* dst, const uint32_t* src, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  assert(i != (kBug ? 77 : -1));
  dst[i] = src[i];
}
KERNEL failed_assert_bug(uint32_t* dst, const uint32_t* src, int n) { failed_assert<true>(dst, src, n); }
KERNEL failed_assert_ok(uint32_t* dst, const uint32_t* src, int n) { failed_assert<false>(dst, src, n); }

// cp.async: which bug, 0 for none.

enum AsyncBug { kNone, kNoWait, kWaitTooShort, kNoBarrier, kReuse };

template <int kBug>
__device__ void async_copy(uint32_t* dst, const uint32_t* src, int n) {
  constexpr int kStages = 2;
  __shared__ uint4 ring[kStages][kThreads];
  const int t = threadIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(src);
  uint4* to = reinterpret_cast<uint4*>(dst);
  const int rounds = n / 4 / kThreads;
  if (blockIdx.x > 0) return;
  __pipeline_memcpy_async(&ring[0][t], from + t, 16);
  __pipeline_commit();
  for (int r = 0; r < rounds; ++r) {
    if (r + 1 < rounds) __pipeline_memcpy_async(&ring[(r + 1) % kStages][t], from + (r + 1) * kThreads + t, 16);
    __pipeline_commit();
    if (kBug == kWaitTooShort) {
      __pipeline_wait_prior(2);
    } else if (kBug != kNoWait) {
      __pipeline_wait_prior(1);
    }
    if (kBug != kNoBarrier) __syncthreads();
    to[r * kThreads + t] = ring[r % kStages][(t + 33) % kThreads];
    if (kBug != kReuse) __syncthreads();
  }
}
KERNEL async_ok(uint32_t* dst, const uint32_t* src, int n) { async_copy<kNone>(dst, src, n); }
KERNEL async_no_wait_bug(uint32_t* dst, const uint32_t* src, int n) { async_copy<kNoWait>(dst, src, n); }
KERNEL async_wait_too_short_bug(uint32_t* dst, const uint32_t* src, int n) { async_copy<kWaitTooShort>(dst, src, n); }
KERNEL async_no_barrier_bug(uint32_t* dst, const uint32_t* src, int n) { async_copy<kNoBarrier>(dst, src, n); }
KERNEL async_reuse_bug(uint32_t* dst, const uint32_t* src, int n) { async_copy<kReuse>(dst, src, n); }

#if __CUDA_ARCH__ >= 900
// Bulk copies through a ring: thread 0 loads, stores or does both, as the kernels' names say; the others move the bytes
// of the first two.

enum BulkBug {
  kBulkNone,
  kNoFullWait,
  kWrongParity,
  kWrongBytes,
  kNoEmptyWait,
  kNoProxyFence,
  kNoReadWait,
  kNoFinalWait,
  kBulkMisaligned,
  kBulkOutOfBounds,
  kNoInitBarrier,
  kNoReuseWait,
  kOtherBarrier,
};

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void wait_parity(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ void load_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint32_t expected) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(expected)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

template <int kBug>
__device__ void bulk_load(uint32_t* dst, const uint32_t* src, int n) {
  constexpr int kStages = 2;
  constexpr uint32_t kBytes = kThreads * 4;
  __shared__ alignas(128) uint32_t ring[kStages][kThreads];
  __shared__ uint64_t full[kStages], empty[kStages];
  const uint32_t t = threadIdx.x;
  const int rounds = n / kThreads;
  if (blockIdx.x > 0) return;
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&full[s])), "r"(1));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&empty[s])), "r"(kThreads));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (kBug != kNoInitBarrier) __syncthreads();
  for (int r = -kStages + 1; r < rounds; ++r) {
    const int next = r + kStages - 1;
    if (t == 0 && next < rounds) {
      const int s = next % kStages;
      if (kBug != kNoEmptyWait && next >= kStages) wait_parity(&empty[s], next / kStages - 1 & 1);
      const int shift = kBug == kBulkMisaligned ? 1 : kBug == kBulkOutOfBounds && next == rounds - 1 ? 4 : 0;
      load_bulk(ring[s], src + next * kThreads + shift, kBytes, &full[s], kBug == kWrongBytes ? kBytes + 16 : kBytes);
    }
    if (r < 0) continue;
    const int s = r % kStages;
    if (kBug != kNoFullWait) wait_parity(&full[s], (r / kStages & 1) ^ (kBug == kWrongParity));
    dst[r * kThreads + t] = ring[s][t ^ 5];
    arrive(&empty[s]);
  }
}

template <int kBug>
__device__ void bulk_store(uint32_t* dst, const uint32_t* src, int n) {
  constexpr int kStages = 2;
  __shared__ alignas(128) uint32_t ring[kStages][kThreads];
  const uint32_t t = threadIdx.x;
  if (blockIdx.x > 0) return;
  for (int r = 0; r < n / kThreads; ++r) {
    const int s = r % kStages;
    if (kBug != kNoReadWait && t == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    __syncthreads();
    ring[s][t] = src[r * kThreads + t];
    if (kBug != kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (t == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                       __cvta_generic_to_global(dst + r * kThreads)),
                   "r"(shared_address(ring[s])), "r"(kThreads * 4)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (kBug != kNoFinalWait && t == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// One thread does everything: nothing orders its copies but the waits.
template <int kBug>
__device__ void bulk_pass(uint32_t* dst, const uint32_t* src, int n) {
  constexpr int kStages = 2;
  constexpr uint32_t kBytes = kThreads * 4;
  __shared__ alignas(128) uint32_t ring[kStages][kThreads];
  __shared__ uint64_t full[kStages];
  if (threadIdx.x + blockIdx.x > 0) return;
  for (int s = 0; s < kStages; ++s) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&full[s])), "r"(1));
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const int rounds = n / kThreads;
  load_bulk(ring[0], src, kBytes, &full[0], kBytes);
  for (int r = 0; r < rounds; ++r) {
    const int next = r + 1;
    if (next < rounds) {
      if (kBug != kNoReuseWait) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      load_bulk(ring[next % kStages], src + next * kThreads, kBytes, &full[next % kStages], kBytes);
    }
    const int waited = kBug == kOtherBarrier && next < rounds ? next : r;
    wait_parity(&full[waited % kStages], waited / kStages & 1);
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(dst + r * kThreads)),
                 "r"(shared_address(ring[r % kStages])), "r"(kBytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
KERNEL bulk_load_ok(uint32_t* d, const uint32_t* s, int n) { bulk_load<kBulkNone>(d, s, n); }
KERNEL bulk_load_no_full_wait_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kNoFullWait>(d, s, n); }
KERNEL bulk_load_wrong_parity_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kWrongParity>(d, s, n); }
KERNEL bulk_load_wrong_bytes_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kWrongBytes>(d, s, n); }
KERNEL bulk_load_no_empty_wait_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kNoEmptyWait>(d, s, n); }
KERNEL bulk_load_misaligned_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kBulkMisaligned>(d, s, n); }
KERNEL bulk_load_out_of_bounds_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kBulkOutOfBounds>(d, s, n); }
KERNEL bulk_load_no_init_barrier_bug(uint32_t* d, const uint32_t* s, int n) { bulk_load<kNoInitBarrier>(d, s, n); }
KERNEL bulk_store_ok(uint32_t* d, const uint32_t* s, int n) { bulk_store<kBulkNone>(d, s, n); }
KERNEL bulk_store_no_proxy_fence_bug(uint32_t* d, const uint32_t* s, int n) { bulk_store<kNoProxyFence>(d, s, n); }
KERNEL bulk_store_no_read_wait_bug(uint32_t* d, const uint32_t* s, int n) { bulk_store<kNoReadWait>(d, s, n); }
KERNEL bulk_store_no_final_wait_bug(uint32_t* d, const uint32_t* s, int n) { bulk_store<kNoFinalWait>(d, s, n); }
KERNEL bulk_pass_ok(uint32_t* d, const uint32_t* s, int n) { bulk_pass<kBulkNone>(d, s, n); }
KERNEL bulk_pass_no_reuse_wait_bug(uint32_t* d, const uint32_t* s, int n) { bulk_pass<kNoReuseWait>(d, s, n); }
KERNEL bulk_pass_other_barrier_bug(uint32_t* d, const uint32_t* s, int n) { bulk_pass<kOtherBarrier>(d, s, n); }
#endif
