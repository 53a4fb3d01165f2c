// What the same source is for nvcc and for a host compiler.
#pragma once

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
