// What loads, stores and atomics mean on the device. Tests run the kernels' bodies with an Access of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/host_device.h"
#include "cuda/tables.h"

namespace kvkernels {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Not `.nc`: that would promise that nobody writes the source while the kernel runs, and host pools are refilled at any
// time.
struct GlobalAccess {
#ifdef __CUDACC__
  static KVKERNELS_HOST_DEVICE uint64_t global(const void* address) {
#ifdef __CUDA_ARCH__
    return __cvta_generic_to_global(address);
#else
    return reinterpret_cast<uint64_t>(address);
#endif
  }
#endif

#ifdef __CUDA_ARCH__
  static __device__ __forceinline__ void load(Bytes16& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint64_t& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint32_t& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint16_t& v, const std::byte* address) {
    asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(global(address)));
  }
  static __device__ __forceinline__ void load(uint8_t& v, const std::byte* address) {
    uint32_t wide;
    asm volatile("ld.global.L1::no_allocate.u8 %0, [%1];" : "=r"(wide) : "l"(global(address)));
    v = static_cast<uint8_t>(wide);
  }
  static __device__ __forceinline__ void store(std::byte* address, const Bytes16& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global(address)), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint64_t v) {
    asm volatile("st.global.cs.u64 [%0], %1;" ::"l"(global(address)), "l"(v) : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint32_t v) {
    asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(global(address)), "r"(v) : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint16_t v) {
    asm volatile("st.global.cs.u16 [%0], %1;" ::"l"(global(address)), "h"(v) : "memory");
  }
  static __device__ __forceinline__ void store(std::byte* address, uint8_t v) {
    asm volatile("st.global.cs.u8 [%0], %1;" ::"l"(global(address)), "r"(static_cast<uint32_t>(v)) : "memory");
  }
  // The first op to fail owns the row: a row of another op's mapping would mislead.
  static __device__ __forceinline__ void record(Fault* fault, unsigned int op, int64_t row) {
    atomicAdd(&fault->count, 1ull);
    const unsigned int owner = atomicCAS(&fault->op, 0u, op);
    if (owner == 0 || owner == op) atomicMax(&fault->complemented_row, ~static_cast<unsigned long long>(row));
  }
#else
  template <class V>
  static KVKERNELS_HOST_DEVICE void load(V& v, const std::byte* address) {
    v = *reinterpret_cast<const V*>(address);
  }
  template <class V>
  static KVKERNELS_HOST_DEVICE void store(std::byte* address, const V& v) {
    *reinterpret_cast<V*>(address) = v;
  }
  static KVKERNELS_HOST_DEVICE void record(Fault* fault, unsigned int op, int64_t row) {
    const unsigned long long complemented = ~static_cast<unsigned long long>(row);
    ++fault->count;
    if (fault->op == 0) fault->op = op;
    if (fault->op == op && fault->complemented_row < complemented) fault->complemented_row = complemented;
  }
#endif
};

}  // namespace kvkernels
