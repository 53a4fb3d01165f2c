// What the same source is for nvcc and for a host compiler.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KVKERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KVKERNELS_HOST_DEVICE inline
#endif

// Host compilers do not know the pragma.
#ifdef __CUDA_ARCH__
#define KVKERNELS_PRAGMA(text) _Pragma(#text)
#define KVKERNELS_UNROLL(count) KVKERNELS_PRAGMA(unroll count)
#else
#define KVKERNELS_UNROLL(count)
#endif

// A value that nvcc shall not compute again wherever it is used, which under conditions takes more instructions.
KVKERNELS_HOST_DEVICE uint32_t computed_once(uint32_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}
