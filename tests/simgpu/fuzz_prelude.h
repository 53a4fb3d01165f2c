// What the random kernels of fuzz.py use: on the host, the device's intrinsics after CUDA's math API.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BOTH __device__
#define NOINLINE __noinline__
#else
#include <vector>

#define BOTH static inline
#define NOINLINE __attribute__((noinline))
#endif
#define U64(x) static_cast<uint64_t>(x)
#define U32(x) static_cast<uint32_t>(x)

constexpr uint32_t kInputBytes = 4096;
constexpr uint32_t kOutputBytes = 128;  // a thread

using Wide = unsigned __int128;

#ifndef __CUDACC__
BOTH uint32_t __popc(uint32_t x) { return __builtin_popcount(x); }
BOTH uint32_t __popcll(uint64_t x) { return __builtin_popcountll(x); }
BOTH uint32_t __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
BOTH uint32_t __clzll(uint64_t x) { return x ? __builtin_clzll(x) : 64; }
BOTH uint32_t __ffs(uint32_t x) { return __builtin_ffs(x); }
BOTH uint32_t __ffsll(uint64_t x) { return __builtin_ffsll(x); }

BOTH uint64_t __brevll(uint64_t x) {
  uint64_t r = 0;
  for (int i = 0; i < 64; ++i) r |= (x >> i & 1) << (63 - i);
  return r;
}
BOTH uint32_t __brev(uint32_t x) { return U32(__brevll(x) >> 32); }

BOTH uint32_t __umulhi(uint32_t x, uint32_t y) { return U32(U64(x) * y >> 32); }
BOTH int32_t __mulhi(int32_t x, int32_t y) { return static_cast<int32_t>(static_cast<int64_t>(x) * y >> 32); }
BOTH uint64_t __umul64hi(uint64_t x, uint64_t y) { return U64(static_cast<Wide>(x) * y >> 64); }
BOTH int64_t __mul64hi(int64_t x, int64_t y) { return static_cast<int64_t>(static_cast<__int128>(x) * y >> 64); }
BOTH uint32_t __umul24(uint32_t x, uint32_t y) { return (x & 0xFFFFFF) * (y & 0xFFFFFF); }
BOTH uint32_t __usad(uint32_t x, uint32_t y, uint32_t z) { return (x < y ? y - x : x - y) + z; }

BOTH uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
  const uint64_t both = U64(y) << 32 | x;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= U32(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

BOTH uint32_t __funnelshift_l(uint32_t lo, uint32_t hi, uint32_t n) {
  return U32((U64(hi) << 32 | lo) << (n & 31) >> 32);
}
BOTH uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t n) { return U32((U64(hi) << 32 | lo) >> (n & 31)); }
BOTH uint32_t __funnelshift_lc(uint32_t lo, uint32_t hi, uint32_t n) {
  return n >= 32 ? lo : U32((U64(hi) << 32 | lo) << n >> 32);
}
BOTH uint32_t __funnelshift_rc(uint32_t lo, uint32_t hi, uint32_t n) {
  return n >= 32 ? hi : U32((U64(hi) << 32 | lo) >> n);
}

BOTH uint32_t __dp4a(uint32_t x, uint32_t y, uint32_t z) {
  for (int i = 0; i < 32; i += 8) z += (x >> i & 255) * (y >> i & 255);
  return z;
}
#endif

// Any place of the input or of the thread's own output, at a multiple of the width.
template <class V>
BOTH V read(const uint8_t* in, uint32_t at) {
  return *reinterpret_cast<const V*>(in + at % kInputBytes / sizeof(V) * sizeof(V));
}
template <class V>
BOTH void write(uint8_t* out, uint32_t at, V value) {
  *reinterpret_cast<V*>(out + 8 + at % (kOutputBytes - 8) / sizeof(V) * sizeof(V)) = value;
}

template <class V>
BOTH V pick_min(V x, V y) {
  return x < y ? x : y;
}
template <class V>
BOTH V pick_max(V x, V y) {
  return x > y ? x : y;
}
